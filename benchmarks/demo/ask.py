"""Questions to an OpenAI-compatible server, and the speed of its answers."""

import statistics
import time
from dataclasses import dataclass

import openai

from benchmarks.demo.errors import DemoError

__all__ = ["CHAT", "COMPLETION", "Answers", "ask"]

COMPLETION = "Water boils at 100 degrees Celsius because"
CHAT = "What is the capital of France, and what is it known for?"


@dataclass(frozen=True)
class Answers:
    """What one server said.

    Attributes:
        completion: of /v1/completions.
        chat: of /v1/chat/completions, streamed.
        chat_pieces: pieces the stream came in.
        tokens_per_second: of one request at a time, from its first new token to its last; the median of the runs.
        runs: the single measurements behind it.
    """

    completion: str
    chat: str
    chat_pieces: int
    tokens_per_second: float
    runs: tuple[float, ...]


def ask(url: str, *, tokens: int = 40, speed_tokens: int = 48, speed_runs: int = 3) -> Answers:
    """Ask both endpoints greedily, then measure speed.

    Args:
        url: of the server, without ``/v1``.
        tokens: most new tokens of an answer.
        speed_tokens: new tokens of a speed run.
        speed_runs: how many of them; the answers before serve as warm-up.

    Raises:
        DemoError: the server refused, broke off or said nothing.
    """
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=180) as client:
            model = client.models.list().data[0].id
            completion = client.completions.create(model=model, prompt=COMPLETION, max_tokens=tokens, temperature=0)
            pieces = _chat_pieces(client, model, tokens)
            runs = tuple(_speed(client, model, speed_tokens) for _ in range(speed_runs))
    except openai.OpenAIError as error:
        raise DemoError(f"asking {url} failed: {error}") from error
    text = completion.choices[0].text
    if not text.strip() or not pieces:
        raise DemoError(f"{url} answered with nothing")
    return Answers(text, "".join(pieces), len(pieces), statistics.median(runs), runs)


def _chat_pieces(client: openai.OpenAI, model: str, tokens: int) -> list[str]:
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": CHAT}], max_tokens=tokens, temperature=0, stream=True
    )
    return [part.choices[0].delta.content for part in stream if part.choices and part.choices[0].delta.content]


def _speed(client: openai.OpenAI, model: str, tokens: int) -> float:
    """Tokens a second after the first, so that reading the prompt does not count."""
    times = []
    stream = client.completions.create(
        model=model,
        prompt=COMPLETION,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    generated = 0
    for part in stream:
        if part.choices:
            times.append(time.perf_counter())
        if part.usage is not None:
            generated = part.usage.completion_tokens
    if generated < 2 or len(times) < 2:
        raise DemoError("the server's stream was too short to measure its speed")
    return (generated - 1) / (times[-1] - times[0])
