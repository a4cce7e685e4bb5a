"""The machine's clocks, behind the Clock seam, and the time by which law is kept."""

from __future__ import annotations

import time

from matcher_service.seams import Clock


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


class LawfulTime:
    """The later of the wall clock and the newest log time seen, so that a clock stepped back revives nobody."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._newest_ms = 0

    def observe(self, at_ms: int) -> None:
        self._newest_ms = max(self._newest_ms, at_ms)

    def now_ms(self) -> int:
        return max(self._clock.wall_ms(), self._newest_ms)
