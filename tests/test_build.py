"""What setup.py builds, with and without compilers."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
    """A copy of what a source distribution holds."""
    folder = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("vllm_gqsa", "offline", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def setup(source, *command, **environment):
    """Run setup.py; the CUDA part only where a test asks for it, since it takes minutes."""
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=source, env=os.environ | {"GQSA_CUDA_ARCHS": ""} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_without_a_compiler_it_installs_and_says_so(source):
    result = setup(source, "build_ext", "--inplace", PATH="")
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler (g++, clang++ or CXX): vllm-gqsa installs without its CPU kernels" in result.stderr
    assert not list(source.rglob("*.so"))


def test_a_compiler_that_fails_ends_the_installation(source):
    (source / "csrc/cpu/portable.cpp").write_text("#error broken\n")
    result = setup(source, "build_ext", "--inplace")
    assert result.returncode != 0
    assert "broken" in result.stderr
    assert not list(source.rglob("*.so"))


def test_a_compiler_that_is_not_there_is_named(source):
    result = setup(source, "build_ext", "--inplace", CXX="no-such-compiler")
    assert result.returncode != 0
    assert "CXX=no-such-compiler: there is no such command; set CXX to a C++ compiler or unset it" in result.stderr


@pytest.mark.slow
def test_wheel_serves_every_python_3(source, tmp_path):
    result = setup(source, "bdist_wheel", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-manylinux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "vllm_gqsa/kernels/_cpu.so" in names
    assert "vllm_gqsa/offline/cli.py" in names


# -- the CUDA part -------------------------------------------------------------------------------------------


@pytest.fixture
def recipe():
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_without_nvcc_it_installs_and_says_so(source, tmp_path):
    result = setup(source, "build_ext", "--inplace", PATH="", CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "no nvcc (CUDA_HOME, PATH or /usr/local/cuda): vllm-gqsa installs without its CUDA kernels" in result.stderr


def test_an_nvcc_that_fails_ends_the_installation(source, tmp_path):
    executable(tmp_path / "bin/nvcc", "echo broken >&2; exit 1")
    result = setup(source, "build_ext", "--inplace", PATH="", CUDA_HOME=str(tmp_path), GQSA_CUDA_ARCHS="90")
    assert result.returncode != 0
    assert "broken" in result.stderr
    assert "could not build the CUDA kernels; it must be 12.4 or later" in result.stderr
    assert not list(source.rglob("_cuda*"))


def test_architectures_that_are_asked_for(recipe, monkeypatch):
    for text, expected in (("80;90", ["80", "90"]), ("8.0, 9.0", ["80", "90"]), ("", []), (" ", [])):
        monkeypatch.setenv("GQSA_CUDA_ARCHS", text)
        assert recipe.cuda_archs("nvcc") == expected


def test_an_architecture_that_is_none_is_named(recipe, monkeypatch):
    monkeypatch.setenv("GQSA_CUDA_ARCHS", "hopper")
    with pytest.raises(
        SystemExit, match='GQSA_CUDA_ARCHS=hopper: is not a list of compute capabilities such as "80;90"'
    ):
        recipe.cuda_archs("nvcc")


def test_architectures_of_this_machine_or_all_that_nvcc_knows(recipe, monkeypatch, tmp_path):
    monkeypatch.delenv("GQSA_CUDA_ARCHS", raising=False)
    nvcc = executable(tmp_path / "nvcc", "echo compute_75; echo compute_80; echo compute_89; echo compute_90")
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    every = ["80", "89", "90"]
    for answer, expected in (("9.0\n8.9\n9.0", ["89", "90"]), ("7.5", every), ("", every), ("9.0\n12.1", every)):
        executable(smi, f"printf '{answer}'")
        assert recipe.cuda_archs(str(nvcc)) == expected


def test_ptx_is_of_the_oldest_architecture(recipe, tmp_path):
    command = recipe.cuda_command("nvcc", ["90", "120", "80"], tmp_path / "_cuda.so")
    assert [word for word in command if "code=compute" in word] == ["-gencode=arch=compute_80,code=compute_80"]
