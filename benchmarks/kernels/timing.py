"""Times on a GPU: replays of a graph with many launches on many copies of the data, medians of several."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from benchmarks.times import Times

__all__ = ["COLD", "LAUNCHES", "Cuda", "Device", "copies", "measure"]

Call = Callable[[], torch.Tensor]

LAUNCHES = 100
"""Launches of one replay, at least: what starting a replay takes disappears."""
COLD = 4
"""How many times the second-level cache the copies of a weight fill at least."""
ROUNDS = (5, 50)
SLOW_ROUNDS = 3
SLOW = 0.5
"""Seconds of one replay above which few must do."""
WARM_UP = 0.03
"""Seconds of replays before the first that counts: clocks fall while the host prepares."""


class Device(Protocol):
    """What :func:`measure` needs: a GPU, or a stand-in for tests."""

    @property
    def torch_device(self) -> torch.device:
        """Where tensors go."""

    @property
    def cache_bytes(self) -> int:
        """Size of the second-level cache."""

    def capture(self, calls: Sequence[Call]) -> tuple[Callable[[], None], torch.Tensor]:
        """Something that does all calls again, and where it puts the last one's result."""

    def seconds(self, work: Callable[[], None]) -> float:
        """Do it, wait for it, and say how long the device took."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes: int = torch.cuda.get_device_properties(self.torch_device).L2_cache_size
        self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def capture(self, calls: Sequence[Call]) -> tuple[Callable[[], None], torch.Tensor]:
        """A graph of the calls, one after the other."""
        # What happens once, loading of modules and choosing of algorithms, must not happen while capturing.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                last = call()
        return graph.replay, last

    def seconds(self, work: Callable[[], None]) -> float:
        """Between two events."""
        start, end = self._events
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def copies(size: int, cache_bytes: int) -> int:
    """How many copies of ``size`` bytes make sure that the cache holds none of them when its turn comes."""
    return max(2, -(-COLD * cache_bytes // size))


def measure(
    device: Device, calls: Sequence[Call], size: int, seconds: float, check: Callable[[torch.Tensor], None]
) -> Times:
    """Time calls that do the same on different copies of the data.

    Args:
        device: that runs them.
        calls: called in turn, all equally often; their results are equal.
        size: bytes that a call reads and writes at least.
        seconds: of replays, about; a few are run in any case.
        check: gets the result of the last launch of a replay, and raises where it is wrong.
    """
    launches = -(-LAUNCHES // len(calls)) * len(calls)
    replay, output = device.capture([calls[i % len(calls)] for i in range(launches)])
    spent = last = device.seconds(replay)
    check(output)
    while spent < WARM_UP:
        last = device.seconds(replay)
        spent += last
    least, most = (SLOW_ROUNDS, SLOW_ROUNDS) if last > SLOW else ROUNDS
    rounds = max(least, min(most, int(seconds / last))) if last else most
    return Times(tuple(device.seconds(replay) / launches for _ in range(rounds)), size)
