"""Clients of a server: one by one, many at once, through ``vllm bench serve``, and some that hang up."""

import asyncio
import json
import random
import re
import subprocess
import sys
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
from openai.types import Completion

from benchmarks.demo.errors import DemoError

__all__ = ["Request", "ask_all", "ask_by_bench", "hang_up", "make_requests", "running", "start_streams"]


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens are to be generated for it."""

    prompt: str
    output_tokens: int


def make_requests(text: str, count: int, seed: int) -> list[Request]:
    """Prompts of 4 to 120 words from all over a text, 4 to 40 tokens each to be generated."""
    rng, words = random.Random(seed), text.split()
    made = []
    for _ in range(count):
        length = round(4 * 30 ** rng.random())  # as many short ones as long ones
        at = rng.randrange(len(words) - length)
        made.append(Request(" ".join(words[at : at + length]), rng.randint(4, 40)))
    return made


def _client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


async def ask_all(url: str, requests: list[Request], concurrency: int) -> list[str]:
    """Answers without streaming, in the order of the requests.

    Raises:
        openai.OpenAIError: a request failed.
    """
    gate = asyncio.Semaphore(concurrency)
    async with _client(url) as client:
        model = (await client.models.list()).data[0].id

        async def one(request: Request) -> str:
            async with gate:
                answer = await client.completions.create(
                    model=model, prompt=request.prompt, max_tokens=request.output_tokens, temperature=0,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                return answer.choices[0].text

        return list(await asyncio.gather(*map(one, requests)))


def ask_by_bench(url: str, model: Path, requests: list[Request], concurrency: int, folder: Path) -> dict[str, Any]:
    """The same by ``vllm bench serve``, which streams. Returns its figures, answers under ``generated_texts``.

    Raises:
        DemoError: it failed.
    """
    data = folder / "requests.jsonl"
    data.write_text("".join(json.dumps(asdict(each)) + "\n" for each in requests), encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--backend", "openai", "--base-url", url,
        "--model", str(model), "--dataset-name", "custom", "--dataset-path", str(data), "--custom-output-len", "-1",
        "--skip-chat-template", "--disable-shuffle", "--num-prompts", str(len(requests)), "--temperature", "0",
        "--max-concurrency", str(concurrency), "--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm",
        "--result-dir", str(folder), "--result-filename", "bench.json",
    ]  # fmt: skip
    with (folder / "bench.log").open("wb") as log:
        status = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT)
    if status != 0:
        raise DemoError(f"vllm bench serve failed with status {status}; see {folder / 'bench.log'}")
    found: dict[str, Any] = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    return found


async def hang_up(url: str, requests: list[Request]) -> int:
    """Start streams all at once and close each after its second piece; returns how many the server ran before."""
    async with _client(url) as client:
        streams = await start_streams(client, requests)
        busy = await asyncio.to_thread(running, url)
        await asyncio.gather(*(stream.close() for stream in streams))
        return busy


async def start_streams(client: openai.AsyncOpenAI, requests: list[Request]) -> list[openai.AsyncStream[Completion]]:
    """Streams of long answers, of each of which two pieces have come."""
    model = (await client.models.list()).data[0].id
    starts = (
        client.completions.create(
            model=model, prompt=each.prompt, max_tokens=200, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )
        for each in requests
    )  # fmt: skip
    streams = await asyncio.gather(*starts)

    async def begin(stream: openai.AsyncStream[Completion]) -> None:
        pieces = aiter(stream)
        for _ in range(2):
            await anext(pieces)

    await asyncio.gather(*map(begin, streams))
    return streams


def running(url: str) -> int:
    """How many requests the server is working on or has waiting."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:  # noqa: S310 - our own address
        text = answer.read().decode()
    return sum(int(float(n)) for n in re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.M))
