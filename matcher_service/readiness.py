"""Whether requests had better come to this process: not while it starts or stops, nor while what it depends on is away.

With hysteresis, because an orchestrator that takes a process out of service and puts it back again and again moves its
streams each time: what is wrong for a moment is answered request by request, and what was wrong must stay right.
"""

from __future__ import annotations

from collections.abc import Callable

from matcher_service.seams import Clock

UNREADY_AFTER_S = 3.0
READY_AFTER_S = 5.0


class Readiness:
    """`lacking` says what is wrong with what the process depends on; "": nothing."""

    def __init__(self, lacking: Callable[[], str], clock: Clock) -> None:
        self._lacking = lacking
        self._clock = clock
        self._serving = False
        self.started = False
        self._told = ""
        # Since when what is lacking contradicts what is told.
        self._otherwise_since: float | None = None

    def serve(self) -> None:
        """The start is over: requests are taken, and they will be answered."""
        self.started = self._serving = True

    def stop(self) -> None:
        """Not ready from now on, at once."""
        self._serving = False

    def __call__(self) -> tuple[bool, str]:
        """Whether it is ready and, if not, why. Whoever asks brings the judgement up to date."""
        if not self._serving:
            return False, "stopping" if self.started else "starting"
        lacking, now = self._lacking(), self._clock.monotonic()
        if bool(lacking) == bool(self._told):
            self._told, self._otherwise_since = lacking, None
        else:
            if self._otherwise_since is None:
                self._otherwise_since = now
            if now - self._otherwise_since >= (UNREADY_AFTER_S if lacking else READY_AFTER_S):
                self._told, self._otherwise_since = lacking, None
        return not self._told, self._told
