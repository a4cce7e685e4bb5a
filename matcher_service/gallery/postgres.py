"""What is particular to PostgreSQL: turns at writing, news for other processes, lost connections, vacuuming.

Law 1 rests on one advisory lock. A write transaction begins by taking it, and only then looks at the log's end;
PostgreSQL lets go of it after the commit has become visible. So of all gateways one writes at a time, sequences are
given out in the order of commits, and a reader that has seen a sequence has seen every one before it. A sequence or
identity column would not do: it numbers rows when they are inserted, and transactions commit in another order.

`synchronous_commit` is on for what writes, and a server without `fsync` is refused.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import structlog
from psycopg.abc import PQGen
from sqlalchemy import URL, ColumnElement, Connection, Engine, Integer, create_engine, event, literal_column, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import QueuePool

from matcher_service.errors import LogUnavailable, StartRefused
from matcher_service.gallery.keys import Keyring
from matcher_service.gallery.log import READERS, SqlGalleryLog
from matcher_service.gallery.migrate import check_version, migrate
from matcher_service.seams import Clock
from matcher_service.settings import StorageSettings

CONNECT_S_MAX = 2
REPLY_S_MAX = 10.0
"""A server that is silent for longer is given up: one that is stopped, or a network that swallows packets, reports
nothing."""
POLL_S = 0.25
"""How long news may take when a notification is lost. As often the listening connection is seen to be alive."""
VERSION_LEAST = 15
# A machine that vanished acknowledges nothing any more, which shows before a reply is overdue.
_LINK = {"tcp_user_timeout": 5000, "keepalives_idle": 2, "keepalives_interval": 1, "keepalives_count": 3}

# Two numbers that mean nothing else: the name of the lock in the database.
_TAKE_TURN = "SELECT pg_advisory_xact_lock(1296127052, 1)"
_CHANNEL = "matcher_log"
_NEWEST = "SELECT sequence, at_ms FROM entry ORDER BY sequence DESC LIMIT 1"
# As `partitions.partition_of` has it. Not indexed: moving partitions is rare, and an import would pay for it.
_PARTITION = (
    "get_byte(sha256("
    "convert_to(entry.gallery_id, 'UTF8') || '\\x00'::bytea || convert_to(entry.reference_id, 'UTF8')), 0)"
)
_LISTENER_REPLY_S_MAX = 1.0
_RECONNECT_EVERY_S = 0.1
# A gateway that stands still inside its turn must not hold the others up for longer.
_TURN_S_MAX = 5
_WAIT_FOR_TURN_S_MAX = 8
# Migrations of large tables, and vacuuming them.
_LONG_S_MAX = 3600.0

# Compiling a query pays for itself in none of these, and takes longer than most.
_READING = ("default_transaction_read_only=on", "jit=off")
# What a write looks up it looks up by key. A planner whose statistics are of a minute ago, when the table was empty,
# would rather read all of it.
_WRITING = ("jit=off", "enable_seqscan=off", "enable_hashjoin=off", "enable_mergejoin=off")

_ERASABLE = ("entry", "audit_record", "alert")
# Row versions that vacuuming had to leave, because somebody may still see them; large templates lie in side tables.
_DEAD_LEFT = """
SELECT coalesce(sum(n_dead_tup), 0) FROM pg_stat_all_tables
WHERE relid IN (SELECT unnest(ARRAY[oid, reltoastrelid]) FROM pg_class WHERE oid = ANY (%s::regclass[]))
"""
_SERVER = """
SELECT current_setting('server_version_num')::int, current_setting('server_encoding'), current_setting('fsync'),
       pg_is_in_recovery()
"""
_DURABLE = "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"

RV = TypeVar("RV")
_log = structlog.get_logger(__name__)


async def open_postgres_log(
    url: str, keys: Path | Keyring, settings: StorageSettings, clock: Clock, *, read_only: bool = False
) -> SqlGalleryLog:
    """Open, or make, the gallery log in a PostgreSQL database (`postgresql://user@host:port/name`).

    Any number of processes may have it open. All of them share the directory `keys`. To write, tables are made or
    brought to the newest version. With `read_only` they must be there, as must be the keys, and every write is
    refused: so a shard opens it. Raises StartRefused if the database cannot be used, if it could lose what it
    acknowledged, or if keys are missing.
    """
    database = PostgresDatabase(url, READERS)
    keyring = keys if isinstance(keys, Keyring) else await asyncio.to_thread(Keyring.open, keys)
    log = SqlGalleryLog(database, keyring, settings, clock)
    try:
        await asyncio.to_thread(log.open_for_reading if read_only else log.open)
    except BaseException:
        await log.close()
        raise
    return log


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is given up when the server does not answer in time, and cannot be used afterwards."""

    reply_s_max = REPLY_S_MAX

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, self.reply_s_max)
        except psycopg.OperationalError:
            # The answer may still come, and would be taken for that to the next question.
            if self.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE:
                self.pgconn.finish()
            raise


class BinaryCursor(psycopg.Cursor[Any]):
    """Fetches values as the server holds them. Templates as text would be twice as long, and take twice the time."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.format = psycopg.pq.Format.BINARY


class PostgresDatabase:
    """The gallery log's database. `writer` has one connection, whose transactions take their turn; the `readers`
    connections of `reader` cannot write. Nothing connects before it is used.

    Of several hosts in the URL the primary is connected to: a standby is told of nothing, and lags behind.
    """

    shared = True
    # Fewer than could be: everybody else's writes wait for their turn meanwhile.
    writes_per_turn_max = 4096
    stores: Mapping[str, tuple[bool, str]] = {
        "database": (True, "vacuumed: no version of it is left in the tables; unused parts of pages hold it sealed"),
        "write_ahead_log": (False, "recycled by the database server by its own clock; what is in it is sealed"),
    }

    def __init__(self, url: str, readers: int) -> None:
        try:
            self._url = make_url(url)
        except ArgumentError as unfit:
            raise StartRefused(
                "the address of the gallery log's database cannot be read",
                field="cluster.log_url",
                hint="such as postgresql://user@host:5432/name",
            ) from unfit
        if self._url.get_backend_name() != "postgresql":
            raise StartRefused(
                f"the gallery log cannot be kept in {self._url.get_backend_name()}",
                field="cluster.log_url",
                hint="such as postgresql://user@host:5432/name; leave it empty for a file in data_dir",
            )
        self._url = self._url.set(drivername="postgresql+psycopg")
        self.writer = self._engine(1)
        self.reader = self._engine(readers, *_READING)
        self._listener: _Listener | None = None
        self._wiping: BoundedConnection | None = None

    def __str__(self) -> str:
        return self._url.set(drivername="postgresql").render_as_string(hide_password=True)

    def prepare(self) -> None:
        engine = self._engine(1, reply_s_max=_LONG_S_MAX)
        try:
            with engine.begin() as connection:
                _check_server(connection)
                migrate(connection)
        finally:
            engine.dispose()

    def check(self) -> None:
        with self.reader.begin() as connection:
            _check_server(connection)
            check_version(connection)

    def announce(self, connection: Connection, sequence: int, at_ms: int) -> None:
        # Without the numbers: whoever hears it looks.
        connection.exec_driver_sql(f"NOTIFY {_CHANNEL}")

    def follow(self, tell: Callable[[int, int], None], went_back: Callable[[int, int], None]) -> None:
        def connect() -> BoundedConnection:
            return _connect(self._url, *_READING, autocommit=True, reply_s_max=_LISTENER_REPLY_S_MAX)

        self._listener = _Listener(connect, tell, went_back)
        self._listener.start()

    def lost(self, failure: BaseException) -> bool:
        if isinstance(failure, DBAPIError):
            if failure.connection_invalidated:
                return True
            failure = failure.orig or failure
        if not isinstance(failure, psycopg.OperationalError | psycopg.InterfaceError):
            return False
        # No state: the driver's own words. 08: connections. 57P: the server ends or starts. 25P03: the transaction
        # stood still for too long.
        state = failure.sqlstate
        return state is None or state.startswith(("08", "57P")) or state == "25P03"

    def wipe(self) -> bool:
        """Vacuum away the row versions that erasure left; False if somebody can still see one.

        What they held stays in the free space of their pages until that is used again, and in the server's
        write-ahead log until that is recycled: sealed, and out of reach of SQL.
        """
        try:
            with _connect(self._url, autocommit=True, reply_s_max=_LONG_S_MAX) as connection:
                self._wiping = connection
                connection.execute(f"VACUUM (TRUNCATE false) {', '.join(_ERASABLE)}")
                (dead,) = connection.execute(_DEAD_LEFT, (list(_ERASABLE),)).fetchone() or (0,)
        except psycopg.Error as broken:
            raise LogUnavailable(
                f"templates were erased, but their old versions could not be vacuumed away: {_words(broken)}",
                hint="erase again; look at the database server",
            ) from broken
        finally:
            self._wiping = None
        return not dead

    def partition(self) -> ColumnElement[int]:
        return literal_column(_PARTITION, Integer())

    def dispose(self) -> None:
        if self._listener is not None:
            self._listener.end()
        wiping = self._wiping
        if wiping is not None:
            # The next process to start does it all again.
            with suppress(psycopg.Error):
                wiping.cancel_safe(timeout=CONNECT_S_MAX)
        self.reader.dispose()
        self.writer.dispose()

    def _engine(self, connections: int, *options: str, reply_s_max: float | None = None) -> Engine:
        writes = not options
        options = options or (
            f"idle_in_transaction_session_timeout={_TURN_S_MAX}s",
            f"lock_timeout={_WAIT_FOR_TURN_S_MAX}s",
            *_WRITING,
        )

        def connect() -> BoundedConnection:
            connection = _connect(self._url, *options, reply_s_max=reply_s_max)
            if not writes:
                connection.cursor_factory = BinaryCursor
            return connection

        engine = create_engine(
            "postgresql+psycopg://",
            creator=connect,
            poolclass=QueuePool,
            pool_size=connections,
            max_overflow=0,
            # Each statement of a transaction sees what is committed by then, so reading needs none around it: a look at
            # the log's end, of which a process that follows it makes several a second, is one round and not three.
            isolation_level="READ COMMITTED" if writes else "AUTOCOMMIT",
            use_native_hstore=False,
        )
        if writes:
            event.listen(engine, "connect", _insist_on_durability)
            event.listen(engine, "begin", _take_turn)
        return engine


class _Listener:
    """Tells of what other processes commit: at once when the database says so, and by looking now and then. Ends by
    itself when the log has gone back."""

    def __init__(
        self,
        connect: Callable[[], BoundedConnection],
        tell: Callable[[int, int], None],
        went_back: Callable[[int, int], None],
    ) -> None:
        self._connect = connect
        self._tell = tell
        self._went_back = went_back
        self._newest = 0
        self._over = False
        self._ended = threading.Event()
        self._wakes, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._run, name="gallery-log-news", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Returns when the thread has ended; repeatable."""
        if not self._ended.is_set():
            self._ended.set()
            os.write(self._waker, b"x")
            self._thread.join()
            os.close(self._waker)
            os.close(self._wakes)

    def _run(self) -> None:
        hears = True
        while not self._ended.is_set() and not self._over:
            try:
                with self._connect() as connection, selectors.DefaultSelector() as either:
                    connection.execute(f"LISTEN {_CHANNEL}")
                    hears = True
                    either.register(connection.fileno(), selectors.EVENT_READ)
                    either.register(self._wakes, selectors.EVENT_READ)
                    self._listen(connection, either)
            except (psycopg.Error, OSError) as broken:
                if hears:
                    _log.warning("no_news_of_the_log", detail=_words(broken))
                hears = False
                self._ended.wait(_RECONNECT_EVERY_S)

    def _listen(self, connection: BoundedConnection, either: selectors.BaseSelector) -> None:
        while not self._ended.is_set():
            sequence, at_ms = connection.execute(_NEWEST).fetchone() or (0, 0)
            if sequence < self._newest:
                self._over = True
                self._went_back(self._newest, sequence)
                return
            self._newest = sequence
            self._tell(sequence, at_ms)
            # What came with the answer will not make the socket readable again.
            if not list(connection.notifies(timeout=0)):
                either.select(POLL_S)


def _connect(url: URL, *options: str, autocommit: bool = False, reply_s_max: float | None = None) -> BoundedConnection:
    _, found = url.get_dialect()().create_connect_args(url)
    arguments = dict(found)
    for name, value in _LINK.items():
        arguments.setdefault(name, value)
    arguments.setdefault("connect_timeout", CONNECT_S_MAX)
    arguments.setdefault("target_session_attrs", "primary")
    arguments.setdefault("application_name", "matcher-service")
    if options:
        arguments["options"] = " ".join([arguments.get("options", ""), *(f"-c {one}" for one in options)])
    connection = BoundedConnection.connect(autocommit=autocommit, **arguments)
    if reply_s_max is not None:
        connection.reply_s_max = reply_s_max
    return connection


def _insist_on_durability(connection: Any, _: object) -> None:
    connection.execute(_DURABLE)
    connection.commit()


def _take_turn(connection: Connection) -> None:
    connection.exec_driver_sql(_TAKE_TURN)


def _check_server(connection: Connection) -> None:
    version, encoding, fsync, standby = connection.exec_driver_sql(_SERVER).one()
    if version < VERSION_LEAST * 10_000:
        raise StartRefused(
            f"the database server is PostgreSQL {version // 10_000}", hint=f"PostgreSQL {VERSION_LEAST} or newer"
        )
    if encoding != "UTF8":
        raise StartRefused(f"the database is encoded in {encoding}", hint="make it with ENCODING 'UTF8'")
    if fsync != "on":
        raise StartRefused(
            "the database server has fsync off: acknowledged enrolments could be lost", hint="set fsync = on"
        )
    if standby:
        raise StartRefused("the database server is a standby", hint="give the address of the primary, or of all")


def _words(broken: BaseException) -> str:
    return str(broken).splitlines()[0] if str(broken) else type(broken).__name__
