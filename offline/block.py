"""One transformer block in the hands of the stages: what they get, and what they give."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.offline.gradients import Squares
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.stream import BlockRunner

__all__ = ["BlockContext", "BlockStage", "CompressedBlock", "Logits", "Matrices", "install", "scale_of_errors"]

Logits = Callable[[int, torch.Tensor], torch.Tensor]
"""From the number of a window and the last block's output ``[context, hidden_size]`` to logits
``[context, vocabulary]``; gradients go back."""
Matrices = dict[str, GroupSparseMatrix]
_HELD_OUT = 8
"""One window in this many judges the result and is not trained on."""
_MASSIVE = 100.0
"""From how many times the median on an output's mean square is massive."""


@dataclass
class CompressedBlock:
    """What a stage makes of a block.

    Attributes:
        matrices: the compressed linears by full name.
        tensors: norms and biases by full name, as trained; those that are not there are as in the dense model.
    """

    matrices: Matrices = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def install(module: nn.Module, prefix: str, state: CompressedBlock) -> None:
    """Give a block the weights of a state.

    Args:
        module: the block, its linears dense.
        prefix: what stands before the names of its parameters, with a dot at the end.
        state: the weights.
    """
    values = {f"{name}.weight": matrix.to_dense() for name, matrix in state.matrices.items()} | state.tensors
    for name, value in values.items():
        module.get_parameter(name.removeprefix(prefix)).copy_(value)


def scale_of_errors(update: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What a position's squared error is relative to, so that each position counts about the same.

    That is what the block adds, but nowhere next to nothing. A few positions of a sequence, its first among them, carry
    massive activations, which one block makes and all later ones pass on: beside their errors, what a later block adds
    there is nothing, and one of them would outweigh all other positions. There it is the output.

    Args:
        update: float32 ``[windows, context]``, mean square of what the dense block adds to its input.
        targets: float32 ``[windows, context, hidden_size]``, what the dense block gives.

    Returns:
        Float32 ``[windows, context]``.
    """
    outputs = torch.stack([window.square().mean(-1) for window in targets])
    massive = outputs > _MASSIVE * outputs.median()
    return torch.where(massive, outputs, update.clamp(min=0.01 * float(update.median())))


@dataclass
class BlockContext:
    """What a stage may use of the block in hand.

    Attributes:
        index: number of the block.
        block: the block, float32, as the model calls it; dense before the first stage, then as the last one left it.
        linears: full names of its compressed linears, those with the same input together.
        local: full name to name within the block.
        prefix: what stands before the local names, with a dot at the end.
        inputs: hidden states ``[windows, context, hidden_size]`` that the compressed model feeds it.
        targets: hidden states of the same shape: the dense block's output on what the dense model feeds it.
        error_scale: float32 ``[windows, context]``, see :func:`scale_of_errors`.
        recipe: the settings.
        batch: windows at a time.
        device: where to compute.
        step: call with the number of steps done.
        squares: of linears by full name, where their rows are compared by them.
        densities: of linears by full name, where they share a budget.
        logits: of the last block only: what the model makes of its output.
        facts: a stage may note here what the report should say about it.
    """

    index: int
    block: BlockRunner
    linears: list[list[str]]
    local: dict[str, str] = field(init=False)
    prefix: str
    inputs: torch.Tensor
    targets: torch.Tensor
    error_scale: torch.Tensor
    recipe: Recipe
    batch: int
    device: torch.device
    step: Callable[[int], None]
    squares: Mapping[str, Squares] = field(default_factory=dict)
    densities: Mapping[str, float] = field(default_factory=dict)
    logits: Logits | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.local = {name: name.removeprefix(self.prefix) for group in self.linears for name in group}

    @property
    def windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the windows to train on, and of those that judge."""
        count = self.inputs.shape[0]
        judges = torch.arange(count) % _HELD_OUT == _HELD_OUT - 1
        judges[-1] = True
        return (~judges).nonzero().squeeze(1), judges.nonzero().squeeze(1)

    def batches(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """The numbers of windows, as many at a time as the memory is meant for."""
        return list(windows.split(self.batch))

    @torch.no_grad()
    def error(self) -> float:
        """Mean squared error of the block's output, relative to ``error_scale``, over the judging windows."""
        total, count = 0.0, 0
        for part in self.batches(self.windows[1]):
            out = self.block(self.inputs[part].to(self.device)).float()
            squares = (out - self.targets[part].to(self.device)).square().mean(-1)
            total += float((squares / self.error_scale[part].to(self.device)).double().sum())
            count += squares.numel()
        return total / count


BlockStage = Callable[[BlockContext, CompressedBlock], CompressedBlock]
"""A step on one block: gets what the step before made (nothing, the first) and gives something better."""
