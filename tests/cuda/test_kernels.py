"""Every CUDA kernel against float64: on the CPU over the shim, and with ``-m gpu`` the same on a GPU."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import random_matrix, uneven_matrix
from vllm_gqsa import kernels
from vllm_gqsa.format import GROUP_SIZES, GroupSparseMatrix
from vllm_gqsa.kernels import cuda
from vllm_gqsa.kernels.cuda import Device, choose_kernel, linear_cuda, look_up
from vllm_gqsa.kernels.embedding import embedding
from vllm_gqsa.kernels.moe import moe
from vllm_gqsa.kernels.slab import SlabMatrix

HALVES = (torch.float16, torch.bfloat16)


def inputs(tokens, weight, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, weight.in_features, generator=generator).to(dtype)
    return x.to(device.name), torch.randn(weight.out_features, generator=generator).to(dtype).to(device.name)


def pack(weight, device):
    return SlabMatrix.pack(weight).to(device.name)


def assert_right(y, x, weight, bias, kernel):
    """Compare with float64.

    gemm and expand round weights to the dtype of ``x`` as a dense model does, add up in float32 and round once; gemv
    multiplies by exact weights, in float16 within 16 of them.
    """
    eps = torch.finfo(x.dtype).eps
    dense = weight.to_dense(torch.float32 if kernel == "gemv" else x.dtype).double()
    x, bias = x.cpu().double(), None if bias is None else bias.cpu().double()
    exact = F.linear(x, dense, bias)
    size = F.linear(x.abs(), dense.abs(), None if bias is None else bias.abs())
    # Where the result is small beside the products, it is their rounding that counts.
    inner = 1e-3 if kernel == "gemv" else 1e-6
    error = (y.cpu().double() - exact).abs()
    assert (error <= exact.abs() * eps * 0.51 + size * inner + 1e-7).all()
    if kernel == "gemv":
        # Roundings of either sign mostly cancel: they grow as the root of the products' squares does.
        spread = F.linear(x.square(), dense.square()).sqrt()
        assert error.norm() <= exact.norm() * eps * 0.5 + spread.norm() * 6e-4


# -- exactness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("kernel", "tokens"), [("gemv", 1), ("gemv", 2), ("gemv", 3), ("gemv", 8), ("gemm", 9),
                                                ("gemm", 17), ("gemm", 64), ("expand", 5)])  # fmt: skip
def test_kernels(device, kernel, tokens, group_size, dtype):
    weight = random_matrix(100, 640, group_size, 0.5, seed=tokens)
    x, bias = inputs(tokens, weight, dtype, device)
    assert_right(linear_cuda(x, pack(weight, device), bias, kernel), x, weight, bias, kernel)


SHAPES = [(1, 16), (31, 48), (33, 208), (64, 64), (65, 1024), (130, 336), (7, 4800)]


@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("kernel", ["gemv", "gemm"])
def test_shapes_and_sparsity(device, kernel, density):
    for (rows, columns), dtype in itertools.product(SHAPES, HALVES):
        weight = random_matrix(rows, columns, 16, density, seed=rows)
        x, bias = inputs(2 if kernel == "gemv" else 11, weight, dtype, device)
        assert_right(linear_cuda(x, pack(weight, device), bias, kernel), x, weight, bias, kernel)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kernel", ["gemv", "gemm", "expand"])
def test_uneven_rows(device, kernel, group_size):
    for seed in range(3):
        weight = uneven_matrix(90, 1280, group_size, seed)
        x, bias = inputs(4 if kernel == "gemv" else 12, weight, torch.float16, device, seed)
        assert_right(linear_cuda(x, pack(weight, device), bias, kernel), x, weight, bias, kernel)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_columns_beyond_the_window(device, group_size):
    """Lanes that are far apart in their rows: a record reaches beyond what gemm holds in shared memory."""
    keep = torch.zeros(64, 250, dtype=torch.bool)
    keep[::2, :60] = True
    keep[1::2, 190:] = True
    weight = GroupSparseMatrix.from_dense(torch.randn(64, 250 * group_size), keep, group_size)
    x, bias = inputs(10, weight, torch.float16, device)
    for kernel in ("gemv", "gemm"):
        assert_right(linear_cuda(x, pack(weight, device), bias, kernel), x, weight, bias, kernel)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_gap_wider_than_the_window(device, group_size):
    """Columns that no row of a panel has kept: what lies before them must not be multiplied again behind them."""
    keep = torch.ones(64, 250, dtype=torch.bool)
    keep[:, 8:180] = False
    weight = GroupSparseMatrix.from_dense(torch.randn(64, 250 * group_size), keep, group_size)
    x, bias = inputs(10, weight, torch.float16, device)
    assert_right(linear_cuda(x, pack(weight, device), bias, "gemm"), x, weight, bias, "gemm")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_many_random_cases(device, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    group_size, dtype = draw(*GROUP_SIZES), draw(*HALVES)
    columns = group_size * draw(1, 2, 3, 5, 17, 40)
    for _ in range(5):
        weight = uneven_matrix(draw(1, 5, 32, 40, 64, 96, 129), columns, group_size, draw(*range(1000)))
        device.shuffle(draw(*range(1000)))
        kernel = draw("gemv", "gemm", "expand")
        x, bias = inputs(draw(1, 2, 4, 7, 8, 13, 33, 64), weight, dtype, device, seed)
        bias = draw(bias, None)
        assert_right(linear_cuda(x, pack(weight, device), bias, kernel), x, weight, bias, kernel)


def test_float32_and_expansion_are_those_of_a_dense_model(device):
    weight = random_matrix(1100, 64, 16)
    packed = pack(weight, device)
    for dtype in (torch.float32, *HALVES):
        with cuda._current(packed.qweight.device):
            dense = torch.cat([cuda._expand(packed, 0, 1024, dtype), cuda._expand(packed, 1024, 1100, dtype)])
        assert torch.equal(dense.cpu(), weight.to_dense(dtype))
    x, bias = inputs(3, weight, torch.float32, device)
    torch.testing.assert_close(linear_cuda(x, packed, bias).cpu(), F.linear(x.cpu(), weight.to_dense(), bias.cpu()))


@pytest.mark.parametrize("dtype", HALVES)
def test_no_activation_is_too_large_or_too_small(device, dtype):
    weight = random_matrix(40, 256, 16)
    x, _ = inputs(4, weight, torch.float32, device)
    x[0] *= 3e-3
    x[1] *= 1e-5 if dtype == torch.float16 else 1e-30
    x[2] *= 1e4 if dtype == torch.float16 else 1e30
    x[3, 17] = 6e4
    x = x.to(dtype)
    y = linear_cuda(x, pack(weight, device), None, "gemv")
    exact = F.linear(x.cpu().double(), weight.to_dense().double())
    for token in range(4):
        fits = exact[token].abs() < torch.finfo(dtype).max
        limit = (exact[token].abs() * torch.finfo(dtype).eps).clamp(min=torch.finfo(dtype).smallest_normal)
        size = F.linear(x[token].cpu().double().abs(), weight.to_dense().double().abs())
        assert ((y[token].cpu().double() - exact[token]).abs() <= limit + size * 1e-3)[fits].all()


def test_infinity_and_nan_stay_with_their_token(device):
    weight = random_matrix(40, 256, 16, 1.0)
    x, bias = inputs(3, weight, torch.float16, device)
    clean = linear_cuda(x, pack(weight, device), bias, "gemv")
    x[1, 5], x[2, 7] = float("inf"), float("nan")
    y = linear_cuda(x, pack(weight, device), bias, "gemv")
    assert torch.equal(y[0], clean[0])
    assert not torch.isfinite(y[1:]).any()


# -- independence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["gemv", "gemm"])
@pytest.mark.parametrize("blocks", [1, 2, 5, 24])
def test_the_order_of_blocks_changes_no_bit(device, monkeypatch, kernel, blocks):
    weight = uneven_matrix(150, 640, 16, 3)
    packed = pack(weight, device)
    x, bias = inputs(3 if kernel == "gemv" else 20, weight, torch.float16, device)
    found = cuda.device_of(x.device)
    monkeypatch.setattr(cuda, "device_of", lambda _: Device(found.capability, blocks, found.shared_bytes))
    first = linear_cuda(x, packed, bias, kernel)
    for seed in range(1, 7):
        device.shuffle(seed)
        assert torch.equal(linear_cuda(x, packed, bias, kernel), first)
        assert not packed.counters.any()
    assert_right(first, x, weight, bias, kernel)


@pytest.mark.parametrize(("kernel", "counts"), [("gemv", (1, 2, 3, 5, 8)), ("gemm", (9, 16, 30, 64))])
def test_other_tokens_change_no_bit(device, kernel, counts):
    weight = uneven_matrix(70, 640, 16, 4)
    packed = pack(weight, device)
    x, bias = inputs(64, weight, torch.bfloat16, device)
    full = linear_cuda(x[: counts[-1]], packed, bias, kernel)
    for count in counts:
        assert torch.equal(linear_cuda(x[:count], packed, bias, kernel), full[:count])


def test_division_by_rows_gives_the_same_result(device):
    weight = uneven_matrix(150, 640, 16, 3)
    x, bias = inputs(3, weight, torch.float16, device)
    assert_right(linear_cuda(x, pack(weight, device), bias, "gemv", by_slab=True), x, weight, bias, "gemv")


@pytest.mark.parametrize(("kernel", "tokens"), [("gemv", 2), ("gemm", 12)])
def test_activations_are_not_read_before_they_are_there(device, kernel, tokens):
    weight = random_matrix(70, 256, 16)
    packed = pack(weight, device)
    x, bias = inputs(tokens, weight, torch.float16, device)
    expected = linear_cuda(x, packed, bias, kernel)
    device.written_late(x)
    assert torch.equal(linear_cuda(x, packed, bias, kernel), expected)


# -- the op --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 64, 65])
def test_the_op_takes_any_number_of_tokens(device, tokens):
    weight = random_matrix(70, 256, 16)
    x, bias = inputs(tokens, weight, torch.float16, device)
    y = kernels.linear(x, pack(weight, device), bias)
    assert y.shape == (tokens, 70)
    assert_right(y, x, weight, bias, "gemv")


def test_any_strides_and_leading_dimensions(device):
    weight = random_matrix(24, 64)
    packed = pack(weight, device)
    x, bias = inputs(6, weight, torch.float16, device)
    expected = kernels.linear(x, packed, bias)
    odd = torch.empty(6, 67, dtype=x.dtype, device=x.device)[:, 1:65].copy_(x)
    for strided in (x.t().contiguous().t(), torch.stack((x, x), 1)[:, 0], odd):
        assert torch.equal(kernels.linear(strided, packed, bias), expected)
    assert torch.equal(kernels.linear(x.view(2, 3, 64), packed, bias), expected.view(2, 3, 24))
    assert torch.equal(kernels.linear(x.expand(2, 6, 64), packed, bias)[1].view(6, 24), kernels.linear(
        torch.cat((x, x)), packed, bias)[6:])  # fmt: skip


def test_opcheck(device):
    weight = random_matrix(24, 64)
    packed = pack(weight, device)
    tensors = list(packed.tensors().values())
    for shape in ((3, 64), (2, 3, 64), (64,), (0, 64)):
        x = torch.randn(shape, device=device.name).half()
        bias = torch.randn(24, device=device.name).half()
        torch.library.opcheck(torch.ops.gqsa.linear.default, (x, tensors, "cuda", 64, 16, bias))
    ids = torch.tensor([[3, 0]], device=device.name)
    torch.library.opcheck(torch.ops.gqsa.embedding.default, (ids, tensors, "cuda", 64, 16, torch.bfloat16))


@pytest.mark.parametrize("tokens", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_experts(device, dtype, tokens, monkeypatch):
    """Four experts: two tokens have copies of theirs, five go through all of them."""
    monkeypatch.setattr("vllm_gqsa.kernels.moe._host_may_wait", lambda _: False)
    gate_up, down = random_matrix(4 * 2 * 96, 64), random_matrix(4 * 64, 96, 8)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 64, generator=generator).to(dtype)
    weights, ids = torch.randn(tokens, 4, generator=generator).softmax(-1).topk(2)
    found = moe(*(each.to(device.name) for each in (x, weights, ids)), pack(gate_up, device), pack(down, device))
    first = gate_up.to_dense(dtype).double().view(4, 2, 96, 64)[ids]  # [tokens, 2, gate and up, I, K]
    gate, up = torch.einsum("tepik,tk->teip", first, x.double()).unbind(-1)
    expected = torch.einsum("teki,tei,te->tk", down.to_dense(dtype).double().view(4, 64, 96)[ids],
                            F.silu(gate) * up, weights.double())  # fmt: skip
    error = (found.cpu().double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_embedding(device, group_size, dtype):
    weight = random_matrix(100, 640, group_size, 0.5)
    ids = torch.tensor([[0, 99, 5], [5, 31, 64]])
    found = embedding(ids.to(device.name), pack(weight, device), dtype)
    assert torch.equal(found.cpu(), F.embedding(ids, weight.to_dense(dtype)))


def test_an_id_that_is_no_row_gives_nan(device):
    ids = torch.tensor([24, -1, 3], device=device.name)
    found = look_up(ids, pack(random_matrix(24, 64), device), torch.float16)
    assert found[:2].isnan().all()
    assert torch.isfinite(found[2]).all()


def test_another_dtype_is_refused(device):
    weight = random_matrix(24, 64)
    with pytest.raises(TypeError, match="x is torch.float64; it must be float32, float16 or bfloat16"):
        kernels.linear(torch.zeros(1, 64, dtype=torch.float64, device=device.name), pack(weight, device))


def test_batch_invariance_keeps_to_one_kernel(device, monkeypatch):
    monkeypatch.setitem(os.environ, "VLLM_BATCH_INVARIANT", "1")
    weight = random_matrix(70, 256, 16)
    packed = pack(weight, device)
    x, bias = inputs(70, weight, torch.float16, device)
    full = kernels.linear(x, packed, bias)
    for count in (1, 9, 65):
        assert torch.equal(kernels.linear(x[:count], packed, bias), full[:count])


# -- the choice ----------------------------------------------------------------------------------------------

H200, RTX_4090 = Device(90, 132, 232448), Device(89, 128, 101376)


@pytest.mark.parametrize(("tokens", "in_features", "where", "expected"), [
    (1, 4096, H200, ("gemv", 8)),
    (8, 8192, H200, ("gemv", 8)),
    (8, 14336, H200, ("gemm", 64)),  # eight tokens of 14336 do not fit into shared memory
    (4, 14336, H200, ("gemv", 4)),
    (8, 8192, RTX_4090, ("gemm", 64)),
    (2, 28672, H200, ("gemv", 2)),
    (1, 1 << 17, H200, ("gemm", 64)),
    (9, 4096, H200, ("gemm", 64)),
    (64, 4096, H200, ("gemm", 64)),
    (65, 4096, H200, ("expand", 65)),
    (65, 4096, Device(103, 160, 232448), ("expand", 65)),
])  # fmt: skip
def test_choice(device, tokens, in_features, where, expected):
    assert choose_kernel(tokens, in_features, where) == expected


@pytest.mark.parametrize(("rows", "columns", "most", "expected"), [
    (4096, 1024, 132, 128),  # 128 slabs: one each, none shared
    (28672, 64, 132, 128),  # 896 slabs: seven each
    (6144, 1024, 132, 132),  # 192 slabs: two each would leave 36 multiprocessors idle
    (1024, 1024, 132, 32),  # 256 records of 32 slabs
    (32, 64, 132, 1),
])  # fmt: skip
def test_number_of_blocks(rows, columns, most, expected):
    packed = SlabMatrix.pack(GroupSparseMatrix.synthesize(rows, columns))
    assert cuda._count_blocks(packed, 32, most) == expected


def test_choice_when_invariant(device):
    assert choose_kernel(300, 4096, H200, invariant=True) == ("gemv", 8)
    assert choose_kernel(1, 1 << 17, H200, invariant=True) == ("gemm", 64)


def test_without_the_library_the_reference_serves_and_says_so(device, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(cuda, "_LIBRARY", tmp_path / "missing.so")
    cuda.device_of.cache_clear()
    weight = random_matrix(24, 64)
    for _ in range(2):
        assert not cuda.usable(torch.device(device.name), weight)
    assert [r.getMessage().count("no nvcc was found then") for r in caplog.records] == [1]


def test_a_device_that_is_not_covered_is_named(device, monkeypatch, caplog):
    class Library:
        def gqsa_cuda_device(self, *_):
            return 209

        def gqsa_cuda_message(self, error):
            return b"no kernel image is available for execution on the device"

    monkeypatch.setattr(cuda, "_library", Library)
    monkeypatch.setattr(cuda, "_forget", None, raising=False)
    cuda.device_of.cache_clear()
    assert cuda.device_of(torch.device(device.name)) is None
    assert "no kernel image is available" in caplog.records[0].getMessage()
