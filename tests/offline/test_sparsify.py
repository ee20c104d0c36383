"""Importance, mask and compensation against definitions computed the slow way."""

import pytest
import torch

from vllm_gqsa.format import GroupSparseMatrix, quantize_groups
from vllm_gqsa.offline import sparsify as module
from vllm_gqsa.offline.importance import HessianSum, InverseHessian, group_importance
from vllm_gqsa.offline.mask import choose_across, choose_groups, share_budget
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.sparsify import compensated, sparsify

ROWS, COLUMNS, GROUP = 24, 256, 16


@pytest.fixture
def inputs():
    """Correlated inputs: what makes compensation worth anything."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5 + torch.eye(COLUMNS)
    return torch.randn(4096, COLUMNS, generator=generator) @ mix


@pytest.fixture
def weight():
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def inverse(inputs):
    total = HessianSum(COLUMNS, torch.device("cpu"))
    for part in inputs.view(4, 2, 512, COLUMNS):
        total.add(part)
    return InverseHessian.of(total.hessian(), 0.01)


def output_error(matrix, weight, inputs):
    return ((matrix.to_dense() - weight) @ inputs.T).square().mean().item()


def test_the_hessian_is_its_definition(inputs):
    total = HessianSum(COLUMNS, torch.device("cpu"))
    total.add(inputs[:1000].view(10, 100, COLUMNS))
    total.add(inputs[1000:])
    x = inputs.double()
    assert torch.allclose(total.hessian().double(), 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-4)


def test_the_inverse_and_its_factor(inputs, inverse):
    x = inputs.double()
    hessian = 2 * x.T @ x / len(x)
    damped = hessian + torch.eye(COLUMNS) * 0.01 * hessian.diagonal().mean()
    assert torch.allclose(inverse.inverse.double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-5)
    assert torch.allclose(inverse.upper.T @ inverse.upper, inverse.inverse, rtol=1e-4, atol=1e-6)
    assert not inverse.upper.tril(-1).any()


def test_block_obs_is_the_loss_of_removing_the_group_when_the_rest_adapts(inputs, inverse, weight):
    scores = group_importance(weight, inverse, GROUP, "block-obs")
    hessian = torch.linalg.inv(inverse.inverse.double())
    row, group = 3, 5
    gone = slice(group * GROUP, (group + 1) * GROUP)
    rest = torch.ones(COLUMNS, dtype=torch.bool)
    rest[gone] = False
    # The best change of the other weights, by the normal equations, and its quadratic loss.
    delta = torch.zeros(COLUMNS, dtype=torch.float64)
    delta[gone] = -weight[row, gone].double()
    delta[rest] = torch.linalg.solve(hessian[rest][:, rest], -hessian[rest][:, gone] @ delta[gone])
    assert scores[row, group].item() == pytest.approx((delta @ hessian @ delta).item(), rel=1e-3)


def test_obs_and_wanda_are_their_formulas(inverse, weight):
    for formula, factor in (("obs", 1 / inverse.inverse.diagonal()), ("wanda", inverse.hessian_diagonal)):
        scores = group_importance(weight, inverse, GROUP, formula)
        expected = [(weight[2, 16:32] ** 2 * factor[16:32]).sum().item()]
        assert scores[2, 1].item() == pytest.approx(expected[0], rel=1e-5)


def test_kfac_is_obs_times_the_gradients_of_the_outputs(inverse, weight):
    squares = torch.rand(ROWS, generator=torch.Generator().manual_seed(0))
    plain = group_importance(weight, inverse, GROUP, "obs")
    torch.testing.assert_close(group_importance(weight, inverse, GROUP, "kfac", squares), plain * squares[:, None])
    recipe = Recipe(sparsity=0.5, pattern="matrix", importance="kfac")
    kept = sparsify(weight, inverse, recipe, squares).keep()
    assert torch.equal(kept, choose_groups(plain * squares[:, None], 0.5, "matrix"))


def test_dead_inputs_get_no_weight(inputs, weight):
    inputs = inputs.clone()
    inputs[:, 7] = 0
    total = HessianSum(COLUMNS, torch.device("cpu"))
    total.add(inputs)
    inverse = InverseHessian.of(total.hessian(), 0.01)
    assert inverse.dead.nonzero().item() == 7
    matrix = sparsify(weight, inverse, Recipe(sparsity=0.0))
    assert not matrix.to_dense()[:, 7].any()


def test_hessians_that_cannot_be_inverted_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        InverseHessian.of(torch.full((4, 4), float("inf")), 0.01)
    with pytest.raises(ValueError, match="not positive definite"):
        InverseHessian.of(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), 0.01)


@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4", "1:8"])
def test_masks_keep_the_best_within_their_scope(pattern):
    scores = torch.rand(10, 16, generator=torch.Generator().manual_seed(0))
    keep = choose_groups(scores, 0.25, pattern)
    units = {"row": (10, 16, 12), "matrix": (1, 160, 120), "2:4": (40, 4, 2), "1:8": (20, 8, 1)}[pattern]
    counts, values, mask = units[2], scores.view(units[:2]), keep.view(units[:2])
    assert (mask.sum(1) == counts).all()
    for value, kept in zip(values, mask, strict=True):
        assert value[kept].min() >= value[~kept].max()


@pytest.mark.parametrize("count", [0, 1, 7, 29, 30])
def test_of_equal_groups_the_first_are_kept(count):
    scores = torch.randint(0, 5, (40, 30), generator=torch.Generator().manual_seed(0)).float()
    keep = choose_groups(scores, 1 - count / 30, "row")
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    assert torch.equal(keep, torch.zeros_like(keep).scatter_(1, order, value=True))


def test_one_budget_for_several_matrices():
    generator = torch.Generator().manual_seed(0)
    scores = [factor * torch.rand(10, 16, generator=generator) for factor in (1e-3, 1.0, 1.5)]
    masks = choose_across(scores, 0.5, floor=0.4)
    counts = [int(mask.sum()) for mask in masks]
    assert sum(counts) == 240
    assert counts[0] == 32  # 0.4 of half
    assert counts[1] < counts[2]
    for score, mask in zip(scores, masks, strict=True):
        assert score[mask].min() > score[~mask].max()
    dropped = max(float(score[~mask].max()) for score, mask in zip(scores[1:], masks[1:], strict=True))
    assert dropped < min(float(score[mask].min()) for score, mask in zip(scores[1:], masks[1:], strict=True))


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.9])
def test_shares_of_one_budget_are_what_its_masks_keep(sparsity):
    generator = torch.Generator().manual_seed(0)
    scores = [10.0**e * torch.rand(n, 64, generator=generator) ** 4 for e, n in ((-20, 9), (-12, 40), (-12.5, 77))]
    scores.append(torch.zeros(3, 64))  # of an expert that was never chosen
    shares = share_budget(iter(scores), sparsity, floor=0.4)
    masks = choose_across(scores, sparsity, floor=0.4)
    for share, mask in zip(shares, masks, strict=True):
        assert abs(share - float(mask.float().mean())) < 0.01
    total = sum(share * score.numel() for share, score in zip(shares, scores, strict=True))
    assert total == pytest.approx((1 - sparsity) * sum(score.numel() for score in scores))


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_one_budget_at_its_ends(sparsity):
    masks = choose_across([torch.ones(2, 4), torch.rand(3, 5)], sparsity, floor=0.4)
    assert all((mask == (sparsity == 0.0)).all() for mask in masks)


def test_a_pattern_that_does_not_divide_the_row_is_refused():
    with pytest.raises(ValueError, match="multiple of 8 groups in a row, there are 12"):
        choose_groups(torch.rand(2, 12), 0.5, "4:8")


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5])
def test_compensation_lowers_the_error_of_the_output(inputs, inverse, weight, sparsity):
    plain = sparsify(weight, inverse, Recipe(sparsity=sparsity, compensate=False))
    better = sparsify(weight, inverse, Recipe(sparsity=sparsity))
    assert torch.equal(plain.keep(), better.keep())
    better.validate()
    assert output_error(better, weight, inputs) < 0.9 * output_error(plain, weight, inputs)


def test_compensation_is_gptq_as_written_in_its_paper(inverse, weight):
    """Element by element with the explicit inverse, one row, no blocking."""
    keep = torch.rand(ROWS, COLUMNS // GROUP, generator=torch.Generator().manual_seed(3)) < 0.6
    matrix = compensated(weight.clone(), keep, inverse.upper, GROUP)
    row = 4
    w, h = weight[row].double().clone(), inverse.inverse.double().clone()
    expected = torch.zeros(COLUMNS, dtype=torch.float64)
    for j in range(COLUMNS):
        if j % GROUP == 0:
            _, scale, zero = quantize_groups(w[j : j + GROUP].float()[None])
        if keep[row, j // GROUP]:
            code = (torch.round(w[j].float() / scale) + zero).clamp(0, 15)
            expected[j] = (scale * (code - zero)).item()
        error = (w[j] - expected[j]) / h[j, j]
        w[j:] -= error * h[j, j:]
        h -= torch.outer(h[:, j], h[j]) / h[j, j]
    same = (matrix.to_dense()[row].double() - expected).abs() < 1e-6
    # Ties of rounding may fall differently in float32; nearly all weights must agree.
    assert same.float().mean() > 0.97


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": "matrix"},
        {"compensate": False},
        {"importance": "block-obs"},
        {"pattern": "matrix", "importance": "kfac"},
    ],
)
def test_a_large_weight_is_compressed_in_parts_as_it_is_whole(inverse, weight, monkeypatch, changes):
    recipe = Recipe(sparsity=0.25, **changes)
    squares = torch.rand(ROWS, generator=torch.Generator().manual_seed(0)) if recipe.importance == "kfac" else None
    whole = sparsify(weight, inverse, recipe, squares)
    monkeypatch.setattr(module, "CHUNK", 10 * COLUMNS)
    parts = sparsify(weight, inverse, recipe, squares)
    parts.validate("parts", (ROWS, COLUMNS))
    assert torch.equal(parts.keep(), whole.keep())
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=1e-3, atol=1e-3)


def test_a_weight_that_is_not_finite_is_refused(inverse, weight):
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="infinite or NaN"):
        sparsify(weight, inverse, Recipe())


def test_pruned_groups_are_exactly_zero(inverse, weight):
    matrix = sparsify(weight, inverse, Recipe(sparsity=0.5))
    assert isinstance(matrix, GroupSparseMatrix)
    groups = matrix.to_dense().view(ROWS, -1, GROUP)
    assert not groups[~matrix.keep()].any()
    assert matrix.sparsity == 0.5


def test_a_linear_that_no_token_reached_is_pruned_by_magnitude():
    # As an expert that the calibration text never chose.
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    inverse = InverseHessian.of(HessianSum(64, torch.device("cpu")).hessian(), 0.01)
    matrix = sparsify(weight, inverse, Recipe(sparsity=0.5))
    sizes = weight.view(8, 4, 16).square().sum(-1)
    assert torch.equal(matrix.keep(), sizes >= sizes.topk(2).values[:, 1:])
    kept = matrix.keep().repeat_interleave(16, 1)
    assert (matrix.to_dense() - weight * kept).abs().max() < 0.3
