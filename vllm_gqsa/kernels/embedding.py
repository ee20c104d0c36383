"""The op ``gqsa::embedding``: rows of a group-sparse INT4 weight, expanded as they are looked up.

An embedding table that is tied to lm_head lies in memory once, compressed; the lookup expands the rows of the tokens
at hand and no others: by the native kernels where the table was packed for them, else by torch, on any device and
without waiting for it. Importing this file registers the op.
"""

from dataclasses import replace

import torch

from vllm_gqsa.format import GroupSparseMatrix, unpack_bitmap
from vllm_gqsa.kernels.cpu import PackedMatrix
from vllm_gqsa.kernels.cuda import look_up
from vllm_gqsa.kernels.layouts import Matrix, check_use, layout_of, rebuild
from vllm_gqsa.kernels.registry import register
from vllm_gqsa.kernels.slab import SlabMatrix

__all__ = ["embedding"]

_NAME = "gqsa::embedding"
_SCHEMA = "(Tensor ids, Tensor[] weight, str layout, int in_features, int group_size, ScalarType dtype) -> Tensor"


def _embedding(
    ids: torch.Tensor,
    weight: list[torch.Tensor],
    layout: str,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    matrix = rebuild(weight, layout, in_features, group_size)
    check_use(_NAME, ids, matrix)
    if ids.device.type == "cpu" and ids.numel() and not (ids.min() >= 0 and ids.max() < matrix.out_features):
        found = f"{int(ids.min())}..{int(ids.max())}"
        raise IndexError(f"{_NAME}: ids {found} are outside 0..{matrix.out_features - 1}")
    if isinstance(matrix, PackedMatrix):
        return matrix.look_up(ids, dtype)
    if isinstance(matrix, SlabMatrix):
        return look_up(ids, matrix, dtype)
    return _embedding_reference(ids, matrix, dtype)


def _embedding_reference(ids: torch.Tensor, weight: GroupSparseMatrix, dtype: torch.dtype) -> torch.Tensor:
    shape = (*ids.shape, weight.in_features)
    if not weight.nnz:
        return torch.zeros(shape, dtype=dtype, device=ids.device)
    is_row = (ids >= 0) & (ids < weight.out_features)
    rows = ids.where(is_row, 0).flatten()
    keep = unpack_bitmap(weight.group_mask[rows])[:, : weight.groups_per_row]  # [M, S]
    # As in to_dense: every place takes the last kept group so far, of its row or before, and pruned ones are blanked.
    source = (weight.crow_indices[rows, None] + keep.cumsum(1) - 1).clamp_(min=0).flatten()
    groups = replace(weight, qweight=weight.qweight[source], scale_zero=weight.scale_zero[source]).dequantize_groups()
    found = groups.masked_fill_(~keep.reshape(-1, 1), 0).to(dtype).view(shape)
    return found.masked_fill_(~is_row[..., None], float("nan"))


def _embedding_fake(
    ids: torch.Tensor,
    weight: list[torch.Tensor],
    layout: str,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return ids.new_empty((*ids.shape, in_features), dtype=dtype)


register(_NAME, _SCHEMA, _embedding, _embedding_fake)


def embedding(ids: torch.Tensor, weight: Matrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Call ``gqsa::embedding`` with the tensors of a matrix.

    Args:
        ids: int64 or int32, any shape, also empty; rows of ``weight``.
        weight: ``[N, K]`` on the device of ``ids``, as for :func:`vllm_gqsa.kernels.linear`.
        dtype: of the result.

    Returns:
        ``[*ids.shape, K]``, contiguous; bit for bit what ``F.embedding`` gives for the dense weight rounded to
        ``dtype``.

    Raises:
        IndexError: an id is no row of ``weight``. On a GPU, where nobody waits to see it, its result is NaN instead.
        ValueError: ``ids`` is on another device than ``weight``.
    """
    result: torch.Tensor = torch.ops.gqsa.embedding(
        ids, list(weight.tensors().values()), layout_of(weight), weight.in_features, weight.group_size, dtype
    )
    return result
