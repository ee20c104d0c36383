"""The fake quantiser: the format's INT4 grid, with gradients that pass straight through the rounding."""

from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from vllm_gqsa.format import GroupSparseMatrix, choose_grid, decode_scale_zero, round_scale, unpack_nibbles
from vllm_gqsa.offline.importance import curvature_importance
from vllm_gqsa.offline.mask import choose_groups

__all__ = ["GroupSparseLinear", "MaskedLinear", "TrainedLinear", "fake_quantize"]

_ZERO_RANGE = 15.0
"""Zero points are learnt as shares of it."""


class _FakeQuantize(torch.autograd.Function):
    """Saves the four inputs alone: composed of autograd's own steps it would keep five tensors of their size."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        weight: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale, zero)
        codes, zeros = _codes(weight, scale, zero)
        return codes.sub_(zeros).mul_(scale[:, None])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401
        grad: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight, scale, zero = ctx.saved_tensors
        ratio = weight / scale[:, None]
        zeros = zero.round().clamp_(0, 15)
        unclamped = ratio.round().add_(zeros[:, None])
        # The gradient where nothing was clamped, else 0; with a mask of booleans it takes three times as long on a CPU.
        to_weight = torch.ops.aten.hardtanh_backward(grad, unclamped, -0.5, 15.5)
        total = grad.sum(-1)
        of_codes = unclamped.clamp_(0, 15).mul_(grad).sum(-1)
        to_scale = of_codes.sub_(zeros * total).sub_(ratio.mul_(to_weight).sum(-1))
        outside = total.sub_(to_weight.sum(-1))
        in_range = (zero.round() >= 0) & (zero.round() <= 15)
        return to_weight, to_scale, -scale * outside * in_range


def _codes(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    zeros = zero.round().clamp_(0, 15)[:, None]
    return (weight / scale[:, None]).round_().add_(zeros).clamp_(0, 15), zeros


def fake_quantize(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Round to INT4 and back; the backward pass takes every rounding for the identity, and clamping as it is.

    Args:
        weight: float32 ``[nnz, G]``.
        scale: float32 ``[nnz]``, positive.
        zero: float32 ``[nnz]``, rounded and clamped to 0..15 here.

    Returns:
        ``scale * (clamp(round(weight / scale) + zero, 0, 15) - zero)``, float32 ``[nnz, G]``.
    """
    return cast("torch.Tensor", _FakeQuantize.apply(weight, scale, zero))


class _RoundScale(torch.autograd.Function):
    """The format's scale grid, straight through."""

    @staticmethod
    def forward(_ctx: Any, scale: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        return round_scale(scale)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        return grad


class GroupSparseLinear(nn.Module):
    """A linear in training: the kept groups alone are parameters, what it multiplies by lies on the format's grid.

    A pruned group has no parameter, so it is exactly 0 whatever the optimiser does. Scales are learnt as logarithms
    and zero points as shares of their range: a learning rate then means the same for every layer and model.

    Attributes:
        weight: float32 ``[nnz, G]``, the kept weights before rounding; None where the codes are frozen.
        log_scale: float32 ``[nnz]``, natural logarithm.
        zero: float32 ``[nnz]``, zero point / 15, before rounding.
        bias: as in the dense linear, or None.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        matrix: GroupSparseMatrix,
        bias: nn.Parameter | None,
        device: torch.device,
        *,
        frozen_codes: bool = False,
    ) -> None:
        """Begin at a compressed matrix.

        Args:
            matrix: where to begin.
            bias: of the dense linear.
            device: of the parameters.
            frozen_codes: keep the INT4 codes as they are and train scales (and zero points) only.
        """
        super().__init__()
        self._shape = (matrix.out_features, matrix.in_features)
        self._keep = matrix.keep()
        scales, zeros = decode_scale_zero(matrix.scale_zero)
        self.log_scale = nn.Parameter(scales.to(device, torch.float32).log())
        self.zero = nn.Parameter(zeros.to(device, torch.float32) / _ZERO_RANGE)
        self.weight = None if frozen_codes else nn.Parameter(matrix.dequantize_groups().to(device))
        codes = unpack_nibbles(matrix.qweight).to(device) if frozen_codes else None
        self.register_buffer("codes", codes, persistent=False)
        kept = self._keep.flatten().nonzero().squeeze(1).to(device)
        self.register_buffer("kept", kept, persistent=False)
        self.bias = bias

    def kinds(self) -> dict[str, nn.Parameter]:
        """Parameters by the setting that holds their learning rate."""
        weight = {} if self.weight is None else {"weight_lr": self.weight}
        return {**weight, "scale_lr": self.log_scale, "zero_lr": self.zero}

    def _scale_zero(self) -> tuple[torch.Tensor, torch.Tensor]:
        # exp(log(s)) may be off by one unit in the last place: rounding to the grid mends that too.
        return _RoundScale.apply(self.log_scale.exp()), self.zero * _ZERO_RANGE

    def groups(self) -> torch.Tensor:
        """The kept groups as they will be stored, float32 ``[nnz, G]``."""
        scale, zero = self._scale_zero()
        if self.weight is not None:
            return fake_quantize(self.weight, scale, zero)
        rounded = zero + (zero.round() - zero).detach()
        codes = cast("torch.Tensor", self.codes)
        return (codes.float() - rounded.clamp(0, 15)[:, None]) * scale[:, None]

    def dense(self) -> torch.Tensor:
        """The weight ``[out_features, in_features]``, float32, pruned groups exactly 0."""
        values = self.groups()
        rows, columns = self._shape
        blank = values.new_zeros(rows * columns // values.shape[1], values.shape[1])
        return blank.index_copy_(0, cast("torch.Tensor", self.kept), values).view(rows, columns)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return nn.functional.linear(inputs, self.dense(), self.bias)

    @torch.no_grad()
    def matrix(self) -> GroupSparseMatrix:
        """What is stored: its weights are bit for bit those of :meth:`dense`.

        Raises:
            ValueError: a scale is NaN.
        """
        scale, zero = self._scale_zero()
        zeros = zero.round().clamp_(0, 15)
        if self.weight is not None:
            codes = _codes(self.weight, scale, zero)[0].to(torch.uint8)
        else:
            codes = cast("torch.Tensor", self.codes)
        keep = self._keep.cpu()
        return GroupSparseMatrix.from_codes(codes.cpu(), scale.cpu(), zeros.to("cpu", torch.uint8), keep)


class _RoundKept(torch.autograd.Function):
    """Rounds the kept groups to nearest as the format does; gradients pass straight through to them."""

    @staticmethod
    def forward(ctx: Any, groups: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        ctx.save_for_backward(keep)
        # All groups are rounded: to pick the kept ones out takes longer.
        flat = groups.flatten(0, 1)
        scales, zeros = choose_grid(flat)
        codes, zeros = _codes(flat, scales, zeros)
        return codes.sub_(zeros).mul_((scales * keep.flatten())[:, None]).view_as(groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        (keep,) = ctx.saved_tensors
        return grad * keep[..., None], None


class MaskedLinear(nn.Module):
    """A linear that is being pruned: all weights are parameters, and a mask blanks some groups.

    Attributes:
        weight: float32 ``[out_features, in_features]``.
        keep: bool ``[out_features, groups]``, the mask.
        rounded: multiply by the kept weights as they will be stored, rather than as they are.
        input_square: float32 ``[in_features]``, mean square of the input.
        gradient_square: float32 ``[out_features]``, mean square of the loss's gradient with respect to the output.
        bias: as in the dense linear, or None.
    """

    def __init__(
        self, shape: tuple[int, int], group_size: int, bias: nn.Parameter | None, device: torch.device
    ) -> None:
        """A linear without weights yet, nothing pruned.

        Args:
            shape: ``(out_features, in_features)``.
            group_size: G.
            bias: of the dense linear.
            device: of the mask.
        """
        super().__init__()
        self._shape = (shape[0], shape[1] // group_size, group_size)
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))
        self.keep = torch.ones(self._shape[:2], dtype=torch.bool, device=device)
        self.rounded = False
        self.input_square = torch.zeros(shape[1], device=device)
        self.gradient_square = torch.zeros(shape[0], device=device)
        self.bias = bias

    def kinds(self) -> dict[str, nn.Parameter]:
        """Parameters by the setting that holds their learning rate."""
        return {"weight_lr": self.weight}

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``input_square`` and ``gradient_square``."""
        return self.input_square, self.gradient_square

    @torch.no_grad()
    def prune(self, share: float, pattern: str) -> None:
        """Choose anew which groups are kept.

        Args:
            share: of groups to prune.
            pattern: ``row`` or ``matrix``.
        """
        self.keep = choose_groups(self.importance(), share, pattern)

    @torch.no_grad()
    def importance(self) -> torch.Tensor:
        """Of each group, float32 ``[out_features, groups]``; see :func:`curvature_importance`."""
        return curvature_importance(self.weight, *self.squares(), self._shape[2])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        groups = self.weight.view(self._shape)
        weight = _RoundKept.apply(groups, self.keep) if self.rounded else groups * self.keep[..., None]
        return nn.functional.linear(inputs, weight.view_as(self.weight), self.bias)

    @torch.no_grad()
    def matrix(self) -> GroupSparseMatrix:
        """The kept groups, rounded to nearest.

        Raises:
            ValueError: a weight is not finite.
        """
        return GroupSparseMatrix.from_dense(self.weight.cpu(), self.keep.cpu(), self._shape[2])


TrainedLinear = GroupSparseLinear | MaskedLinear
