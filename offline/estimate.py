"""What a compression will cost, before an hour is spent on it."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vllm_gqsa.offline.arithmetic import fast_float32, resolve_precision
from vllm_gqsa.offline.estimate_training import training_costs
from vllm_gqsa.offline.families import Family
from vllm_gqsa.offline.gradients import WINDOWS
from vllm_gqsa.offline.head import head_name
from vllm_gqsa.offline.passes import MEMORY
from vllm_gqsa.offline.perplexity import REPORTED_WINDOWS
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.sparsify import CHUNK
from vllm_gqsa.offline.stream import meta_model

__all__ = ["DENSE_INT4_BITS", "Estimate", "estimate", "module_bytes"]

_TRAINING_SPEED = 0.7
"""Share of a large matrix product's speed that the products of training reach, roughly."""
DENSE_INT4_BITS = 4.125
"""Bits a weight of the usual rival: dense INT4, groups of 128, a 16-bit scale each."""


@dataclass(frozen=True)
class Estimate:
    """Costs of one compression.

    Attributes:
        blocks: transformer blocks.
        modules: linears that are compressed.
        compressed_weights: weights in them.
        bits_per_weight: of those linears; exact except for ties between rounding of rows and matrices.
        output_bytes: safetensors files of the checkpoint.
        dense_bytes: safetensors files of the dense model.
        disk_bytes: needed free in the output folder.
        peak_memory_bytes: beside what Python, torch and mapped files take (about 0.8 GB).
        seconds: rough, training included; from this machine's measured speeds of a matrix product and of a copy.
        gflops: that speed in float32, in 10^9 floating point operations a second.
        training: memory in bytes and seconds of each training stage, rough.
    """

    blocks: int
    modules: int
    compressed_weights: int
    bits_per_weight: float
    output_bytes: int
    dense_bytes: int
    disk_bytes: int
    peak_memory_bytes: int
    seconds: float
    gflops: float
    training: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def module_bytes(out_features: int, in_features: int, nnz: int, group_size: int) -> int:
    """Bytes of the four tensors of a compressed linear."""
    bitmap = out_features * -(-(in_features // group_size) // 8)
    return 4 * (out_features + 1) + bitmap + nnz * (group_size // 2 + 2)


def _stored(rows: int, columns: int, recipe: Recipe) -> int:
    groups = columns // recipe.group_size
    return module_bytes(rows, columns, rows * round(groups * (1 - recipe.sparsity)), recipe.group_size)


def estimate(
    model: DenseModel,
    family: Family,
    recipe: Recipe,
    shapes: dict[str, tuple[int, int]],
    *,
    batch: int,
    device: str,
) -> Estimate:
    """Estimate the costs of compressing ``model`` by ``recipe``.

    Args:
        model: the dense model; only headers are read.
        family: its description.
        recipe: the settings.
        shapes: ``(out_features, in_features)`` of the linears to compress.
        batch: windows at a time.
        device: where the work would be done; its speed is measured for half a second.
    """
    skeleton = meta_model(model.config)
    blocks = skeleton.get_submodule(family.blocks)
    count = len(blocks)
    weights = sum(rows * columns for rows, columns in shapes.values())
    head = head_name(model.config, family, recipe)
    recipes = {name: recipe.for_head(name) if name == head else recipe.for_linear(name) for name in shapes}
    stored = sum(_stored(*shape, recipes[name]) for name, shape in shapes.items())
    replaced = sum(model.tensor_bytes(f"{name}.weight") for name in shapes)
    output = model.nbytes - replaced + stored
    with fast_float32(torch.device(device)):
        gflops = _gflops(device, torch.float32)
    # Gradual pruning takes the place of the one-shot pass: what is left of it are forward passes, and the head.
    pruned = {head: shapes[head]} if recipe.prune and head else {} if recipe.prune else shapes
    seconds = _operations(recipe, family, pruned, skeleton, head) / (gflops * 1e9)
    heads = 0 if head is None else _head_floats(*shapes[head], recipes[head].group_size)
    peak = _peak(skeleton, blocks, family, recipe, batch, heads)
    inside = {name: r * c for name, (r, c) in shapes.items() if name != head}
    precision = resolve_precision(recipe.precision, torch.device(device))
    costs = training_costs(skeleton, blocks, inside, recipe, batch, precision)
    training: dict[str, dict[str, float]] = {}
    if costs:
        products = _TRAINING_SPEED * 1e9 * _gflops(device, getattr(torch, precision))
        copies = _copy_speed(device)
        for name, cost in costs.items():
            seconds_of_stage = cost.operations / products + cost.moved_bytes / copies
            training[name] = {"memory_bytes": cost.memory_bytes, "seconds": seconds_of_stage}
    # Each pass leaves its shards until the checkpoint is finished; the state is written anew beside the old one.
    passes = len({"blocks", *costs} - ({"blocks"} if recipe.prune else set()) - {"bqpo"})
    states = _gradient_states(model.config, recipe)
    state = max((2 * cost.state_bytes for cost in costs.values()), default=0)
    return Estimate(
        blocks=count,
        modules=len(shapes),
        compressed_weights=weights,
        bits_per_weight=8 * stored / weights,
        output_bytes=output,
        dense_bytes=model.nbytes,
        disk_bytes=passes * output + output // count + max(state, 4 * states if _is_mapped(states) else 0),
        peak_memory_bytes=max(peak, *(cost.memory_bytes for cost in costs.values()), 0),
        seconds=seconds + sum(cost["seconds"] for cost in training.values()),
        gflops=gflops,
        training=training,
    )


def _peak(
    skeleton: Any,  # noqa: ANN401 - transformers chooses the class
    blocks: Any,  # noqa: ANN401
    family: Family,
    recipe: Recipe,
    batch: int,
    heads: int,
) -> int:
    """The largest of the three peaks: compressing a block, the head, and the logits of the perplexity."""
    config = skeleton.config
    hidden, tokens = config.hidden_size, recipe.samples * recipe.context
    block = max(sum(p.numel() for p in b.parameters()) for b in blocks)
    outside = sum(p.numel() for p in skeleton.parameters()) - sum(p.numel() for p in blocks.parameters())
    groups = max((family.linear_names(index) for index in range(len(blocks))), key=len)
    widths = [skeleton.get_submodule(names[0]).weight.shape[1] for names in groups]
    widest = max(p.numel() for p in blocks[0].parameters())
    # Hessians of all inputs; the inverse, its factor and two temporaries of the widest; a linear's copies.
    working = sum(k * k for k in widths) + 4 * max(widths) ** 2 + 3 * widest
    activations = batch * recipe.context * (4 * hidden + 3 * max(widths))
    # What the dense and the compressed model feed it; for gradients, what is fed to all, unless that goes to files.
    fed = hidden * (2 * tokens + REPORTED_WINDOWS * recipe.context)
    states = _gradient_states(config, recipe)
    streams = max(fed, 0 if _is_mapped(states) else states)
    logits = 3 * recipe.context * config.vocab_size
    return 4 * (outside + block + streams + max(working + activations, heads, logits))


def _head_floats(rows: int, hidden: int, group_size: int) -> int:
    """Memory in floats for compressing a head: a chunk's copies, what a group costs before and after, Hessians."""
    groups = rows * hidden // group_size
    # Per group: its score, its place in the order of scores (int64), a mask; twice the packed result.
    return 4 * min(CHUNK, rows * hidden) + 4 * groups + rows * hidden // 4 + 5 * hidden**2


def _gradient_tokens(recipe: Recipe) -> int:
    return min(WINDOWS, recipe.samples) * recipe.context if recipe.compares_rows_by_gradients else 0


def _gradient_states(config: Any, recipe: Recipe) -> int:  # noqa: ANN401 - a transformers configuration
    """Floats that are kept between the passes forward and back."""
    return int(config.hidden_size) * (config.num_hidden_layers + 1) * _gradient_tokens(recipe)


def _is_mapped(floats: int) -> bool:
    """Whether hidden states go to files by the default of ``--memory``, see :meth:`Work.allocate` in ``passes.py``."""
    return 2 * 4 * floats > MEMORY


def _operations(
    recipe: Recipe,
    family: Family,
    shapes: dict[str, tuple[int, int]],
    skeleton: Any,  # noqa: ANN401 - transformers chooses the class
    head: str | None,
) -> float:
    """Floating point operations, weighted by how far each part stays below a large matrix product's speed.

    Counted as if every token went through every expert of a mixture: an upper bound there.
    """
    tokens = recipe.samples * recipe.context
    weights = sum(r * c for name, (r, c) in shapes.items() if name != head)
    # Three times through each block to calibrate, twice and back for gradients, once dense and once compressed to
    # measure.
    forward = 2.0 * weights * (3 * tokens + 3 * _gradient_tokens(recipe) + 2 * REPORTED_WINDOWS * recipe.context)
    blocks = range(skeleton.config.num_hidden_layers)
    firsts = {names[0] for index in blocks for names in family.linear_names(index, recipe.ignore)} | {head}
    inputs = [c for name, (_, c) in shapes.items() if name in firsts]
    hessians = sum(2.0 * tokens * k * k + 2.0 * k**3 for k in inputs)
    # The column-by-column update runs at memory speed, about a twentieth of a matrix product's.
    updates = sum(1.0 * r * c * c + 20 * r * c * 128 for r, c in shapes.values()) if recipe.compensate else 0
    logits = 2.0 * skeleton.config.hidden_size * skeleton.config.vocab_size * 2 * REPORTED_WINDOWS * recipe.context
    return forward + hessians + updates + logits


def _gflops(device: str, dtype: torch.dtype) -> float:
    size = 1024
    a = torch.rand(size, size, device=device).to(dtype)
    return 2 * size**3 / 1e9 / _seconds_of(lambda: float((a @ a)[0, 0]))


def _copy_speed(device: str) -> float:
    """Bytes a second, read and written."""
    source = torch.rand(2**26, device=device)  # larger than caches
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds_of(lambda: float(target.copy_(source)[0]))


def _seconds_of(work: Callable[[], object]) -> float:
    """Mean of half a second's repetitions; ``work`` waits for its result."""
    work()  # warm up
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.5:
        work()
        count += 1
    return (time.perf_counter() - begin) / count
