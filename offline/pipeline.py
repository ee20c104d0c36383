"""Dense model in, finished checkpoint out, one block at a time, resumable."""

import importlib
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_gqsa
from vllm_gqsa.format import HEAD, CheckpointReader, check_fused, is_ignored, read_json
from vllm_gqsa.offline import parallel
from vllm_gqsa.offline.arithmetic import fast_float32, resolve_precision
from vllm_gqsa.offline.card import REPORT_FILE, make_report, model_card
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.families import Family, family_of
from vllm_gqsa.offline.files import WORK_FOLDER, digest_files, digest_tensor, open_run, write_atomically, write_json
from vllm_gqsa.offline.head import find_head
from vllm_gqsa.offline.passes import MEMORY, Progress, Work, run_passes
from vllm_gqsa.offline.perplexity import REPORTED_WINDOWS, Perplexity, streamed_perplexity
from vllm_gqsa.offline.recipe import NAMED, Recipe
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.stream import ModelStream, TensorSource, meta_model
from vllm_gqsa.offline.text import TextSource, check_context, choose_windows, token_windows
from vllm_gqsa.offline.training_report import TRAINING_FILE, TRAINING_PICTURE, collect, plot
from vllm_gqsa.offline.writer import CompressedSource, write_rest

__all__ = ["RECIPE_FILE", "Job", "check_layers", "compress", "split_text"]

RECIPE_FILE = "gqsa_recipe.yaml"
"""The recipe, every setting written out, beside the checkpoint."""


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
        memory: bytes of hidden states above which they are mapped from files.
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
    memory: float = MEMORY
    restart: bool = False

    def command(self) -> str:
        """The command line that does this job, settings at their default left out, a recipe that has a name by it."""
        options = self.recipe.model_dump(include=_OPTIONS)
        fit = (name for name, named in NAMED.items() if named.model_copy(update=options) == self.recipe)
        name = next(fit, str(self.output / RECIPE_FILE))
        base = NAMED.get(name, self.recipe)
        settings: dict[str, Any] = {
            "recipe": (name, "default"),
            **{k: (getattr(self.recipe, k), getattr(base, k)) for k in _RECIPE_OPTIONS},
            "split": (self.calibration.split, "train"),
            "column": (self.calibration.column, "text"),
            "eval_text": (self.evaluation and self.evaluation.name, None),
            "eval_split": ((self.evaluation and self.evaluation.split) or "test", "test"),
            "eval_windows": (self.evaluation_windows, REPORTED_WINDOWS),
            "device": (self.device, "cpu"),
            "batch": (self.batch, 8),
        }
        count = parallel.processes()
        torchrun = ["torchrun", "--standalone", f"--nproc-per-node={count}", "-m", "vllm_gqsa.offline"]
        parts = [*(["gqsa"] if count == 1 else torchrun), "compress", self.model, str(self.output)]
        for name, (value, default) in settings.items():
            if value != default:
                parts += ["--" + name.replace("_", "-"), str(value)]
        parts += [part for name in (self.calibration.name, *self.calibration.more) for part in ("--calibration", name)]
        if self.recipe.compensate != base.compensate:
            parts.append("--compensate" if self.recipe.compensate else "--no-compensate")
        if self.recipe.ignore != base.ignore:
            parts += [part for entry in self.recipe.ignore for part in ("--ignore", entry)]
        return shlex.join(parts)


_RECIPE_OPTIONS = (
    "sparsity", "lm_head", "group_size", "pattern", "importance", "damping", "samples", "context", "seed", "precision",
)  # fmt: skip
_OPTIONS = {*_RECIPE_OPTIONS, "compensate", "ignore"}


def check_layers(model: DenseModel, family: Family, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Shapes ``(out_features, in_features)`` of all linears to compress, the head last, if the recipe fits them.

    Raises:
        InputError: a linear is missing from the files, an entry of ``ignore`` or ``overrides`` matches none, the group
            size or pattern does not fit its shape, or linears of a fused layer differ in their group size; or the head
            cannot be compressed, see :func:`vllm_gqsa.offline.head.find_head`.
    """
    skeleton = meta_model(model.config)
    head = find_head(model, family, recipe)
    names = [
        name
        for index in range(len(skeleton.get_submodule(family.blocks)))
        for group in family.linear_names(index, recipe.ignore)
        for name in group
    ]
    _check_ignore(family, recipe, len(skeleton.get_submodule(family.blocks)))
    shapes: dict[str, tuple[int, int]] = {}
    for name in names if head is None else [*names, head]:
        rows, columns = skeleton.get_submodule(name).weight.shape
        pattern, instead = (recipe.pattern, "--ignore it") if name != head else ("row", "leave out --lm-head")
        if f"{name}.weight" not in model:
            raise InputError(f"{model.folder}: {name}.weight is missing")
        if not rows * columns:
            raise InputError(f"{name}: config.json gives it the shape {rows} x {columns}")
        size = recipe.group_size_of(name)
        if columns % size:
            option = "--group-size" if size == recipe.group_size else "one in overrides"
            raise InputError(
                f"{name}: group_size {size} does not divide its {columns} input features; "
                f"choose another {option} or {instead}"
            )
        groups = columns // size
        if ":" in pattern and groups % int(pattern.split(":")[1]):
            raise InputError(
                f"{name}: pattern {pattern} does not divide its {groups} groups a row; "
                f"choose another --pattern or {instead}"
            )
        shapes[name] = (rows, columns)
    if not shapes:
        raise InputError("every linear is ignored, nothing is left to compress")
    _check_overrides(recipe, list(shapes), head)
    return shapes


def _check_ignore(family: Family, recipe: Recipe, blocks: int) -> None:
    linears = [name for index in range(blocks) for group in family.linear_names(index) for name in group]
    for entry in recipe.ignore:
        if not any(is_ignored(name, (entry,)) for name in (*linears, HEAD)):
            raise InputError(f"--ignore {entry}: matches no linear of the model; their names are like {linears[0]}")


def _check_overrides(recipe: Recipe, names: list[str], head: str | None) -> None:
    for entry, override in recipe.overrides.items():
        fits = [name for name in names if is_ignored(name, (entry,))]
        if override.sparsity is not None and fits == [head]:
            raise InputError(f"overrides {entry}: is the head, which has its sparsity from lm_head; give it there")
        if not fits:
            raise InputError(
                f"overrides {entry}: matches no linear that is compressed; their names are like {names[0]}"
            )
    try:
        check_fused({name: recipe.group_size_of(name) for name in names})
    except ValueError as error:
        raise InputError(f"overrides: {error}") from error


def compress(job: Job, progress: Progress) -> dict[str, Any]:
    """Make the checkpoint, or go on making it, and return its report (see :func:`make_report`).

    Killed at any point and called again, it ends with the same bytes as without the interruption.

    Raises:
        InputError: model, text, recipe or output folder cannot be used; see the message.
        FormatError: a file of the dense model is broken.
    """
    importlib.import_module("matplotlib")  # for the last step: better missed now than hours later
    model = DenseModel(job.model)
    family = family_of(model.config)
    shapes = check_layers(model, family, job.recipe)
    check_context(job.recipe.context, model.config)
    parallel.check_shares(job.recipe)
    device, count = parallel.own_device(job.device), parallel.processes()
    calibration, training, evaluation, text = split_text(job, model)
    run = {
        "vllm_gqsa": vllm_gqsa.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        # The number of processes changes the order in which gradients are summed.
        "device": device.type if count == 1 else f"{count} x {device.type}",
        "precision": resolve_precision(job.recipe.precision, device),
        "batch": job.batch,
        "model": {"config": model.raw_config, "weights": digest_files(model.files())},
        "recipe": job.recipe.model_dump(mode="json"),
        "calibration": digest_tensor(calibration),
        "training": digest_tensor(training),
        "evaluation": digest_tensor(evaluation),
    }
    folder = job.output / WORK_FOLDER
    with open_run(job.output, run, restart=job.restart), fast_float32(device):
        if (job.output / "config.json").exists():
            CheckpointReader(job.output)  # raises where a file has been lost since
            shutil.rmtree(folder, ignore_errors=True)
            return read_json(job.output / REPORT_FILE)
        work = Work(
            job.output, folder, model, family, job.recipe, shapes, find_head(model, family, job.recipe), calibration,
            training, job.batch, device, job.memory, progress,
        )  # fmt: skip
        shards = run_passes(work)
        config = write_rest(shards, job.recipe, model, family, shapes)
        compressed = CompressedSource(job.output, shapes, config)
        dense = _measure(job, model, model, evaluation, text, progress)
        ours = _measure(job, model, compressed, evaluation, text, progress)
        trained = collect(folder)
        write_json(job.output / TRAINING_FILE, trained)
        write_atomically(job.output / TRAINING_PICTURE, lambda path: plot(trained, path))
        write_atomically(job.output / RECIPE_FILE, lambda path: path.write_text(job.recipe.to_yaml(), "utf-8"))
        report = make_report(job.model, job.command(), model.nbytes, job.output, config, shapes, dense, ours, trained)
        write_json(job.output / REPORT_FILE, report)
        write_atomically(job.output / "README.md", lambda p: p.write_text(model_card(report), "utf-8"))
        write_json(job.output / "config.json", {**model.raw_config, "quantization_config": config.to_json()})
        shutil.rmtree(folder)
    return report


def split_text(job: Job, model: DenseModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """Windows to calibrate on, to train on end to end, to measure perplexity on, and the name of the latter.

    Raises:
        InputError: there is not enough text.
    """
    tokenizer, recipe = model.tokenizer(), job.recipe
    training = sum(stage.steps(recipe.context) * stage.batch for stage in recipe.whole_model_stages().values())
    # Chosen from eight times as many, so that they are spread over the text, and the same whatever is trained on.
    pool = 8 * recipe.samples
    most = max(pool, training + 8) + job.evaluation_windows  # 8 judge the training
    windows = token_windows(job.calibration, tokenizer, recipe.context, most)
    if job.evaluation is not None:
        measured = token_windows(job.evaluation, tokenizer, recipe.context, job.evaluation_windows)
        text = job.evaluation.name
    else:
        held = min(job.evaluation_windows, windows.shape[0] - recipe.samples)
        if held < 1:
            raise InputError(
                f"{job.calibration.label}: its {windows.shape[0]} windows of {recipe.context} tokens leave none to "
                f"measure perplexity on after {recipe.samples} for calibration; give --eval-text, more text, or fewer "
                "--samples"
            )
        windows, measured, text = windows[:-held], windows[-held:], f"{job.calibration.label} (held-out end)"
    chosen = choose_windows(windows[:pool], recipe.samples, recipe.seed, job.calibration.label)
    return chosen, windows if training else windows[:0], measured, text


def _measure(
    job: Job, model: DenseModel, source: TensorSource, windows: torch.Tensor, text: str, progress: Progress
) -> Perplexity:
    phase = f"perplexity of the {'dense' if source is model else 'compressed'} model"
    stream = ModelStream(source, model.config, family_of(model.config), torch.device(job.device))
    return streamed_perplexity(stream, windows, text, job.batch, lambda done, total: progress(phase, done, total))
