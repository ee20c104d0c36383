"""What a contestant's rounds took."""

import statistics
from dataclasses import dataclass

__all__ = ["Times"]


@dataclass(frozen=True)
class Times:
    """Seconds a call, one figure a round; the rounds of contestants of one race belong together."""

    rounds: tuple[float, ...]
    bytes: int

    @property
    def median(self) -> float:
        """Seconds a call."""
        return statistics.median(self.rounds)

    def quantile(self, share: float) -> float:
        """Seconds a call that ``share`` of the rounds did not exceed."""
        return sorted(self.rounds)[min(len(self.rounds) - 1, int(share * len(self.rounds)))]

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes read, by the median time."""
        return self.bytes / self.median / 1e9
