"""Which groups are kept."""

from collections.abc import Iterable, Sequence

import torch

from vllm_gqsa.format import parse_pattern

__all__ = ["FLOOR", "choose_across", "choose_groups", "share_budget"]

FLOOR = 0.4
"""Share of the mean density that each matrix keeps at least, where several share a budget."""
_OCTAVES, _FINE = 256, 64  # of a histogram of importances: all of float32's range, in bins of a 64th of an octave


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


def share_budget(importances: Iterable[torch.Tensor], sparsity: float, floor: float) -> list[float]:
    """What :func:`choose_across` would leave of each matrix, with one matrix in memory at a time.

    Args:
        importances: as there.
        sparsity: as there, below 1.
        floor: as there, below 1.

    Returns:
        The density of each matrix.
    """
    counts = torch.stack([_histogram(importance) for importance in importances]).double()
    least = floor * (1 - sparsity) * counts.sum(1, keepdim=True)
    # What each matrix keeps if all groups down to a bin are kept.
    kept = torch.cat([least, counts.cumsum(1).clamp(min=least)], 1)
    wanted = (1 - sparsity) * counts.sum()
    last = int((kept.sum(0) < wanted).sum())
    before, after = kept[:, last - 1], kept[:, last]
    share = (wanted - before.sum()) / (after.sum() - before.sum())
    return ((before + share * (after - before)) / counts.sum(1)).tolist()


def _histogram(importance: torch.Tensor) -> torch.Tensor:
    """Numbers of groups, from the most important to the least; what is not finite is refused where it is compressed."""
    place = (_OCTAVES / 2 - importance.flatten().nan_to_num().log2()).mul(_FINE).clamp(0, _OCTAVES * _FINE - 1)
    return place.long().bincount(minlength=_OCTAVES * _FINE).cpu()


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Not by sorting: a model has millions of groups.
    least = scores.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    more, equal = scores > least, scores == least
    return more | (equal & (equal.cumsum(1) <= count - more.sum(1, keepdim=True)))
