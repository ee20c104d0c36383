"""What is done to one block: a list of stages, each giving a better block than the one before."""

from collections.abc import Mapping

import torch

from vllm_gqsa.offline.block import BlockContext, BlockStage, CompressedBlock
from vllm_gqsa.offline.bqpo import bqpo
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.importance import HessianSum, InverseHessian
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.sparsify import sparsify
from vllm_gqsa.offline.stream import watch_inputs

__all__ = ["STAGES", "one_shot", "stages_of"]


def one_shot(context: BlockContext, _state: CompressedBlock) -> CompressedBlock:
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
    state = CompressedBlock()
    modules: dict[str, float] = {}
    for group in context.linears:
        name = group[0]
        try:
            hessian = sums.pop(name).hessian()
            inverse = InverseHessian.of(hessian, context.recipe.damping)
            for name in group:
                weight: torch.Tensor = context.block.module.get_submodule(context.local[name]).weight  # type: ignore[assignment]
                recipe = context.recipe.for_linear(name)
                if name in context.densities:
                    recipe = recipe.model_copy(update={"sparsity": 1 - context.densities[name]})
                state.matrices[name] = sparsify(weight, inverse, recipe, _gradients(context, name))
                modules[name] = _output_error(weight, state.matrices[name].to_dense().to(weight.device), hessian)
                context.step(1)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
    context.facts["modules"] = modules
    return state


def _gradients(context: BlockContext, name: str) -> torch.Tensor | None:
    """What a linear's rows are compared by; None where they are not, or no token came by: then all rows count alike."""
    squares = context.squares.get(name)
    return squares.gradients if squares is not None and squares.gradients.any() else None


def _output_error(weight: torch.Tensor, compressed: torch.Tensor, hessian: torch.Tensor) -> float:
    """Squared error of a linear's output over the calibration text, relative to the square of that output."""
    total = wrong = 0.0
    for rows, ours in zip(weight.split(4096), compressed.split(4096), strict=True):
        difference = rows - ours
        total += float(((rows @ hessian) * rows).sum(dtype=torch.float64))
        wrong += float(((difference @ hessian) * difference).sum(dtype=torch.float64))
    return wrong / total if total > 0 else 0.0


STAGES: Mapping[str, BlockStage] = {"one_shot": one_shot, "bqpo": bqpo}
"""What can be done to each block, in order."""


def stages_of(recipe: Recipe) -> dict[str, BlockStage]:
    """The stages that a recipe asks for."""
    return {name: stage for name, stage in STAGES.items() if name == "one_shot" or getattr(recipe, name) is not None}
