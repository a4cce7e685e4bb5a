"""A clock that moves only when told to."""

from __future__ import annotations

from matcher_service.clock import SystemClock


class FakeClock:
    def __init__(self, wall_ms: int = 1_800_000_000_000) -> None:
        self._monotonic = 1_000.0
        self._wall_ms = wall_ms

    def monotonic(self) -> float:
        return self._monotonic

    def wall_ms(self) -> int:
        return self._wall_ms

    def advance(self, seconds: float) -> None:
        self._monotonic += seconds
        self._wall_ms += int(seconds * 1000)

    def step_wall(self, ms: int) -> None:
        """As an operator or a time server may do."""
        self._wall_ms += ms


class SteppedClock(SystemClock):
    """The machine's clocks, with a wall clock that a test may step."""

    def __init__(self) -> None:
        self._step_ms = 0

    def wall_ms(self) -> int:
        return super().wall_ms() + self._step_ms

    def step_wall(self, ms: int) -> None:
        self._step_ms += ms
