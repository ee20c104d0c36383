"""Static gates on the machine code of the CUDA library, for every architecture that it was built for."""

import pytest

from tests.cuda.sass import find_cuobjdump, kernels, resources
from vllm_gqsa.kernels import cuda

CUOBJDUMP = find_cuobjdump()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cuda._LIBRARY.exists(), reason="needs the CUDA library: nvcc when vllm-gqsa is installed"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump"),
]

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
REGISTERS = {"gemv": 128, "gemm": 255, "expand": 64, "look_up": 64}  # that the threads of a block leave for each

# Instructions of a lane for each kept group of 16, by tokens: the main loop, with the code that stores a finished slab,
# over its 8 groups. At full memory bandwidth an H200 can issue 76.
GEMV_BUDGET = {1: 78, 2: 106, 4: 160, 8: 280}
# Instructions of a warp for 64 rows by 16 columns, kept or not, by tokens.
GEMM_BUDGET = {16: 190, 32: 220, 64: 290}


@pytest.fixture(scope="module")
def usage():
    found = resources(cuda._LIBRARY, CUOBJDUMP)
    if {arch for arch, _, _ in found} != set(ARCHS):
        pytest.skip("built for the GPUs of this machine alone")
    return found


@pytest.fixture(scope="module", params=ARCHS)
def code(request, usage):
    return kernels(cuda._LIBRARY, request.param, CUOBJDUMP)


def test_no_spills_and_no_more_registers_than_there_are(usage):
    assert len(usage) == 48 * len(ARCHS)
    for arch, name, used in usage:
        kind = next(kind for kind in REGISTERS if kind in name)
        assert used["STACK"] == used["LOCAL"] == 0, (arch, name, used)
        assert used["REG"] <= REGISTERS[kind], (arch, name, used)


def test_no_local_memory(code):
    for kernel in code:
        assert kernel.count(r"\b(LDL|STL)\b") == 0, kernel.parameters


def test_weights_are_loaded_16_bytes_at_a_time(code):
    for kernel in code:
        assert kernel.count(r"LDG\.E\S*\.128") >= 2, (kernel.kind, kernel.parameters)


def test_tensor_cores_are_used(code):
    for kernel in code:
        assert (kernel.count("HMMA.16816.F32") > 0) == (kernel.kind == "gemm")


def test_instructions_are_within_budget(code):
    found = {(kernel.kind, kernel.parameters): kernel.main_loop() for kernel in code if kernel.kind in ("gemv", "gemm")}
    for tokens, budget in GEMV_BUDGET.items():
        assert found["gemv", f"Li{tokens}ELi16"] / 8 <= budget
    for tokens, budget in GEMM_BUDGET.items():
        for dtype in ("4Half", "6Bfloat"):
            assert found["gemm", f"NS0_{dtype}ELi16ELi{tokens // 8}"] <= budget


def test_weights_are_under_way_before_the_kernel_before_has_ended(usage):
    for kernel in kernels(cuda._LIBRARY, "sm_90", CUOBJDUMP):
        if kernel.kind == "gemv":
            waits = [i for i, (_, text) in enumerate(kernel.code) if "ACQBULK" in text]
            loads = [i for i, (_, text) in enumerate(kernel.code) if "LDG.E.EF.128" in text]
            assert len(waits) == 1
            assert min(loads) < waits[0]
