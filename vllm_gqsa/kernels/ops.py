"""The one op that models call, ``gqsa::linear``: functional and opaque to torch.compile.

The choice of kernel lies behind the op, never in front of it: a branch on the number of tokens in Python would be
traced once and baked into the compiled model.
"""

import torch

from vllm_gqsa.kernels.cpu import PackedMatrix, linear_cpu
from vllm_gqsa.kernels.cuda import linear_cuda
from vllm_gqsa.kernels.layouts import Matrix, check_use, layout_of, rebuild
from vllm_gqsa.kernels.reference import linear_reference
from vllm_gqsa.kernels.registry import register
from vllm_gqsa.kernels.slab import SlabMatrix

__all__ = ["linear"]

_NAME = "gqsa::linear"
_SCHEMA = "(Tensor x, Tensor[] weight, str layout, int in_features, int group_size, Tensor? bias=None) -> Tensor"


def _linear(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    layout: str,
    in_features: int,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    if x.shape[-1] != in_features:
        raise ValueError(f"{_NAME}: x has {x.shape[-1]} features, the weight has {in_features}")
    matrix = rebuild(weight, layout, in_features, group_size)
    check_use(_NAME, x, matrix)
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (matrix.out_features,)):
        raise ValueError(
            f"{_NAME}: bias is {bias.dtype} {list(bias.shape)}, it must be {x.dtype} [{matrix.out_features}]"
        )
    if isinstance(matrix, PackedMatrix):
        return linear_cpu(x, matrix, bias)
    if isinstance(matrix, SlabMatrix):
        return linear_cuda(x, matrix, bias)
    return linear_reference(x, matrix, bias)


def _linear_fake(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    layout: str,
    in_features: int,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    # crow_indices comes first in every layout.
    return x.new_empty((*x.shape[:-1], weight[0].shape[0] - 1))


register(_NAME, _SCHEMA, _linear, _linear_fake)


def linear(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Call ``gqsa::linear`` with the tensors of a matrix.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``.
        weight: ``[N, K]`` on the device of ``x``, trusted: validate what comes from a file. What
            :func:`vllm_gqsa.kernels.prepare` returns is fast, a matrix in the checkpoint's order goes through the torch
            reference.
        bias: ``[N]`` in the dtype of ``x``.

    Returns:
        ``[..., N]`` in the dtype of ``x``, contiguous, never an alias of an input.

    Raises:
        ValueError: the last dimension of ``x`` is not K, ``x`` is on another device than ``weight``, or ``bias`` is not
            ``[N]`` in the dtype of ``x``.
        RuntimeError: a gradient is wanted through what :func:`vllm_gqsa.kernels.prepare` returned.
    """
    tensors = list(weight.tensors().values())
    result: torch.Tensor = torch.ops.gqsa.linear(
        x, tensors, layout_of(weight), weight.in_features, weight.group_size, bias
    )
    return result
