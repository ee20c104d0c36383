"""Parts 2 and 3: whole models in vLLM and llama.cpp, one thread, tokens a second of decoding.

All contestants on one model are alive at once, each in its own process on the same core, and take turns.
"""

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cpu import llamacpp
from benchmarks.cpu.machine import INT8, core, one_thread
from benchmarks.dummy import bits_per_weight, vocabulary
from benchmarks.errors import BenchmarkError
from benchmarks.protocol import Worker

__all__ = ["BATCHES", "Effort", "Entrant", "llamacpp_entrants", "race", "vllm_entrants"]

BATCHES = (1, 4, 16)
NAMES = {"dense": "dense bf16", "int4": "vLLM INT4", "gqsa": "GQSA S50", "gqsa_head": "GQSA S50, INT4 head"}
_LOAD_TIMEOUT = 600
_WARM_UP_TOKENS = 6
_TOKENS = (3, 49)


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        batches: requests at a time.
        rounds: of every contestant in turn.
        seconds: of decoding in one turn, about.
        most: seconds that all turns of a contestant with one batch may take, prefill included; what is slow gets
            fewer rounds, but one in any case.
        eager: vLLM without compilation. Compiling takes a C++ compiler and a minute a contestant, and its linears
            cannot be timed apart.
    """

    batches: tuple[int, ...] = BATCHES
    rounds: int = 3
    seconds: float = 1.5
    most: float = 9.0
    eager: bool = True


@dataclass(frozen=True)
class Entrant:
    """A model in an engine, or the same with other settings.

    Attributes:
        name: in the results.
        engine: vLLM or llama.cpp.
        worker: the process that has the model.
        bits: a weight takes on the average; in vLLM of the linear layers, in llama.cpp of all.
        environment: set while it generates.
    """

    name: str
    engine: str
    worker: Worker
    bits: float | None
    environment: Mapping[str, str] = field(default_factory=dict)

    def measure(self, batch: int, tokens: int, *, look_inside: bool = False) -> dict[str, Any]:
        """Seconds of prefill and decoding; see the workers."""
        question = {"batch": batch, "tokens": tokens, "environment": dict(self.environment)}
        return self.worker.ask({**question, "look_inside": look_inside})


@contextlib.contextmanager
def vllm_entrants(
    folders: Mapping[str, Path], logs: Path, effort: Effort, *, dummy: bool, say: Callable[[str], None]
) -> Iterator[list[Entrant]]:
    """Start vLLM with each form of a model; ends them afterwards.

    Args:
        folders: by form, see :data:`benchmarks.cpu.models.FORMS`.
        logs: folder for what vLLM says.
        effort: of which only ``eager`` matters here.
        dummy: the folders hold no weights.
        say: is told what happens.
    """
    with contextlib.ExitStack() as stack:
        entrants = []
        for form, folder in folders.items():
            settings = {
                "core": core(),
                "folder": str(folder.absolute()),
                "dummy": dummy,
                "vocabulary": vocabulary(folder),
                "eager": effort.eager,
            }
            worker = Worker(
                f"vLLM with {folder}", Path(sys.executable), "benchmarks.cpu.vllm_worker", settings,
                logs / f"vllm-{form}.log", one_thread(),
            )  # fmt: skip
            stack.enter_context(worker).start(_LOAD_TIMEOUT)
            say(f"vLLM, {NAMES[form]}: ready after {worker.ready['seconds']:.0f} s")
            entrants.append(Entrant(NAMES[form], "vLLM", worker, bits_per_weight(folder)))
            if form == "gqsa" and worker.ready["int8_activations"]:
                entrants.append(Entrant(f"{NAMES[form]} int8", "vLLM", worker, bits_per_weight(folder), INT8))
        yield entrants


@contextlib.contextmanager
def llamacpp_entrants(
    python: Path, files: Mapping[str, Path], logs: Path, say: Callable[[str], None]
) -> Iterator[list[Entrant]]:
    """Start llama.cpp with each file; ends them afterwards.

    Args:
        python: of llama.cpp's environment.
        files: by format.
        logs: folder for what llama.cpp says.
        say: is told what happens.
    """
    with contextlib.ExitStack() as stack:
        entrants = []
        for name, path in files.items():
            settings = {"core": core(), "file": str(path.absolute())}
            worker = Worker(
                f"llama.cpp with {path.name}", python, llamacpp.WORKER, settings,
                logs / f"llamacpp-{name}.log", one_thread(),
            )  # fmt: skip
            stack.enter_context(worker).start(_LOAD_TIMEOUT)
            say(f"llama.cpp, {name}: ready, {worker.ready['bits_per_weight']:.2f} bits a weight")
            entrants.append(Entrant(f"llama.cpp {name}", "llama.cpp", worker, worker.ready["bits_per_weight"]))
        yield entrants


def race(model: str, entrants: Sequence[Entrant], effort: Effort, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Let all contestants decode, in turn.

    Returns:
        A row for each batch and contestant, in that order.
    """
    rows = []
    for batch in effort.batches:
        inside = [_look_inside(each, batch, effort) for each in entrants]
        runs: list[list[dict[str, Any]]] = [[] for _ in entrants]
        for turn in range(effort.rounds):
            for entrant, warm_up, found in zip(entrants, inside, runs, strict=True):
                tokens, rounds = plan(warm_up, effort)
                if turn < rounds:
                    found.append(entrant.measure(batch, tokens))
        for entrant, found, facts in zip(entrants, runs, inside, strict=True):
            rows.append(summary(model, entrant, batch, found, facts))
            say(f"{model}, batch {batch}, {entrant.name}: {rows[-1]['tokens_per_second']:.1f} tokens/s")
    return rows


def plan(warm_up: Mapping[str, Any], effort: Effort) -> tuple[int, int]:
    """How many tokens to generate in a turn, and in how many rounds, by what the warm-up took."""
    step = warm_up["decode"] / warm_up["steps"]
    least, most = _TOKENS
    tokens = max(least, min(most, 1 + int(effort.seconds / step)))
    rounds = int(effort.most / (warm_up["prefill"] + step * (tokens - 1)))
    return tokens, max(1, min(effort.rounds, rounds))


def _look_inside(entrant: Entrant, batch: int, effort: Effort) -> dict[str, Any]:
    """Warm up, and time the modules: adds milliseconds a step in the linears and in the output layer."""
    look = effort.eager and entrant.engine == "vLLM"
    found = entrant.measure(batch, _WARM_UP_TOKENS, look_inside=look)
    if not look:
        return {**found, "linears_ms": None, "lm_head_ms": None}
    if found["watched"] != found["steps"] - 1:
        raise BenchmarkError(
            f"{entrant.worker.name}: {found['watched']} steps were timed, {found['steps'] - 1} expected; "
            "the requests did not go on in step"
        )
    return {**found, **{f"{kind}_ms": 1e3 * found[kind] / found["watched"] for kind in ("linears", "lm_head")}}


def summary(
    model: str, entrant: Entrant, batch: int, runs: Sequence[Mapping[str, Any]], inside: Mapping[str, Any]
) -> dict[str, Any]:
    """One row of the results: medians over the runs of a contestant."""
    speeds = [batch * run["steps"] / run["decode"] for run in runs]
    speed = statistics.median(speeds)
    return {
        "model": model,
        "contestant": entrant.name,
        "engine": entrant.engine,
        "batch": batch,
        "tokens_per_second": speed,
        "runs": speeds,
        "step_ms": 1e3 * batch / speed,
        "linears_ms": inside["linears_ms"],
        "lm_head_ms": inside["lm_head_ms"],
        "prefill_ms": 1e3 * statistics.median(run["prefill"] for run in runs),
        "steps": runs[0]["steps"],
        "bits_per_weight": entrant.bits,
    }
