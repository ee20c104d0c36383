"""The parts of `make load` that need no server."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks.load.__main__ import is_calm
from benchmarks.load.clients import make_requests
from benchmarks.load.watch import MemoryWatch, growth, members


def test_requests_are_mixed_and_the_same_every_time():
    text = " ".join(map(str, range(5000)))
    requests = make_requests(text, 200, seed=0)
    assert requests == make_requests(text, 200, seed=0) != make_requests(text, 200, seed=1)
    lengths = sorted(len(each.prompt.split()) for each in requests)
    assert lengths[0] < 6
    assert lengths[-1] > 100
    assert {each.output_tokens for each in requests} <= set(range(4, 41))
    assert all(each.prompt in text for each in requests)


@pytest.mark.parametrize(("samples", "share"), [
    ([10] * 100, 0.0),
    ([1] * 15 + [10] * 85, 0.0),  # warming up does not count
    ([*range(100, 200)], 198 / 122 - 1),
    ([10] * 50 + [13] * 50, 0.3),
])  # fmt: skip
def test_growth_counts_after_the_first_fifth(samples, share):
    assert growth(samples) == pytest.approx(share, abs=0.02)


def test_memory_of_a_group_and_its_members():
    code = "import sys; block = bytearray(b'x' * 80_000_000); print(flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, start_new_session=True)
    child.stdout.readline()
    assert members(child.pid) == [child.pid]
    assert os.getpid() not in members(child.pid)
    with MemoryWatch(child.pid) as memory:
        time.sleep(0.2)
    assert 80e6 < memory.samples[0] < 300e6
    child.communicate()
    assert members(child.pid) == []


def test_tracebacks_count_until_the_server_is_stopped():
    stop = "INFO [shutdown] EngineCore: trigger received signal=SIGTERM\n"
    assert is_calm(f"ready\n{stop}Traceback (most recent call last):")
    assert not is_calm(f"Traceback (most recent call last):\n{stop}")
    assert not is_calm("it was never stopped")
