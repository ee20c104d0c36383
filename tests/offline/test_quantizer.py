"""The fake quantiser against autograd's own composition of its steps, and against the format."""

import pytest
import torch

from tests.helpers import random_matrix
from vllm_gqsa.format import GroupSparseMatrix, round_scale
from vllm_gqsa.offline.quantizer import GroupSparseLinear, fake_quantize


def composed(weight, scale, zero):
    """The same by straight-through rounding in plain torch."""

    def rounded(x):
        return x + (x.round() - x).detach()

    zeros = rounded(zero).clamp(0, 15)[:, None]
    codes = (rounded(weight / scale[:, None]) + zeros).clamp(0, 15)
    return (codes - zeros) * scale[:, None]


def test_values_and_gradients_are_those_of_the_composition():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 16, generator=generator)
    scale = torch.rand(200, generator=generator) * 0.2 + 0.02  # many weights are clamped
    zero = torch.rand(200, generator=generator) * 20 - 2  # and some zero points
    upstream = torch.randn(200, 16, generator=generator)
    found = []
    for function in (fake_quantize, composed):
        inputs = [t.clone().requires_grad_() for t in (weight, scale, zero)]
        out = function(*inputs)
        out.backward(upstream)
        found.append([out.detach(), *(t.grad for t in inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("group_size", [8, 16, 64])
def test_it_begins_and_ends_with_the_matrix(group_size, frozen):
    matrix = random_matrix(24, 128, group_size)
    linear = GroupSparseLinear(matrix, None, torch.device("cpu"), frozen_codes=frozen)
    assert torch.equal(linear.dense(), matrix.to_dense())
    again = linear.matrix()
    for name, tensor in matrix.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name


def train(linear, steps=30, rate=0.05):
    target = torch.randn(24, 128, generator=torch.Generator().manual_seed(5))
    inputs = torch.randn(64, 128, generator=torch.Generator().manual_seed(6))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=rate, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = (linear(inputs) - inputs @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("frozen", [False, True])
def test_after_training_pruned_groups_are_exactly_zero_and_all_else_is_on_the_grid(frozen):
    matrix = random_matrix(24, 128)
    linear = GroupSparseLinear(matrix, None, torch.device("cpu"), frozen_codes=frozen)
    losses = train(linear)
    assert losses[-1] < losses[0]
    pruned = ~matrix.keep()
    assert pruned.any()
    dense = linear.dense().detach().view(24, 8, 16)
    assert (dense[pruned] == 0).all()
    stored = linear.matrix()
    stored.validate()  # scales on the 12-bit grid, zero points 0..15
    assert torch.equal(stored.to_dense(), dense.view(24, 128))
    assert torch.equal(stored.group_mask, matrix.group_mask)
    assert not torch.equal(stored.scale_zero, matrix.scale_zero)
    assert torch.equal(stored.qweight, matrix.qweight) == frozen


def test_the_forward_pass_is_that_of_a_dense_linear_on_the_grid():
    matrix = random_matrix(24, 128)
    bias = torch.nn.Parameter(torch.randn(24))
    linear = GroupSparseLinear(matrix, bias, torch.device("cpu"))
    with torch.no_grad():
        linear.weight.add_(torch.randn_like(linear.weight) * 0.1)
        linear.log_scale.add_(0.05)
    x = torch.randn(3, 5, 128)
    expected = torch.nn.functional.linear(x, linear.matrix().to_dense(), bias)
    assert torch.equal(linear(x), expected)
    scales = linear.log_scale.exp()
    assert not torch.equal(round_scale(scales), scales)  # they are between grid points, and rounded there


def test_empty_matrices_and_scales_at_the_ends_of_the_grid():
    keep = torch.zeros(4, 8, dtype=torch.bool)
    empty = GroupSparseMatrix.from_dense(torch.randn(4, 128), keep)
    linear = GroupSparseLinear(empty, None, torch.device("cpu"))
    assert (linear.dense() == 0).all()
    linear = GroupSparseLinear(random_matrix(4, 128), None, torch.device("cpu"))
    with torch.no_grad():
        linear.log_scale[0], linear.log_scale[1] = -100.0, 100.0
        linear.zero[0], linear.zero[1] = -3.0, 7.0
    linear.matrix().validate()
