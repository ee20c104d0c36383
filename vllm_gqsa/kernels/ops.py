"""The one op that models call, ``gqsa::linear``: functional and opaque to torch.compile.

The choice of kernel lies behind the op, never in front of it: a branch on the number of tokens in Python would be
traced once and baked into the compiled model.
"""

import torch

from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.kernels.reference import linear_reference

__all__ = ["linear"]

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
    weight = GroupSparseMatrix(crow_indices, group_mask, qweight, scale_zero, in_features, group_size)
    return linear_reference(x, weight, bias)


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


def _register() -> None:
    # A second import of this file (reload, a test that clears sys.modules) finds the op in place.
    if hasattr(torch.ops.gqsa, "linear"):
        return
    torch.library.define(_NAME, _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(_NAME, "default", _linear)
    torch.library.register_fake(_NAME, _linear_fake)


_register()


def linear(x: torch.Tensor, weight: GroupSparseMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Call ``gqsa::linear`` with the four tensors of a matrix.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``.
        weight: ``[N, K]`` on the device of ``x``, trusted: validate what comes from a file.
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
