"""cuda_check.cpp: the kernels over the shim under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess

import pytest

from tests.cuda.build import COMPILER, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="needs g++")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles the program, with a change to one file or without."""

    def compile_it(name, file="", right="", wrong=""):
        folder = tmp_path_factory.mktemp(name)
        for path in [*ROOT.glob("csrc/*/*"), *ROOT.glob("tests/cuda/*.[ch]*"), ROOT / "tests/kernels/random_matrix.h"]:
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text()
            if path.name == file:
                assert text.count(right) == 1
                text = text.replace(right, wrong)
            copy.write_text(text)
        flags = ["-std=c++17", "-O1", "-g", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        command = [COMPILER, *flags, "-x", "c++", f"-I{folder}/tests/cuda", str(folder / "tests/cuda/cuda_check.cpp")]
        subprocess.run([*command, "-o", str(folder / "check")], check=True)
        return folder / "check"

    return compile_it


def run(program, cases):
    # vLLM puts libraries into LD_PRELOAD, which the sanitizers must not meet.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run([program, str(cases)], capture_output=True, text=True, env=environment, check=False)


def test_clean(compiled):
    result = run(compiled("clean"), 150)
    assert result.returncode == 0, result.stdout + result.stderr[:3000]
    assert result.stdout == "150 cases\n"


def test_too_little_shared_memory_is_noticed(compiled):
    result = run(
        compiled("short", "gemv.cuh", "static_cast<int>(sizeof(GemvShared<M>))", "sizeof(GemvShared<M>) - 4"), 150
    )
    assert "heap-buffer-overflow" in result.stderr
