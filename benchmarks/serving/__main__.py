"""Measure whole models in vLLM: FP16, INT4 and GQSA, of 8B and 70B shape, by `vllm bench latency` and `throughput`.

    python -m benchmarks.serving --models 8B -- --gpu-memory-utilization 0.95

What stands behind `--` goes to vLLM. Nothing is downloaded: weights are random. Results go to benchmarks/results as
JSON and Markdown. Not yet run on a GPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.machine import processor, slug, versions
from benchmarks.serving.models import FORMS, MODELS, TINY, write_models
from benchmarks.serving.report import markdown

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_BEGIN = time.monotonic()
_LOADED = re.compile(r"Model loading took ([\d.]+) GiB")


def main(arguments: list[str] | None = None) -> int:
    """Measure, write and print; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description="Measure whole models in vLLM.")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "tiny"], default=list(MODELS), help="[%(default)s]")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), help="[%(default)s]")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 16, 64], help="[%(default)s]")
    parser.add_argument("--input-len", type=int, default=128, help="tokens in [%(default)s]")
    parser.add_argument("--output-len", type=int, default=128, help="tokens out [%(default)s]")
    parser.add_argument("--iterations", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--warm-up", type=int, default=2, help="iterations before [%(default)s]")
    parser.add_argument("--prompts", type=int, default=256, help="of throughput; 0 for none [%(default)s]")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one run of vLLM [%(default)s]")
    parser.add_argument("--folder", type=Path, default=Path("build/serving"), help="models and logs [%(default)s]")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="[%(default)s]")
    options = parser.parse_args(given[:split])
    options.vllm = given[split + 1 :]
    try:
        path = run(options)
    except BenchmarkError as error:
        print(f"benchmarks.serving: {error}", file=sys.stderr)
        return 1
    document = json.loads(path.read_text(encoding="utf-8"))
    text = markdown(document)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if all("failed" in row for row in document["rows"]) else 0


def run(options: argparse.Namespace) -> Path:
    """Run all benchmarks and write the JSON file, again after every one; returns its path.

    Raises:
        BenchmarkError: vLLM is not installed.
    """
    found = versions()
    if "vllm" not in found:
        raise BenchmarkError("vLLM is not installed (no distribution vllm); for a CPU run `make setup`")
    device = _device()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = Path(options.results / f"serving-{slug(device)}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for model in options.models:
        folders = write_models(options.folder / model, TINY if model == "tiny" else MODELS[model])
        for form in options.forms:
            rows += _form(model, form, folders[form], options)
            effort = {key: value for key, value in vars(options).items() if key not in ("folder", "results")}
            document = {
                "format": 1,
                "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}",
                "device": device,
                "versions": found,
                "effort": effort,
                "rows": rows,
            }
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
    return path


def _device() -> str:
    import torch  # noqa: PLC0415 - slow to import

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def _form(model: str, form: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All benchmarks of one model in one form; after one that fails larger batches are not tried."""
    rows: list[dict[str, Any]] = []
    jobs = [("latency", batch) for batch in sorted(options.batches)] + [("throughput", None)] * bool(options.prompts)
    for measured, batch in jobs:
        row = {"model": model, "form": form, "measured": measured, "batch": batch}
        log = options.folder / f"{model}-{form}-{measured}-{batch or 'all'}.log"
        before = next((each["failed"] for each in rows if "failed" in each), None)
        if before is not None:
            rows.append({**row, "failed": f"not tried: {before}"})
            continue
        start = time.monotonic()
        try:
            result = bench(measured, batch, folder, log, options)
        except BenchmarkError as error:
            result = {"failed": str(error)}
        rows.append({**row, **result})
        say(f"{model} {FORMS[form]}, {measured} {batch or ''}: {result.get('failed', 'done')}, "
            f"{time.monotonic() - start:.0f} s")  # fmt: skip
    return rows


def bench(measured: str, batch: int | None, folder: Path, log: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run of `vllm bench`.

    Args:
        measured: latency or throughput.
        batch: of latency.
        folder: of the model.
        log: gets what vLLM writes.
        options: of the command line.

    Raises:
        BenchmarkError: it failed, or took too long.
    """
    output = log.with_suffix(".json")
    output.unlink(missing_ok=True)
    if measured == "latency":
        iterations = ["--num-iters", str(options.iterations), "--num-iters-warmup", str(options.warm_up)]
        wanted = ["--batch-size", str(batch), *iterations]
    else:
        wanted = ["--dataset-name", "random", "--num-prompts", str(options.prompts)]
    # Of throughput --input-len counts for nothing beside the default of --random-input-len.
    prefix = "--" if measured == "latency" else "--random-"
    wanted += [f"{prefix}input-len", str(options.input_len), f"{prefix}output-len", str(options.output_len)]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", measured, "--model", str(folder),
        "--load-format", "dummy", "--max-model-len", str(2 * (options.input_len + options.output_len)),
        *wanted, "--output-json", str(output), *options.vllm,
    ]  # fmt: skip
    with log.open("w", encoding="utf-8") as text:
        try:
            status = subprocess.run(
                command, check=False, stdout=text, stderr=subprocess.STDOUT, timeout=options.timeout,
                stdin=subprocess.DEVNULL, env={**os.environ, **ENVIRONMENT},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"not done after {options.timeout:.0f} s (log: {log})") from error
    said = log.read_text(encoding="utf-8", errors="replace")
    if status != 0 or not output.exists():
        lines = [line for line in said.splitlines() if re.search(r"\w*(Error|Exception)\b.*:", line)] or said.split(
            "\n"
        )
        raise BenchmarkError(f"status {status}: {lines[-1].strip()} (log: {log})")
    loaded = _LOADED.search(said)
    return {**_figures(measured, batch, output, options), "gib": float(loaded[1]) if loaded else None}


def _figures(measured: str, batch: int | None, output: Path, options: argparse.Namespace) -> dict[str, float | None]:
    """Seconds of a batch, or of all requests; milliseconds of a step; tokens out a second."""
    result = json.loads(output.read_text(encoding="utf-8"))
    if measured == "latency":
        assert batch is not None
        seconds: float = result["avg_latency"]
        return {
            "seconds": seconds,
            "ms_a_token": 1e3 * seconds / options.output_len,
            "tokens_per_second": batch * options.output_len / seconds,
        }
    tokens = result["requests_per_second"] * options.output_len
    return {"seconds": result["elapsed_time"], "ms_a_token": None, "tokens_per_second": tokens}


def say(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"serving {time.monotonic() - _BEGIN:4.0f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
