"""The gallery log over SQL: one thread owns all writes of this process, a few threads read.

Callers' appends wait in a bounded inbox; the owner takes what waits, judges it in order and commits it in one
transaction, so that the price of syncing the disk is shared. Receipts are given only after the commit returned, or
was found to have been done.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import orjson
import structlog
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import ColumnElement, Connection, Engine, Select, func, or_, select
from sqlalchemy.exc import DatabaseError, DataError, DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError

from matcher_service import audit
from matcher_service.errors import (
    AuditUnavailable,
    CallerFault,
    DataDamaged,
    LogUnavailable,
    MatcherError,
    NotFound,
    StartRefused,
    TooLarge,
)
from matcher_service.gallery import enrolments, erasure_rows, judgement, seal
from matcher_service.gallery.alert_rows import read_alert
from matcher_service.gallery.erase import erase
from matcher_service.gallery.inbox import AppendJob, EnrolJob, EraseJob, Inbox, Job, RecordJob, WorkJob
from matcher_service.gallery.keys import Keyring
from matcher_service.gallery.ledger import ErasureLedger, returned
from matcher_service.gallery.recent import Recent
from matcher_service.gallery.schema import IS_CATALOGUE, alert, audit_record, data_key, entry, erasure, live
from matcher_service.gallery.sqlite import FILE_NAME, SqliteDatabase
from matcher_service.gallery.state import CatalogueState
from matcher_service.gallery.transaction import SERVICE, Terms, WriteTransaction
from matcher_service.receipts import EnrolReceipts
from matcher_service.seams import Clock
from matcher_service.settings import StorageSettings
from matcher_service.terms import (
    Actor,
    Alert,
    AuditEvent,
    Cause,
    DeleteGallery,
    EnrolRows,
    EntryKind,
    LogEntry,
    Receipt,
    Reference,
    Withdraw,
    Write,
)

WRITES_PER_APPEND_MAX = 10_000
ERASED_AT_ONCE_MAX = 10_000
_JOBS_WAITING_MAX = 4096
_WRITES_WAITING_MAX = 131_072
_RECENT_BYTES_MAX = 64 * 1024 * 1024
READERS = 3
_RETRY_AFTER_MS = 200
# How long a transaction whose connection broke waits for another one; callers wait with it.
RECONNECT_S_MAX = 2.0
_RECONNECT_EVERY_S = 0.05
_OF_REFERENCES = frozenset((EntryKind.ENROL, EntryKind.WITHDRAW))

T = TypeVar("T")


class _KeyMissing(LogUnavailable):
    """A key is not there and was not destroyed with its gallery."""


_log = structlog.get_logger(__name__)


async def open_sqlite_log(
    data_dir: Path, keys: Path | Keyring, settings: StorageSettings, clock: Clock, *, busy_timeout_ms: int = 2000
) -> SqlGalleryLog:
    """Open, or make, the gallery log of a data directory. The caller sees to it that no other process has it open.

    `keys` is the keys directory, or the keyring already opened on it. Brings the tables to the newest version, and
    finishes deletions of galleries whose keys were destroyed, whether the process ended in between or an older
    database was restored. Raises StartRefused if the database cannot be used, or if templates are sealed under keys
    that are missing.
    """
    database = SqliteDatabase(data_dir / FILE_NAME, READERS, busy_timeout_ms)
    keyring = keys if isinstance(keys, Keyring) else await asyncio.to_thread(Keyring.open, keys)
    log = SqlGalleryLog(database, keyring, settings, clock)
    try:
        await asyncio.to_thread(log.open)
    except BaseException:
        await log.close()
        raise
    return log


class Database(Protocol):
    """What the log needs of a database besides SQL."""

    @property
    def writer(self) -> Engine:
        """Connections whose transactions exclude each other, in every process, from their beginning."""
        ...

    @property
    def reader(self) -> Engine: ...

    @property
    def writes_per_turn_max(self) -> int:
        """Of how many writes one transaction may be made up; one append is never divided."""
        ...

    @property
    def shared(self) -> bool:
        """Whether other processes may write to it as well."""
        ...

    def prepare(self) -> None:
        """Make the tables, or bring them to the newest version. Raises StartRefused if it cannot be relied on."""
        ...

    def check(self) -> None:
        """Raises StartRefused unless it can be read as it is."""
        ...

    def announce(self, connection: Connection, sequence: int, at_ms: int) -> None:
        """Let other processes be told of the newest entry, once the transaction of this connection is committed."""
        ...

    def follow(self, tell: Callable[[int, int], None], went_back: Callable[[int, int], None]) -> None:
        """From now on call `tell` with sequence and time of the newest entry when others have committed some; or
        `went_back` with the newest sequence seen before, and that of now, if entries are gone. From a thread that ends
        with `dispose`."""
        ...

    def lost(self, failure: BaseException) -> bool:
        """Whether the connection broke, so that another one may work, and can tell what became of a commit."""
        ...

    @property
    def stores(self) -> Mapping[str, tuple[bool, str]]:
        """Where what was removed may still be: whether `wipe` sees to that store, and how it is erased there."""
        ...

    def wipe(self) -> bool:
        """See to it that nothing which a committed transaction removed is left where it was; False: try again."""
        ...

    def partition(self) -> ColumnElement[int]:
        """The partition of an entry's reference, computed by the database."""
        ...

    def dispose(self) -> None: ...


class SqlGalleryLog:
    """Implements `seams.GalleryLog`. Made by `open_sqlite_log`; its methods are for event loops, any of them."""

    def __init__(self, database: Database, keyring: Keyring, settings: StorageSettings, clock: Clock) -> None:
        self._database = database
        self._keyring = keyring
        self._clock = clock
        self._terms = Terms(
            idempotency_window_ms=round(settings.idempotency_window_h * 3_600_000),
            erase_within_ms=round(settings.erase_within_h * 3_600_000),
            alert_retention_ms=round(settings.alert_retention_d * 86_400_000),
            audit_detail_retention_ms=round(settings.audit_detail_retention_d * 86_400_000),
            backups_destroyed_within_ms=round(settings.backups_destroyed_within_d * 86_400_000),
        )
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="gallery-log-read")
        self._inbox = Inbox(_JOBS_WAITING_MAX, _WRITES_WAITING_MAX)
        self._recent = Recent(_RECENT_BYTES_MAX)
        self._owner: threading.Thread | None = None
        self._state = CatalogueState()
        self._wiping = threading.Lock()
        self._wipe_pending = False
        self._doomed: set[str] = set()
        self._ledger = ErasureLedger(keyring.directory / "erasures")
        self._news = threading.Lock()
        self._head = 0
        self._newest_at_ms = 0
        self._gone: DataDamaged | None = None
        # Who waits for news: beyond which sequence, and on which loop.
        self._waiting: dict[asyncio.Future[None], tuple[int, asyncio.AbstractEventLoop]] = {}
        self._closed = False
        self._can_read = self._can_write = True

    @property
    def newest(self) -> int:
        """Sequence of the newest entry known to be committed, without asking the database."""
        return self._head

    @property
    def available(self) -> bool:
        """Whether reading and writing succeeded when each was last tried."""
        return self._can_read and self._can_write and self._gone is None

    @property
    def keyring(self) -> Keyring:
        """The keys, which segment files are sealed under too."""
        return self._keyring

    def now_ms(self) -> int:
        """The time by which what is held is judged: the wall clock, never before the newest entry known here."""
        return max(self._clock.wall_ms(), self._newest_at_ms)

    @property
    def stores(self) -> Mapping[str, tuple[bool, str]]:
        """The stores of the database that an erasure concerns, as `Database.stores` says."""
        return self._database.stores

    def open(self) -> None:
        """Blocking part of `open_sqlite_log`."""
        try:
            self._database.prepare()
            with self._database.writer.begin() as connection:
                newest = connection.execute(_NEWEST).first()
                self._state.catch_up(connection)
                # Inside the transaction: of several processes that start at once, one makes the keys.
                self._keyring.prepare(fresh=newest is None)
            # A process that was killed may have left erased pages behind. Where that takes a while it is done with
            # the first erasure.
            self._wipe_pending = self._database.shared or not self._database.wipe()
        except (SQLAlchemyError, OSError) as broken:
            raise _cannot_open(self._database, broken) from broken
        if newest is not None:
            self._head, self._newest_at_ms = newest
        self._settle_keys()
        self._obey_ledger()
        self._database.follow(self._tell, self._went_back)
        # A process that dies without closing the log must not hang on this thread: what it cuts off was not
        # acknowledged.
        self._owner = threading.Thread(target=self._own, name="gallery-log-write", daemon=True)
        self._owner.start()

    def open_for_reading(self) -> None:
        """The same for a process that never writes: tables and keys must be there already."""
        try:
            self._database.check()
        except (SQLAlchemyError, OSError) as broken:
            raise _cannot_open(self._database, broken) from broken
        self._keyring.require()
        self._inbox.close()
        self._database.follow(self._tell, self._went_back)

    def _settle_keys(self) -> None:
        for gallery_id in self._state.deleted:
            self._keyring.destroy(gallery_id, self._newest_at_ms)
        ended = [one for one in self._state.galleries if self._keyring.destroyed(one)]
        if ended:
            writes = [DeleteGallery(one, "its key was destroyed") for one in ended]
            self._commit([AppendJob(writes, SERVICE)])
        with self._database.reader.begin() as connection:
            rotated = {row.gallery_id: row for row in connection.execute(select(data_key))}
        for gallery_id in self._state.galleries:
            row = rotated.get(gallery_id)
            try:
                cipher = self._keyring.cipher(gallery_id, 1 if row is None else row.generation)
            except LogUnavailable as away:
                raise StartRefused(away.detail, hint=away.hint) from away
            if cipher is None:
                raise StartRefused(
                    f"the key of gallery {gallery_id} is missing: its references could not be searched",
                    hint="restore the keys directory; if the database was restored from before a rotation of the key, "
                    "whose older generations were destroyed since, that backup cannot be read any more",
                )
            if row is not None and row.retired_at_ms is not None:
                self._keyring.forget(gallery_id, row.generation)

    # --- writing -----------------------------------------------------------------------------------

    async def append(self, writes: Sequence[Write], actor: Actor) -> list[Receipt | MatcherError]:
        if not writes:
            return []
        if len(writes) > WRITES_PER_APPEND_MAX:
            raise TooLarge(
                f"{len(writes)} writes at once", field="writes", hint=f"at most {WRITES_PER_APPEND_MAX} in one append"
            )
        answers: list[Receipt | MatcherError] = await self._put(AppendJob(tuple(writes), actor), LogUnavailable)
        return answers

    async def enrol(self, rows: EnrolRows, actor: Actor) -> EnrolReceipts:
        if len(rows) > WRITES_PER_APPEND_MAX:
            raise TooLarge(
                f"{len(rows)} references at once",
                field="reference_ids",
                hint=f"at most {WRITES_PER_APPEND_MAX} in one message",
            )
        if not len(rows):
            return EnrolReceipts.of([])
        receipts: EnrolReceipts = await self._put(EnrolJob(rows, actor), LogUnavailable)
        return receipts

    async def record(self, events: Sequence[AuditEvent], alerts: Sequence[Alert]) -> None:
        if not events and not alerts:
            return
        try:
            details = [audit.canonical_detail(event.detail) for event in events]
        except ValueError as unfit:
            raise AuditUnavailable(f"an event's detail is not JSON: {unfit}", field="detail") from unfit
        await self._put(RecordJob(tuple(events), details, tuple(alerts)), AuditUnavailable)

    async def erase(self, now_ms: int) -> int:
        erased: int = await self._put(EraseJob(now_ms), LogUnavailable)
        # Also those of a process that ended before it came to wipe.
        receipt_id = await self.query(erasure_rows.newest_unwiped)
        # Not in the owner's thread: other writes need not wait for it.
        await asyncio.to_thread(self._wipe, erased > 0 or receipt_id > 0)
        if receipt_id:
            await self.transact(lambda transaction: erasure_rows.wiped(transaction, receipt_id))
        return erased

    async def wipe(self) -> None:
        """See to it that no older version of anything is left in the database. Raises LogUnavailable."""
        await asyncio.to_thread(self._wipe, True)

    async def transact(self, work: Callable[[WriteTransaction], T]) -> T:
        """Do a piece of work inside a write transaction, as `inbox.WorkJob` asks of it; durable on return. Raises
        what it refuses with, or LogUnavailable if nothing was committed."""
        answer: T | CallerFault = await self._put(WorkJob(work), LogUnavailable)
        if isinstance(answer, CallerFault):
            raise answer
        return answer

    async def _put(self, job: Job, unavailable: type[MatcherError]) -> Any:
        if self._gone is not None:
            raise self._gone.with_traceback(None)
        try:
            accepted = self._inbox.put(job)
        except RuntimeError:
            if self._owner is None:
                raise unavailable("the gallery log was opened for reading only") from None
            raise unavailable("the gallery log is closed", cause=Cause.SHUTTING_DOWN) from None
        if not accepted:
            raise unavailable(
                "too many writes wait for the gallery log",
                cause=Cause.OVERLOADED,
                hint="send more slowly",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        return await asyncio.wrap_future(job.answer)

    def _own(self) -> None:
        while jobs := self._inbox.take(self._database.writes_per_turn_max):
            # A caller who left before the work began is not served; from here on nobody can leave.
            present = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            if not present:
                continue
            failure = self._attempt(present)
            self._can_write = failure is None or not _is_storage(failure)
            if failure is None:
                continue
            for job in present:
                # What is wrong with one caller's writes must not fail those it shared a transaction with.
                alone = failure if len(present) == 1 or _is_storage(failure) else self._attempt([job])
                if alone is not None:
                    job.answer.set_exception(_translated(alone, job))

    def _attempt(self, jobs: list[Job]) -> BaseException | None:
        """Serve the jobs and give the answers; or give none, and return what went wrong."""
        until = time.monotonic() + RECONNECT_S_MAX
        while True:
            try:
                answers = self._commit(jobs)
                break
            except BaseException as failure:
                self._recover()
                if not self._database.lost(failure) or self._closed or time.monotonic() > until:
                    return failure
                # Nothing was committed, so that it can be done again.
                time.sleep(_RECONNECT_EVERY_S)
        for job, answer in zip(jobs, answers, strict=True):
            job.answer.set_result(answer)
        return None

    def _commit(self, jobs: Sequence[Job]) -> list[Any]:
        answers: list[Any] = []
        unknown: SQLAlchemyError | None = None
        with self._database.writer.connect() as connection:
            begun = connection.begin()
            transaction = WriteTransaction(connection, self._keyring, self._state, self._terms, self._clock.wall_ms())
            for job in jobs:
                match job:
                    case AppendJob():
                        answers.append(judgement.append(transaction, job.writes, job.actor))
                    case EnrolJob():
                        answers.append(enrolments.enrol(transaction, job.rows, job.actor))
                    case RecordJob():
                        transaction.record(job.events, job.details, job.alerts)
                        answers.append(None)
                    case EraseJob():
                        answers.append(erase(transaction, job.now_ms, ERASED_AT_ONCE_MAX))
                    case WorkJob():
                        try:
                            answers.append(job.work(transaction))
                        except CallerFault as refusal:
                            answers.append(refusal.with_traceback(None))
            transaction.flush()
            if transaction.wrote:
                self._database.announce(connection, transaction.sequence, transaction.newest_at_ms)
            try:
                begun.commit()
            except SQLAlchemyError as failure:
                if not self._database.lost(failure):
                    raise
                unknown = failure
        if unknown is not None and not self._stored(transaction):
            raise unknown
        # Of a database that others write to as well, nobody here reads the references.
        if not self._database.shared:
            self._recent.add(transaction.runs)
        if transaction.destroyed or any(isinstance(job, EraseJob) for job in jobs):
            self._recent.clear()
        self._tell(transaction.sequence, transaction.newest_at_ms)
        self._remember(transaction)
        self._doomed.update(transaction.destroyed)
        if self._doomed:
            self._destroy_keys(transaction.at_ms)
            _qualify(jobs, answers, self._doomed)
        return answers

    def _stored(self, transaction: WriteTransaction) -> bool:
        """Whether a transaction was committed although the connection broke before that was answered. It is asked
        under the write lock, which is free only when that transaction has ended. Raises LogUnavailable if the answer
        cannot be had in time."""
        until = time.monotonic() + RECONNECT_S_MAX
        while True:
            try:
                with self._database.writer.begin() as connection:
                    stored = transaction.is_stored(connection)
                    break
            except (SQLAlchemyError, OSError) as broken:
                if self._closed or time.monotonic() > until:
                    raise _outcome_unknown() from broken
            time.sleep(_RECONNECT_EVERY_S)
        if stored is None:
            raise _outcome_unknown()
        return stored

    def _remember(self, transaction: WriteTransaction) -> None:
        """Put who was withdrawn into the ledger; what cannot be written is tried again with the next transaction."""
        try:
            self._ledger.add(transaction.ended, transaction.sequence, transaction.at_ms)
        except OSError as broken:
            _log.error("erasure_ledger_not_written", detail=str(broken))

    def _obey_ledger(self) -> None:
        """In a database that was restored, withdraw again who had been withdrawn since its backup."""
        self._ledger.drop_before(self._clock.wall_ms() - self._terms.backups_destroyed_within_ms)
        digests, newest = self._ledger.read()
        if newest <= self._head:
            return
        columns = (live.c.gallery_id, live.c.reference_id, live.c.sequence, live.c.enrolled_at_ms)
        with self._database.reader.begin() as connection:
            back = returned(connection.execute(select(*columns)), digests)
        for start in range(0, len(back), WRITES_PER_APPEND_MAX):
            writes = [
                Withdraw(one.gallery_id, one.reference_id, "withdrawn before the database was restored")
                for one in back[start : start + WRITES_PER_APPEND_MAX]
            ]
            self._commit([AppendJob(writes, SERVICE)])
        _log.warning("restored_database_obeys_ledger", withdrawn_again=len(back))

    def _destroy_keys(self, at_ms: int) -> None:
        """Destroy the keys of deleted galleries; those that resist are tried again with the next transaction."""
        for gallery_id in sorted(self._doomed):
            try:
                self._keyring.destroy(gallery_id, at_ms)
            except OSError as broken:
                _log.error("key_not_destroyed", gallery=gallery_id, detail=str(broken))
            else:
                self._doomed.discard(gallery_id)

    def _wipe(self, erased: bool) -> None:
        """Leave no older version behind of what was erased."""
        with self._wiping:
            self._wipe_pending |= erased
            if not self._wipe_pending:
                return
            try:
                wiped = self._database.wipe()
            except (SQLAlchemyError, OSError) as broken:
                raise _unavailable(broken, LogUnavailable, "write") from broken
            if not wiped:
                raise LogUnavailable(
                    "templates were erased, but a reader still holds older versions of their pages",
                    hint="erase again; if it stays so, look for a long transaction or a backup that is running",
                )
            self._wipe_pending = False

    def _recover(self) -> None:
        """After a failure: trust nothing in memory. The outcome of a failed commit is unknown, so whoever waits for
        news is told that there may be some."""
        self._state = CatalogueState()
        self._database.writer.dispose()
        if self._database.shared:
            return  # Whoever follows what others commit is told of this as well.
        try:
            with self._database.reader.begin() as connection:
                newest = connection.execute(_NEWEST).first()
        except (SQLAlchemyError, OSError):
            newest = None
        self._tell(*(newest or (0, 0)))
        self._wake_all()

    # --- news --------------------------------------------------------------------------------------

    async def head(self) -> int:
        if self._database.shared:
            newest = await self.query(lambda connection: connection.execute(_NEWEST).first())
            self._tell(*(newest or (0, 0)))
            return newest[0] if newest else 0
        return self._head

    async def wait_beyond(self, sequence: int) -> None:
        loop = asyncio.get_running_loop()
        news: asyncio.Future[None] = loop.create_future()
        with self._news:
            if self._head > sequence or self._closed:
                return
            self._waiting[news] = (sequence, loop)
        try:
            await news
        finally:
            with self._news:
                self._waiting.pop(news, None)

    def _went_back(self, before: int, now: int) -> None:
        self._gone = DataDamaged(
            f"the gallery log ends at {now}, although {before} was read from it: its database has lost entries",
            hint="a standby that lagged behind took over, or a backup was restored: start gateways and shards anew, "
            "the shards without their data directories",
        )
        _log.critical("log_went_back", detail=str(self._gone))
        self._wake_all()

    def _tell(self, head: int, at_ms: int) -> None:
        with self._news:
            self._head = max(self._head, head)
            self._newest_at_ms = max(self._newest_at_ms, at_ms)
            told = {news: loop for news, (beyond, loop) in self._waiting.items() if self._head > beyond}
            for news in told:
                del self._waiting[news]
        _wake(told)

    def _wake_all(self) -> None:
        """Whoever waits is to look: there may be news."""
        with self._news:
            told = {news: loop for news, (_, loop) in self._waiting.items()}
            self._waiting.clear()
        _wake(told)

    # --- reading -----------------------------------------------------------------------------------

    async def waiting_for_erasure(self) -> int:
        """Templates that are to be erased and are still there, those under a legal hold included."""
        counted = select(func.count()).select_from(erasure)
        return await self.query(lambda connection: int(connection.execute(counted).scalar_one()))

    async def read(self, after: int, limit: int, kinds: Collection[EntryKind] | None = None) -> Sequence[LogEntry]:
        if kinds is None and (run := self._recent.beyond(after, limit)) is not None:
            return run
        wanted = _ENTRIES.where(entry.c.sequence > after).order_by(entry.c.sequence).limit(limit)
        if kinds is not None:
            wanted = wanted.where(entry.c.kind.in_([int(kind) for kind in kinds]))
            if _OF_REFERENCES.isdisjoint(kinds):
                wanted = wanted.where(IS_CATALOGUE)
        return await self._entries(wanted)

    async def read_share(self, partitions: Collection[int], after: int, upto: int, limit: int) -> Sequence[LogEntry]:
        within = _ENTRIES.where(entry.c.sequence > after, entry.c.sequence <= upto)
        concerned = or_(IS_CATALOGUE, self._database.partition().in_(sorted(partitions)))
        return await self._entries(within.where(concerned).order_by(entry.c.sequence).limit(limit))

    async def _entries(self, wanted: Select[Any]) -> list[LogEntry]:
        try:
            return await self.query(lambda connection: self._read(connection, wanted))
        except _KeyMissing:
            # The key may have been destroyed since the rows were read, because they are sealed under a newer one now.
            return await self.query(lambda connection: self._read(connection, wanted))

    def _read(self, connection: Connection, wanted: Select[Any]) -> list[LogEntry]:
        ciphers: dict[tuple[str, int], AESGCM | None] = {}
        kinds = {int(kind): kind for kind in EntryKind}
        found: list[LogEntry] = []
        for row in connection.execute(wanted):
            sequence, kind, at_ms, gallery_id, reference_id, subject_id, expires_at_ms, sealed, record = row
            template = None
            if sealed is not None:
                place = (gallery_id, seal.generation_of(sealed) or 1)
                if place not in ciphers:
                    ciphers[place] = self._keyring.cipher(*place)
                    if ciphers[place] is None and not self._keyring.destroyed(gallery_id):
                        # Not to be taken for erased: its people would be lost without a word (law 4).
                        raise _KeyMissing(
                            f"the key of gallery {gallery_id} is missing: its templates cannot be read",
                            hint="check the keys directory, which all processes share",
                        )
                cipher = ciphers[place]
                if cipher is not None:
                    template = seal.unseal_template(cipher, sealed, gallery_id, reference_id, sequence)
            found.append(
                LogEntry(
                    sequence, kinds[kind], at_ms, gallery_id, reference_id, subject_id, expires_at_ms, template,
                    record or b"",
                )
            )  # fmt: skip
        return found

    async def references(self, gallery_id: str, after: str, limit: int) -> list[Reference]:
        wanted = (
            _REFERENCES.where(live.c.gallery_id == gallery_id, live.c.reference_id > after)
            .order_by(live.c.reference_id)
            .limit(limit)
        )
        return await self._references(wanted)

    async def reference(self, gallery_id: str, reference_id: str) -> Reference | None:
        found = await self._references(
            _REFERENCES.where(live.c.gallery_id == gallery_id, live.c.reference_id == reference_id)
        )
        return found[0] if found else None

    async def subject(self, subject_id: str) -> list[Reference]:
        return await self._references(
            _REFERENCES.where(live.c.subject_id == subject_id).order_by(live.c.gallery_id, live.c.reference_id)
        )

    async def _references(self, wanted: Any) -> list[Reference]:
        if self._database.shared:
            await self.head()
        wanted = wanted.where(live.c.expires_at_ms > self.now_ms())
        return await self.query(lambda connection: [_reference(row) for row in connection.execute(wanted)])

    async def alerts(self, deployment_id: str, before: str, limit: int) -> list[Alert]:
        now_ms = self.now_ms()

        def query(connection: Connection) -> list[Alert]:
            columns = (alert.c.alert_id, alert.c.sealed, alert.c.attributes)
            wanted = select(*columns).where(alert.c.erase_at_ms > now_ms)
            wanted = wanted.order_by(alert.c.position.desc()).limit(limit)
            if deployment_id:
                wanted = wanted.where(alert.c.deployment_id == deployment_id)
            if before:
                place = connection.execute(select(alert.c.position).where(alert.c.alert_id == before)).scalar()
                if place is None:
                    raise NotFound(
                        f"alert {before} is not held", field="before", hint="it may have been erased; start again"
                    )
                wanted = wanted.where(alert.c.position < place)
            system = self._keyring.system
            return [read_alert(system, *row) for row in connection.execute(wanted)]

        return await self.query(query)

    async def audit(self, after: int, limit: int) -> list[dict[str, object]]:
        """Each with `salt` (hex) and `detail` beside the chained fields; None if there is none or it was erased."""

        def query(connection: Connection) -> list[dict[str, object]]:
            columns = (audit_record.c.position, audit_record.c.chained, audit_record.c.sealed)
            wanted = select(*columns).where(audit_record.c.position > after)
            found: list[dict[str, object]] = []
            for position, chained, sealed in connection.execute(wanted.order_by(audit_record.c.position).limit(limit)):
                try:
                    record: dict[str, object] = orjson.loads(chained)
                except ValueError as unfit:
                    raise DataDamaged(f"audit record {position} is not JSON", hint="restore the database") from unfit
                record["salt"] = record["detail"] = None
                if sealed is not None:
                    content = seal.unseal_record(self._keyring.system, sealed, "audit", str(position))
                    record["salt"], record["detail"] = content[:32].hex(), orjson.loads(content[32:])
                found.append(record)
            return found

        return await self.query(query)

    async def query(self, query: Callable[[Connection], T]) -> T:
        """What a query finds in one read transaction. Raises LogUnavailable if the log cannot be read."""
        if self._closed:
            raise LogUnavailable("the gallery log is closed", cause=Cause.SHUTTING_DOWN)
        if self._gone is not None:
            raise self._gone.with_traceback(None)

        def once() -> T:
            with self._database.reader.begin() as connection:
                found = query(connection)
            self._can_read = True
            return found

        def run() -> T:
            try:
                try:
                    return once()
                except DBAPIError as broken:
                    if not broken.connection_invalidated:
                        raise
                    # The connection was of before a restart, as all in the pool were, which is now empty.
                    return once()
            except (SQLAlchemyError, OSError) as broken:
                self._can_read = False
                raise _unavailable(broken, LogUnavailable, "read") from broken

        return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    async def close(self) -> None:
        """Finish the writes that were accepted, then let go of the database. Repeating it changes nothing."""
        with self._news:
            self._closed = True
        self._inbox.close()
        self._wake_all()
        await asyncio.to_thread(self._let_go)

    def _let_go(self) -> None:
        if self._owner is not None:
            self._owner.join()
        self._readers.shutdown()
        self._database.dispose()


_NEWEST = select(entry.c.sequence, entry.c.at_ms).order_by(entry.c.sequence.desc()).limit(1)
_ENTRIES = select(
    entry.c.sequence, entry.c.kind, entry.c.at_ms, entry.c.gallery_id, entry.c.reference_id, entry.c.subject_id,
    entry.c.expires_at_ms, entry.c.sealed, entry.c.record,
)  # fmt: skip
_REFERENCES = select(
    live.c.gallery_id, live.c.reference_id, live.c.subject_id, live.c.sequence, live.c.enrolled_at_ms,
    live.c.expires_at_ms, entry.c.attributes,
).join(entry, entry.c.sequence == live.c.sequence)  # fmt: skip


def _reference(row: Sequence[Any]) -> Reference:
    gallery_id, reference_id, subject_id, sequence, enrolled_at_ms, expires_at_ms, attributes = row
    return Reference(gallery_id, reference_id, subject_id, sequence, enrolled_at_ms, expires_at_ms, attributes or b"")


def _wake(waiting: Mapping[asyncio.Future[None], asyncio.AbstractEventLoop]) -> None:
    """Each on its loop; for any thread."""
    for news, loop in waiting.items():
        try:
            loop.call_soon_threadsafe(_end_wait, news)
        except RuntimeError:
            _log.debug("waiting_loop_closed")


def _end_wait(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)


def _qualify(jobs: Sequence[Job], answers: list[Any], doomed: set[str]) -> None:
    """A deletion whose key is still there must not be answered as done, although it is committed."""
    for job, answer in zip(jobs, answers, strict=True):
        if isinstance(job, AppendJob):
            for place, write in enumerate(job.writes):
                if (
                    isinstance(write, DeleteGallery)
                    and write.gallery_id in doomed
                    and isinstance(answer[place], Receipt)
                ):
                    answer[place] = LogUnavailable(
                        f"gallery {write.gallery_id} is deleted, but its key could not be destroyed yet",
                        field="gallery_id",
                        hint="check the keys directory; destruction is tried again with every write and at start",
                    )


def _is_storage(failure: BaseException) -> bool:
    """Whether the database or the disk failed, and not what one caller brought."""
    if isinstance(failure, IntegrityError | DataError | ProgrammingError):
        return False
    return isinstance(failure, OSError | DatabaseError | TimeoutError | LogUnavailable)


def _translated(failure: BaseException, job: Job) -> BaseException:
    unavailable = AuditUnavailable if isinstance(job, RecordJob) else LogUnavailable
    if isinstance(failure, SQLAlchemyError | OSError):
        return _unavailable(failure, unavailable, "write")
    if isinstance(failure, MatcherError) and isinstance(job, RecordJob):
        return AuditUnavailable(failure.detail, hint=failure.hint)
    return failure


def _unavailable(broken: BaseException, unavailable: type[MatcherError], verb: str) -> MatcherError:
    return unavailable(
        f"the gallery log cannot be {'written' if verb == 'write' else 'read'}: {_first_line(broken)}",
        hint="check the database and its disk; an enrolment may be repeated with its idempotency key",
        retry_after_ms=_RETRY_AFTER_MS,
    )


def _outcome_unknown() -> LogUnavailable:
    return LogUnavailable(
        "the connection to the gallery log broke while it committed: it is not known whether the writes were stored",
        hint="repeat them: with their idempotency keys enrolments are stored once",
        retry_after_ms=_RETRY_AFTER_MS,
    )


def _cannot_open(database: Database, broken: BaseException) -> StartRefused:
    return StartRefused(
        f"the gallery log {database} cannot be opened: {_first_line(broken)}",
        hint="check that the database runs and lets this account in, or the disk and the file's owner; "
        "otherwise restore it from a backup",
    )


def _first_line(broken: BaseException) -> str:
    # The driver's own words only: SQLAlchemy's go on with the statement and its parameters.
    return str(getattr(broken, "orig", None) or broken).splitlines()[0]
