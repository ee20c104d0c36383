"""Part 1: linear kernels on one thread, cold data. Both the list of cases and the process that times them."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.cpu.timing import race, ratio
from benchmarks.times import Times

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

    def __str__(self) -> str:
        sparsity = f"S{100 * self.sparsity:.0f} G{self.group_size}"
        return f"{self.n} x {self.k}, {sparsity}, M = {self.m} in {self.dtype}"


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

# Cases of one shape stand together, so that its weights are made once.
CASES = (
    *(Case(*layer) for layer in _LAYERS),
    *(Case(*_SQUARE, m=m) for m in (1, 4, 8, 16, 64, 512)),
    *(Case(*_SQUARE, m=m, dtype="float32") for m in (1, 8, 64)),
    *(Case(*_SQUARE, sparsity=sparsity) for sparsity in (0.2, 0.8)),
    *(Case(*_SQUARE, group_size=size) for size in (8, 32, 64, 128)),
    *(Case(*_TALL, m=m) for m in (1, 4, 8, 16, 64, 512)),
)
QUICK_CASES = (Case(*_LAYERS[1]), Case(*_LAYERS[1], m=4, dtype="float32"))


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Find the fastest way to read memory; see :func:`benchmarks.protocol.serve`.

    Args:
        settings: ``cache_bytes``, and ``seconds`` for the rounds of one case.
    """
    import torch  # noqa: PLC0415 - the parent, which reads CASES, does without
    import vllm.model_executor.layers.linear  # noqa: F401, PLC0415 - not in the time of the first case

    from benchmarks.cpu.bandwidth import read_contestant  # noqa: PLC0415
    from benchmarks.cpu.contestants import Baselines, gqsa_contestants, int8_activations  # noqa: PLC0415

    torch.set_num_threads(1)
    cache = settings["cache_bytes"]
    read, loop = read_contestant(cache)
    int8 = int8_activations()
    # One shape at a time is in memory.
    baselines = functools.lru_cache(1)(lambda n, k: Baselines(n, k, cache))
    ours = functools.lru_cache(1)(lambda n, k, sparsity, size: gqsa_contestants(n, k, sparsity, size, cache))

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        case = Case(**question)
        start = time.monotonic()
        others = baselines(case.n, case.k)
        mine = ours(case.n, case.k, case.sparsity, case.group_size)
        contestants = [*mine(case.m, getattr(torch, case.dtype), int8), *others.contestants(case.m), read]
        with torch.inference_mode():
            row = _row(race(contestants, settings["seconds"]))
        return {**question, **others.facts, **row, "seconds": time.monotonic() - start}

    return {"read_loop": loop, "int8_activations": int8}, answer


def _row(times: dict[str, Times]) -> dict[str, Any]:
    """The figures of one race.

    Returns:
        speedup: by the name of ours and of the other, how many times faster ours is. read_share: of the speed at
        which this thread can read, what ours reads its weight at. microseconds: a call of each, with its spread.
    """
    read = times.pop("read")
    ours = [name for name in times if name.startswith("GQSA")]
    return {
        "speedup": {name: {other: ratio(times[name], times[other]) for other in times} for name in ours},
        "read_share": {name: ratio(times[name], read) * times[name].bytes / read.bytes for name in ours},
        "read_gb_per_s": read.gigabytes_per_second,
        "microseconds": {
            name: {
                "median": 1e6 * each.median,
                "p10": 1e6 * each.quantile(0.1),
                "p90": 1e6 * each.quantile(0.9),
                "bytes": each.bytes,
            }
            for name, each in times.items()
        },
        "rounds": len(read.rounds),
    }


if __name__ == "__main__":
    from benchmarks.protocol import serve

    serve(prepare)
