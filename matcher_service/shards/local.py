"""The shard in this process: the index engine behind the asynchronous seam.

Searches run in a small pool of threads, applying in one thread and upkeep in another, so the event loop never
waits for arithmetic. Upkeep is not of lower priority: it would be preempted while it holds the interpreter's
lock, and everything would wait for it.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from matcher_service.errors import LogUnavailable, ShuttingDown
from matcher_service.index.compaction import CompactionBudget
from matcher_service.index.disk import Disk
from matcher_service.index.engine import Engine, Erased
from matcher_service.index.fastscan import one_thread
from matcher_service.index.memory import budget_bytes
from matcher_service.index.scanners import Scanners, scanners_for
from matcher_service.index.search import View
from matcher_service.index.snapshots import Key, Snapshots
from matcher_service.records import decode_gallery
from matcher_service.seams import Clock
from matcher_service.settings import IndexSettings
from matcher_service.terms import LogEntry, SearchRequest, SearchResult, ShardStatus

ERASE_WITHIN_S = 3600.0
# Searches at once, where there are so many cores; each uses `index.threads` of them in its inner loops. On one core a
# second search only takes the first one's cache away.
SEARCHES_AT_ONCE_MAX = 2
# Rows that may come in, to be scanned in full, while one rewrite goes on; bounds how large it may be.
ARRIVING_ROWS_MAX = 65_536
REWRITE_ROWS_MIN = 32_768
# Below this rate of arrival, in rows/s, segments are joined more eagerly.
QUIET_ROWS_PER_S = 100.0
# So long after a search somebody is taken to be searching.
SEARCHED_S = 2.0
# Rewriting speed taken for granted until it was measured, in rows/s.
_REWRITE_ROWS_PER_S = 20_000.0
# The files are written anew after so many entries, or so long after the first change; sooner if rows must be gone.
SNAPSHOT_ENTRIES = 131_072
SNAPSHOT_S = 60.0

T = TypeVar("T")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Upkeep:
    """One round of upkeep: whether there is `more` to do at once, and which rows left memory and every file of
    the index in this round, at `at_ms` by the wall clock."""

    more: bool
    erased: tuple[Erased, ...]
    at_ms: int


class Arrivals:
    """How fast rows come in, smoothed over a second or so."""

    def __init__(self, now: float) -> None:
        self._at = now
        self._rows = 0
        self._rate = 0.0

    def rate(self, rows: int, now: float) -> float:
        """Rows/s, given all the rows that have come by `now`, in monotonic seconds."""
        elapsed = now - self._at
        if elapsed >= 0.1:
            weight = min(1.0, elapsed)
            self._rate += weight * ((rows - self._rows) / elapsed - self._rate)
            self._at, self._rows = now, rows
        return self._rate


class LocalShard:
    """A ReplayedShard over the index engine. Made by `open`; upkeep is one call of `maintain` after another."""

    def __init__(
        self,
        engine: Engine,
        snapshots: Snapshots,
        scanners: Scanners,
        settings: IndexSettings,
        clock: Clock,
        erase_within_s: float,
    ) -> None:
        self._engine = engine
        self._snapshots = snapshots
        self._scanners = scanners
        self._clock = clock
        self._segment_rows_max = settings.segment_rows_max
        # Half the time is left for the rounds of other galleries and for writing the files anew.
        self._erase_after_ms = int(erase_within_s * 1000 / 2)
        self._arrivals = Arrivals(clock.monotonic())
        self._rewrite_rows_per_s = _REWRITE_ROWS_PER_S
        self._snapshot_at = clock.monotonic()
        self._snapshot_sequence = engine.sequence
        self._snapshot_s = min(SNAPSHOT_S, erase_within_s / 4)
        self._erased_through = engine.erased_through()
        self._closed = False
        self._searched_at = -math.inf
        self._searching = ThreadPoolExecutor(searches_at_once(), "search", one_thread)
        self._applying = ThreadPoolExecutor(1, "apply", one_thread)
        self._tending = ThreadPoolExecutor(1, "tend", one_thread)

    @classmethod
    async def open(
        cls,
        directory: Path,
        key: Key,
        settings: IndexSettings,
        clock: Clock,
        *,
        erase_within_s: float = ERASE_WITHIN_S,
        scanners: Scanners | None = None,
        log_head: int | None = None,
    ) -> LocalShard:
        """Open the segment files of `directory`, made if need be; what they lack comes by replay, beginning
        behind `applied_sequence`.

        `key` gives the keys of galleries; see `snapshots.Key`. Rows that
        ended leave memory and files within `erase_within_s`. Files that reach beyond `log_head`, the newest sequence
        of the log, are of another history and removed. Raises StartRefused if a newer release wrote them.
        """
        opened = scanners or scanners_for(settings)
        snapshots = Snapshots(Disk(directory), key, opened)
        engine = Engine(
            build=opened.build,
            dimension_of=_dimension_of,
            segment_rows_max=settings.segment_rows_max,
            memory_bytes_max=budget_bytes(settings.memory_bytes_max),
            growing_of=opened.growing,
        )
        restored = await asyncio.to_thread(snapshots.restore, log_head)
        engine.restore(restored.sequence, restored.galleries, restored.damaged)
        return cls(engine, snapshots, opened, settings, clock, erase_within_s)

    @property
    def applied_sequence(self) -> int:
        return self._engine.sequence

    @property
    def uncoded_rows(self) -> int:
        searched = self._clock.monotonic() - self._searched_at < SEARCHED_S
        return self._engine.uncoded_rows if searched else 0

    @property
    def erased_through(self) -> int:
        """The sequence through which no row that had ended is in memory or in any file."""
        return self._erased_through

    async def told_keys(self) -> dict[str, Mapping[str, int] | None]:
        return {"index": self.key_generations}

    @property
    def key_generations(self) -> dict[str, int]:
        """Of each gallery the oldest generation of its key that a file is sealed under."""
        return self._snapshots.generations

    async def told_erased(self) -> dict[str, int]:
        return {"index": self._erased_through}

    async def search(self, request: SearchRequest) -> SearchResult:
        self._searched_at = self._clock.monotonic()
        return await self._run(self._searching, lambda: self._engine.search(request))

    @property
    def scanners(self) -> Scanners:
        """What its segments are scanned with; closed with it."""
        return self._scanners

    @property
    def view(self) -> View:
        """What is held now, for `search_here`."""
        return self._engine.view

    def search_here(self, request: SearchRequest, view: View) -> SearchResult:
        """Search a view in the calling thread, for which `fastscan.one_thread` has been called."""
        if self._closed:
            raise ShuttingDown("the shard is closed", hint="ask another node")
        return self._engine.search(request, view)

    async def apply(self, entries: Sequence[LogEntry], through: int = 0) -> None:
        """`through`: the log up to there has nothing more that this shard is to hold."""
        if entries or through:
            await self._run(self._applying, lambda: self._engine.apply(entries, through))

    async def adopt(self, other: LocalShard) -> None:
        """Hold what `other` holds as well; see `Engine.adopt`. What is left to do with `other` is to close it."""
        await self._run(self._applying, lambda: self._engine.adopt(other._engine))

    async def end_rows(self, chosen: Callable[[str, Sequence[bytes]], NDArray[np.bool_]]) -> int:
        """End the live rows whose references are chosen; see `Engine.end_rows`."""
        return await self._run(self._tending, lambda: self._engine.end_rows(chosen, self._clock.wall_ms()))

    async def write_files(self) -> tuple[Erased, ...] | None:
        """Make the files hold what is held now; the rows that have left them. None: not while a gallery is being
        rebuilt. Raises OSError."""
        return await self._run(self._tending, self._write_files)

    async def status(self) -> ShardStatus:
        held = await self._run(self._applying, self._engine.status)
        return replace(held, devices=self._scanners.condition(), device_bytes=self._scanners.memory())

    async def maintain(self) -> Upkeep:
        """One bounded round: at most one rewrite of up to `segment_rows_max` rows, then the files."""
        return await self._run(self._tending, self._tend)

    def _tend(self) -> Upkeep:
        now = self._clock.monotonic()
        rate = self._arrivals.rate(self._engine.rows_added, now)
        rows_max = max(REWRITE_ROWS_MIN, int(ARRIVING_ROWS_MAX * self._rewrite_rows_per_s / max(rate, 1.0)))
        budget = CompactionBudget(min(rows_max, self._segment_rows_max), self._erase_after_ms)
        rows = self._engine.rewrite_one(budget, self._clock.wall_ms(), quiet=rate < QUIET_ROWS_PER_S)
        took = self._clock.monotonic() - now
        if rows >= REWRITE_ROWS_MIN and took > 0:
            self._rewrite_rows_per_s = rows / took
        self._engine.erase_ended()
        more = self._scanners.tend()
        entries = self._engine.sequence - self._snapshot_sequence
        due = entries >= SNAPSHOT_ENTRIES or now - self._snapshot_at >= self._snapshot_s
        erased: tuple[Erased, ...] = ()
        # A rotation of keys is looked for between the writings, and then gone through file by file.
        try:
            outdated = (due or rows == 0) and self._snapshots.outdated
            if outdated or (due and self._engine.changed):
                self._snapshot_at = now
                erased = self._write_files() or ()
                more |= outdated and self._snapshots.outdated
        except (OSError, LogUnavailable) as error:
            # The log is the truth: nothing is lost, but a restart replays more and erasure waits.
            _log.error("index_files_not_written", detail=str(error), hint="free space in the data directory")
        return Upkeep(more or rows > 0, erased, self._clock.wall_ms())

    def _write_files(self) -> tuple[Erased, ...] | None:
        snapshot = self._engine.snapshot()
        if snapshot is None:
            return None
        try:
            self._snapshots.write(snapshot)
        except BaseException:
            self._engine.snapshot_failed(snapshot)
            raise
        self._snapshot_sequence = snapshot.sequence
        self._erased_through = snapshot.erased_through
        return snapshot.erased

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        if self._closed:
            raise ShuttingDown("the shard is closed", hint="ask another node")
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def close(self) -> None:
        """Wait for what runs, write the files, and refuse everything later. Closing again changes nothing."""
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._searching.shutdown)
        await asyncio.to_thread(self._applying.shutdown)
        if self._engine.changed:
            try:
                await asyncio.get_running_loop().run_in_executor(self._tending, self._write_files)
            except LogUnavailable as error:
                _log.error("index_files_not_written", detail=str(error), hint="the next start reads the log instead")
        await asyncio.to_thread(self._tending.shutdown)
        self._scanners.close()


def searches_at_once() -> int:
    """By one shard, on this machine."""
    return min(SEARCHES_AT_ONCE_MAX, len(os.sched_getaffinity(0)))


def _dimension_of(entry: LogEntry) -> int:
    return decode_gallery(entry.record).space.dimension
