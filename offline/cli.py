"""The ``gqsa`` command line: thin; everything it does is a function elsewhere in this package."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vllm_gqsa.format import FormatError, parse_pattern
from vllm_gqsa.offline.errors import InputError, missing_extra
from vllm_gqsa.offline.options import (
    MOST,
    Batch,
    CheckpointArgument,
    Column,
    Compensate,
    Context,
    Damping,
    Device,
    GroupSize,
    Ignore,
    ImportanceOption,
    Json,
    LmHead,
    ModelArgument,
    Pattern,
    PrecisionOption,
    RecipeName,
    Samples,
    Seed,
    Sparsity,
)
from vllm_gqsa.offline.recipe import Recipe

if TYPE_CHECKING:
    from vllm_gqsa.offline.tasks import TaskScore

__all__ = ["main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make, look at, check and measure GQSA checkpoints: group-sparse INT4 language models for vLLM.",
)
# What a program may read goes to stdout, everything else to stderr. No emoji: rich would make one of the :x: in re:x:.
_out = Console(emoji=False)
_err = Console(stderr=True, emoji=False)
_SILENCE = 60
"""Seconds after which a log gets a line again, though no tenth is done."""


def main() -> None:
    """Entry point: errors a person can mend become one sentence on stderr and exit code 2."""
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1":
            _under_torchrun()
        else:
            app()
    except (InputError, FormatError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError):
            error = missing_extra(error)
        _err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _under_torchrun() -> None:
    from vllm_gqsa.offline.parallel import run
    from vllm_gqsa.offline.passes import follow

    run(app, follow)


def _recipe(name: str, **settings: Any) -> Recipe:  # noqa: ANN401
    """A recipe with some settings replaced, those that are not None; ``n:m`` brings its own sparsity."""
    recipe = Recipe.read(name)
    given = {key: value for key, value in settings.items() if value is not None}
    pattern = given.get("pattern", recipe.pattern)
    if ":" in pattern and "sparsity" not in given:
        try:
            n, m = parse_pattern(pattern)
        except ValueError as error:
            raise InputError(str(error)) from error
        given["sparsity"] = 1 - n / m
    return recipe.changed(given)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for every phase, with the time left, on stderr; into a file a line each tenth, and each minute."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_err) as bars:
        tasks: dict[str, TaskID] = {}
        said = time.monotonic()

        def report(phase: str, done: int, total: int) -> None:
            nonlocal said
            if phase not in tasks:
                tasks[phase] = bars.add_task(escape(phase), total=total)
            bars.update(tasks[phase], completed=done)
            due = done == total or done % max(1, total // 10) == 0 or time.monotonic() - said > _SILENCE
            if not _err.is_terminal and due:
                _err.print(escape(f"{phase}: {done} of {total}"))
                said = time.monotonic()

        yield report


def _facts(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    _out.print(table)


def _megabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@app.command()
def compress(
    model: ModelArgument,
    output: Annotated[
        Path,
        typer.Argument(metavar="OUTPUT", help="Folder to write; a run that was cut short goes on in it."),
    ],
    calibration: Annotated[
        list[str],
        typer.Option(
            help="Text: a .txt, .jsonl or .parquet file, or a datasets name (name:config). May be given several times: "
            "an even mixture."
        ),
    ],
    recipe: RecipeName = "default",
    sparsity: Sparsity = None,
    lm_head: LmHead = None,
    group_size: GroupSize = None,
    pattern: Pattern = None,
    importance: ImportanceOption = None,
    compensate: Compensate = None,
    damping: Damping = None,
    samples: Samples = None,
    context: Context = None,
    seed: Seed = None,
    precision: PrecisionOption = None,
    ignore: Ignore = None,
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    column: Column = "text",
    eval_text: Annotated[
        str | None,
        typer.Option(
            help="Text for the perplexities of the model card.  [default: the end of the calibration text, held out]"
        ),
    ] = None,
    eval_split: Annotated[str, typer.Option(help="Split of --eval-text, where it is a dataset.")] = "test",
    eval_windows: Annotated[int, typer.Option(min=1, max=MOST, help="Measure them on at most this many windows.")] = 16,
    device: Device = "cpu",
    batch: Batch = 8,
    memory: Annotated[
        float, typer.Option(min=0, help="GB of hidden states above which they are mapped from files in OUTPUT.")
    ] = 8,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an earlier run left in OUTPUT.")] = False,
    as_json: Json = False,
) -> None:
    """Compress a dense model: prune groups, round the rest to INT4, and train what is left.

    The recipes quick, default and best hold the whole model in memory, 16 bytes a weight; one-shot and blockwise one
    block at a time: ask gqsa estimate first. Start the same command again after an interruption: it goes on where it
    stopped, and ends with the same bytes.
    """
    from vllm_gqsa.offline.pipeline import Job, compress as run
    from vllm_gqsa.offline.text import TextSource

    chosen = _recipe(
        recipe, sparsity=sparsity, lm_head=lm_head, group_size=group_size, pattern=pattern, importance=importance,
        compensate=compensate, damping=damping, samples=samples, context=context, seed=seed, precision=precision,
        ignore=ignore and tuple(ignore),
    )  # fmt: skip
    job = Job(
        model=model, output=output, recipe=chosen,
        calibration=TextSource(calibration[0], split, column, tuple(calibration[1:])),
        evaluation=None if eval_text is None else TextSource(eval_text, eval_split, column),
        evaluation_windows=eval_windows, device=device, batch=batch, memory=1e9 * memory, restart=restart,
    )  # fmt: skip
    with _progress() as progress:
        report = run(job, progress)
    if as_json:
        print(json.dumps(report))
        return
    _facts(
        str(output),
        {
            "safetensors files": f"{_megabytes(report['bytes'])} (dense {_megabytes(report['dense_bytes'])})",
            "bits a weight, compressed linears": f"{report['bits_per_weight']:.2f}",
            "pruned groups": f"{100 * report['sparsity']:.1f} %",
            "output head": "dense" if report["lm_head"] is None else "compressed ({name})".format(**report["lm_head"]),
            "perplexity": f"{report['perplexity']['perplexity']:.3f} (dense "
            f"{report['dense_perplexity']['perplexity']:.3f}), {report['perplexity']['tokens']} tokens",
        },
    )
    _out.print(
        f"serve it: vllm serve {output} --quantization gqsa (on a CPU with VLLM_CPU_KVCACHE_SPACE=1 before it)",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


@app.command()
def estimate(
    model: ModelArgument,
    recipe: RecipeName = "default",
    sparsity: Sparsity = None,
    lm_head: LmHead = None,
    group_size: GroupSize = None,
    pattern: Pattern = None,
    compensate: Compensate = None,
    samples: Samples = None,
    context: Context = None,
    ignore: Ignore = None,
    device: Device = "cpu",
    batch: Batch = 8,
    as_json: Json = False,
) -> None:
    """Say what compressing would cost: memory, disk, size of the result, rough time. Reads no weights."""
    from vllm_gqsa.offline.estimate import DENSE_INT4_BITS, estimate as run
    from vllm_gqsa.offline.families import family_of
    from vllm_gqsa.offline.pipeline import check_layers
    from vllm_gqsa.offline.source import DenseModel
    from vllm_gqsa.offline.text import check_context

    chosen = _recipe(
        recipe, sparsity=sparsity, lm_head=lm_head, group_size=group_size, pattern=pattern, compensate=compensate,
        samples=samples, context=context, ignore=ignore and tuple(ignore),
    )  # fmt: skip
    dense = DenseModel(model, weights=False)
    family = family_of(dense.config)
    check_context(chosen.context, dense.config)
    costs = run(dense, family, chosen, check_layers(dense, family, chosen), batch=batch, device=device)
    if as_json:
        print(json.dumps(costs.to_json()))
        return
    where = f"{costs.blocks} blocks" + ("" if chosen.lm_head is None else " and the head")
    _facts(
        f"compressing {model}",
        {
            "linears": f"{costs.modules} in {where}, {costs.compressed_weights / 1e6:.1f} M weights",
            "peak memory": f"{_megabytes(costs.peak_memory_bytes)}, beside 0.8 GB for Python, torch and mapped files",
            **{
                f"of it in {name}": f"{_megabytes(cost['memory_bytes'])}, roughly {_duration(cost['seconds'])}"
                for name, cost in costs.training.items()
            },
            "disk": _megabytes(costs.disk_bytes),
            "result": f"{_megabytes(costs.output_bytes)} (dense {_megabytes(costs.dense_bytes)})",
            "bits a weight, compressed linears": f"{costs.bits_per_weight:.2f}",
            "time": f"roughly {_duration(costs.seconds)} on {device} ({costs.gflops:.0f} GFLOP/s measured)",
        },
    )
    if costs.bits_per_weight > DENSE_INT4_BITS:
        _out.print(f"at this setting dense INT4 with groups of 128 ({DENSE_INT4_BITS} bits a weight) is smaller")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@app.command("inspect")
def inspect_command(
    checkpoint: CheckpointArgument,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw sparsity and bits a weight over the blocks, as a PNG.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the compressed linears of a checkpoint: shape, sparsity, nnz, bits a weight, and totals."""
    from vllm_gqsa.offline import inspect

    found = inspect.inspect_checkpoint(checkpoint)
    if plot is not None:
        inspect.plot(found, plot)
    if as_json:
        print(json.dumps(found.to_json()))
        return
    table = Table(title=str(checkpoint))
    for heading in ("module", "out x in", "G", "sparsity", "nnz", "a row", "bits a weight"):
        # Names are folded, never cut: they are there to be copied.
        table.add_column(heading, justify="left" if heading == "module" else "right", overflow="fold")
    for m in found.modules:
        table.add_row(
            m.name,
            f"{m.out_features} x {m.in_features}",
            str(m.group_size),
            f"{100 * m.sparsity:.1f} %",
            str(m.nnz),
            f"{m.row_nnz_min}" if m.row_nnz_min == m.row_nnz_max else f"{m.row_nnz_min}..{m.row_nnz_max}",
            f"{m.bits_per_weight:.3f}",
        )
    _out.print(table)
    sizes = "/".join(map(str, found.group_sizes))
    _facts(
        "in all",
        {
            "compressed linears": f"{len(found.modules)}, {found.compressed_weights / 1e6:.1f} M weights",
            "sparsity": f"{100 * found.sparsity:.1f} % of groups of {sizes}, pattern {found.pattern}",
            "bits a weight": f"{found.bits_per_weight:.3f}",
            "bytes": f"{_megabytes(found.compressed_bytes)} compressed, {_megabytes(found.bytes)} with all else",
        },
    )


@app.command()
def verify(
    checkpoint: CheckpointArgument,
    against: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="Dense model it was made from: recompute and compare logits."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every rule of the format; exit code 0 only if all of it is valid."""
    from vllm_gqsa.offline import verify as checks

    with _progress() as progress:
        modules = checks.verify_checkpoint(checkpoint, lambda done, total: progress("verifying", done, total))
    comparison = None if against is None else checks.compare(checkpoint, against)
    if comparison is not None and comparison.twin_max_difference > comparison.twin_may_differ:
        raise FormatError(
            f"{checkpoint}: logits differ by {comparison.twin_max_difference:g} from those of the expanded weights"
        )
    if as_json:
        facts = None if comparison is None else comparison.to_json()
        print(json.dumps({"checkpoint": str(checkpoint), "valid": True, "modules": modules, "against": facts}))
        return
    _out.print(f"{checkpoint}: valid, {modules} compressed linears", highlight=False, soft_wrap=True)
    if comparison is not None:
        _facts(
            f"logits, {comparison.tokens} tokens, float32",
            {
                "largest difference from the expanded weights": f"{comparison.twin_max_difference:g}",
                "largest difference from the dense model": f"{comparison.dense_max_difference:.3f}",
                "mean KL divergence from the dense model": f"{comparison.mean_kl:.4f} nats",
                "same most likely token": f"{100 * comparison.same_best:.0f} %",
            },
        )


@app.command()
def doctor(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CHECKPOINT]", help="Also say what would be used for this one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show versions, processor, GPU and kernels; exit code 1 if vLLM could not serve here, with what to do."""
    from vllm_gqsa.offline.doctor import diagnose

    found = diagnose(checkpoint)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        # Plain lines, to be pasted into an issue.
        width = max(map(len, found.facts)) + 2
        for name, value in found.facts.items():
            print(f"{name:<{width}}{value}")
        for warning in found.warnings:
            print(f"warning: {warning}")
        for problem in found.problems:
            print(f"problem: {problem}")
        print("vLLM cannot serve GQSA checkpoints here" if found.problems else "all is well")
    if found.problems:
        raise typer.Exit(1)


@app.command("eval")
def eval_command(
    call: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Dense model or GQSA checkpoint: folder or hub name.")],
    text: Annotated[
        str | None, typer.Option(help="Text: a .txt, .jsonl or .parquet file, or a datasets name (name:config).")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "test",
    column: Column = "text",
    context: Annotated[
        int, typer.Option(min=2, help="Tokens a window; perplexities at other contexts do not compare.")
    ] = 2048,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use only the first windows.  [default: all]")] = None,
    task: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="In the place of --text: JSON lines with query, choices and gold; question, choices and gold; goal, "
            "sol1, sol2 and label; or context and continuation. May be given several times.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first lines of each --task.  [default: all]")
    ] = None,
    engine: Annotated[Literal["transformers", "vllm"], typer.Option(help="What runs the model.")] = "transformers",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Activations.")] = "float32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, or score tasks by the rules of lm-evaluation-harness.

    For perplexity the text is joined, cut into windows without overlap, and the loss averaged.
    """
    if (text is None) is (not task):
        raise InputError("gqsa eval takes either --text, for perplexity, or --task, for task sets")
    for name in ("split", "column", "context", "max_windows") if text is None else ("limit",):
        source = call.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"--{name.replace('_', '-')} does not go with {'--task' if text is None else '--text'}")
    facts = {"model": model, "engine": engine, "dtype": dtype}
    if text is None:
        from vllm_gqsa.offline.tasks import evaluate_tasks

        with _progress() as progress:
            scores = evaluate_tasks(
                model, task or [], limit=limit, engine=engine, dtype=dtype, device=device, progress=progress
            )
        if as_json:
            print(json.dumps({**facts, "tasks": [score.to_json() for score in scores]}))
        else:
            _show_scores(f"{model}, {engine}, {dtype}", scores)
        return
    from vllm_gqsa.offline.perplexity import evaluate
    from vllm_gqsa.offline.text import TextSource

    with _progress() as progress:
        found = evaluate(
            model, TextSource(text, split, column), context=context, max_windows=max_windows, engine=engine,
            dtype=dtype, device=device, progress=lambda done, total: progress("windows", done, total),
        )  # fmt: skip
    if as_json:
        print(json.dumps({**facts, **found.to_json()}))
        return
    _out.print(
        f"perplexity {found.perplexity:.4f} ({found.windows} windows of {found.context} tokens, {engine}, {dtype})",
        highlight=False,
    )


def _show_scores(title: str, scores: "list[TaskScore]") -> None:
    table = Table(title=title)
    for heading in ("task", "items", "metric", "value", "standard error"):
        table.add_column(heading, justify="left" if heading in {"task", "metric"} else "right", overflow="fold")
    for score in scores:
        name = escape(Path(score.task).name)
        for metric, (value, error) in score.metrics.items():
            table.add_row(name, str(score.items), metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    _out.print(table)
    for score in scores:
        if score.truncated:
            note = f"{score.task}: {score.truncated} contexts, longer than the model takes, were cut at the left"
            _out.print(escape(note), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
