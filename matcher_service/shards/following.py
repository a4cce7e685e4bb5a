"""A shard that follows the log from another machine and holds a share of its references, which may change.

It reads the whole log and applies what belongs to its partitions. Three tasks do the work: one follows the log, one
tends the index, one brings what is held into line with what is assigned. A search needs none of them: it takes one
immutable value, `_Standing`, before its view of the rows and one after, and answers for the partitions that were held
throughout. What is assigned while it searches that view changes nothing of it.

- *A partition that is lost* is no longer answered for at once. Its rows go on being ended, but none come in, until
  all of them have been let go of: so at no moment does a search meet a row that should have ended. What it finds of
  them until then is true, if not all.
- *Partitions that are gained* are replayed from the beginning into an index aside, of the same engine, which is
  adopted whole when it stands where the main one stands. Until then they are not answered for. The log gives out their
  entries alone.
- *Freshness*: where a reading finds nothing more, everything that was committed before it began is applied. That
  beginning is the moment at which the shard last knew itself caught up.
- *Another log*: with every reading the entry applied last is looked for. If it is not there any more, the log is not
  the one that the rows came from (a standby that had not everything took over, or a backup was restored): all rows
  are dropped and the shard begins anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from matcher_service.errors import (
    DataDamaged,
    LogUnavailable,
    MatcherError,
    ShardUnavailable,
    ShuttingDown,
    StartRefused,
)
from matcher_service.index.disk import Disk
from matcher_service.index.engine import Erased
from matcher_service.index.memory import budget_bytes
from matcher_service.index.scanners import Scanners
from matcher_service.index.snapshots import Key
from matcher_service.partitions import (
    ALL_PARTITIONS,
    NO_PARTITIONS,
    Partitions,
    mask_of,
    partition_of,
    partitions_of,
    ranges,
)
from matcher_service.seams import Clock, GalleryLog
from matcher_service.settings import IndexSettings
from matcher_service.shards import assignment as assignments
from matcher_service.shards.assignment import Assignment
from matcher_service.shards.exchange import ShardAnswer, ShardState
from matcher_service.shards.local import LocalShard
from matcher_service.terms import EntryKind, LogEntry, SearchRequest

BLOCK_ENTRIES = 4096
# So many entries at once are looked through for those of a share; the database answers within a second or so.
SEARCHED_ENTRIES = 262_144
# The log is read as often even if no news comes, so that a quiet shard stays within the lease of law 5 (500 ms).
READ_EVERY_S = 0.15
TEND_EVERY_S = 1.0
RETRY_S = 0.5
# A log that could not be read for so long is opened anew; it may have refused for good, as with DataDamaged at once,
# which says that it is not the log that was opened any more.
GIVE_UP_S = 5.0

OpenLog = Callable[[], AbstractAsyncContextManager[GalleryLog]]

_OF_REFERENCES = (EntryKind.ENROL, EntryKind.WITHDRAW)

_log = structlog.get_logger(__name__)


class _AnotherLog(Exception):
    """The log does not have what was applied from it."""


class _Fingerprint(NamedTuple):
    """What never changes of an entry, whatever is erased."""

    sequence: int
    kind: EntryKind
    at_ms: int
    gallery_id: str
    reference_id: str

    @classmethod
    def of(cls, entry: LogEntry) -> _Fingerprint:
        return cls(entry.sequence, entry.kind, entry.at_ms, entry.gallery_id, entry.reference_id)


@dataclass(frozen=True, slots=True)
class _Standing:
    """What a search may say of itself. `losses` counts, for each partition, how often it was let go of, and `logs` how
    often the log turned out to be another; times are on the shard's clock, in seconds."""

    shard: LocalShard
    held: Partitions
    losses: Mapping[int, int] = field(default_factory=dict)
    logs: int = 0
    caught_up_at: float | None = None
    newest_ms: int = 0

    def without(self, lost: Iterable[int]) -> _Standing:
        counts = dict(self.losses)
        for one in lost:
            counts[one] = counts.get(one, 0) + 1
        return replace(self, held=self.held - set(lost), losses=counts)

    def held_until(self, later: _Standing) -> Partitions:
        if self.losses is later.losses:
            return self.held
        return frozenset(one for one in self.held if self.losses.get(one, 0) == later.losses.get(one, 0))


class _Lent:
    """The scanners of one index for use by another, which neither tends nor closes them."""

    def __init__(self, scanners: Scanners) -> None:
        self.build = scanners.build
        self.arrays = scanners.arrays
        self.load = scanners.load
        self.growing = scanners.growing
        self.condition = scanners.condition
        self.memory = scanners.memory

    def tend(self) -> bool:
        return False

    def close(self) -> None:
        """They stay open."""


class FollowingShard:
    """Made by `open`. `run` does the work until it is cancelled; `search` is for any thread."""

    def __init__(self, name: str, directory: Path, key: Key, settings: IndexSettings, clock: Clock, erase_s: float):
        self._name = name
        self._directory = directory
        self._key = key
        self._settings = settings
        self._clock = clock
        self._erase_within_s = erase_s
        self._disk = Disk(directory)
        # Held by whoever applies entries, so that adopting finds both indexes at one place of the log.
        self._applying = asyncio.Lock()
        self._reassigned = asyncio.Event()
        self._assigned = Assignment(NO_PARTITIONS, NO_PARTITIONS, NO_PARTITIONS)
        self._leaving: Partitions = NO_PARTITIONS
        self._last: _Fingerprint | None = None
        self._refusals: dict[str, str] = {}
        self._standing: _Standing
        self._closed = False

    @classmethod
    async def open(
        cls,
        name: str,
        directory: Path,
        key: Key,
        settings: IndexSettings,
        clock: Clock,
        *,
        configured: Partitions,
        erase_within_s: float,
    ) -> FollowingShard:
        """Open the files of `directory`, made if need be. `configured` are the partitions to own unless others have
        been assigned since the configuration last changed. Nothing is answered for as fresh before `run`.

        Files that are missing or damaged are made anew from the log. Raises StartRefused if a newer release wrote
        them, or what `key` raises.
        """
        shard = cls(name, directory, key, settings, clock, erase_within_s)
        await shard._open(configured)
        return shard

    # --- answering ---------------------------------------------------------------------------------

    def search(self, request: SearchRequest) -> ShardAnswer:
        """Answers in the calling thread, for which `fastscan.one_thread` has been called. Raises InvalidInput, or
        ShardUnavailable while the shard begins anew."""
        before = self._standing
        began = self._clock.monotonic()
        view = before.shard.view
        viewed = self._standing
        # Asked after the view was taken, and moved on before entries are applied: law 9.
        at_ms = max(request.at_ms, viewed.newest_ms)
        try:
            result = before.shard.search_here(replace(request, at_ms=at_ms), view)
        except ShuttingDown as closed:
            raise ShardUnavailable(f"shard {self._name} begins anew", hint="ask another replica") from closed
        searched_us = int((self._clock.monotonic() - began) * 1e6)
        state = replace(
            self._state(before, before.held_until(viewed)),
            sequence=result.sequence,
            certified=result.certified,
            scanned=result.scanned,
            missing=result.missing,
            searched_us=searched_us,
        )
        return ShardAnswer(result, state)

    async def status(self) -> ShardState:
        """The state with the counts of rows and bytes."""
        before = self._standing
        try:
            held = await before.shard.status()
        except ShuttingDown:
            return replace(self._state(before, NO_PARTITIONS), refusal="beginning anew")
        return replace(
            self._state(before, before.held_until(self._standing)),
            sequence=held.sequence,
            live=held.live,
            dead=held.dead,
            bytes_in_memory=held.bytes_in_memory,
            segments=held.segments,
            erased_through=self._erased_through(before),
            # Files aside are sealed anew when they are adopted.
            keys=before.shard.key_generations,
        )

    def _state(self, before: _Standing, held: Partitions) -> ShardState:
        # What was caught up with a log that is not the log any more was caught up with nothing.
        known = None if before.logs != self._standing.logs else before.caught_up_at
        age = None if known is None else (self._clock.monotonic() - known) * 1000
        return ShardState(
            shard=self._name,
            sequence=0,
            caught_up_age_ms=age,
            partitions=held,
            assigned=self._assigned.wanted,
            refusal="; ".join(self._refusals.values()),
        )

    def _erased_through(self, before: _Standing) -> int:
        # What is gained lies in files aside, and what is lost may be in the files still.
        moving = self._assigned.gaining or self._leaving or not self._assigned.settled
        return 0 if moving else before.shard.erased_through

    async def assign(self, partitions: Partitions) -> None:
        """Own these partitions from now on; durable on return. Those lost are not answered for any more, those gained
        as soon as they have been replayed. Raises OSError."""
        lost = self._standing.held - partitions
        if lost:
            self._leaving |= lost
            self._standing = self._standing.without(lost)
        now = self._assigned
        self._assigned = replace(now, wanted=partitions, held=now.held & partitions, settled=now.settled and not lost)
        self._save()
        _log.info("shard_assigned", shard=self._name, partitions=ranges(partitions), lost=ranges(lost))
        self._reassigned.set()

    # --- working -----------------------------------------------------------------------------------

    async def run(self, open_log: OpenLog) -> None:
        """Follow the log, tend the index, carry out assignments, until cancelled. What is held stays open when the log
        has to be opened again."""
        while True:
            try:
                async with open_log() as log:
                    await self._recognise(log)
                    self._refusals.pop("log", None)
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(self._follow(log), name="follow")
                        tasks.create_task(self._tend(), name="tend")
                        tasks.create_task(self._reassign(log), name="reassign")
            except* _AnotherLog:
                _log.error("shard_log_is_another", shard=self._name, applied=self._standing.shard.applied_sequence)
                await self._begin_anew()
            except* (LogUnavailable, DataDamaged, StartRefused) as refused:
                self._refuse("log", refused.exceptions[0])
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """After `run` has ended: write the files. Closing again changes nothing."""
        if not self._closed:
            self._closed = True
            await self._standing.shard.close()

    async def _recognise(self, log: GalleryLog) -> None:
        """Raises _AnotherLog if the files were made from another log than this one, and LogUnavailable."""
        first = await log.read(0, 1)
        if not first:
            if self._standing.shard.applied_sequence:
                raise _AnotherLog
            return
        record = hashlib.sha256(first[0].record).hexdigest()
        identity = hashlib.sha256(repr((*_Fingerprint.of(first[0]), record)).encode()).hexdigest()
        if self._assigned.log not in ("", identity):
            raise _AnotherLog
        if not self._assigned.log:
            self._assigned = replace(self._assigned, log=identity)
            self._save()

    async def _begin_anew(self) -> None:
        before = self._standing
        self._standing = replace(before.without(ALL_PARTITIONS), caught_up_at=None, logs=before.logs + 1)
        await before.shard.close()
        shard = await self._start_empty()
        self._standing = replace(self._standing, shard=shard, held=self._assigned.held, newest_ms=0)

    # --- following ---------------------------------------------------------------------------------

    async def _follow(self, log: GalleryLog) -> None:
        read_at = self._clock.monotonic()
        while True:
            try:
                more = await self._read_on(log)
            except MatcherError as refusal:
                self._refuse("follow", refusal)
                late = isinstance(refusal, LogUnavailable) and self._clock.monotonic() - read_at > GIVE_UP_S
                if late or isinstance(refusal, DataDamaged):
                    raise
                await asyncio.sleep(RETRY_S)
                continue
            self._refusals.pop("follow", None)
            read_at = self._clock.monotonic()
            if not more:
                try:
                    async with asyncio.timeout(READ_EVERY_S):
                        await log.wait_beyond(self._standing.shard.applied_sequence)
                except TimeoutError:
                    pass

    async def _read_on(self, log: GalleryLog) -> bool:
        """Apply one block; False if there was none."""
        async with self._applying:
            shard = self._standing.shard
            applied = shard.applied_sequence
            began = self._clock.monotonic()
            # From the entry applied last on: one reading tells whether it is the same log, and what is new.
            read = await log.read(max(0, applied - 1), BLOCK_ENTRIES)
            self._check_place(read, applied)
            entries = read[1:] if applied else read
            if not entries:
                self._standing = replace(self._standing, caught_up_at=began)
                return False
            # Time first: what the entries' own times already let expire must not be returned by a search that sees
            # them.
            newest_ms = max(self._standing.newest_ms, *(entry.at_ms for entry in entries))
            self._standing = replace(self._standing, newest_ms=newest_ms)
            wanted = _of(entries, mask_of(self._standing.held), mask_of(self._leaving))
            await shard.apply(wanted, entries[-1].sequence)
            self._last = _Fingerprint.of(entries[-1])
            return True

    def _check_place(self, read: Sequence[LogEntry], applied: int) -> None:
        """Raises _AnotherLog unless what was read begins with the entry applied last, as it was."""
        if applied:
            if not read or read[0].sequence != applied or self._last not in (None, _Fingerprint.of(read[0])):
                raise _AnotherLog
            if read[0].at_ms > self._standing.newest_ms:
                self._standing = replace(self._standing, newest_ms=read[0].at_ms)

    async def _tend(self) -> None:
        while True:
            done = await self._standing.shard.maintain()
            self._note_erased(done.erased)
            await asyncio.sleep(0 if done.more else TEND_EVERY_S)

    # --- assignments -------------------------------------------------------------------------------

    async def _reassign(self, log: GalleryLog) -> None:
        self._reassigned.set()
        while True:
            await self._reassigned.wait()
            self._reassigned.clear()
            try:
                await self._let_go()
                await self._gain(log)
                await self._settle()
                self._refusals.pop("reassign", None)
            except (MatcherError, OSError) as refusal:
                self._refuse("reassign", refusal)
                await asyncio.sleep(RETRY_S)
                self._reassigned.set()

    async def _let_go(self) -> None:
        while self._leaving:
            leaving = self._leaving
            ended = await self._standing.shard.end_rows(_among(leaving))
            self._leaving -= leaving
            _log.info("shard_let_go", shard=self._name, partitions=ranges(leaving), rows=ended)

    async def _settle(self) -> None:
        """See to it that the files hold what the assignment says."""
        while not self._assigned.settled:
            held, losses = self._standing.held, self._standing.losses
            erased = await self._standing.shard.write_files()
            if erased is None:
                await asyncio.sleep(RETRY_S)  # a damaged gallery is still being filled again
                continue
            self._note_erased(erased)
            if self._leaving or losses != self._standing.losses:
                self._reassigned.set()  # more was assigned away meanwhile
                return
            gaining = self._assigned.gaining - held
            self._assigned = replace(self._assigned, held=held, gaining=gaining, settled=True)
            self._save()
            if not gaining:
                await _removed(self._aside)

    async def _gain(self, log: GalleryLog) -> None:
        """Replay what is wanted and not held into an index aside, and adopt it when it stands where this one does."""
        gaining = self._assigned.wanted - self._standing.held
        if not gaining or gaining & self._leaving:
            return
        if self._assigned.gaining != gaining:
            await _removed(self._aside)
            self._assigned = replace(self._assigned, gaining=gaining)
            self._save()
        held = await self._standing.shard.status()
        left = max(1, budget_bytes(self._settings.memory_bytes_max) - held.bytes_in_memory)
        settings = self._settings.model_copy(update={"memory_bytes_max": left})
        # With the same scanners: those of the segments that are adopted must outlive the index aside.
        other = await self._open_index(self._aside, settings, _Lent(self._standing.shard.scanners))
        try:
            while self._still(gaining):
                if other.applied_sequence > self._standing.shard.applied_sequence:
                    await asyncio.sleep(READ_EVERY_S)  # both were opened from files, and this one's reached further
                elif await self._read_aside(log, other, gaining):
                    await other.maintain()
                elif await self._adopted(log, other, gaining):
                    break
        finally:
            await other.close()

    def _still(self, gaining: Partitions) -> bool:
        return gaining <= self._assigned.wanted and not gaining & self._leaving

    async def _adopted(self, log: GalleryLog, other: LocalShard, gaining: Partitions) -> bool:
        """Bring the index aside to where the main one stands, which waits for it, and adopt it; False if what it was
        made for has changed."""
        async with self._applying:
            while await self._read_aside(log, other, gaining):
                pass
            if not self._still(gaining):
                return False
            # What was read must be of the log that the main index is of, up to where it stands.
            upto = self._standing.shard.applied_sequence
            self._check_place(await log.read(max(0, upto - 1), 1), upto)
            # On record before a row of theirs can reach the files.
            self._assigned = replace(self._assigned, settled=False)
            self._save()
            await _whole(self._adopt(other, gaining))
        return True

    async def _adopt(self, other: LocalShard, gaining: Partitions) -> None:
        await self._standing.shard.adopt(other)
        # What was assigned away while that went on has been gained and is lost again.
        kept = gaining & self._assigned.wanted
        self._leaving |= gaining - kept
        self._standing = replace(self._standing, held=self._standing.held | kept)
        _log.info("shard_gained", shard=self._name, partitions=ranges(kept), at=other.applied_sequence)

    async def _read_aside(self, log: GalleryLog, other: LocalShard, gaining: Partitions) -> bool:
        """Apply one block to the index aside, at most up to where the main one stands; False if it stands there."""
        upto = self._standing.shard.applied_sequence
        if other.applied_sequence >= upto:
            return False
        reach = min(upto, other.applied_sequence + SEARCHED_ENTRIES)
        entries = await log.read_share(gaining, other.applied_sequence, reach, BLOCK_ENTRIES)
        through = entries[-1].sequence if len(entries) == BLOCK_ENTRIES else reach
        await other.apply(entries, through)
        return True

    # --- files -------------------------------------------------------------------------------------

    async def _open(self, configured: Partitions) -> None:
        await asyncio.to_thread(self._disk.open)
        found = await asyncio.to_thread(assignments.read, self._directory)
        if found is None:
            _log.info("shard_starts_empty", shard=self._name, partitions=ranges(configured))
            self._assigned = Assignment(configured, configured, configured)
            self._standing = _Standing(await self._start_empty(), configured)
            return
        now = found.started_with(configured)
        if not now.gaining:
            await _removed(self._aside)
        shard = await self._open_index(self._directory / "index", self._settings)
        if not shard.applied_sequence:
            # Nothing is in it yet, or it was damaged as a whole.
            now = replace(now, held=now.wanted, gaining=NO_PARTITIONS, settled=True)
        if not now.settled:
            ended = await shard.end_rows(_among(ALL_PARTITIONS - now.held))
            _log.info("shard_let_go", shard=self._name, partitions=ranges(ALL_PARTITIONS - now.held), rows=ended)
        self._assigned = now
        self._standing = _Standing(shard, now.held)
        self._save()

    async def _start_empty(self) -> LocalShard:
        for directory in (self._directory / "index", self._aside):
            await _removed(directory)
        # Whatever is assigned by now is held: there is nothing that would have to be replayed first.
        now = self._assigned
        self._assigned = Assignment(now.configured, now.wanted, now.wanted)
        self._leaving, self._last = NO_PARTITIONS, None
        self._save()
        return await self._open_index(self._directory / "index", self._settings)

    @property
    def _aside(self) -> Path:
        return self._directory / "gaining"

    async def _open_index(
        self, directory: Path, settings: IndexSettings, scanners: Scanners | None = None
    ) -> LocalShard:
        return await LocalShard.open(
            directory, self._key, settings, self._clock, erase_within_s=self._erase_within_s, scanners=scanners
        )

    def _save(self) -> None:
        # Not in a thread: what is written must be the latest, and whole, whatever is cancelled; and it is seldom.
        self._disk.write(assignments.NAME, [assignments.encode(self._assigned)])
        self._disk.sync()

    def _refuse(self, task: str, refusal: Exception) -> None:
        if task not in self._refusals:
            _log.error("shard_stuck", shard=self._name, task=task, detail=str(refusal))
        self._refusals[task] = str(refusal)

    def _note_erased(self, erased: Sequence[Erased]) -> None:
        for one in erased:
            _log.info(
                "shard_erased",
                shard=self._name,
                gallery=one.gallery_id,
                rows=one.rows,
                sequence_min=one.sequence_min,
                sequence_max=one.sequence_max,
            )


async def _whole(work: Coroutine[Any, Any, None]) -> None:
    """Do all of the work before being cancelled."""
    doing = asyncio.ensure_future(work)
    try:
        await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait([doing])
        raise


async def _removed(directory: Path) -> None:
    await _whole(asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True))


def _among(partitions: Partitions) -> Callable[[str, Sequence[bytes]], NDArray[np.bool_]]:
    """Marks the references of a gallery that fall into these partitions."""
    mask = mask_of(partitions)
    return lambda gallery_id, references: mask[partitions_of(gallery_id, references)]


def _of(entries: Sequence[LogEntry], held: NDArray[np.bool_], leaving: NDArray[np.bool_]) -> list[LogEntry]:
    """The entries that concern partitions held, and the catalogue's; of partitions on their way out only the ends of
    rows: their enrolments stand without template, and so end what they replace and bring nothing."""
    wanted: list[LogEntry] = []
    for entry in entries:
        if entry.kind not in _OF_REFERENCES:
            wanted.append(entry)
            continue
        partition = partition_of(entry.gallery_id, entry.reference_id)
        if held[partition]:
            wanted.append(entry)
        elif leaving[partition]:
            wanted.append(entry._replace(template=None))
    return wanted
