"""Which groups are kept."""

from collections.abc import Sequence

import torch

from vllm_gqsa.format import parse_pattern

__all__ = ["choose_across", "choose_groups"]


def choose_groups(importance: torch.Tensor, sparsity: float, pattern: str) -> torch.Tensor:
    """Keep the most important groups; of equal ones the first.

    Args:
        importance: ``[N, S]``.
        sparsity: share of groups to prune (``row``, ``matrix``).
        pattern: ``row``: every row keeps the same number; ``matrix``: one budget for all rows;
            ``n:m``: n of every m adjacent groups.

    Returns:
        bool ``[N, S]``, true where a group is kept.

    Raises:
        ValueError: m does not divide S.
    """
    rows, groups = importance.shape
    if pattern == "row":
        return _top(importance, round(groups * (1 - sparsity)))
    if pattern == "matrix":
        return _top(importance.reshape(1, -1), round(rows * groups * (1 - sparsity))).view(rows, groups)
    n, m = parse_pattern(pattern)
    if groups % m:
        raise ValueError(f"pattern {pattern} needs a multiple of {m} groups in a row, there are {groups}")
    return _top(importance.view(-1, m), n).view(rows, groups)


def choose_across(importances: Sequence[torch.Tensor], sparsity: float, floor: float) -> list[torch.Tensor]:
    """Keep the most important groups of several matrices, one budget for all; of equal ones the first.

    Args:
        importances: ``[N, S]`` of each matrix, comparable with each other.
        sparsity: share of groups to prune, of all.
        floor: share of the mean density that each matrix keeps at least.

    Returns:
        bool ``[N, S]`` for each, true where a group is kept.
    """
    density = 1 - sparsity
    safe = [choose_groups(importance, 1 - floor * density, "matrix") for importance in importances]
    scores = torch.cat([i.masked_fill(s, torch.inf).flatten() for i, s in zip(importances, safe, strict=True)])
    keep = _top(scores[None], round(len(scores) * density))[0]
    parts = keep.split([importance.numel() for importance in importances])
    return [part.view_as(importance) for part, importance in zip(parts, importances, strict=True)]


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Not by sorting: a model has millions of groups.
    least = scores.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    more, equal = scores > least, scores == least
    return more | (equal & (equal.cumsum(1) <= count - more.sum(1, keepdim=True)))
