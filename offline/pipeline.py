"""Dense model in, finished checkpoint out, one block at a time, resumable."""

import gc
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import vllm_gqsa
from vllm_gqsa.format import TENSORS, CheckpointReader, GqsaConfig, GroupSparseMatrix, ModuleEntry, read_json
from vllm_gqsa.offline.card import REPORT_FILE, make_report, model_card
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.families import Family, family_of
from vllm_gqsa.offline.files import (
    digest_files,
    digest_tensor,
    open_run,
    write_atomically,
    write_json,
    write_tensors,
)
from vllm_gqsa.offline.importance import HessianSum, InverseHessian
from vllm_gqsa.offline.perplexity import Perplexity, streamed_perplexity
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.sparsify import sparsify
from vllm_gqsa.offline.stream import BlockRunner, ModelStream, meta_model, watch_inputs
from vllm_gqsa.offline.text import TextSource, choose_windows, token_windows

__all__ = ["BlockContext", "BlockStage", "Job", "check_layers", "compress", "CompressedSource", "one_shot"]

Progress = Callable[[str, int, int], None]
"""Called with the name of a phase, steps done and steps in all."""
Matrices = dict[str, GroupSparseMatrix]
_HELD_OUT = 16


@dataclass(frozen=True)
class Job:
    """One compression.

    Attributes:
        model: folder or hub name of the dense model.
        output: folder of the checkpoint.
        recipe: what is done to the weights.
        calibration: text for the Hessians.
        evaluation: text for the perplexities of the model card; None holds out the end of the calibration text.
        evaluation_windows: at most this many windows of ``recipe.context`` tokens are measured.
        device: torch device that computes.
        batch: windows at a time through a block.
        restart: throw away what an earlier run left in the output folder.
    """

    model: str
    output: Path
    recipe: Recipe
    calibration: TextSource
    evaluation: TextSource | None = None
    evaluation_windows: int = _HELD_OUT
    device: str = "cpu"
    batch: int = 8
    restart: bool = False

    def command(self) -> str:
        """The command line that does this job."""
        default, parts = Recipe(), ["gqsa", "compress", self.model, str(self.output)]
        for name in ("sparsity", "group_size", "pattern", "importance", "damping", "samples", "context", "seed"):
            if getattr(self.recipe, name) != getattr(default, name):
                parts += ["--" + name.replace("_", "-"), str(getattr(self.recipe, name))]
        if not self.recipe.compensate:
            parts.append("--no-compensate")
        if self.recipe.ignore != default.ignore:
            parts += [part for entry in self.recipe.ignore for part in ("--ignore", entry)]
        plain = TextSource("")
        parts += ["--calibration", self.calibration.name]
        for name in ("split", "column"):
            if getattr(self.calibration, name) != getattr(plain, name):
                parts += ["--" + name, getattr(self.calibration, name)]
        if self.evaluation is not None:
            parts += ["--eval-text", self.evaluation.name]
        if self.evaluation_windows != _HELD_OUT:
            parts += ["--eval-windows", str(self.evaluation_windows)]
        return shlex.join(parts)


@dataclass
class BlockContext:
    """What a stage may use of the block in hand.

    Attributes:
        index: number of the block.
        block: the dense block, float32, as the model calls it.
        linears: full names of its compressed linears, those with the same input together.
        local: full name to name within the block.
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
                matrices[name] = sparsify(weight, inverse, context.recipe).to("cpu")  # type: ignore[arg-type]
                context.step()
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
    return matrices


STAGES: Sequence[BlockStage] = (one_shot,)
"""What is done to each block, in order. Block-wise training (BQPO) takes its place after :func:`one_shot`."""


def check_layers(model: DenseModel, family: Family, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Shapes ``(out_features, in_features)`` of all linears to compress, after checking that the recipe fits them.

    Raises:
        InputError: a linear is missing from the files, or the group size or pattern does not fit its shape.
    """
    skeleton = meta_model(model.config)
    shapes: dict[str, tuple[int, int]] = {}
    for index in range(len(skeleton.get_submodule(family.blocks))):  # type: ignore[arg-type]
        for name in (n for group in family.linear_names(index, recipe.ignore) for n in group):
            rows, columns = skeleton.get_submodule(name).weight.shape  # type: ignore[misc, union-attr]
            if f"{name}.weight" not in model:
                raise InputError(f"{model.folder}: {name}.weight is missing")
            if columns % recipe.group_size:
                raise InputError(
                    f"{name}: group_size {recipe.group_size} does not divide its {columns} input features; "
                    "choose another --group-size or --ignore it"
                )
            groups = columns // recipe.group_size
            if ":" in recipe.pattern and groups % int(recipe.pattern.split(":")[1]):
                raise InputError(
                    f"{name}: pattern {recipe.pattern} does not divide its {groups} groups a row; "
                    "choose another --pattern or --ignore it"
                )
            shapes[name] = (rows, columns)
    if not shapes:
        raise InputError("every linear is ignored, nothing is left to compress")
    return shapes


def compress(job: Job, progress: Progress) -> dict[str, Any]:
    """Make the checkpoint, or go on making it, and return its report (see :func:`make_report`).

    Killed at any point and called again, it ends with the same bytes as without the interruption.

    Raises:
        InputError: model, text, recipe or output folder cannot be used; see the message.
        FormatError: a file of the dense model is broken.
    """
    model = DenseModel(job.model)
    family = family_of(model.config.model_type)
    shapes = check_layers(model, family, job.recipe)
    calibration, evaluation, text = _windows(job, model)
    run = {
        "vllm_gqsa": vllm_gqsa.__version__,
        "torch": torch.__version__,
        "device": torch.device(job.device).type,
        "model": {"config": model.raw_config, "weights": digest_files(model.files())},
        "recipe": job.recipe.model_dump(mode="json"),
        "calibration": digest_tensor(calibration),
        "evaluation": digest_tensor(evaluation),
    }
    with open_run(job.output, run, restart=job.restart):
        if (job.output / "config.json").exists():
            return read_json(job.output / REPORT_FILE)
        _write_blocks(job, model, family, calibration, progress)
        config = _write_rest(job, model, shapes)
        stream = ModelStream(model, model.config, family, torch.device(job.device))
        dense = _measure(job, stream, evaluation, text, "perplexity of the dense model", progress)
        stream = ModelStream(
            CompressedSource(job.output, shapes, config), model.config, family, torch.device(job.device)
        )
        ours = _measure(job, stream, evaluation, text, "perplexity of the compressed model", progress)
        report = make_report(job.model, job.command(), model.nbytes, job.output, config, shapes, dense, ours)
        write_json(job.output / REPORT_FILE, report)
        write_atomically(job.output / "README.md", lambda p: p.write_text(model_card(report), "utf-8") and None)
        write_json(job.output / "config.json", {**model.raw_config, "quantization_config": config.to_json()})
    return report


def _windows(job: Job, model: DenseModel) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Windows to calibrate on, windows to measure perplexity on, and the name of the latter."""
    tokenizer, recipe = model.tokenizer(), job.recipe
    # Eight times as much as is asked for is read, so that the choice is spread over the text.
    most = 8 * recipe.samples + job.evaluation_windows
    windows = token_windows(job.calibration, tokenizer, recipe.context, most)
    if job.evaluation is not None:
        measured = token_windows(job.evaluation, tokenizer, recipe.context, job.evaluation_windows)
        return choose_windows(windows, recipe.samples, recipe.seed, job.calibration.name), measured, job.evaluation.name
    held = min(job.evaluation_windows, windows.shape[0] - recipe.samples)
    if held < 1:
        raise InputError(
            f"{job.calibration.name}: its {windows.shape[0]} windows of {recipe.context} tokens leave none to measure "
            f"perplexity on after {recipe.samples} for calibration; give --eval-text, more text, or fewer --samples"
        )
    chosen = choose_windows(windows[:-held], recipe.samples, recipe.seed, job.calibration.name)
    return chosen, windows[-held:], f"{job.calibration.name} (held-out end)"


def _shards(output: Path, blocks: int) -> list[Path]:
    """The files of the checkpoint: one a block, then one for everything else."""
    return [output / f"model-{i + 1:05d}-of-{blocks + 1:05d}.safetensors" for i in range(blocks + 1)]


def _write_blocks(
    job: Job, model: DenseModel, family: Family, calibration: torch.Tensor, progress: Progress
) -> None:
    """Make the shard of every block that has none, feeding each block what the compressed model feeds it."""
    device = torch.device(job.device)
    blocks = len(meta_model(model.config).get_submodule(family.blocks))  # type: ignore[arg-type]
    shards = _shards(job.output, blocks)
    if all(shard.exists() for shard in shards[:-1]):
        return
    stream = ModelStream(model, model.config, family, device)
    hidden = stream.embed(calibration, job.batch)
    linears = [family.linear_names(i, job.recipe.ignore) for i in range(blocks)]
    done, total = 0, sum(len(group) for groups in linears for group in groups)

    def step() -> None:
        nonlocal done
        done += 1
        progress("compressing", done, total)

    for index, shard in enumerate(shards[:-1]):
        block = stream.block(index)
        prefix = f"{family.blocks}.{index}."
        if not shard.exists():
            matrices: Matrices = {}
            context = BlockContext(index, block, linears[index], hidden, prefix, job.recipe, job.batch, device, step)
            for stage in STAGES:
                matrices = stage(context, matrices)
            write_tensors(shard, dict(_block_tensors(model, block, prefix, matrices)))
        else:
            done += sum(len(group) for group in linears[index]) - 1
            step()
        if index + 1 < blocks:
            # Always from the file, so that a run that is continued feeds the next block the same numbers.
            _install(block, prefix, shard, [n for group in linears[index] for n in group], job.recipe.group_size)
            block.advance(hidden, job.batch, device)
        del block
        gc.collect()


def _block_tensors(
    model: DenseModel, block: BlockRunner, prefix: str, matrices: Matrices
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in block.module.state_dict():
        module = prefix + name.removesuffix(".weight")
        if name.endswith(".weight") and module in matrices:
            for suffix, tensor in matrices[module].tensors().items():
                yield f"{module}.{suffix}", tensor
        else:
            yield prefix + name, model.tensor(prefix + name)


def _install(block: BlockRunner, prefix: str, shard: Path, names: list[str], group_size: int) -> None:
    """Replace the weights of a dense block by what its shard holds."""
    tensors = load_file(shard)
    for name in names:
        linear: Any = block.module.get_submodule(name.removeprefix(prefix))
        parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in TENSORS}
        matrix = GroupSparseMatrix.from_tensors(parts, linear.in_features, group_size)
        matrix.validate(f"{shard}: {name}", (linear.out_features, linear.in_features))
        linear.weight.copy_(matrix.to_dense())


def _write_rest(job: Job, model: DenseModel, shapes: dict[str, tuple[int, int]]) -> GqsaConfig:
    """Write everything outside the blocks, the index and the tokenizer; return the configuration for config.json."""
    skeleton = meta_model(model.config)
    family = family_of(model.config.model_type)
    shards = _shards(job.output, len(skeleton.get_submodule(family.blocks)))  # type: ignore[arg-type]
    outside = [n for n in skeleton.state_dict() if not n.startswith(family.blocks + ".") and n in model]
    write_tensors(shards[-1], {name: model.tensor(name) for name in outside})
    weight_map: dict[str, str] = {}
    sizes: dict[str, int] = {}
    total = 0
    for shard in shards:
        for name, tensor in load_file(shard).items():
            weight_map[name] = shard.name
            total += tensor.nbytes
            if name.endswith(".qweight"):
                sizes[name.removesuffix(".qweight")] = tensor.shape[0]
    write_json(
        job.output / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    tokenizer = model.tokenizer()
    tokenizer.save_pretrained(job.output)
    generation = model.folder / "generation_config.json"
    if generation.exists():
        (job.output / generation.name).write_bytes(generation.read_bytes())
    return GqsaConfig(
        group_size=job.recipe.group_size,
        sparsity=job.recipe.sparsity,
        pattern=job.recipe.pattern,
        ignore=job.recipe.ignore,
        modules={name: ModuleEntry(nnz=sizes[name]) for name in shapes},
    )


class CompressedSource:
    """A checkpoint as a source of dense tensors: ``P.weight`` of a compressed linear is expanded when asked for."""

    def __init__(
        self, folder: Path, shapes: dict[str, tuple[int, int]], config: GqsaConfig | None = None
    ) -> None:
        self._reader = CheckpointReader(folder, config)
        self._shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name.removesuffix(".weight") in self._shapes or name in self._reader.files

    def tensor(self, name: str) -> torch.Tensor:
        """A dense tensor, float32 where it was compressed."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._shapes:
            return self._reader.matrix(module, self._shapes[module]).to_dense()
        return self._reader.files.tensor(name)


def _measure(
    job: Job, stream: ModelStream, windows: torch.Tensor, text: str, phase: str, progress: Progress
) -> Perplexity:
    return streamed_perplexity(stream, windows, text, job.batch, lambda done, total: progress(phase, done, total))
