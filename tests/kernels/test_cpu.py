import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from tests.helpers import random_matrix, uneven_matrix
from vllm_gqsa.format import GROUP_SIZES, GroupSparseMatrix
from vllm_gqsa.kernels import cpu, linear, native, prepare, restore
from vllm_gqsa.kernels.cpu import PackedMatrix, choose_kernel, kernels, linear_cpu, partition
from vllm_gqsa.kernels.reference import linear_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = [name for name in kernels() if name != "avx512_vnni"]
# One token, one block of tokens, two, and several calls; odd and even.
TOKENS = (1, 2, 3, 4, 8, 9, 15, 16, 17, 35)
SHAPES = [(1, 128), (33, 128), (70, 640), (16, 1152)]
LIMITS = {torch.float32: 1e-6, **{dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16)}}
"""Relative errors; those of a half-precision result are no more than its rounding."""


def can_run(kernel, dtype, group_size):
    if kernel == "avx512_bf16":
        return dtype == torch.bfloat16 and group_size >= 16
    return kernel != "avx512_vnni" or group_size >= 16


def inputs(tokens, weight, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, weight.in_features, generator=generator).to(dtype)
    return x, torch.randn(weight.out_features, generator=generator).to(dtype)


def relative_error(y, x, weight, bias):
    """Against float64."""
    expected = F.linear(x.double(), weight.to_dense().double(), bias.double())
    return float((y.double() - expected).norm() / expected.norm())


# -- the layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_packing_is_undone_exactly(group_size, density):
    weight = random_matrix(37, 640, group_size, density)
    packed = PackedMatrix.pack(weight)
    for name, tensor in packed.unpack().tensors().items():
        assert torch.equal(tensor, weight.tensors()[name]), name
    assert torch.equal(restore(packed).qweight, weight.qweight)


def test_word_i_of_half_h_holds_code_i_of_four_units():
    weight = random_matrix(5, 256, 16, 1.0)
    codes = torch.stack((weight.qweight & 15, weight.qweight >> 4), -1).view(-1, 4, 2, 16).int()  # [block, n, h, i]
    expected = sum(codes[:, n] << (4 * n) for n in range(4))
    assert torch.equal(PackedMatrix.pack(weight).qweight.int() & 0xFFFF, expected)


def test_a_matrix_too_wide_to_number_stays_as_it_is(caplog):
    weight = random_matrix(1, 131072, 128, 0.01)
    assert prepare(weight) is weight
    assert "[1, 131072] is too wide for the CPU kernels, which number 131070 columns; torch computes it" in caplog.text


def test_packed_bytes_are_those_of_the_checkpoint():
    weight = GroupSparseMatrix.synthesize(576, 576)
    packed = sum(t.nbytes for t in PackedMatrix.pack(weight).tensors().values())
    assert weight.nbytes <= packed < weight.nbytes + 64


def test_packing_needs_the_packed_copy_and_no_more():
    code = """
import re, sys
from pathlib import Path
from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.kernels.cpu import PackedMatrix
def memory(line):
    return int(re.search(line + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
weight = GroupSparseMatrix.synthesize(4096, 8192)
PackedMatrix.pack(GroupSparseMatrix.synthesize(16, 16))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
packed = PackedMatrix.pack(weight)
print((memory("VmHWM") - before) / weight.nbytes)
"""
    # Freed memory goes back at once, or it would be used again and not be counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert 0.9 < float(output) < 1.1


# -- exactness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kernel", EXACT)
def test_exact_in_float32(kernel, group_size):
    for (rows, columns), density, tokens in itertools.product(SHAPES, (0.05, 0.5, 0.8, 1.0), TOKENS):
        dtype = torch.bfloat16 if kernel == "avx512_bf16" else torch.float32
        weight = random_matrix(rows, columns, group_size, density, seed=tokens)
        if not can_run(kernel, dtype, group_size):
            pytest.skip("not this group size")
        x, bias = inputs(tokens, weight, dtype)
        y = linear_cpu(x, PackedMatrix.pack(weight), bias, kernel)
        assert relative_error(y, x, weight, bias) < LIMITS[dtype]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kernel", EXACT)
def test_the_widest_matrix(kernel, group_size):
    dtype = torch.bfloat16 if kernel == "avx512_bf16" else torch.float32
    if not can_run(kernel, dtype, group_size):
        pytest.skip("not this group size")
    weight = uneven_matrix(3, 131070 // group_size * group_size, group_size, 0)
    for tokens in (1, 16):
        x, bias = inputs(tokens, weight, dtype)
        y = linear_cpu(x, PackedMatrix.pack(weight), bias, kernel)
        # More numbers are added up in float32 than elsewhere here.
        assert relative_error(y, x, weight, bias) < max(1e-5, LIMITS[dtype])


@pytest.mark.parametrize("kernel", EXACT)
def test_half_precision_is_the_rounded_exact_result(kernel):
    weight = uneven_matrix(130, 640, 16, 1)
    for dtype in (torch.bfloat16, torch.float16):
        if can_run(kernel, dtype, 16):
            x, bias = inputs(5, weight, dtype)
            exact = F.linear(x.double(), weight.to_dense().double(), bias.double())
            y = linear_cpu(x, PackedMatrix.pack(weight), bias, kernel)
            # Half a unit in the last place, and a little where float32 rounded across a border.
            torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-5)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kernel", list(kernels()))
def test_uneven_rows(kernel, group_size):
    dtype = torch.bfloat16 if kernel == "avx512_bf16" else torch.float32
    if not can_run(kernel, dtype, group_size):
        pytest.skip("not this group size")
    for seed in range(6):
        weight = uneven_matrix(50, 640, group_size, seed)
        x, bias = inputs(3, weight, dtype, seed)
        y = linear_cpu(x, PackedMatrix.pack(weight), bias, kernel)
        assert relative_error(y, x, weight, bias) < (1e-2 if kernel == "avx512_vnni" else LIMITS[dtype])


def test_int8_activations_lose_little():
    if "avx512_vnni" not in kernels():
        pytest.skip("needs AVX-512 VNNI")
    weight = random_matrix(256, 1024, 16, 0.5)
    x, bias = inputs(4, weight, torch.float32)
    y = linear_cpu(x, PackedMatrix.pack(weight), bias, "avx512_vnni")
    exact = F.linear(x, weight.to_dense(), bias)
    assert 1e-3 < float((y - exact).norm() / exact.norm()) < 1.5e-2


@pytest.mark.parametrize("kernel", list(kernels()))
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_activations_that_are_not_finite_stay_so(kernel, value):
    dtype = torch.bfloat16 if kernel == "avx512_bf16" else torch.float32
    weight = PackedMatrix.pack(random_matrix(20, 128, 16, 1.0))
    x = torch.ones(2, 128, dtype=dtype)
    x[0, 5] = value
    y = linear_cpu(x, weight, None, kernel)
    assert not y[0, 1:].isfinite().any()  # the first row is empty
    assert y[1].isfinite().all()


@pytest.mark.parametrize("kernel", EXACT)
def test_inputs_of_pruned_groups_are_not_read(kernel):
    dtype = torch.bfloat16 if kernel == "avx512_bf16" else torch.float32
    keep = torch.zeros(20, 8, dtype=torch.bool)
    keep[:, 3] = True
    weight = PackedMatrix.pack(GroupSparseMatrix.from_dense(torch.randn(20, 128), keep))
    x = torch.full((3, 128), float("nan"), dtype=dtype)
    x[:, 48:64] = 1
    assert linear_cpu(x, weight, None, kernel).isfinite().all()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kernel", list(kernels()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_weight_equals_the_reference_bit_for_bit(kernel, group_size, dtype):
    weight = uneven_matrix(41, 640, group_size, 2)
    packed = PackedMatrix.pack(weight)
    assert torch.equal(packed.to_dense(0, 41, dtype, kernel), weight.to_dense(dtype))
    assert torch.equal(packed.to_dense(7, 20, dtype, kernel), weight.to_dense(dtype)[7:20])


def test_smallest_and_largest_scales():
    scales = torch.tensor([2.0**-24 * 8, 2.0**-14, 1.0, 65280.0])  # subnormal half, smallest normal, one, largest
    codes = torch.arange(16, dtype=torch.uint8).expand(4, 16).contiguous()
    weight = GroupSparseMatrix.from_codes(
        codes, scales, torch.tensor([0, 3, 8, 15]), torch.ones(4, 1, dtype=torch.bool)
    )
    for kernel in kernels():
        assert torch.equal(PackedMatrix.pack(weight).to_dense(0, 4, torch.float32, kernel), weight.to_dense())


# -- what a result may depend on -----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", list(kernels()))
@pytest.mark.parametrize("group_size", [8, 16, 64])
def test_a_token_does_not_depend_on_the_others(kernel, group_size):
    dtype = torch.bfloat16 if kernel == "avx512_bf16" else torch.float32
    if not can_run(kernel, dtype, group_size):
        pytest.skip("not this group size")
    weight = uneven_matrix(70, 640, group_size, 3)
    packed = PackedMatrix.pack(weight)
    x, bias = inputs(max(TOKENS), weight, dtype)
    alone = torch.cat([linear_cpu(row[None], packed, bias, kernel) for row in x])
    for tokens in TOKENS:
        assert torch.equal(linear_cpu(x[:tokens], packed, bias, kernel), alone[:tokens]), tokens


def test_the_number_of_threads_does_not_matter():
    code = """
import sys, torch
from tests.helpers import uneven_matrix
from tests.kernels.test_cpu import EXACT, inputs
from vllm_gqsa.kernels.cpu import PackedMatrix, linear_cpu
torch.set_num_threads(int(sys.argv[1]))
weight = uneven_matrix(500, 1152, 16, 4)
packed = PackedMatrix.pack(weight)
for kernel in EXACT:
    x, bias = inputs(5, weight, torch.bfloat16)
    print(linear_cpu(x, packed, bias, kernel).double().sum(0).tolist())
"""
    results = {
        subprocess.run(
            [sys.executable, "-c", code, str(threads)], capture_output=True, text=True, check=True, env=os.environ
        ).stdout
        for threads in (1, 2, 5)
    }
    assert len(results) == 1


def test_batch_invariance_keeps_to_one_kernel(monkeypatch):
    weight = random_matrix(64, 640, 16, 0.5)
    packed = PackedMatrix.pack(weight)
    x, bias = inputs(70, weight, torch.bfloat16)
    alone = torch.cat([linear_cpu(row[None], packed, bias) for row in x])
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert torch.equal(linear_cpu(x, packed, bias), alone)


@pytest.mark.parametrize("shares", [1, 2, 3, 7, 64])
def test_rows_are_cut_evenly(shares):
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 200, (4096,), generator=generator)
    counts[:300] = 2000  # a few heavy rows in front
    crow_indices = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    rows = partition(crow_indices, shares)
    assert rows[0] == 0
    assert rows[-1] == 4096
    assert rows == sorted(rows)
    assert all(row % 32 == 0 for row in rows)
    work = [int(crow_indices[b] - crow_indices[a]) + 8 * (b - a) for a, b in itertools.pairwise(rows)]
    # Cuts fall on multiples of 32 rows, so a share may miss its part by half of 32 of the heaviest rows at each end.
    assert max(abs(w - sum(work) / shares) for w in work) <= 32 * 2008


@pytest.mark.parametrize("rows", [0, 1, 31, 33])
def test_few_rows_are_cut_too(rows):
    crow_indices = torch.arange(rows + 1, dtype=torch.int32)
    cuts = partition(crow_indices, 4)
    assert cuts[0] == 0
    assert cuts[-1] == rows
    assert cuts == sorted(cuts)


# -- choosing ------------------------------------------------------------------------------------------------


def test_the_fastest_kernel_is_chosen():
    assert choose_kernel(torch.float32, 16) == [n for n in kernels() if n in ("portable", "avx2", "avx512")][-1]
    if "avx512_bf16" in kernels():
        assert choose_kernel(torch.bfloat16, 16) == "avx512_bf16"
        assert choose_kernel(torch.bfloat16, 8) == "avx512"
        assert choose_kernel(torch.float16, 16) == "avx512"
    if "avx512_vnni" in kernels():
        assert choose_kernel(torch.bfloat16, 16, "int8") == "avx512_vnni"


def test_int8_where_it_cannot_be_is_said(caplog):
    cpu.choose_kernel.cache_clear()
    assert choose_kernel(torch.float32, 8, "int8") != "avx512_vnni"
    assert "GQSA_CPU_ACT=int8 has no effect with" in caplog.text


def test_unknown_activations_are_refused(monkeypatch):
    monkeypatch.setenv("GQSA_CPU_ACT", "int4")
    with pytest.raises(ValueError, match="GQSA_CPU_ACT=int4: is not known; set it to int8 or leave it out"):
        linear_cpu(torch.ones(1, 64), PackedMatrix.pack(random_matrix(4, 64)))


def test_int8_acts_inside_the_op(monkeypatch):
    if "avx512_vnni" not in kernels():
        pytest.skip("needs AVX-512 VNNI")
    weight = random_matrix(64, 640, 16, 0.5)
    packed = PackedMatrix.pack(weight)
    x, bias = inputs(1, weight, torch.float32)
    exact = linear(x, packed, bias)
    monkeypatch.setenv("GQSA_CPU_ACT", "int8")
    assert torch.equal(linear(x, packed, bias), linear_cpu(x, packed, bias, "avx512_vnni"))
    assert not torch.equal(linear(x, packed, bias), exact)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="x is torch.float64; it must be float32, float16 or bfloat16"):
        linear_cpu(torch.ones(1, 64, dtype=torch.float64), PackedMatrix.pack(random_matrix(4, 64)))


# -- through the op ------------------------------------------------------------------------------------------


@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    rows=st.integers(1, 70),
    groups=st.integers(1, 20),
    size=st.sampled_from(GROUP_SIZES),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=60)
def test_any_shape(leading, rows, groups, size, density, dtype):
    weight = random_matrix(rows, groups * size, size, density)
    x = torch.randn(*leading, groups * size).to(dtype)
    y = linear(x, prepare(weight))
    assert y.shape == (*leading, rows)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), linear_reference(x.float(), weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tokens", [1, 15, 16, 40, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_sides_of_the_crossover(tokens, dtype):
    weight = uneven_matrix(300, 640, 16, 5)
    x, bias = inputs(tokens, weight, dtype)
    error = relative_error(linear(x, prepare(weight), bias), x, weight, bias)
    assert error < LIMITS[dtype]


@pytest.mark.parametrize("kernel", list(kernels()))
def test_many_tokens_go_through_several_chunks(kernel, monkeypatch):
    weight = uneven_matrix(300, 640, 16, 6)
    x, bias = inputs(64, weight, torch.float32)
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 640 * 4 * 64)
    found = cpu._linear_dense(x, PackedMatrix.pack(weight), bias, kernel)
    torch.testing.assert_close(found, linear_reference(x, weight, bias))


def test_strides_of_x_do_not_matter():
    weight = random_matrix(24, 64, 16, 0.5)
    packed = prepare(weight)
    x, bias = inputs(6, weight, torch.float32)
    for strided in (x.t().contiguous().t(), torch.stack((x, x), 1)[:, 0], x.expand(2, 6, 64), x[::2]):
        assert torch.equal(linear(strided, packed, bias), linear(strided.contiguous(), packed, bias))


def test_opcheck():
    packed = prepare(random_matrix(24, 64))
    for shape in ((3, 64), (2, 3, 64), (64,), (0, 64)):
        arguments = (torch.randn(shape), list(packed.tensors().values()), "cpu", 64, 16, torch.randn(24))
        torch.library.opcheck(torch.ops.gqsa.linear.default, arguments)


@pytest.fixture
def library_at(monkeypatch):
    """Pretends that the library lies elsewhere."""

    def forget():
        cpu._library.cache_clear()
        native.available.cache_clear()

    def pretend(path):
        monkeypatch.setattr(native, "_LIBRARY", path)
        forget()

    yield pretend
    monkeypatch.undo()
    forget()


def test_a_library_that_does_not_fit_is_named(library_at, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    library_at(tmp_path / "broken.so")
    with pytest.raises(RuntimeError, match=r"broken.so: does not fit this vllm-gqsa .* install vllm-gqsa again"):
        prepare(random_matrix(24, 64))


def test_without_the_library_the_reference_serves_and_says_so(library_at, caplog, tmp_path):
    weight = random_matrix(24, 64)
    library_at(tmp_path / "missing.so")
    for _ in range(2):
        assert prepare(weight) is weight
    assert [record.getMessage().count("without its CPU kernels") for record in caplog.records] == [1]
