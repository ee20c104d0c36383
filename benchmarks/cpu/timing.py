"""Contestants in turn, round by round, and what is made of their times."""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.times import Times

__all__ = ["Contestant", "environment", "race", "ratio"]

BURST = 0.002
"""Seconds one contestant runs before the next has its turn: short against drift, long against a clock's tick."""
SLOW = 1.0
"""Seconds of one round above which few rounds must do."""
ROUNDS = (7, 201)
SLOW_ROUNDS = 3
_WARM_UP = 1.5


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
        name: in the results.
        calls: the same work on different copies of the data; one after the other is called, so that the data of a
            call has left the cache when its turn comes again.
        bytes: read by one call.
        environment: variables that are set while it runs.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    bytes: int
    environment: Mapping[str, str] = field(default_factory=dict)


def ratio(ours: Times, other: Times) -> float:
    """How many times faster ``ours`` is: the median over the rounds of one race."""
    return statistics.median(theirs / mine for mine, theirs in zip(ours.rounds, other.rounds, strict=True))


def race(contestants: Sequence[Contestant], seconds: float) -> dict[str, Times]:
    """Time all contestants, taking turns.

    Args:
        contestants: with distinct names.
        seconds: to spend, about; a few rounds are run in any case.

    Returns:
        Times by the contestants' names.
    """
    bursts = {each.name: _warm_up(each) for each in contestants}
    cost = sum(calls * each for calls, each in bursts.values())
    least, most = (SLOW_ROUNDS, SLOW_ROUNDS) if cost > SLOW else ROUNDS
    rounds = max(least, min(most, int(seconds / cost)))
    next_call = dict.fromkeys(bursts, 0)
    found: dict[str, list[float]] = {name: [] for name in bursts}
    with _no_garbage_collection():
        for _ in range(rounds):
            for each in contestants:
                calls = bursts[each.name][0]
                first, next_call[each.name] = next_call[each.name], next_call[each.name] + calls
                found[each.name].append(_burst(each, first, calls))
    return {each.name: Times(tuple(found[each.name]), each.bytes) for each in contestants}


def _warm_up(contestant: Contestant) -> tuple[int, float]:
    """Touch every copy once, unless that takes long; returns calls of a burst, and seconds a call."""
    _burst(contestant, 0, 1)
    seconds = _burst(contestant, 0, 1)
    if seconds * len(contestant.calls) < _WARM_UP:
        seconds = _burst(contestant, 0, len(contestant.calls))
    return max(1, min(len(contestant.calls), round(BURST / seconds))), seconds


def _burst(contestant: Contestant, first: int, calls: int) -> float:
    """Seconds a call over ``calls`` calls from the copy ``first`` on."""
    every = contestant.calls
    chosen = [every[i % len(every)] for i in range(first, first + calls)]
    with environment(contestant.environment):
        start = time.perf_counter()
        for call in chosen:
            call()
        return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
