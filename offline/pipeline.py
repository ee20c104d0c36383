"""Dense model in, finished checkpoint out, one block at a time, resumable."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_gqsa
from vllm_gqsa.format import CheckpointReader, read_json
from vllm_gqsa.offline.card import REPORT_FILE, make_report, model_card
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.families import Family, family_of
from vllm_gqsa.offline.files import digest_files, digest_tensor, open_run, write_atomically, write_json
from vllm_gqsa.offline.head import compress_head, find_head, head_name
from vllm_gqsa.offline.perplexity import REPORTED_WINDOWS, Perplexity, streamed_perplexity
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.stages import STAGES, BlockContext, Matrices
from vllm_gqsa.offline.stream import ModelStream, TensorSource, meta_model
from vllm_gqsa.offline.text import TextSource, check_context, choose_windows, token_windows
from vllm_gqsa.offline.writer import CompressedSource, install, shard_paths, write_block, write_head, write_rest

__all__ = ["Job", "check_layers", "compress"]

Progress = Callable[[str, int, int], None]
"""Called with the name of a phase, steps done and steps in all."""


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
    evaluation_windows: int = REPORTED_WINDOWS
    device: str = "cpu"
    batch: int = 8
    restart: bool = False

    def command(self) -> str:
        """The command line that does this job, settings at their default left out."""
        settings: dict[str, Any] = {
            **{k: (getattr(self.recipe, k), getattr(Recipe(), k)) for k in _RECIPE_OPTIONS},
            "calibration": (self.calibration.name, None),
            "split": (self.calibration.split, "train"),
            "column": (self.calibration.column, "text"),
            "eval_text": (self.evaluation and self.evaluation.name, None),
            "eval_split": ((self.evaluation and self.evaluation.split) or "test", "test"),
            "eval_windows": (self.evaluation_windows, REPORTED_WINDOWS),
            "device": (self.device, "cpu"),
            "batch": (self.batch, 8),
        }
        parts = ["gqsa", "compress", self.model, str(self.output)]
        for name, (value, default) in settings.items():
            if value != default:
                parts += ["--" + name.replace("_", "-"), str(value)]
        if not self.recipe.compensate:
            parts.append("--no-compensate")
        for entry in self.recipe.ignore:
            parts += ["--ignore", entry]
        return shlex.join(parts)


_RECIPE_OPTIONS = (
    "sparsity", "lm_head", "group_size", "pattern", "importance", "damping", "samples", "context", "seed",
)  # fmt: skip


def check_layers(model: DenseModel, family: Family, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Shapes ``(out_features, in_features)`` of all linears to compress, the head last, if the recipe fits them.

    Raises:
        InputError: a linear is missing from the files, or the group size or pattern does not fit its shape; or the
            head cannot be compressed, see :func:`vllm_gqsa.offline.head.find_head`.
    """
    skeleton = meta_model(model.config)
    head = find_head(model, family, recipe)
    names = [
        name
        for index in range(len(skeleton.get_submodule(family.blocks)))
        for group in family.linear_names(index, recipe.ignore)
        for name in group
    ]
    shapes: dict[str, tuple[int, int]] = {}
    for name in names if head is None else [*names, head]:
        rows, columns = skeleton.get_submodule(name).weight.shape
        pattern, instead = (recipe.pattern, "--ignore it") if name != head else ("row", "leave out --lm-head")
        if f"{name}.weight" not in model:
            raise InputError(f"{model.folder}: {name}.weight is missing")
        if columns % recipe.group_size:
            raise InputError(
                f"{name}: group_size {recipe.group_size} does not divide its {columns} input features; "
                f"choose another --group-size or {instead}"
            )
        groups = columns // recipe.group_size
        if ":" in pattern and groups % int(pattern.split(":")[1]):
            raise InputError(
                f"{name}: pattern {pattern} does not divide its {groups} groups a row; "
                f"choose another --pattern or {instead}"
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
    family = family_of(model.config)
    shapes = check_layers(model, family, job.recipe)
    check_context(job.recipe.context, model.config)
    calibration, evaluation, text = _windows(job, model)
    run = {
        "vllm_gqsa": vllm_gqsa.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.device(job.device).type,
        "batch": job.batch,
        "model": {"config": model.raw_config, "weights": digest_files(model.files())},
        "recipe": job.recipe.model_dump(mode="json"),
        "calibration": digest_tensor(calibration),
        "evaluation": digest_tensor(evaluation),
    }
    with open_run(job.output, run, restart=job.restart):
        if (job.output / "config.json").exists():
            CheckpointReader(job.output)  # raises where a file has been lost since
            return read_json(job.output / REPORT_FILE)
        shards = _write_compressed(job, model, family, calibration, progress)
        config = write_rest(shards, job.recipe, model, family, shapes)
        compressed = CompressedSource(job.output, shapes, config)
        dense = _measure(job, model, model, evaluation, text, progress)
        ours = _measure(job, model, compressed, evaluation, text, progress)
        report = make_report(job.model, job.command(), model.nbytes, job.output, config, shapes, dense, ours)
        write_json(job.output / REPORT_FILE, report)
        write_atomically(job.output / "README.md", lambda p: p.write_text(model_card(report), "utf-8"))
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
        return (
            choose_windows(windows, recipe.samples, recipe.seed, job.calibration.name),
            measured,
            job.evaluation.name,
        )
    held = min(job.evaluation_windows, windows.shape[0] - recipe.samples)
    if held < 1:
        raise InputError(
            f"{job.calibration.name}: its {windows.shape[0]} windows of {recipe.context} tokens leave none to measure "
            f"perplexity on after {recipe.samples} for calibration; give --eval-text, more text, or fewer --samples"
        )
    chosen = choose_windows(windows[:-held], recipe.samples, recipe.seed, job.calibration.name)
    return chosen, windows[-held:], f"{job.calibration.name} (held-out end)"


def _write_compressed(
    job: Job, model: DenseModel, family: Family, calibration: torch.Tensor, progress: Progress
) -> list[Path]:
    """Make the shard of every block, and of the head, that has none; returns the files of the checkpoint.

    Each block, and the head, is fed what the compressed model feeds it. The embedding is the dense one, also where
    it is tied to the head, which comes last.
    """
    device = torch.device(job.device)
    blocks = len(meta_model(model.config).get_submodule(family.blocks))
    head = head_name(model.config, family, job.recipe)
    shards = shard_paths(job.output, blocks, head=head is not None)
    if all(shard.exists() for shard in shards[:-1]):
        return shards
    stream = ModelStream(model, model.config, family, device)
    hidden = stream.embed(calibration, job.batch)
    linears = [family.linear_names(i, job.recipe.ignore) for i in range(blocks)]
    done, total = 0, sum(len(group) for groups in linears for group in groups) + (head is not None)

    def step() -> None:
        nonlocal done
        done += 1
        progress("compressing", done, total)

    for index, shard in enumerate(shards[:blocks]):
        block = stream.block(index)
        prefix = f"{family.blocks}.{index}."
        if not shard.exists():
            matrices: Matrices = {}
            context = BlockContext(index, block, linears[index], hidden, prefix, job.recipe, job.batch, device, step)
            for stage in STAGES:
                matrices = stage(context, matrices)
            write_block(shard, model, block, prefix, matrices)
        else:
            done += sum(len(group) for group in linears[index]) - 1
            step()
        if index + 1 < blocks or head is not None:
            # Always from the file, so that a run that is continued feeds the next block the same numbers.
            install(block, prefix, shard, [n for group in linears[index] for n in group], job.recipe.group_size)
            block.advance(hidden, job.batch, device)
    if head is not None:
        inputs = stream.head_inputs(calibration, hidden, job.batch)
        matrix = compress_head(head, model.tensor(f"{head}.weight"), inputs, job.recipe, device)
        write_head(shards[blocks], head, matrix)
        step()
    return shards


def _measure(
    job: Job, model: DenseModel, source: TensorSource, windows: torch.Tensor, text: str, progress: Progress
) -> Perplexity:
    phase = f"perplexity of the {'dense' if source is model else 'compressed'} model"
    stream = ModelStream(source, model.config, family_of(model.config), torch.device(job.device))
    return streamed_perplexity(stream, windows, text, job.batch, lambda done, total: progress(phase, done, total))
