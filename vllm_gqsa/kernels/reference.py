"""The reference kernel: expand the weight, then multiply. Every other kernel is compared with it."""

import torch
import torch.nn.functional as F

from vllm_gqsa.format import GroupSparseMatrix

__all__ = ["linear_reference"]


def linear_reference(x: torch.Tensor, weight: GroupSparseMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply by the dequantised weight, on any device and without waiting for it.

    Args:
        x: floating point ``[..., K]``, any strides, any leading dimensions, also none or zero rows.
        weight: ``[N, K]``, on the device of ``x``.
        bias: ``[N]`` in the dtype of ``x``.

    Returns:
        ``[..., N]`` in the dtype of ``x``; bit for bit what ``F.linear`` gives for the dense weight rounded to
        that dtype.
    """
    return F.linear(x, weight.to_dense(x.dtype), bias)
