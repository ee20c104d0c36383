"""cpu_check.cpp, compiled together with the kernels: under sanitizers, and under valgrind."""

import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def recipe():
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder, *flags):
    """The program, compiled as setup.py compiles the library."""
    setup = recipe()

    def compile_one(item):
        source, own_flags = item
        output = folder / (Path(source).stem + ".o")
        command = [COMPILER, *setup.FLAGS, *own_flags, *flags, "-c", str(ROOT / source), "-o", str(output)]
        subprocess.run(command, check=True)
        return str(output)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, {**setup.SOURCES, "tests/kernels/cpu_check.cpp": []}.items()))
    subprocess.run([COMPILER, *flags, *objects, "-pthread", "-o", str(folder / "check")], check=True)
    return folder / "check"


def run(*command, **environment):
    # vLLM sets LD_PRELOAD for the processes that it starts; the sanitizer's library must come first.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | environment
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return int(result.stdout.split()[0])


def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    program = build(tmp_path, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert run(str(program), "400") > 400


@pytest.mark.slow
def test_valgrind(tmp_path):
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("needs valgrind")
    program = build(tmp_path, "-O1", "-g")
    # valgrind knows no AVX-512.
    options = ["--error-exitcode=1", "--quiet", "--leak-check=full"]
    left_out = ["avx512", "avx512_bf16", "avx512_vnni"]
    assert run(valgrind, *options, str(program), "40", *left_out) > 40
