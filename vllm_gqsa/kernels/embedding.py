"""The op ``gqsa::embedding``: rows of a group-sparse INT4 weight, expanded as they are looked up.

An embedding table that is tied to lm_head lies in memory once, compressed; the lookup expands the rows of the tokens
at hand and no others: by the native kernels where the table was packed for them, else by torch, on any device and
without waiting for it. Importing this file registers the op.
"""

import torch

from vllm_gqsa.format import GroupSparseMatrix, unpack_bitmap
from vllm_gqsa.kernels.cpu import PackedMatrix
from vllm_gqsa.kernels.registry import register

__all__ = ["embedding"]

_NAME = "gqsa::embedding"
_SCHEMA = (
    "(Tensor ids, Tensor crow_indices, Tensor group_mask, Tensor qweight, Tensor scale_zero, "
    "int in_features, int group_size, ScalarType dtype) -> Tensor"
)


def _embedding(
    ids: torch.Tensor,
    crow_indices: torch.Tensor,
    group_mask: torch.Tensor,
    qweight: torch.Tensor,
    scale_zero: torch.Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    if qweight.dtype == torch.int16:
        packed = PackedMatrix(crow_indices, group_mask, qweight, scale_zero, in_features, group_size)
        return packed.look_up(ids, dtype)
    shape = (*ids.shape, in_features)
    if not qweight.shape[0]:
        return torch.zeros(shape, dtype=dtype, device=ids.device)
    rows = ids.flatten()
    keep = unpack_bitmap(group_mask[rows])[:, : in_features // group_size]  # [M, S]
    # As in to_dense: every place takes the last kept group so far, of its row or before, and pruned ones are blanked.
    source = (crow_indices[rows, None] + keep.cumsum(1) - 1).clamp_(min=0).flatten()
    groups = GroupSparseMatrix(
        crow_indices, group_mask, qweight[source], scale_zero[source], in_features, group_size
    ).dequantize_groups()
    return groups.masked_fill_(~keep.reshape(-1, 1), 0).to(dtype).view(shape)


def _embedding_fake(
    ids: torch.Tensor,
    crow_indices: torch.Tensor,
    group_mask: torch.Tensor,
    qweight: torch.Tensor,
    scale_zero: torch.Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return ids.new_empty((*ids.shape, in_features), dtype=dtype)


register(_NAME, _SCHEMA, _embedding, _embedding_fake)


def embedding(
    ids: torch.Tensor, weight: GroupSparseMatrix | PackedMatrix, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Call ``gqsa::embedding`` with the four tensors of a matrix.

    Args:
        ids: int64 or int32, any shape, also empty; rows of ``weight``.
        weight: ``[N, K]`` on the device of ``ids``, as for :func:`vllm_gqsa.kernels.linear`.
        dtype: of the result.

    Returns:
        ``[*ids.shape, K]``, contiguous; bit for bit what ``F.embedding`` gives for the dense weight rounded to
        ``dtype``.

    Raises:
        IndexError: an id is no row of ``weight``; not noticed on a GPU, as with ``F.embedding``.
    """
    result: torch.Tensor = torch.ops.gqsa.embedding(
        ids, *weight.tensors().values(), weight.in_features, weight.group_size, dtype
    )
    return result
