"""Memory and time of training one block of Llama-2-7B's shape, which docs/compress.md extrapolates from.

    .venv/bin/python -m benchmarks.accuracy.block_memory [--device cuda] [--context 2048] [--steps 3]

A model of one block (hidden 4096, intermediate 11008, 32 heads) with random weights and a vocabulary of 256 goes
through the stages of `gqsa compress`: one-shot pruning, BQPO, and a few steps of each end-to-end stage, one window a
step. Of each the peak of the memory and the median time of a step are measured, and set beside what `gqsa estimate`
says. The result goes to benchmarks/results/block-memory-<machine>.json. It takes 3 GB of disk where it is started.
"""

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.machine import processor, slug, versions
from vllm_gqsa.offline.arithmetic import resolve_precision
from vllm_gqsa.offline.block import BlockContext, CompressedBlock, install
from vllm_gqsa.offline.bqpo import bqpo
from vllm_gqsa.offline.e2e import EndToEndJob, train_end_to_end
from vllm_gqsa.offline.estimate_training import training_costs
from vllm_gqsa.offline.families import FAMILIES, Family
from vllm_gqsa.offline.recipe import BlockTraining, Distillation, EndToEnd, GradualPruning, Recipe
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.stages import one_shot
from vllm_gqsa.offline.stream import ModelStream, meta_model

CONFIG = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 1,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
"""Llama-2-7B's, but for the numbers of blocks and of tokens."""
RESULTS = Path(__file__).parents[1] / "results"
PREFIX = "model.layers.0."
Costs = dict[str, dict[str, float]]


class Memory:
    """Bytes on the device, those that Python and torch take without any work left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle = 0
        self._idle = self.peak()

    def reset(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        """The most since then; on a CPU of the resident set, mapped files left out."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._idle
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
        kilobytes = {name: int(fields[name].split()[0]) for name in ("VmHWM", "RssFile", "RssShmem")}
        return 1024 * (kilobytes["VmHWM"] - kilobytes["RssFile"] - kilobytes["RssShmem"]) - self._idle


@contextmanager
def measured(memory: Memory, name: str, into: Costs) -> Iterator[None]:
    """Note peak and seconds, all of them and from one step of an optimiser to the next.

    A busy machine makes a step longer, and hardly changes what it takes of the processor's time.
    """

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    ends: list[tuple[float, float]] = []
    handle = register_optimizer_step_post_hook(lambda *_: ends.append(now()))
    memory.reset()
    begin = now()
    try:
        yield
    finally:
        handle.remove()
    into[name] = {"peak_bytes": memory.peak()}
    for number, clock in enumerate(("seconds", "cpu_seconds")):
        into[name][clock] = now()[number] - begin[number]
        if len(ends) > 1:
            gaps = (b[number] - a[number] for a, b in itertools.pairwise(ends))
            into[name][f"{clock}_a_step"] = statistics.median(gaps)
    print(name, into[name], flush=True)


def make_model(folder: Path) -> DenseModel:
    """Random weights in bfloat16."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG), dtype=torch.bfloat16).save_pretrained(folder)
    return DenseModel(str(folder))


def make_recipe(context: int, steps: int) -> Recipe:
    """All stages, one window a step; the last window judges."""
    tokens = steps * context
    return Recipe(
        samples=steps + 1,
        context=context,
        bqpo=BlockTraining(epochs=1, batch=1),
        distill=Distillation(tokens=tokens, batch=1),
        oqp=EndToEnd(tokens=tokens, batch=1),
    )


def gradual(recipe: Recipe, tokens: int) -> Recipe:
    """Gradual pruning in the place of all other stages."""
    stages = {"bqpo": None, "distill": None, "oqp": None, "prune": GradualPruning(tokens=tokens, batch=1)}
    return recipe.model_copy(update=stages)


def compress_block(
    model: DenseModel, family: Family, recipe: Recipe, windows: torch.Tensor, device: torch.device, memory: Memory
) -> tuple[CompressedBlock, Costs]:
    """One-shot pruning and BQPO, as the pass over the blocks does them."""
    costs: Costs = {}
    stream = ModelStream(model, model.config, family, device)
    stream.prepare_training(resolve_precision(recipe.precision, device), recipe.context)
    inputs = stream.embed(windows, 1)
    targets = inputs.clone()
    block = stream.block(0)
    update = block.advance(targets, 1, device)
    names = family.linear_names(0)
    context = BlockContext(0, block, names, PREFIX, inputs, targets, update, recipe, 1, device, lambda _: None)
    with measured(memory, "one_shot", costs):
        state = one_shot(context, CompressedBlock())
    install(block.module, PREFIX, state)
    with measured(memory, "bqpo", costs):
        state = bqpo(context, state)
    return state, costs


def train(
    model: DenseModel, family: Family, recipe: Recipe, state: CompressedBlock, windows: torch.Tensor,
    device: torch.device, memory: Memory,
) -> Costs:  # fmt: skip
    """The end-to-end stages, each from the state that one-shot pruning and BQPO left."""
    costs: Costs = {}
    pruning = gradual(recipe, (len(windows) - 1) * windows.shape[1])
    for name, its in (("prune", pruning), ("distill", recipe), ("oqp", recipe)):
        job = EndToEndJob(
            name=name, settings=its.whole_model_stages()[name], recipe=its, model=model, family=family,
            linears=[[each for group in family.linear_names(0) for each in group]],
            blocks=[CompressedBlock() if name == "prune" else state], windows=windows, first=0, batch=1, device=device,
            state=model.folder / f"{name}.state", progress=lambda *_: None,
        )  # fmt: skip
        with measured(memory, name, costs):
            train_end_to_end(job)
        job.state.unlink()
    return costs


def estimated(model: DenseModel, family: Family, recipe: Recipe, device: torch.device) -> dict[str, int]:
    """Bytes that `gqsa estimate` says for the training stages."""
    skeleton = meta_model(model.config)
    names = [name for group in family.linear_names(0) for name in group]
    weights = {name: skeleton.get_submodule(name).weight.numel() for name in names}
    found: dict[str, Any] = {}
    for each in (recipe, gradual(recipe, recipe.context)):
        precision = resolve_precision(recipe.precision, device)
        costs = training_costs(skeleton, skeleton.get_submodule(family.blocks), weights, each, 1, precision)
        found |= {name: cost.memory_bytes for name, cost in costs.items()}
    return found


def split(stage: str, peak: float, weights: int, half: int) -> dict[str, float]:
    """A peak by arithmetic: parameters in training, their gradients and AdamW's moments, frozen weights, and the rest.

    Args:
        stage: its name.
        peak: bytes.
        weights: in the linears of the block.
        half: bytes of a number of the dense teacher.
    """
    kept, scales = weights // 2, weights // 2 // 16
    trained = {"bqpo": kept + 2 * scales, "prune": weights, "distill": kept + 2 * scales, "oqp": 2 * scales}[stage]
    # The dense block in float32, or the dense teacher; INT4 codes, a byte each, and int64 places of the groups.
    frozen = 4 * weights if stage == "bqpo" else half * weights
    frozen += {"bqpo": 8 * scales, "prune": 0, "distill": 8 * scales, "oqp": kept + 8 * scales}[stage]
    known = {"parameters": 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained, "frozen_weights": frozen}
    return {**known, "activations_and_temporaries": peak - sum(known.values())}


def report(costs: Costs, said: dict[str, int], recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What is written."""
    precision = resolve_precision(recipe.precision, device)
    weights = 4 * CONFIG["hidden_size"] ** 2 + 3 * CONFIG["hidden_size"] * CONFIG["intermediate_size"]
    stages: dict[str, Any] = {}
    for name, cost in costs.items():
        stages[name] = dict(cost)
        if name in said:
            parts = split(name, cost["peak_bytes"], weights, 2 if precision == "bfloat16" else 4)
            stages[name] |= {"estimate_bytes": said[name], "of_the_peak": parts}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "model": CONFIG,
        "weights": weights,
        "sparsity": recipe.sparsity,
        "group_size": recipe.group_size,
        "context": recipe.context,
        "windows_a_step": 1,
        "precision": precision,
        "stages": stages,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3, help="of each stage [%(default)s]")
    options = parser.parse_args()
    device: torch.device = options.device
    recipe, family = make_recipe(options.context, options.steps), FAMILIES["llama"]
    windows = torch.randint(CONFIG["vocab_size"], (options.steps + 1, options.context))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        model = make_model(Path(folder))
        memory = Memory(device)
        state, costs = compress_block(model, family, recipe, windows, device, memory)
        costs |= train(model, family, recipe, state, windows, device, memory)
        said = estimated(model, family, recipe, device)
    found = report(costs, said, recipe, device)
    path = RESULTS / f"block-memory-{slug(found['machine'])}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
