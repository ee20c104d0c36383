"""A test of the tests: mistakes planted into the kernels must be caught by test_kernels.py over the shim."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.cuda.build import COMPILER, ROOT, build_shim

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="needs g++")]

# File, what stands there, what is put in its place, and the tests that should notice.
MISTAKES = {
    "gemv: a constant": ("gemv.cuh", "0xd400d400u", "0xd000d000u", "test_kernels"),
    "gemv: a bit of the scale": ("device.cuh", "& 0x7ff8u", "& 0x7ff0u", "test_kernels"),
    "gemv: no barrier before the parts are added": (
        "gemv.cuh",
        "    __syncthreads();\n    add_parts(",
        "    add_parts(",
        "test_kernels or order_of_blocks",
    ),
    "gemv: no barrier after staging": (
        "gemv.cuh",
        "        v = uint4{convert(v.x), convert(v.y), convert(v.z), convert(v.w)};\n    }\n    __syncthreads();\n",
        "        v = uint4{convert(v.x), convert(v.y), convert(v.z), convert(v.w)};\n    }\n",
        "test_kernels",
    ),
    "gemv: a block is left out": (
        "gemv.cuh",
        "for (int block = first; block <= last; ++block)",
        "for (int block = first; block < last; ++block)",
        "order_of_blocks",
    ),
    "gemv: counters are not reset": ("gemv.cuh", "weight.counters[slab] = 0;", ";", "order_of_blocks"),
    "gemv: reads before it waits": ("gemv.cuh", "    wait_for_inputs();\n", "", "before_they_are_there"),
    "gemm: no barrier after a window": (
        "gemm.cuh",
        "magic, shared, sums);\n            __syncthreads();\n",
        "magic, shared, sums);\n",
        "test_kernels or test_uneven",
    ),
    "gemm: pruned groups are not cleared": (
        "gemm.cuh",
        "scales[lane] = scales[lane + kLanes] = 0;",
        "scales[lane] = 0;",
        "test_kernels or test_shapes",
    ),
    "gemm: some threads skip a barrier": (
        "gemm.cuh",
        "            __syncthreads();\n            float sum = 0;",
        "            if (threadIdx.x != 7) __syncthreads();\n            float sum = 0;",
        "test_kernels",
    ),
    "gemm: groups beyond the window are lost": ("gemm.cuh", "beyond = true;", ";", "beyond_the_window"),
}  # fmt: skip


def run_tests(library, selection):
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/cuda/test_kernels.py"]
    return subprocess.run(
        [*command, "-k", f"shim and ({selection})"],
        cwd=ROOT, env=os.environ | {"GQSA_TEST_SHIM": str(library)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_it_is_caught(name, tmp_path):
    file, right, wrong, selection = MISTAKES[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/cuda" / file
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, wrong))
    result = run_tests(build_shim(tmp_path), selection)
    # Failed tests, or a process that the shim ended; not: no tests found.
    assert result.returncode == 1 or result.returncode < 0, result.stdout[-2000:]


def test_without_a_mistake_the_same_tests_pass():
    assert run_tests(build_shim(), "order_of_blocks or before_they_are_there").returncode == 0
