"""Which groups are kept."""

import torch

from vllm_gqsa.format import parse_pattern

__all__ = ["choose_groups"]


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


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    order = scores.argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(1, order[:, :count], value=True)
