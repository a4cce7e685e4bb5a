"""Permits at the door. Nothing queues without one; a refusal is immediate, typed and cheap.

Permits are counted in rows (probes, or references being enrolled), in total and per credential. The estimated
wait comes from how long batches took lately, as a fixed part and a part per row.
"""

from __future__ import annotations

import asyncio
import math
from types import TracebackType

from prometheus_client import Gauge

from matcher_service.errors import DeadlineExceeded, Overloaded, ShuttingDown, TooLarge
from matcher_service.seams import Clock
from matcher_service.terms import Actor

RETRY_MS_MIN = 10
RETRY_MS_MAX = 5_000


class ServiceTime:
    """How long a batch takes: seconds = fixed + per_row * rows, by least squares that forgets.

    While only one batch size has been seen the two cannot be told apart; all is then taken as fixed, which
    admits rather than refuses until more is known.
    """

    FORGET = 0.95

    def __init__(self, batch_rows_max: int, searchers: int) -> None:
        self._batch_rows_max = batch_rows_max
        self._searchers = searchers
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def learn(self, rows: int, seconds: float) -> None:
        keep = self.FORGET
        self._weight = keep * self._weight + 1
        self._rows = keep * self._rows + rows
        self._seconds = keep * self._seconds + seconds
        self._rows_rows = keep * self._rows_rows + rows * rows
        self._rows_seconds = keep * self._rows_seconds + rows * seconds

    def wait_s(self, rows: int) -> float:
        """Estimated seconds until `rows` rows are answered; 0 while nothing is known."""
        fixed, slope = self._parts()
        batches = math.ceil(rows / self._batch_rows_max)
        return (batches * fixed + rows * slope) / self._searchers

    def batch_s(self, rows: int) -> float:
        """Estimated seconds that one batch of `rows` rows takes; 0 while nothing is known."""
        fixed, slope = self._parts()
        return fixed + rows * slope

    def _parts(self) -> tuple[float, float]:
        """Seconds of a batch, and of each of its rows."""
        if self._weight == 0:
            return 0.0, 0.0
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows_rows / self._weight - mean_rows**2
        slope = 0.0
        if spread > 1e-3 * mean_rows**2:
            slope = max(0.0, (self._rows_seconds / self._weight - mean_rows * mean_seconds) / spread)
        return max(0.0, mean_seconds - slope * mean_rows), slope


class Permit:
    """The right to have `rows` rows in flight; held as a context, given back once."""

    __slots__ = ("_admission", "_held", "actor", "rows")

    def __init__(self, admission: Admission, actor: Actor, rows: int) -> None:
        self._admission = admission
        self._held = True
        self.actor = actor
        self.rows = rows

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held:
            self._held = False
            self._admission._give_back(self)


class Admission:
    """Owned by one event loop; no method waits except `idle`."""

    def __init__(
        self, rows_max: int, rows_per_credential_max: int, service_time: ServiceTime, clock: Clock, in_use: Gauge
    ) -> None:
        self._rows_max = rows_max
        self._per_credential_max = rows_per_credential_max
        self._service_time = service_time
        self._clock = clock
        self._gauge = in_use
        self._rows = 0
        self._by_credential: dict[str, int] = {}
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    def admit(self, actor: Actor, rows: int, deadline: float) -> Permit:
        """A permit for `rows` rows whose answer is of use until `deadline` (monotonic seconds).

        Raises ShuttingDown, TooLarge (could never be admitted), DeadlineExceeded (already past), or
        Overloaded (no permit now, or the estimated wait passes the deadline) with a retry_after_ms.
        """
        if self._closed:
            raise ShuttingDown(
                "the service is stopping", hint="send to another node, or again shortly", retry_after_ms=1000
            )
        if rows > self._per_credential_max or rows > self._rows_max:
            raise TooLarge(
                f"{rows} rows can never be admitted at once",
                hint=f"send at most {min(self._per_credential_max, self._rows_max)} in a message",
            )
        left = deadline - self._clock.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before admission", hint="allow more time")
        held = self._by_credential.get(actor.name, 0)
        if self._rows + rows > self._rows_max or held + rows > self._per_credential_max:
            whose = "the service" if self._rows + rows > self._rows_max else "this credential"
            raise Overloaded(
                f"all permits of {whose} are in use",
                hint="slow down, and send again after retry_after_ms",
                retry_after_ms=self._retry_ms(self._service_time.wait_s(rows)),
            )
        # What finds nobody ahead of it is always tried: the estimate learns from it.
        wait = self._service_time.wait_s(self._rows + rows) if self._rows else 0.0
        if wait > left:
            raise Overloaded(
                f"the queue would take about {wait * 1000:.0f} ms, the deadline is in {left * 1000:.0f} ms",
                hint="send again after retry_after_ms, or allow more time",
                retry_after_ms=self._retry_ms(wait - left),
            )
        self._rows += rows
        self._by_credential[actor.name] = held + rows
        self._gauge.set(self._rows)
        self._idle.clear()
        return Permit(self, actor, rows)

    def close(self) -> None:
        """Refuse whatever comes from now on; what holds a permit goes on."""
        self._closed = True

    async def idle(self) -> None:
        """Return when no permit is out."""
        await self._idle.wait()

    def _give_back(self, permit: Permit) -> None:
        self._rows -= permit.rows
        left = self._by_credential[permit.actor.name] - permit.rows
        if left:
            self._by_credential[permit.actor.name] = left
        else:
            del self._by_credential[permit.actor.name]
        self._gauge.set(self._rows)
        if self._rows == 0:
            self._idle.set()

    @staticmethod
    def _retry_ms(seconds: float) -> int:
        return max(RETRY_MS_MIN, min(RETRY_MS_MAX, int(seconds * 1000) + 1))
