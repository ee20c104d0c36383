"""Measure the CUDA kernels on the GPU of this machine.

    python -m benchmarks.kernels --quick

Results go to benchmarks/results as JSON, Markdown and, where there is matplotlib, PNG. Nothing else may use the GPU
meanwhile. A process of its own has the GPU; where a contestant brings it down, or does not come back, that is a line of
the report, and a new process goes on with the next.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.kernels.cases import CASES, QUICK_CASES, TAKING_PART, Case
from benchmarks.kernels.report import layers, markdown
from benchmarks.machine import slug
from benchmarks.protocol import Worker

SECONDS = {"quick": 0.02, "full": 0.05}
"""Of replays for one figure."""
BUDGET = {"quick": 150, "full": 450}
"""Seconds after which nothing new is begun."""
START_TIMEOUT = 180
TIMEOUT = 90
_BEGIN = time.monotonic()


def main(arguments: list[str] | None = None) -> int:
    """Measure, write and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description="Measure the CUDA kernels on this GPU.")
    parser.add_argument("--quick", action="store_true", help="a subset, in under three minutes on an H200")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing new after these [150 or 450]")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of GQSA's activations")
    parser.add_argument("--marlin", type=Path, help="_C_stable_libtorch.abi3.so of vLLM, where that is not installed")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="[%(default)s]")
    parser.add_argument("--log", type=Path, default=Path("build/gpu/kernels-worker.log"), help="[%(default)s]")
    parser.add_argument("--report", type=Path, metavar="JSON", help="measure nothing, write the report of this file")
    options = parser.parse_args(arguments)
    try:
        if options.report:
            path = options.report
        else:
            if options.marlin and not options.marlin.is_file():
                raise BenchmarkError(f"--marlin {options.marlin}: there is no such file")
            path = run(QUICK_CASES if options.quick else CASES, options)
        document = read(path)
    except BenchmarkError as error:
        print(f"benchmarks.kernels: {error}", file=sys.stderr)
        return 1
    publish(document, path)
    print("\n".join(layers(document)))
    print(f"\nall of it: {path.with_suffix('.md')}")
    return 0


def run(cases: Sequence[Case], options: argparse.Namespace) -> Path:
    """Measure and write the JSON file, again after every shape; returns its path.

    Raises:
        BenchmarkError: the GPU cannot be used, or nothing could be measured on it.
    """
    mode = "quick" if options.quick else "full"
    deadline = _BEGIN + (options.budget or BUDGET[mode])
    marlin = str(options.marlin.absolute()) if options.marlin else None
    settings = {"seconds": SECONDS[mode], "dtype": options.dtype, "marlin": marlin}

    def start() -> Worker:
        worker = Worker("the GPU", Path(sys.executable), "benchmarks.kernels.worker", settings, options.log, {})
        worker.start(START_TIMEOUT)
        return worker

    race = Race(start, say)
    machine = race.worker.ready
    path = Path(options.results / f"gpu-{slug(machine['gpu'])}.json")
    document: dict[str, Any] = {
        "format": 1,
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}",
        "effort": {"mode": mode, **settings, "marlin": bool(marlin)},
        "machine": machine,
    }
    try:
        left_out = 0
        for group in _shapes(cases):
            if time.monotonic() < deadline:
                left_out += race.run(group, deadline)
            else:
                left_out += len(list(race.jobs(group)))
            document |= {"rows": race.rows, "left_out": left_out, "seconds": time.monotonic() - _BEGIN}
            write(document, path)
    finally:
        race.worker.stop()
    if all("failed" in row for row in race.rows):
        raise BenchmarkError(f"nothing could be measured; {path} says why")
    return path


def _shapes(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """Cases that share their weights."""
    for _, group in itertools.groupby(cases, key=lambda case: (case.part, case.weight)):
        yield list(group)


class Race:
    """Asks the process that has the GPU for one figure after the other, and starts another where it is lost.

    Attributes:
        rows: what was found, or why nothing.
        worker: the process.
    """

    def __init__(self, start: Callable[[], Worker], say: Callable[[str], None]) -> None:
        """Start the first process.

        Args:
            start: makes one that is ready.
            say: is told what happens.

        Raises:
            BenchmarkError: it could not be started.
        """
        self.rows: list[dict[str, Any]] = []
        self._start = start
        self._say = say
        self.worker = start()

    def jobs(self, cases: Sequence[Case]) -> Iterator[tuple[str, Case]]:
        """Who is asked for what, one contestant after the other, so that one weight at a time is in memory."""
        for name in TAKING_PART[cases[0].part]:
            if name not in self.worker.ready["missing"]:
                for case in cases:
                    yield name, case

    def run(self, cases: Sequence[Case], deadline: float) -> int:
        """Measure cases that share their weights; returns how many figures the time did not suffice for."""
        jobs = list(self.jobs(cases))
        hopeless: dict[str, str] = {}
        start = time.monotonic()
        for i, (name, case) in enumerate(jobs):
            if time.monotonic() >= deadline:
                return len(jobs) - i
            answer = {"failed": hopeless[name]} if name in hopeless else self._ask(name, case)
            if "failed" in answer and not answer.get("again", True):
                hopeless[name] = answer["failed"]
            fields = dataclasses.asdict(case)
            self.rows.append({**fields.pop("weight"), **fields, "contestant": name, **answer})
        failed = sum("failed" in row for row in self.rows[-len(jobs) :])
        also = f", {failed} failed" if failed else ""
        self._say(f"{cases[0]}: {len(jobs)} figures{also}, {time.monotonic() - start:.1f} s")
        return 0

    def _ask(self, name: str, case: Case) -> dict[str, Any]:
        question = {"contestant": name, "weight": dataclasses.asdict(case.weight), "m": case.m}
        try:
            answer = self.worker.ask(question, TIMEOUT)
        except BenchmarkError as error:
            answer = {"failed": str(error), "again": False, "fatal": True}
        if "failed" in answer:
            self._say(f"{name}, {case}: {answer['failed']}")
        if answer.get("fatal"):
            self.worker.stop()
            self.worker = self._start()
        return answer


def write(document: dict[str, Any], path: Path) -> None:
    """Write the JSON file; it is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote.

    Raises:
        BenchmarkError: it is not there, or no such file.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != 1 or "read_bytes_per_second" not in document["machine"]:
            raise BenchmarkError(f"{path}: not written by benchmarks.kernels of this version")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{path}: cannot be read as results ({error})") from error
    return document


def publish(document: dict[str, Any], path: Path) -> None:
    """Write Markdown and, where it can be drawn, the picture beside the JSON file."""
    from benchmarks.kernels.plot import plot  # noqa: PLC0415 - matplotlib is slow to import

    path.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
    if not plot(document, path.with_suffix(".png")):
        say("no picture: there is no matplotlib here")


def say(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"kernels {time.monotonic() - _BEGIN:4.0f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
