"""A server under load and abuse: what `make load` runs.

    .venv/bin/python -m benchmarks.load

SmolLM2-135M-Instruct is compressed and served in float32, with torch.compile, by `vllm serve`. It is asked one request
at a time, then 500 at a concurrency of 32, streamed by `vllm bench serve` and not streamed; clients hang up; the server
is stopped under load and started again with a warm compile cache. Everything lies in build/load; the figures go to
benchmarks/results/load.json. The exit status is 0 if every check holds.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import openai
from openai.types import Completion

from benchmarks.demo.errors import DemoError
from benchmarks.demo.model import find_gguf, write_dense_model, write_texts
from benchmarks.demo.report import machine
from benchmarks.demo.server import Server, tail
from benchmarks.load.clients import ask_all, ask_by_bench, hang_up, make_requests, running, start_streams
from benchmarks.load.watch import MemoryWatch, growth, members

DISTINCT = 100
"""Different requests; each is asked ``REQUESTS / DISTINCT`` times, and once alone."""
REQUESTS = 500
CONCURRENCY = 32
MOST_GROWTH = 0.02
"""Share by which memory may grow over the last four fifths of the load."""
STOP_SECONDS = 120
"""Given to requests that are being answered when the server is told to stop; they take less."""
RESULT = Path("benchmarks/results/load.json")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/load"), help="where it writes [%(default)s]")
    parser.add_argument("--model", type=Path, help="serve this GQSA checkpoint instead of making one")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(VLLM_CACHE_ROOT=str((folder / "cache").absolute()), HF_HUB_OFFLINE="1")
    try:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        write_texts(folder / "calibration.txt", folder / "eval.txt")
        model = options.model or prepare(folder)
        figures = load(folder, model)
    except (DemoError, openai.OpenAIError, OSError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    RESULT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    failed = [name for name, holds in figures["checks"].items() if not holds]
    print(json.dumps(figures["checks"], indent=2))
    return 1 if failed else 0


def prepare(folder: Path) -> Path:
    """Compress the demo's model in a hurry, since nobody reads its answers, unless that was done."""
    dense, ours, text = folder / "dense", folder / "gqsa", folder / "calibration.txt"
    write_dense_model(find_gguf(), dense)
    if not (ours / "config.json").exists():
        options = ["--recipe", "one-shot", "--sparsity", "0.2", "--lm-head", "0", "--no-compensate"]
        options += ["--calibration", str(text), "--samples", "4", "--context", "128", "--eval-windows", "1"]
        gqsa = Path(sys.executable).with_name("gqsa")
        if subprocess.call([str(gqsa), "compress", str(dense), str(ours), *options]) != 0:
            raise DemoError("gqsa compress failed; its message stands above")
    return ours


def serve(model: Path, log: Path) -> Server:
    """`vllm serve` in float32 and compiled; its cache for keys and values is small, so that it is soon in use whole."""
    vllm = Path(sys.executable).with_name("vllm")
    settings = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", str(CONCURRENCY))
    cache = ("--kv-cache-memory-bytes", str(400 << 20), "--no-enable-prefix-caching")
    # Without it vLLM 0.32 ends its engine at once, and then waits for clients that it cannot answer any more.
    patience = ("--shutdown-timeout", str(STOP_SECONDS))
    return Server([str(vllm), "serve", str(model), *settings, *cache, *patience], log, say, timeout=600)


def load(folder: Path, model: Path) -> dict[str, Any]:
    """All steps; returns figures, and under ``checks`` what holds."""
    distinct = make_requests((folder / "calibration.txt").read_text(encoding="utf-8"), DISTINCT, seed=0)
    requests = distinct * (REQUESTS // DISTINCT)
    with serve(model, folder / "serve-cold.log") as server:
        cold = server.seconds_to_ready
        say(f"ready after {cold:.0f} s; {DISTINCT} requests one by one")
        alone = asyncio.run(ask_all(server.url, distinct, 1))
        expected = alone * (REQUESTS // DISTINCT)
        with MemoryWatch(server.group) as memory:
            say(f"{REQUESTS} requests, {CONCURRENCY} at a time, streamed by vllm bench serve")
            bench = ask_by_bench(server.url, model, requests, CONCURRENCY, folder)
            say("the same without streaming")
            start = time.monotonic()
            whole = asyncio.run(ask_all(server.url, requests, CONCURRENCY))
            seconds = time.monotonic() - start
        say("clients that hang up")
        busy = asyncio.run(hang_up(server.url, distinct[:CONCURRENCY]))
        idle = wait_idle(server.url)
        after = asyncio.run(ask_all(server.url, distinct[:4], 1))
        say("SIGTERM under load")
        stop_seconds, status, complete = asyncio.run(stop_under_load(server, distinct[:CONCURRENCY]))
    log = tail(folder / "serve-cold.log", 100_000)
    with serve(model, folder / "serve-warm.log") as server:
        warm = server.seconds_to_ready
        say(f"ready again after {warm:.0f} s")
        again = asyncio.run(ask_all(server.url, distinct[:4], 1))
    answers: list[list[str]] = [bench["generated_texts"], whole]
    differ = [sum(a != b for a, b in zip(expected, got, strict=True)) for got in answers]
    grown = growth(memory.samples)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(),
        "model": "SmolLM2-135M-Instruct, GQSA W4S20 G16 with an INT4 head, float32, torch.compile",
        "requests": REQUESTS,
        "concurrency": CONCURRENCY,
        "streamed": {
            key: bench[key] for key in ("completed", "failed", "duration", "output_throughput", "mean_ttft_ms")
        },
        "not_streamed": {"duration": round(seconds, 1)},
        "answers_that_differ_from_those_of_single_requests": {"streamed": differ[0], "not_streamed": differ[1]},
        "memory_mb": [round(each / 1e6) for each in memory.samples[:: max(1, len(memory.samples) // 20)]],
        "memory_growth_over_the_last_four_fifths": round(grown, 4),
        "streams_that_ran_before_hanging_up": busy,
        "seconds_until_idle_after_hanging_up": idle,
        "seconds_to_stop": round(stop_seconds, 1),
        "exit_status": status,
        "seconds_to_ready": {"cold": round(cold, 1), "warm": round(warm, 1)},
        "checks": {
            "no request failed": bench["completed"] == REQUESTS and len(whole) == REQUESTS,
            "answers under load are those of single requests": differ == [0, 0],
            "memory is flat": grown <= MOST_GROWTH,
            "hanging up frees the server": busy == CONCURRENCY and idle is not None and after == alone[:4],
            "SIGTERM under load: all streams end complete": complete == CONCURRENCY,
            "SIGTERM under load ends all processes": status == 0 and stop_seconds <= STOP_SECONDS,
            "no traceback in the log before it": is_calm(log),
            "a restart is faster and answers the same": warm < cold and again == alone[:4],
        },
    }


def is_calm(log: str) -> bool:
    """Whether vLLM logged no traceback until it was stopped; it logs some as it ends."""
    before, stop, _ = log.partition("received signal=SIGTERM")
    return bool(stop) and "Traceback" not in before


def wait_idle(url: str, patience: float = 15) -> float | None:
    """Seconds until the server works on nothing any more; None if it still does after ``patience``."""
    start = time.monotonic()
    while time.monotonic() - start < patience:
        if running(url) == 0:
            return round(time.monotonic() - start, 1)
        time.sleep(0.2)
    return None


async def stop_under_load(server: Server, requests: list[Any]) -> tuple[float, int | None, int]:
    """Send SIGTERM while streams run; returns seconds to the end of all processes, exit status, complete streams."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        streams = await start_streams(client, requests)
        start = time.monotonic()
        os.kill(server.group, signal.SIGTERM)
        reading = asyncio.gather(*(ends_complete(stream) for stream in streams))
        while members(server.group) and time.monotonic() - start <= STOP_SECONDS:
            await asyncio.sleep(0.1)
        seconds, status = time.monotonic() - start, server.poll()
        server.stop()  # or a server that hangs would keep the streams open
        return seconds, status, sum(await reading)


async def ends_complete(stream: openai.AsyncStream[Completion]) -> bool:
    """Whether what is left of a stream comes to its regular end."""
    reason = None
    with contextlib.suppress(openai.OpenAIError, httpx.HTTPError):
        async for piece in stream:
            reason = piece.choices[0].finish_reason if piece.choices else reason
    return reason == "length"


def say(text: str) -> None:
    """A line of progress."""
    print(f"load: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
