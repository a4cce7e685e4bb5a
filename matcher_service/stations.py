"""A station of a flow, watched: how long each message or batch was there, what ended there and why, and its span."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from types import TracebackType

from prometheus_client import Histogram

from matcher_service.errors import MatcherError
from matcher_service.metrics import Metrics
from matcher_service.seams import Clock
from matcher_service.terms import Cause
from matcher_service.traces import NoTraces, Traces


class Station:
    """`with station():` around the work of one message or batch; any number may be in it at once."""

    def __init__(self, name: str, metrics: Metrics, clock: Clock, traces: Traces | None = None) -> None:
        self.name = name
        self.metrics = metrics
        self.clock = clock
        self.seconds: Histogram = metrics.station_seconds.labels(name)
        self._traces = traces or NoTraces()

    def __call__(self) -> _Passage:
        return _Passage(self, self._traces.station(self.name))


class _Passage:
    __slots__ = ("_began", "_span", "_station")

    def __init__(self, station: Station, span: AbstractContextManager[None]) -> None:
        self._station = station
        self._span = span

    def __enter__(self) -> None:
        self._began = self._station.clock.monotonic()
        self._span.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        station = self._station
        station.seconds.observe(station.clock.monotonic() - self._began)
        if error is not None and not isinstance(error, asyncio.CancelledError):
            cause = error.cause if isinstance(error, MatcherError) else Cause.INTERNAL
            station.metrics.station_refusals.labels(station.name, cause).inc()
        self._span.__exit__(kind, error, trace)
