"""Rates by token bucket, on the monotonic clock. Bounded: the buckets least recently used are forgotten, which is
harmless once they would have filled up again."""

from __future__ import annotations

import math
from collections import OrderedDict

from matcher_service.errors import Overloaded, TooLarge
from matcher_service.seams import Clock

BUCKETS_MAX = 4096


class Rates:
    """One bucket per name, holding `burst_s` seconds of its rate."""

    def __init__(self, clock: Clock, burst_s: float, whose: str) -> None:
        self._clock = clock
        self._burst_s = burst_s
        self._whose = whose
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, count: int, per_s: float) -> None:
        """Take `count` tokens of a bucket that fills at `per_s` per second.

        Raises TooLarge if the bucket never holds that many, else Overloaded with the time until it does.
        """
        holds = max(1.0, per_s * self._burst_s)
        if count > holds:
            raise TooLarge(
                f"{count} at once, where {self._whose} allows {int(holds)}",
                hint=f"send at most {int(holds)} in a message",
            )
        now = self._clock.monotonic()
        level, at = self._buckets.pop(name, (holds, now))
        level = min(holds, level + (now - at) * per_s)
        enough = level >= count
        self._buckets[name] = (level - count if enough else level, now)
        if len(self._buckets) > BUCKETS_MAX:
            self._buckets.popitem(last=False)
        if not enough:
            raise Overloaded(
                f"more than {self._whose} allows",
                hint="slow down, and send again after retry_after_ms",
                retry_after_ms=math.ceil((count - level) / per_s * 1000),
            )
