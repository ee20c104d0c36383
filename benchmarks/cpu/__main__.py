"""`make bench-cpu`: all parts, or one alone.

    .venv/bin/python -m benchmarks.cpu kernels

Results go to benchmarks/results as JSON, Markdown and PNG; a part that is run alone replaces its own figures there and
leaves the others. Models and llama.cpp are made in build/ the first time and found there the next.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cpu import engines, kernels, llamacpp, machine, models
from benchmarks.cpu.report import markdown
from benchmarks.dummy import write_dummy
from benchmarks.errors import BenchmarkError
from benchmarks.machine import processor, slug, versions
from benchmarks.protocol import Worker

PARTS = ("kernels", "engines", "llamacpp")
# Room for one request of one small model; nothing here is to be trusted as a measurement.
QUICK = engines.Effort(batches=(1,), rounds=1, seconds=0.2)
QUICK_ONE_B = {**models.ONE_B, "num_hidden_layers": 1, "vocab_size": 1024}
LLAMA_CPP = Path("build/llama-cpp-venv")
BUSY = 0.5
"""Load of the machine before a run above which a warning is given."""
_KERNEL_TIMEOUT = 300
_BEGIN = time.monotonic()


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.cpu", description="Measure kernels and engines on one thread.")
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all", "report"], help="[%(default)s]")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench-cpu"), help="for models and logs [%(default)s]"
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="[%(default)s]")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile; some minutes more")
    parser.add_argument("--quick", action="store_true", help="tiny cases, to see that it works")
    options = parser.parse_args(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name in machine.INT8:
        os.environ.pop(name, None)  # set where 8-bit activations have their turn, and nowhere else
    path = options.results / f"cpu-{slug(processor())}.json"
    try:
        if options.part != "report":
            run(PARTS if options.part == "all" else (options.part,), options, path)
        text = publish(path)
    except BenchmarkError as error:
        print(f"bench-cpu: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench-cpu: stopped; nothing was written", file=sys.stderr)
        return 130
    print(text)
    return 0


def run(parts: tuple[str, ...], options: argparse.Namespace, path: Path) -> None:
    """Measure and write the JSON file.

    Args:
        parts: of :data:`PARTS`.
        options: of the command line.
        path: of the JSON file; what it holds of other parts stays.

    Raises:
        BenchmarkError: a contestant could not be measured.
    """
    effort = QUICK if options.quick else engines.Effort()
    effort = dataclasses.replace(effort, eager=not options.compile)
    config = QUICK_ONE_B if options.quick else models.ONE_B
    sources, llama = prepare(parts, options.folder, config)
    load = os.getloadavg()[0]
    if load > BUSY:
        say(f"something else runs here (load {load:.1f}); figures will be off")
    start = time.monotonic()
    date = f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}"
    found: dict[str, dict[str, Any]] = {}
    if "kernels" in parts:
        found["kernels"] = run_kernels(options.folder, kernels.QUICK_CASES if options.quick else kernels.CASES)
    if sources:
        rows = run_engines(sources, llama, options.folder, effort)
        seconds = time.monotonic() - start - found.get("kernels", {}).get("seconds", 0)
        for part, engine in (("engines", "vLLM"), ("llamacpp", "llama.cpp")):
            chosen = [row for row in rows if row["engine"] == engine]
            if chosen:
                found[part] = {"seconds": seconds, "rows": chosen}
    if "llamacpp" in found:
        found["llamacpp"]["versions"] = {"llama-cpp-python": llamacpp.LLAMA_CPP_PYTHON}
    if "engines" in found:
        found["engines"]["effort"] = dataclasses.asdict(effort)
    for part in ("kernels", "engines"):
        if part in found:
            found[part]["versions"] = versions()
    write(path, {part: {"date": date, "load_before": load, **found[part]} for part in PARTS if part in found})
    say(f"measured in {time.monotonic() - start:.0f} s: {path}")


def prepare(
    parts: tuple[str, ...], folder: Path, config: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], Path | None]:
    """Make what is not there yet, which is not part of the measured time.

    Returns:
        For each model its folders for vLLM and its files for llama.cpp, as far as the parts need them; and the
        Python of llama.cpp, None where it takes no part.
    """
    sources: dict[str, dict[str, Any]] = {}
    llama = None
    if "engines" in parts:
        sources["1B shape"] = {"vllm": write_dummy(folder / f"dummy-{config['num_hidden_layers']}", config)}
        sources["SmolLM2-135M"] = {"vllm": models.write_smollm2(folder / "smollm2", say)}
    if "llamacpp" in parts:
        try:
            llama = llamacpp.install(LLAMA_CPP, say)
            files = llamacpp.dummy_files(llama, folder / "gguf", config, say)
            sources.setdefault("1B shape", {})["llamacpp"] = files
            sources.setdefault("SmolLM2-135M", {})["llamacpp"] = llamacpp.smollm2_files(llama, folder / "gguf", say)
        except BenchmarkError as error:
            if parts == ("llamacpp",):
                raise
            say(f"llama.cpp is left out: {error}")
            llama = None
            for each in sources.values():
                each.pop("llamacpp", None)
    return {model: each for model, each in sources.items() if each}, llama


def run_kernels(folder: Path, cases: tuple[kernels.Case, ...]) -> dict[str, Any]:
    """Part 1, in a process of its own."""
    start = time.monotonic()
    settings = {
        "core": machine.core(),
        "cache_bytes": machine.cache_bytes(),
        "seconds": kernels.SECONDS if cases is kernels.CASES else 0.2,
    }
    rows = []
    log = folder / "kernels.log"
    with Worker(
        "the kernels", Path(sys.executable), "benchmarks.cpu.kernels", settings, log, machine.one_thread()
    ) as worker:
        worker.start(_KERNEL_TIMEOUT)
        say(f"kernels: memory is read by {worker.ready['read_loop']}")
        if not worker.ready["int8_activations"]:
            say("kernels: GQSA_CPU_ACT=int8 changes nothing, so 8-bit activations take no part")
        for i, case in enumerate(cases, 1):
            row = worker.ask(dataclasses.asdict(case), _KERNEL_TIMEOUT)
            rows.append(row)
            speed = row["speedup"]["GQSA"]["torch bf16"]
            say(f"kernels {i}/{len(cases)}: {case}: {speed:.2f} x torch bf16")
        return {**worker.ready, "rows": rows, "seconds": time.monotonic() - start}


def run_engines(
    sources: dict[str, dict[str, Any]], llama: Path | None, folder: Path, effort: engines.Effort
) -> list[dict[str, Any]]:
    """Parts 2 and 3: one race a model."""
    rows = []
    for model, source in sources.items():
        logs = folder / "logs" / slug(model)
        with contextlib.ExitStack() as stack:
            entrants = []
            if "vllm" in source:
                started = engines.vllm_entrants(source["vllm"], logs, effort, dummy=model == "1B shape", say=say)
                entrants += stack.enter_context(started)
            if llama is not None and "llamacpp" in source:
                entrants += stack.enter_context(engines.llamacpp_entrants(llama, source["llamacpp"], logs, say))
            rows += engines.race(model, entrants, effort, say)
    return rows


def write(path: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Write the JSON file; parts that are not given stay as they are."""
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}
    merged = {**document["parts"], **parts}
    document = {
        "format": 1,
        "machine": machine.facts(),
        "parts": {part: merged[part] for part in PARTS if part in merged},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def publish(path: Path) -> str:
    """Write Markdown and picture beside a JSON file; returns the former.

    Raises:
        BenchmarkError: the file is not there.
    """
    from benchmarks.cpu.plot import plot  # noqa: PLC0415 - matplotlib is slow to import

    if not path.exists():
        raise BenchmarkError(f"{path} is not there; run `make bench-cpu` first")
    document = json.loads(path.read_text(encoding="utf-8"))
    text = markdown(document)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(document, path.with_suffix(".png"))
    return text


def say(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"bench-cpu {time.monotonic() - _BEGIN:4.0f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
