"""From the log to the shard and the catalogue of this process, at start and live. The only way in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from matcher_service.catalogue import CATALOGUE_KINDS, Catalogue
from matcher_service.clock import LawfulTime
from matcher_service.errors import MatcherError, MemoryRefused, ReplayBehind
from matcher_service.metrics import Metrics
from matcher_service.seams import Clock, GalleryLog, Models, ReplayedShard
from matcher_service.stations import Station
from matcher_service.terms import EnrolRun, EntryKind, LogEntry

BLOCK_ENTRIES = 4096
RETRY_S = 0.5

# A shard that has stood behind the log for longer answers as if a part were missing (law 5).
FRESHNESS_LEASE_S = 0.5

_log = structlog.get_logger(__name__)


class Following(Protocol):
    """How far what this process judges by, and what it searches, obey the gallery log."""

    @property
    def applied(self) -> int:
        """The sequence up to which they do."""
        ...

    @property
    def refusal(self) -> MatcherError | None:
        """Why they cannot obey what is written from now on, if they cannot."""
        ...

    @property
    def unready(self) -> str:
        """Why requests had better go to another process; "": no reason."""
        ...

    def missing(self) -> tuple[str, ...]:
        """What an answer of this process lacks now, whatever the shards say."""
        ...

    async def renewed(self, deadline: float) -> bool:
        """Return once the catalogue is no older than the freshness lease; True if that took a wait, so that what was
        judged by it must be judged again. Raises LogUnavailable, and ReplayBehind at `deadline`."""
        ...

    async def reached(self, sequence: int, deadline: float) -> None:
        """Return once `sequence` is applied; raises ReplayBehind at `deadline` (monotonic seconds)."""
        ...

    async def obeyed(self, sequence: int, deadline: float, *, catalogue: bool) -> None:
        """Return once no search that starts later, here or in any other process, can fail to obey `sequence`, which
        was committed before this call. `catalogue`: it changed the catalogue. Raises ReplayBehind at `deadline`."""
        ...


class Replay:
    def __init__(
        self,
        log: GalleryLog,
        shard: ReplayedShard,
        catalogue: Catalogue,
        models: Models,
        time: LawfulTime,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._log = log
        self._shard = shard
        self._catalogue = catalogue
        self._models = models
        self._time = time
        self._clock = clock
        self._metrics = metrics
        self._applied = 0
        self._progress = asyncio.Condition()
        self._behind_since: float | None = None
        self._refusal: MatcherError | None = None
        self._at_replay = Station("replay", metrics, clock)
        # Asked for, not set: a replay that stands still is the one that must be seen.
        metrics.replay_lag_seconds.set_function(self._lag_s)

    @property
    def applied(self) -> int:
        """The sequence up to which the shard and the catalogue have applied the log."""
        return self._applied

    @property
    def refusal(self) -> MatcherError | None:
        """Why replay is stuck, if it is."""
        return self._refusal

    @property
    def unready(self) -> str:
        return "" if self._refusal is None else f"replay is stuck: {self._refusal}"

    def missing(self) -> tuple[str, ...]:
        """What an answer of this process lacks now: the tail of the log, if replay is stuck."""
        since = self._behind_since
        if self._refusal is None or since is None or self._clock.monotonic() - since < FRESHNESS_LEASE_S:
            return ()
        return (f"log tail beyond {self._applied}",)

    async def catch_up(self) -> None:
        """At start: the whole catalogue, then what the shard has not yet applied, up to the head."""
        after = 0
        while entries := await self._log.read(after, BLOCK_ENTRIES, CATALOGUE_KINDS):
            await self._catalogue_applies(entries)
            after = entries[-1].sequence
        self._applied = (await self._shard.status()).sequence
        while await self._step(known_catalogue=after):
            pass
        self._metrics.applied_sequence.set(self._applied)

    async def run(self) -> None:
        """Live, until cancelled. What cannot be applied is tried again; the answers say that it is missing."""
        while True:
            await self._log.wait_beyond(self._applied)
            self._behind()
            try:
                await self._step()
            except MemoryRefused as refusal:
                if self._refusal is None:
                    _log.error("replay_stuck", detail=str(refusal), applied=self._applied)
                self._refusal = refusal
                await asyncio.sleep(RETRY_S)

    async def reached(self, sequence: int, deadline: float) -> None:
        """Return once `sequence` is applied; raises ReplayBehind at `deadline` (monotonic seconds)."""
        if sequence <= self._applied:
            return
        try:
            async with asyncio.timeout(deadline - self._clock.monotonic()), self._progress:
                await self._progress.wait_for(lambda: sequence <= self._applied)
        except TimeoutError:
            raise ReplayBehind(
                f"sequence {sequence} is not applied yet, {self._applied} is",
                field="min_sequence",
                hint="ask again; if it stays so, look at matcher_replay_lag_seconds",
                retry_after_ms=100,
            ) from None

    async def renewed(self, deadline: float) -> bool:
        # Nobody else writes to this log: the catalogue is as old as what this process has acknowledged.
        return False

    async def obeyed(self, sequence: int, deadline: float, *, catalogue: bool) -> None:
        await self.reached(sequence, deadline)

    async def _step(self, known_catalogue: int = 0) -> bool:
        """Apply one block; False at the head. Catalogue entries up to `known_catalogue` are already applied."""
        entries = await self._log.read(self._applied, BLOCK_ENTRIES, None)
        if not entries:
            self._at_head()
            return False
        self._behind()
        # Time first: what the entries' own times already let expire must not be returned by a search that
        # sees them. The catalogue last: a gallery is offered only when the shard holds it.
        run = entries if isinstance(entries, EnrolRun) else None
        self._time.observe(run.at_ms if run else max(entry.at_ms for entry in entries))
        with self._at_replay():
            await self._shard.apply(entries)
        if run is None:
            await self._catalogue_applies([entry for entry in entries if entry.sequence > known_catalogue])
        self._refusal = None
        async with self._progress:
            self._applied = entries[-1].sequence
            self._progress.notify_all()
        self._metrics.applied_sequence.set(self._applied)
        if len(entries) < BLOCK_ENTRIES if run is None else run.last_sequence >= await self._log.head():
            # That was the whole tail. Otherwise the next write, hours later, would look like a lag of hours.
            self._at_head()
        return True

    def _at_head(self) -> None:
        self._behind_since = None

    def _behind(self) -> None:
        if self._behind_since is None:
            self._behind_since = self._clock.monotonic()

    def _lag_s(self) -> float:
        since = self._behind_since
        return 0.0 if since is None else self._clock.monotonic() - since

    async def _catalogue_applies(self, entries: Sequence[LogEntry]) -> None:
        before = self._catalogue.spaces
        self._catalogue.apply(entries)
        if any(entry.kind is EntryKind.SPACE_REGISTERED for entry in entries):
            for space_id, space in self._catalogue.spaces.items():
                if before.get(space_id) is not space:
                    await self._models.register(space)
