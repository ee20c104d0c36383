"""The memory of a process group, sampled while something runs."""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["MemoryWatch", "growth", "members"]

PERIOD = 0.5


def members(group: int) -> list[int]:
    """Process ids of a process group."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(path.name))
    return found


def _resident(group: int) -> int:
    """Bytes of a process group, a page shared by several processes counted in parts."""
    total = 0
    for process in members(group):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def growth(samples: Sequence[int]) -> float:
    """How much more memory is in use at the end of a run than after its first fifth: medians of a twentieth each."""
    width = max(1, len(samples) // 20)
    at = len(samples) // 5

    def median(part: Sequence[int]) -> float:
        return float(sorted(part)[len(part) // 2])

    return median(samples[-width:]) / median(samples[at : at + width]) - 1


class MemoryWatch:
    """Samples while its ``with`` lasts; ``samples`` are bytes, one every half second."""

    def __init__(self, group: int) -> None:
        self.samples: list[int] = []
        self._group = group
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.samples.append(_resident(self._group))
            if self._stop.wait(PERIOD):
                return
