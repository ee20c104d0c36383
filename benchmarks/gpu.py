"""`make gpu`: builds the CUDA kernels for the GPU of this machine, tests them there, and measures them.

    python -m benchmarks.gpu

Needs CUDA (nvcc and, for the checks, compute-sanitizer), torch with CUDA, pytest, hypothesis, filelock and what
vllm-gqsa requires; no network, no vLLM, no virtual environment. It ends within ten minutes, whatever hangs; on a GPU it
has not been tried yet. Everything a step writes goes to build/gpu/STEP.log; a folder build/gpu/site, where there is
one, is searched for Python packages too (see `make gpu-site`).
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.tables import table

__all__ = ["Result", "Step", "main", "run", "run_step", "steps"]

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu" / "site"
CUDA_LIBRARY = "vllm_gqsa/kernels/_cuda.so"
CPU_LIBRARY = "vllm_gqsa/kernels/_cpu.so"
NEEDED = ("torch", "numpy", "pydantic", "re2", "safetensors", "pytest", "hypothesis", "filelock", "setuptools")
SELECTION = (
    "(test_kernels and 16 and dtype0) or (test_uneven_rows and 16) or test_columns_beyond_the_window or "
    "test_a_gap_wider_than_the_window or test_other_tokens_change_no_bit or test_division_by_rows or "
    "(test_embedding and 16)"
)
"""Tests for the sanitizers, which slow everything down: every kernel, groups that span records, and split sums."""
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/cuda")
_CHECK = """
import importlib.util, sys
missing = [name for name in {needed!r} if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("not installed: " + ", ".join(missing) + "; install them, or where there is no network "
             "run `make gpu-site` on a machine that has one and bring build/gpu/site here")
import torch
if not torch.cuda.is_available():
    sys.exit("torch " + torch.__version__ + " sees no CUDA device")
print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())
"""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step and its log.
        command: what is started, in the root of the repository.
        timeout: seconds after which it counts as failed.
        environment: added to this process's own.
        makes: files, relative to the root, that are new afterwards, or else it has failed.
        gate: whether nothing that comes later makes sense without it.
    """

    name: str
    command: Sequence[str]
    timeout: float
    environment: Mapping[str, str] = field(default_factory=dict)
    makes: Sequence[str] = ()
    gate: bool = False


@dataclass(frozen=True)
class Result:
    """How a step went: whether well, what to say of it, and seconds."""

    name: str
    passed: bool
    what: str
    seconds: float = 0


def steps(python: str, sanitizer: str | None) -> list[list[Step]]:
    """All steps; those of one list run at the same time, and the lists one after the other.

    Args:
        python: interpreter.
        sanitizer: compute-sanitizer, None where it was not found.
    """
    check = Step("check", [python, "-c", _CHECK.format(needed=NEEDED)], 60, gate=True)
    # What is there may be older, or for another GPU.
    built = (CUDA_LIBRARY, CPU_LIBRARY)
    build = Step("build", [python, "setup.py", "build_ext", "--inplace"], 140, makes=built, gate=True)
    tests = [Step("test", [python, *PYTEST], 200)]
    for tool in ("memcheck", "racecheck", "synccheck"):
        if sanitizer is None:
            missing = "no compute-sanitizer on PATH or in /usr/local/cuda/bin"
            tests.append(Step(tool, [python, "-c", f"import sys; sys.exit({missing!r})"], 20))
            continue
        # Our kernels alone: torch's are not under test, and some of them take minutes under racecheck.
        command = [sanitizer, "--tool", tool, "--kernel-name", "kns=gqsa", "--error-exitcode", "66"]
        # Every tensor an allocation of its own, or an access behind its end would meet another tensor's memory.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        tests.append(Step(tool, [*command, python, *PYTEST, "-k", SELECTION], 200, environment))
    measure = [Step("kernels", [python, "-m", "benchmarks.kernels", "--quick"], 200)]
    return [[check], [build], tests, measure]


def run(stages: Sequence[Sequence[Step]], folder: Path) -> list[Result]:
    """Run all steps, none after a gate that failed.

    Args:
        stages: see :func:`steps`.
        folder: for the logs.
    """
    results: list[Result] = []
    stopped = False
    for stage in stages:
        if stopped:
            results += [Result(step.name, False, "not run") for step in stage]
            continue
        print(f"gpu: {', '.join(step.name for step in stage)}", file=sys.stderr, flush=True)
        with ThreadPoolExecutor(len(stage)) as pool:
            found = list(pool.map(lambda step: run_step(step, folder), stage))
        results += found
        stopped = any(step.gate and not each.passed for step, each in zip(stage, found, strict=True))
    return results


def run_step(step: Step, folder: Path) -> Result:
    """Run one step; its log is in ``folder``, its last line in the result."""
    log = folder / f"{step.name}.log"
    paths = [str(ROOT), *([str(SITE)] if SITE.is_dir() else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **step.environment}
    before = {name: _stamp(name) for name in step.makes}
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all it started ends with it
        )
        try:
            status: int | None = process.wait(step.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    seconds = time.monotonic() - start
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1].strip("= ") if lines else "it wrote nothing"
    if status is None:
        return Result(step.name, False, f"not done after {step.timeout:.0f} s: {last}", seconds)
    stale = [name for name in step.makes if _stamp(name) is None or _stamp(name) == before[name]]
    if status == 0 and stale:
        return Result(step.name, False, f"{', '.join(stale)} was not built; the log says why", seconds)
    return Result(step.name, status == 0, last if status == 0 else f"status {status}: {last}", seconds)


def _stamp(name: str) -> int | None:
    path = ROOT / name
    return path.stat().st_mtime_ns if path.exists() else None


def main(arguments: list[str] | None = None) -> int:
    """Run everything and print one table; returns the exit status, 0 if every step passed."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Build, test and measure the CUDA kernels.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu", help="for logs [build/gpu]")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    results = run(steps(sys.executable, sanitizer), options.folder)
    kernels = options.folder / "kernels.log"
    if any(each.name == "kernels" and each.passed for each in results):
        text = kernels.read_text(encoding="utf-8")
        print("\n".join(line for line in text.splitlines() if line.startswith("|")), end="\n\n")
    rows = [(each.name, "passed" if each.passed else "FAILED", f"{each.seconds:.0f}", each.what) for each in results]
    summary = "\n".join(table(("step", "result", "seconds", "last line"), rows, 4))
    (options.folder / "summary.md").write_text(summary + "\n", encoding="utf-8")
    print(f"{summary}\n\nlogs: {options.folder}")
    return 0 if all(each.passed for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
