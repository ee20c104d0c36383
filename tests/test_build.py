"""What setup.py builds, with and without a compiler."""

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
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=source, env=environment or None, capture_output=True, text=True, check=False,
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
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "vllm_gqsa/kernels/_cpu.so" in names
    assert "vllm_gqsa/offline/cli.py" in names
