import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from tests.helpers import random_matrix
from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.kernels import linear, ops, prepare
from vllm_gqsa.kernels.layouts import check_use
from vllm_gqsa.kernels.reference import linear_reference


def arguments(dtype=torch.float32, rows=3, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = random_matrix(24, 64, seed=seed)
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    b = torch.randn(24, generator=generator).to(dtype) if bias else None
    return x, weight, b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_dense_linear_bit_for_bit(dtype, bias):
    x, weight, b = arguments(dtype, bias=bias)
    assert torch.equal(linear(x, weight, b), F.linear(x, weight.to_dense(dtype), b))


@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    rows=st.integers(1, 9),
    groups=st.integers(1, 9),
    size=st.sampled_from([8, 16, 32]),
    density=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(deadline=None, max_examples=40)
def test_any_shape(leading, rows, groups, size, density):
    weight = random_matrix(rows, groups * size, size, density)
    x = torch.randn(*leading, groups * size)
    y = linear(x, weight)
    assert y.shape == (*leading, rows)
    assert torch.equal(y, F.linear(x, weight.to_dense()))


def test_no_tokens():
    x, weight, b = arguments(rows=0)
    assert linear(x, weight, b).shape == (0, 24)


def test_nothing_kept():
    weight = GroupSparseMatrix.from_dense(torch.ones(4, 32), torch.zeros(4, 2, dtype=torch.bool))
    assert torch.equal(linear(torch.ones(2, 32), weight), torch.zeros(2, 4))


def test_strides_of_x_do_not_matter():
    x, weight, b = arguments(rows=6)
    for strided in (x.t().contiguous().t(), torch.stack((x, x), 1)[:, 0], x.expand(2, 6, 64)):
        assert torch.equal(linear(strided, weight, b), F.linear(strided, weight.to_dense(), b))
        torch.testing.assert_close(linear(strided, weight, b), linear(strided.contiguous(), weight, b))


def test_wrong_width_is_refused():
    x, weight, _ = arguments()
    with pytest.raises(ValueError, match="x has 32 features, the weight has 64"):
        linear(x[:, :32], weight)


@pytest.mark.parametrize("layout", [prepare, lambda weight: weight])
@pytest.mark.parametrize("bias", [torch.zeros(24, dtype=torch.float16), torch.zeros(3), torch.zeros(1, 24)])
def test_another_bias_is_refused(layout, bias):
    x, weight, _ = arguments()
    with pytest.raises(ValueError, match=r"bias is torch.float\d\d \[.*\], it must be torch.float32 \[24\]"):
        linear(x, layout(weight), bias)


def test_another_device_is_refused():
    _, weight, _ = arguments()
    with pytest.raises(ValueError, match="gqsa::linear: x is on meta, the weight on cpu"):
        check_use("gqsa::linear", torch.empty(3, 64, device="meta"), prepare(weight))


def test_gradients_come_from_the_reference_alone():
    x, weight, _ = arguments()
    x.requires_grad_()
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.to_dense().sum(0).expand(3, 64))
    with pytest.raises(RuntimeError, match="gqsa::linear: the native kernels have no gradients; call it under"):
        linear(x, prepare(weight))
    with torch.no_grad():
        torch.testing.assert_close(linear(x, prepare(weight)), linear(x, weight))


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64), (64,), (0, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(shape, bias):
    _, weight, b = arguments(bias=bias)
    x = torch.randn(shape)
    torch.library.opcheck(torch.ops.gqsa.linear.default, (x, list(weight.tensors().values()), "checkpoint", 64, 16, b))


def test_opcheck_of_strided_input():
    _, weight, b = arguments()
    x = torch.randn(64, 5).t()
    torch.library.opcheck(torch.ops.gqsa.linear.default, (x, list(weight.tensors().values()), "checkpoint", 64, 16, b))


def test_compiles_whole_for_any_number_of_tokens():
    _, weight, b = arguments()
    compiled = torch.compile(lambda x: linear(x * 2, weight, b) + 1, fullgraph=True, dynamic=True, backend="eager")
    for rows in (1, 2, 7, 33):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), linear(x * 2, weight, b) + 1)


def test_importing_twice_is_harmless():
    importlib.reload(ops)
    x, weight, b = arguments()
    assert torch.equal(ops.linear(x, weight, b), linear_reference(x, weight, b))
