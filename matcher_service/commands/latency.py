"""Latencies in bounded memory."""

from __future__ import annotations

import math


class Latencies:
    """A histogram whose buckets widen by 1%, from 10 microseconds to 1000 seconds: quantiles are right to 1%."""

    _FIRST_S = 1e-5
    _GROWTH = math.log(1.01)
    _BUCKETS = math.ceil(math.log(1e3 / 1e-5) / math.log(1.01))

    def __init__(self) -> None:
        self._counts = [0] * (self._BUCKETS + 1)
        self.count = 0
        self.most_s = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        bucket = 0
        if seconds > self._FIRST_S:
            bucket = min(self._BUCKETS, math.ceil(math.log(seconds / self._FIRST_S) / self._GROWTH))
        self._counts[bucket] += times
        self.count += times
        self.most_s = max(self.most_s, seconds)

    def quantile_s(self, share: float) -> float:
        """The latency that `share` of them do not exceed; NaN for none."""
        if not self.count:
            return math.nan
        wanted = max(1, math.ceil(share * self.count))
        for bucket, count in enumerate(self._counts):
            wanted -= count
            if wanted <= 0:
                return min(self.most_s, self._FIRST_S * math.exp(bucket * self._GROWTH))
        raise AssertionError("the buckets hold fewer than were counted")
