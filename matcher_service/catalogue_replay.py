"""The gallery log as a gateway of a cluster follows it: the catalogue by replay here, the references by the shards.

Other gateways write to the same log, so being told is not enough: this process asks the log for its head again and
again, and what it judges by counts as current for the freshness lease after the moment before it asked (law 5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import structlog

from matcher_service.catalogue import CATALOGUE_KINDS, Catalogue
from matcher_service.clock import LawfulTime
from matcher_service.errors import LogUnavailable, MatcherError, ReplayBehind
from matcher_service.metrics import Metrics
from matcher_service.replay import BLOCK_ENTRIES, FRESHNESS_LEASE_S
from matcher_service.seams import Clock, GalleryLog, Models
from matcher_service.terms import LogEntry

ASK_EVERY_S = 0.15

# Beyond the lease when it is waited out: clocks of two machines do not run at quite the same rate.
LEASE_MARGIN_S = 0.01


class FollowingShards(Protocol):
    """What the shards of a cluster say of their own following of the log."""

    @property
    def refusal(self) -> MatcherError | None:
        """Why one cannot take in what is enrolled from now on, if so."""
        ...

    @property
    def unready(self) -> str:
        """Why another gateway may do better; "": no reason."""
        ...

    async def applied_by_all(self, sequence: int) -> None:
        """Return once every replica has applied it; never, if one is lost for good."""
        ...

    async def reached(self, sequence: int, deadline: float) -> None:
        """Return once each shard that is there can answer as of it. Raises ReplayBehind at `deadline`."""
        ...


_log = structlog.get_logger(__name__)


class CatalogueReplay:
    """Implements `replay.Following`. `catch_up` at start, then `run` beside what it serves."""

    def __init__(
        self,
        log: GalleryLog,
        shards: FollowingShards,
        catalogue: Catalogue,
        models: Models,
        time: LawfulTime,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._log = log
        self._shards = shards
        self._catalogue = catalogue
        self._models = models
        self._time = time
        self._clock = clock
        self._metrics = metrics
        self._applied = 0
        self._current_at = -FRESHNESS_LEASE_S
        self._unavailable: LogUnavailable | None = None
        self._progress = asyncio.Condition()
        # Asked for, not set: a replay that stands still is the one that must be seen.
        metrics.replay_lag_seconds.set_function(self._lag_s)

    @property
    def applied(self) -> int:
        return self._applied

    @property
    def refusal(self) -> MatcherError | None:
        return self._unavailable or self._shards.refusal

    @property
    def unready(self) -> str:
        # A shard that is full or lost is the same to every gateway, and no reason to ask another one.
        if self._unavailable is not None:
            return f"the gallery log cannot be read: {self._unavailable}"
        return self._shards.unready

    def missing(self) -> tuple[str, ...]:
        # What is missing of the references the shards say themselves.
        return ()

    async def catch_up(self) -> None:
        """At start: the whole catalogue. Raises LogUnavailable."""
        await self._step()

    async def run(self) -> None:
        """Live, until cancelled. While the log cannot be read, what depends on it is refused."""
        while True:
            try:
                await self._step()
            except LogUnavailable as error:
                if self._unavailable is None:
                    _log.error("log_unavailable", detail=str(error))
                async with self._progress:
                    self._unavailable = error
                    self._progress.notify_all()
            await asyncio.sleep(ASK_EVERY_S)

    async def renewed(self, deadline: float) -> bool:
        if self._is_current():
            return False
        await self._until(self._is_current, deadline, "what may be searched is not known to be current")
        return True

    async def reached(self, sequence: int, deadline: float) -> None:
        if sequence > self._applied:
            await self._until(lambda: sequence <= self._applied, deadline, f"sequence {sequence} is not applied yet")
        await self._shards.reached(sequence, deadline)

    async def obeyed(self, sequence: int, deadline: float, *, catalogue: bool) -> None:
        lease_s = FRESHNESS_LEASE_S + LEASE_MARGIN_S
        if catalogue:
            # Nobody knows how many gateways there are; each is current, or knows that it is not.
            await asyncio.sleep(lease_s)
            await self._until(lambda: sequence <= self._applied, deadline, f"sequence {sequence} is not applied yet")
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(lease_s):
                await self._shards.applied_by_all(sequence)

    async def _step(self) -> None:
        """Apply what the catalogue lacks, and note from when on it is current."""
        asked_at = self._clock.monotonic()
        head = await self._log.head()
        applied = self._applied
        while applied < head and (entries := await self._log.read(applied, BLOCK_ENTRIES, CATALOGUE_KINDS)):
            self._time.observe(max(entry.at_ms for entry in entries))
            await self._apply(entries)
            applied = entries[-1].sequence
        async with self._progress:
            self._applied = max(head, applied)
            self._current_at = asked_at
            self._unavailable = None
            self._progress.notify_all()
        self._metrics.applied_sequence.set(self._applied)

    async def _apply(self, entries: Sequence[LogEntry]) -> None:
        before = self._catalogue.spaces
        self._catalogue.apply(entries)
        for space_id, space in self._catalogue.spaces.items():
            if before.get(space_id) is not space:
                await self._models.register(space)

    def _lag_s(self) -> float:
        return self._clock.monotonic() - self._current_at

    def _is_current(self) -> bool:
        return self._lag_s() <= FRESHNESS_LEASE_S

    async def _until(self, done: Callable[[], bool], deadline: float, lacking: str) -> None:
        """Raises LogUnavailable as soon as the log cannot be read, ReplayBehind at `deadline`."""
        try:
            async with asyncio.timeout(deadline - self._clock.monotonic()), self._progress:
                await self._progress.wait_for(lambda: done() or self._unavailable is not None)
        except TimeoutError:
            raise ReplayBehind(
                f"{lacking}: the gallery log has not been read for a while",
                hint="ask again; if it stays so, look at matcher_replay_lag_seconds",
                retry_after_ms=100,
            ) from None
        if not done() and self._unavailable is not None:
            raise self._unavailable
