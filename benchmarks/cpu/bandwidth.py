"""How fast one thread can read memory: the limit of every kernel with cold data.

Torch and numpy have several loops that only read; which of them is fastest depends on the build and the machine. All
are tried, and the fastest stands for the limit.
"""

import functools
from collections.abc import Callable

import torch

from benchmarks.cpu.timing import Contestant, race

__all__ = ["LOOPS", "read_contestant"]

CHUNK = 32 << 20
"""Bytes of one read: about a millisecond."""
# Floating point and unsigned integers would meet NaN or be widened; these do not.
LOOPS: dict[str, Callable[[torch.Tensor], object]] = {
    "torch sum of int64": lambda chunk: chunk.sum(),
    "torch max of int32": lambda chunk: chunk.view(torch.int32).max(),
    "torch max of int8": lambda chunk: chunk.view(torch.int8).amax(),
    "torch sum of float64": lambda chunk: chunk.view(torch.float64).sum(),
    "numpy sum of int64": lambda chunk: chunk.numpy().sum(),
    "numpy max of int64": lambda chunk: chunk.numpy().max(),
}


def read_contestant(cache_bytes: int, seconds: float = 2.0, chunk: int = CHUNK) -> tuple[Contestant, str]:
    """A contestant that only reads, from a buffer that no cache holds.

    Args:
        cache_bytes: of the last-level cache.
        seconds: to spend on finding the fastest loop.
        chunk: bytes of one read, a multiple of 8.

    Returns:
        The contestant, named ``read``, and the name of its loop.
    """
    buffer = torch.randint(1, 1 << 20, (max(2, 4 * cache_bytes // chunk + 1), chunk // 8), dtype=torch.int64)

    def contestant(name: str, loop: Callable[[torch.Tensor], object]) -> Contestant:
        return Contestant(name, [functools.partial(loop, part) for part in buffer], chunk)

    times = race([contestant(name, loop) for name, loop in LOOPS.items()], seconds)
    fastest = min(times, key=lambda name: times[name].median)
    return contestant("read", LOOPS[fastest]), fastest
