"""What the training stages share: parameter groups, learning rates, a stop at the first NaN, and a loss."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.quantizer import TrainedLinear
from vllm_gqsa.offline.recipe import Training

__all__ = ["Optimizer", "divergence", "replace_linears", "sample_order"]


def replace_linears(
    module: nn.Module, linears: Mapping[str, TrainedLinear], settings: Training
) -> dict[str, list[nn.Parameter]]:
    """Put linears in training in the place of dense ones, and sort the parameters by their learning rate.

    Args:
        module: a block or a model; all else in it is frozen but norms and biases, if the settings train them.
        linears: by name within the module.
        settings: which parameters are trained.

    Returns:
        Parameters by the setting that holds their learning rate.
    """
    for name, linear in linears.items():
        module.set_submodule(name, linear)
    kinds: dict[str, list[nn.Parameter]] = {"weight_lr": [], "scale_lr": [], "zero_lr": [], "norm_lr": []}
    for linear in linears.values():
        for kind, parameter in linear.kinds().items():
            kinds[kind].append(parameter)
    theirs = {id(p) for parameters in kinds.values() for p in parameters}
    kinds["norm_lr"] = [p for p in module.parameters() if p.dim() == 1 and id(p) not in theirs]
    chosen = {kind: parameters for kind, parameters in kinds.items() if getattr(settings, kind, 0) and parameters}
    module.requires_grad_(requires_grad=False)
    for parameters in chosen.values():
        for parameter in parameters:
            parameter.requires_grad_()
    return chosen


class Optimizer:
    """AdamW with a learning rate for each kind of parameter, warm-up, cosine, and clipped gradients."""

    def __init__(self, kinds: dict[str, list[nn.Parameter]], settings: Training, steps: int) -> None:
        if not kinds:
            raise InputError("every learning rate of the stage is 0; leave the stage out of the recipe")
        self._settings = settings
        self._steps = steps
        groups = [{"params": parameters, "peak": getattr(settings, kind)} for kind, parameters in kinds.items()]
        self._parameters = [p for parameters in kinds.values() for p in parameters]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def factor(self, step: int) -> float:
        """Share of its peak that a learning rate has in a step, counted from 0."""
        warm = round(self._settings.warmup * self._steps)
        if step < warm:
            return (step + 1) / warm
        share = (step - warm) / max(1, self._steps - warm)
        return self._settings.final_lr + (1 - self._settings.final_lr) * 0.5 * (1 + math.cos(math.pi * share))

    def step(self, step: int, loss: float, where: str) -> None:
        """Move the parameters along their gradients, and drop these.

        Args:
            step: number of the step, from 0.
            loss: of the step.
            where: stage and block, for the message.

        Raises:
            InputError: loss or gradients are not finite.
        """
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * self.factor(step)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.clip, foreach=True)
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise InputError(
                f"{where}: loss {loss:g} and gradient {float(norm):g} in step {step + 1}: training has diverged; "
                "lower the learning rates of this stage in the recipe (weight_lr first), or set precision to float32"
            )
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def sample_order(count: int, epoch: int, seed: int) -> torch.Tensor:
    """A permutation of ``count`` windows, another one in each epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """KL divergence from the wanted next-token distributions, mean over the positions.

    Args:
        logits: ``[positions, vocabulary]``.
        wanted: logits of the same shape.
    """
    return cast("torch.Tensor", _Divergence.apply(logits, wanted))


class _Divergence(torch.autograd.Function):
    """Its gradient is made in the forward pass and kept in the logits' dtype: a vocabulary is wide, and autograd would
    keep three float32 tensors of its size.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        ours, theirs = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
        probabilities = theirs.exp()
        loss = theirs.sub_(ours).mul_(probabilities).sum() / len(logits)
        ctx.save_for_backward(ours.exp_().sub_(probabilities).div_(len(logits)).to(logits.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None
