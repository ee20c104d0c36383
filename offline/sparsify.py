"""One linear, dense to group-sparse INT4, without training."""

from concurrent.futures import ThreadPoolExecutor

import torch

from vllm_gqsa.format import GroupSparseMatrix, choose_grid
from vllm_gqsa.offline.importance import InverseHessian, group_importance
from vllm_gqsa.offline.mask import choose_groups
from vllm_gqsa.offline.recipe import Recipe

__all__ = ["CHUNK", "compensated", "sparsify"]

_ROWS = 512
"""Rows a thread takes at a time; fixed, so that the result does not depend on the number of threads."""
_SPAN = 128
"""Columns between two updates of all later columns (a multiple of every group size)."""
CHUNK = 1 << 24
"""Weights worked on at a time: an output head has a hundred thousand rows, which do not depend on each other."""


def sparsify(
    weight: torch.Tensor, inverse: InverseHessian, recipe: Recipe, gradient_square: torch.Tensor | None = None
) -> GroupSparseMatrix:
    """Choose the groups to keep and quantise them.

    Args:
        weight: floating point ``[N, K]``, on any device.
        inverse: of the linear's input, ``K`` wide, on the device that computes.
        recipe: sparsity, pattern, importance, group size, compensation.
        gradient_square: see :func:`vllm_gqsa.offline.importance.group_importance`.

    Returns:
        The matrix, on the CPU.

    Raises:
        ValueError: the weight is not finite, or pattern or group size do not fit its shape.
    """
    chunks = weight.split(max(1, CHUNK // weight.shape[1]))
    squares = [None] * len(chunks) if gradient_square is None else gradient_square.split(chunks[0].shape[0])
    pairs = zip(chunks, squares, strict=True)
    scores = torch.cat([_scores(chunk, inverse, recipe, square) for chunk, square in pairs])
    keep = choose_groups(scores, recipe.sparsity, recipe.pattern)
    parts = zip(chunks, keep.split(chunks[0].shape[0]), strict=True)
    return GroupSparseMatrix.concat([_quantised(chunk, kept, inverse, recipe).to("cpu") for chunk, kept in parts])


def _alive(weight: torch.Tensor, inverse: InverseHessian) -> torch.Tensor:
    """A float32 copy on the device of the Hessian, without the weights of dead inputs."""
    weight = weight.to(inverse.upper.device, torch.float32, copy=True)
    weight[:, inverse.dead] = 0
    return weight


def _scores(
    weight: torch.Tensor, inverse: InverseHessian, recipe: Recipe, gradient_square: torch.Tensor | None
) -> torch.Tensor:
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds infinite or NaN values")
    return group_importance(_alive(weight, inverse), inverse, recipe.group_size, recipe.importance, gradient_square)


def _quantised(weight: torch.Tensor, keep: torch.Tensor, inverse: InverseHessian, recipe: Recipe) -> GroupSparseMatrix:
    if not recipe.compensate:
        return GroupSparseMatrix.from_dense(_alive(weight, inverse), keep, recipe.group_size)
    return compensated(_alive(weight, inverse), keep, inverse.upper, recipe.group_size)


def compensated(weight: torch.Tensor, keep: torch.Tensor, upper: torch.Tensor, group_size: int) -> GroupSparseMatrix:
    """Prune and quantise column by column, later columns taking up the error of earlier ones.

    The order and the update are those of GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774), for a mask
    that is given. A group's scale and zero point are fixed when its first column is reached.

    Args:
        weight: float32 ``[N, K]``; used up.
        keep: bool ``[N, K / G]``.
        upper: U of :class:`InverseHessian`, ``[K, K]``.
        group_size: G.
    """
    if weight.device.type == "cpu":
        # Rows do not depend on each other. A few hundred stay in a core's cache, and hundreds of tiny steps
        # on one thread each are many times faster than each step spread over all threads.
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            done = list(
                pool.map(
                    lambda rows, kept: _quantise_rows(rows, kept, upper, group_size),
                    weight.split(_ROWS),
                    keep.split(_ROWS),
                )
            )
    else:
        done = [_quantise_rows(weight, keep, upper, group_size)]
    codes, scales, zeros = (torch.cat(column) for column in zip(*done, strict=True))
    return GroupSparseMatrix.from_codes(codes, scales, zeros, keep)


def _quantise_rows(
    weight: torch.Tensor, keep: torch.Tensor, upper: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``[nnz, G]``, scales and zero points ``[nnz]`` of some rows; see :func:`compensated`."""
    rows, columns = weight.shape
    groups = columns // group_size
    codes = torch.zeros(groups, rows, group_size, dtype=torch.uint8, device=weight.device)
    scales = torch.zeros(groups, rows, device=weight.device)
    zeros = torch.zeros(groups, rows, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, _SPAN):
        stop = min(start + _SPAN, columns)
        # Columns as rows of a contiguous copy: every step below then touches contiguous memory.
        span = weight[:, start:stop].T.contiguous()
        factor = upper[start:stop, start:stop]
        errors = torch.empty_like(span)
        for first in range(0, stop - start, group_size):
            g = (start + first) // group_size
            kept = keep[:, g].float()
            scales[g], zeros[g] = choose_grid(span[first : first + group_size].T)
            scale, zero = scales[g], zeros[g].float()
            for j in range(first, first + group_size):
                code = (span[j] / scale).round_().add_(zero).clamp_(0, 15)
                codes[g, :, j - first] = code.to(torch.uint8)
                quantised = code.sub_(zero).mul_(scale).mul_(kept)
                torch.sub(span[j], quantised, out=errors[j]).div_(factor[j, j])
                span[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        weight[:, stop:].addmm_(errors.T, upper[start:stop, stop:], alpha=-1)
    return codes.transpose(0, 1)[keep], scales.T[keep], zeros.T[keep]
