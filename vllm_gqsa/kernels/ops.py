"""The one op that models call, ``gqsa::linear``: functional and opaque to torch.compile.

The choice of kernel lies behind the op, never in front of it: a branch on the number of tokens in Python would be
traced once and baked into the compiled model.
"""

from collections.abc import Mapping

import torch

from vllm_gqsa.format import TENSORS, GroupSparseMatrix
from vllm_gqsa.kernels import native
from vllm_gqsa.kernels.cpu import PackedMatrix, linear_cpu
from vllm_gqsa.kernels.reference import linear_reference
from vllm_gqsa.kernels.registry import register

__all__ = ["linear", "prepare", "restore"]

_NAME = "gqsa::linear"
_SCHEMA = (
    "(Tensor x, Tensor crow_indices, Tensor group_mask, Tensor qweight, Tensor scale_zero, "
    "int in_features, int group_size, Tensor? bias=None) -> Tensor"
)


def _linear(
    x: torch.Tensor,
    crow_indices: torch.Tensor,
    group_mask: torch.Tensor,
    qweight: torch.Tensor,
    scale_zero: torch.Tensor,
    in_features: int,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    if x.shape[-1] != in_features:
        raise ValueError(f"{_NAME}: x has {x.shape[-1]} features, the weight has {in_features}")
    tensors = (crow_indices, group_mask, qweight, scale_zero)
    # Packed for the CPU kernels, or as in a checkpoint: the dtype of the codes tells.
    if qweight.dtype == torch.int16:
        return linear_cpu(x, PackedMatrix(*tensors, in_features, group_size), bias)
    return linear_reference(x, GroupSparseMatrix(*tensors, in_features, group_size), bias)


def _linear_fake(
    x: torch.Tensor,
    crow_indices: torch.Tensor,
    group_mask: torch.Tensor,
    qweight: torch.Tensor,
    scale_zero: torch.Tensor,
    in_features: int,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], crow_indices.shape[0] - 1))


register(_NAME, _SCHEMA, _linear, _linear_fake)


def prepare(weight: GroupSparseMatrix) -> GroupSparseMatrix | PackedMatrix:
    """A matrix laid out for the fastest kernel on its device: what to keep in place of ``weight``.

    On a CPU whose native kernels were built, a copy in their order. Anywhere else ``weight`` itself, for the torch
    reference; where that is for want of a library, a warning says so once.

    Args:
        weight: valid.
    """
    if weight.qweight.device.type == "cpu" and native.available():
        return PackedMatrix.pack(weight)
    return weight


def restore(tensors: Mapping[str, torch.Tensor], in_features: int, group_size: int) -> GroupSparseMatrix:
    """The matrix that :func:`prepare` was given, from the tensors of what it returned."""
    kind = PackedMatrix if tensors["qweight"].dtype == torch.int16 else GroupSparseMatrix
    weight = kind(**{name: tensors[name] for name in TENSORS}, in_features=in_features, group_size=group_size)
    return weight.unpack() if isinstance(weight, PackedMatrix) else weight


def linear(x: torch.Tensor, weight: GroupSparseMatrix | PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Call ``gqsa::linear`` with the four tensors of a matrix.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``.
        weight: ``[N, K]`` on the device of ``x``, trusted: validate what comes from a file. What :func:`prepare`
            returns is fast, a matrix in the checkpoint's order goes through the torch reference.
        bias: ``[N]`` in the dtype of ``x``.

    Returns:
        ``[..., N]`` in the dtype of ``x``, contiguous, never an alias of an input.

    Raises:
        ValueError: the last dimension of ``x`` is not K.
    """
    result: torch.Tensor = torch.ops.gqsa.linear(
        x, *weight.tensors().values(), weight.in_features, weight.group_size, bias
    )
    return result
