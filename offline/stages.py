"""What is done to one block: a list of stages, each giving better matrices than the one before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.importance import HessianSum, InverseHessian
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.sparsify import sparsify
from vllm_gqsa.offline.stream import BlockRunner, watch_inputs

__all__ = ["STAGES", "BlockContext", "BlockStage", "Matrices", "one_shot"]

Matrices = dict[str, GroupSparseMatrix]


@dataclass
class BlockContext:
    """What a stage may use of the block in hand.

    Attributes:
        index: number of the block.
        block: the dense block, float32, as the model calls it.
        linears: full names of its compressed linears, those with the same input together.
        local: full name to name within the block.
        prefix: what stands before the local names, with a dot at the end.
        inputs: hidden states ``[windows, context, hidden_size]`` that the compressed model feeds it.
        recipe: the settings.
        batch: windows at a time.
        device: where to compute.
        step: call once a linear is done.
    """

    index: int
    block: BlockRunner
    linears: list[list[str]]
    local: dict[str, str] = field(init=False)
    inputs: torch.Tensor
    prefix: str
    recipe: Recipe
    batch: int
    device: torch.device
    step: Callable[[], None]

    def __post_init__(self) -> None:
        self.local = {name: name.removeprefix(self.prefix) for group in self.linears for name in group}


BlockStage = Callable[[BlockContext, Matrices], Matrices]
"""A step on one block: gets what the step before made (nothing, the first) and gives matrices by full name."""


def one_shot(context: BlockContext, _matrices: Matrices) -> Matrices:
    """The first stage: Hessians of the block's inputs, mask, compensation, INT4."""
    sums: dict[str, HessianSum] = {}
    for group in context.linears:
        linear = context.block.module.get_submodule(context.local[group[0]])
        sums[group[0]] = HessianSum(linear.in_features, context.device)  # type: ignore[arg-type]
    labels = {context.local[first]: first for first in sums}
    hooks = watch_inputs(context.block.module, labels, lambda label, x: sums[label].add(x))
    with torch.no_grad():
        for start in range(0, context.inputs.shape[0], context.batch):
            context.block(context.inputs[start : start + context.batch].to(context.device))
    for hook in hooks:
        hook.remove()
    matrices: Matrices = {}
    for group in context.linears:
        name = group[0]
        try:
            inverse = InverseHessian.of(sums.pop(name).hessian(), context.recipe.damping)
            for name in group:
                weight = context.block.module.get_submodule(context.local[name]).weight
                matrices[name] = sparsify(weight, inverse, context.recipe)  # type: ignore[arg-type]
                context.step()
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
    return matrices


STAGES: Sequence[BlockStage] = (one_shot,)
"""What is done to each block, in order. Block-wise training (BQPO) takes its place after :func:`one_shot`."""
