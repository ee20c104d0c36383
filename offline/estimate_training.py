"""What the training stages will cost: memory of the device, floating point operations, and bytes moved."""

from dataclasses import dataclass
from typing import Any

from vllm_gqsa.offline.recipe import Distillation, GradualPruning, Recipe, WholeModel

__all__ = ["StageCost", "training_costs"]

_PARAMETER = 16
"""Bytes of a trained float32 parameter, its gradient, and AdamW's two moments."""
_MOVED = 500
"""Bytes that a step moves for each weight of a linear, fake quantiser and AdamW together, as if at the speed of a copy;
measured: 16 ns a weight on one thread that copies 34 GB/s (SmolLM2-135M, and a block of Llama-2-7B's shape)."""


@dataclass(frozen=True)
class StageCost:
    """Of one training stage.

    Attributes:
        memory_bytes: on the device, for BQPO with the hidden states that main memory holds.
        state_bytes: largest file with the state of the training; 0 for a stage that begins each block anew.
        operations: floating point operations in matrix products.
        moved_bytes: read and written by what is done to single weights.
    """

    memory_bytes: int
    state_bytes: int
    operations: float
    moved_bytes: float


@dataclass(frozen=True)
class _Sizes:
    """What the costs are made of.

    Attributes:
        hidden: size of a hidden state.
        block: weights in the linears of a block.
        linears: of all blocks.
        token: weights on a token's way to its logits.
        outside: parameters outside the blocks.
        kept: parameters that training has for each weight of a linear, those of scales and zero points among them.
        scales: those of scales and zero points alone.
        width: inputs and outputs of a block's linears, summed.
        half: bytes of a number in the arithmetic of training.
        vocabulary: tokens to choose from.
    """

    hidden: int
    block: int
    linears: int
    token: int
    outside: int
    kept: float
    scales: float
    width: int
    half: int
    vocabulary: int

    def activations(self, windows: int, context: int) -> int:
        """Bytes that a block's backward pass needs of its forward pass, roughly."""
        return 4 * 3 * windows * context * self.width

    def logits(self, windows: int, context: int) -> int:
        """Bytes of the logits of model and teacher, and of what their divergence needs, one window at a time."""
        return (2 * self.half * windows + 3 * 4) * context * self.vocabulary


def training_costs(
    skeleton: Any,  # noqa: ANN401 - transformers chooses the class
    blocks: Any,  # noqa: ANN401
    inside: dict[str, int],
    recipe: Recipe,
    batch: int,
    precision: str,
) -> dict[str, StageCost]:
    """Costs of the training stages that a recipe asks for, by their names.

    Args:
        skeleton: the model without memory for weights.
        blocks: its list of blocks.
        inside: number of weights of each compressed linear of the blocks.
        recipe: the settings.
        batch: windows at a time.
        precision: ``bfloat16`` or ``float32``.
    """
    config = skeleton.config
    outside = sum(p.numel() for p in skeleton.parameters()) - sum(p.numel() for p in blocks.parameters())
    linears = [p for p in blocks[0].parameters() if p.dim() == 2]
    weights = sum(inside.values())
    kept = {name: count * (1 - recipe.sparsity_of(name)) for name, count in inside.items()}
    # A scale and a zero point stand beside each kept group.
    scales = sum(2 * count / recipe.group_size_of(name) for name, count in kept.items())
    sizes = _Sizes(
        hidden=config.hidden_size,
        block=weights // len(blocks),
        linears=weights,
        token=weights + config.hidden_size * config.vocab_size,
        outside=outside,
        kept=(sum(kept.values()) + scales) / max(1, weights),
        scales=scales / max(1, weights),
        width=sum(p.shape[0] + p.shape[1] for p in linears),
        half=2 if precision == "bfloat16" else 4,
        vocabulary=config.vocab_size,
    )
    costs = {} if recipe.bqpo is None else {"bqpo": _block(sizes, recipe, batch)}
    for name, settings in recipe.whole_model_stages().items():
        costs[name] = _end_to_end(sizes, recipe, settings, batch, len(blocks))
    return costs


def _block(sizes: _Sizes, recipe: Recipe, batch: int) -> StageCost:
    assert recipe.bqpo is not None
    windows = min(batch, recipe.bqpo.batch)
    # The dense block beside the one in training, and the weights that this one multiplies by.
    memory = sizes.block * (4 + _PARAMETER * sizes.kept + 4 + sizes.half) + sizes.activations(windows, recipe.context)
    # What stands outside the blocks, and what the dense and the compressed model feed this one.
    memory += 4 * (sizes.outside + 2 * recipe.samples * recipe.context * sizes.hidden)
    tokens = recipe.samples * recipe.context * recipe.bqpo.epochs
    steps = -(-recipe.samples // recipe.bqpo.batch) * recipe.bqpo.epochs
    operations = 6.0 * sizes.linears * tokens
    if recipe.bqpo.last_block == "kl":  # the head forward and back, for the teacher forward
        memory += sizes.logits(1, recipe.context)
        operations += 6.0 * (sizes.token - sizes.linears) * tokens
    return StageCost(int(memory), 0, operations, float(_MOVED) * sizes.linears * steps)


def _end_to_end(sizes: _Sizes, recipe: Recipe, settings: WholeModel, batch: int, blocks: int) -> StageCost:
    windows = min(batch, settings.batch)
    if isinstance(settings, GradualPruning):
        trained = 1.0
    elif isinstance(settings, Distillation):
        trained = sizes.kept
    else:
        trained = sizes.scales
    state = sizes.linears * trained * _PARAMETER * 0.75  # the gradient is not saved
    teacher = (sizes.linears + sizes.outside) * sizes.half if settings.loss == "kl" else 0
    # Between the passes: the weights that are multiplied by, and each block's activations, or one block's of both.
    alive = 1 if settings.checkpointing else blocks
    between = alive * (sizes.block * sizes.half + sizes.activations(windows, recipe.context))
    if not isinstance(settings, (Distillation, GradualPruning)):
        between += int(sizes.kept * (sizes.linears + 4 * alive * sizes.block))  # codes, and their values
    memory = sizes.linears * trained * _PARAMETER + 4 * sizes.outside + teacher + between
    memory += sizes.logits(windows, recipe.context)
    # Forward and backward, the teacher forward; a checkpointed block forward once more.
    passes = 6 + (2 if settings.loss == "kl" else 0) + (2 if settings.checkpointing else 0)
    operations = float(passes) * sizes.token * settings.tokens
    return StageCost(
        int(memory), int(state), operations, float(_MOVED) * sizes.linears * settings.steps(recipe.context)
    )
