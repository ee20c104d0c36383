"""Part 1: linear kernels on one thread, cold data. Both the list of cases and the process that times them."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["CASES", "QUICK_CASES", "Case", "prepare"]

SECONDS = 2.0
"""To spend on the rounds of one case."""


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        model: whose layer it is.
        layer: of that model; fused as vLLM fuses it.
        n: outputs.
        k: inputs.
        m: tokens of a call.
        dtype: of the activations of the group-sparse kernel.
        sparsity: share of pruned groups.
        group_size: weights of a group.
    """

    model: str
    layer: str
    n: int
    k: int
    m: int = 1
    dtype: str = "bfloat16"
    sparsity: float = 0.5
    group_size: int = 16


_LAYERS = (
    ("SmolLM2-135M", "qkv", 960, 576),
    ("SmolLM2-135M", "o", 576, 576),
    ("SmolLM2-135M", "gate_up", 3072, 576),
    ("SmolLM2-135M", "down", 576, 1536),
    ("Qwen2.5-1.5B", "qkv", 2048, 1536),
    ("Qwen2.5-1.5B", "o", 1536, 1536),
    ("Qwen2.5-1.5B", "gate_up", 17920, 1536),
    ("Qwen2.5-1.5B", "down", 1536, 8960),
    ("Llama-3-8B", "qkv", 6144, 4096),
    ("Llama-3-8B", "down", 4096, 14336),
)
_SQUARE = ("Llama-3-8B", "o", 4096, 4096)
_TALL = ("Llama-3-8B", "up", 14336, 4096)

# Cases of one weight stand together, so that it is made once.
CASES = (
    *(Case(*layer) for layer in _LAYERS),
    *(Case(*_SQUARE, m=m) for m in (1, 4, 8, 16, 64, 512)),
    *(Case(*_SQUARE, m=m, dtype="float32") for m in (1, 8, 64)),
    *(Case(*_TALL, m=m) for m in (1, 4, 8, 16, 64, 512)),
    *(Case(*_SQUARE, sparsity=sparsity) for sparsity in (0.2, 0.8)),
    *(Case(*_SQUARE, group_size=size) for size in (8, 32, 64, 128)),
)
QUICK_CASES = (Case(*_LAYERS[1]), Case(*_LAYERS[1], m=4, dtype="float32"))


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Find the fastest way to read memory; see :func:`benchmarks.cpu.protocol.serve`.

    Args:
        settings: ``cache_bytes``, and ``seconds`` for the rounds of one case.
    """
    import torch  # noqa: PLC0415 - the parent, which reads CASES, does without

    from benchmarks.cpu.bandwidth import read_contestant  # noqa: PLC0415
    from benchmarks.cpu.contestants import Weights, int8_activations  # noqa: PLC0415

    torch.set_num_threads(1)
    read, loop = read_contestant(settings["cache_bytes"])
    int8 = int8_activations()
    made: dict[tuple[Any, ...], Weights] = {}

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        case = Case(**question)
        start = time.monotonic()
        key = (case.n, case.k, case.sparsity, case.group_size)
        if key not in made:
            made.clear()
            made[key] = Weights(*key, settings["cache_bytes"])
        contestants = made[key].contestants(case.m, getattr(torch, case.dtype), int8=int8)
        with torch.inference_mode():
            return _row(case, [*contestants, read], settings["seconds"], made[key].facts, start)

    return {"read_loop": loop, "int8_activations": int8}, answer


def _row(case: Case, contestants: list[Any], seconds: float, facts: dict[str, Any], start: float) -> dict[str, Any]:
    from benchmarks.cpu.timing import race, ratio  # noqa: PLC0415

    times = race(contestants, seconds)
    ours, read = times["GQSA"], times["read"]
    shares = sorted(
        (ours.bytes / mine) / (read.bytes / theirs) for mine, theirs in zip(ours.rounds, read.rounds, strict=True)
    )
    return {
        **dataclasses.asdict(case),
        **facts,
        # How many times faster than each other contestant; for 8-bit activations the same, under its own name.
        "speedup": {name: ratio(ours, each) for name, each in times.items() if name != "read"},
        "int8_speedup": {
            name: ratio(times["GQSA int8"], each) for name, each in times.items() if name != "read"
        } if "GQSA int8" in times else None,
        "read_share": shares[len(shares) // 2],
        "microseconds": {
            name: {
                "median": 1e6 * each.median,
                "p10": 1e6 * each.quantile(0.1),
                "p90": 1e6 * each.quantile(0.9),
                "bytes": each.bytes,
                "gb_per_s": each.gigabytes_per_second,
            }
            for name, each in times.items()
        },
        "rounds": len(ours.rounds),
        "seconds": time.monotonic() - start,
    }


if __name__ == "__main__":
    from benchmarks.cpu.protocol import serve

    serve(prepare)
