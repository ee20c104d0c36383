"""The wheel and the source distribution, installed into fresh environments. `make dist` builds them first."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import vllm_gqsa

ROOT = Path(__file__).parents[1]
CHECK = """
import sys
import vllm_gqsa, vllm_gqsa.offline.cli
from vllm_gqsa.kernels import cuda, native
assert vllm_gqsa.__file__.startswith(sys.prefix), vllm_gqsa.__file__
print(vllm_gqsa.__version__, native.available(), cuda.available())
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """What `make dist` built, or else what is built now."""
    if "GQSA_DIST" in os.environ:
        return ROOT / os.environ["GQSA_DIST"]
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.mark.parametrize("kind", [".whl", ".tar.gz"])
def test_it_installs_into_a_fresh_environment(dist, tmp_path, kind):
    (file,) = (path for path in dist.iterdir() if path.name.endswith(kind))
    assert file.name.startswith(f"vllm_gqsa-{vllm_gqsa.__version__}")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    # What it depends on, and setuptools, come from here: torch is not to be downloaded again.
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", file]
    subprocess.run(install, check=True, env=env, cwd=tmp_path)
    done = subprocess.run([python, "-c", CHECK], check=True, env=env, cwd=tmp_path, capture_output=True, text=True)
    compilers = ("g++",), ("nvcc", "/usr/local/cuda/bin/nvcc", f"{os.environ.get('CUDA_HOME')}/bin/nvcc")
    built = [str(any(map(shutil.which, names))) for names in compilers]
    assert done.stdout.split() == [vllm_gqsa.__version__, *built]
    gqsa = [python.with_name("gqsa"), "--help"]
    assert "doctor" in subprocess.run(gqsa, check=True, env=env, capture_output=True, text=True).stdout
