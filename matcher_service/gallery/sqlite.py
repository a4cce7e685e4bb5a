"""What is particular to SQLite: where the file is, how connections are set up, how the disk is wiped.

`journal_mode=WAL` with `synchronous=FULL`: every commit syncs the write-ahead log before it returns.
`secure_delete=ON`: what is removed from a page is overwritten with zeros. The write-ahead log keeps older pages
until it is truncated, so erasure ends with `wipe`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from sqlite3 import Connection as SqliteConnection

from sqlalchemy import ColumnElement, Connection, Engine, Integer, create_engine, event, func
from sqlalchemy.pool import QueuePool

from matcher_service.gallery.migrate import check_version, migrate
from matcher_service.gallery.schema import entry
from matcher_service.partitions import partition_of

FILE_NAME = "gallery.db"

# Pages of 8 KiB hold seven sealed 512-d templates; 4 KiB pages would hold three and waste a quarter.
_PAGE_BYTES = 8192
# Checkpoints sync the database file; at SQLite's default of 1,000 pages they would dominate an import.
_CHECKPOINT_BYTES = 64 * 1024 * 1024
# Pages that SQLite keeps of each connection. They only ever fill: most are of the newest entries and audit records,
# which nobody reads again, so a large cache is memory that grows with every alert until it is full. An import of
# 150,000 references, named in order or at random, takes as much processor time with this as with 64 MiB. What a
# reader has kept is void after each commit of the writer.
_WRITER_CACHE_KIB = 8 * 1024
_READER_CACHE_KIB = 2 * 1024


class SqliteDatabase:
    """The gallery log's database file. `writer` has one connection, whose transactions take the write lock at once;
    the `readers` connections of `reader` cannot write. Neither touches the disk before `prepare`."""

    shared = False
    writes_per_turn_max = 10_000
    stores: Mapping[str, tuple[bool, str]] = {
        "database": (True, "overwritten with zeros in its pages"),
        "write_ahead_log": (True, "copied into the database and cut to nothing"),
    }

    def __init__(self, path: Path, readers: int, busy_timeout_ms: int) -> None:
        self._path = path
        busy = f"busy_timeout={busy_timeout_ms}"
        self.writer = _engine(
            path,
            1,
            "BEGIN IMMEDIATE",
            busy,
            f"page_size={_PAGE_BYTES}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "secure_delete=ON",
            "foreign_keys=ON",
            f"cache_size=-{_WRITER_CACHE_KIB}",
            f"wal_autocheckpoint={_CHECKPOINT_BYTES // _PAGE_BYTES}",
        )
        self.reader = _engine(path, readers, "BEGIN", busy, "query_only=ON", f"cache_size=-{_READER_CACHE_KIB}")

    def __str__(self) -> str:
        return str(self._path)

    def prepare(self) -> None:
        """Make the file, for its owner only, and bring the tables to the newest version in one transaction."""
        folder = self._path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its side files the mode of the main file.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        for directory in (folder, folder.parent):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(descriptor)
            os.close(descriptor)
        with self.writer.begin() as connection:
            migrate(connection)

    def check(self) -> None:
        with self.reader.begin() as connection:
            check_version(connection)

    def announce(self, connection: Connection, sequence: int, at_ms: int) -> None:
        """Nobody else is there to be told."""

    def follow(self, tell: Callable[[int, int], None], went_back: Callable[[int, int], None]) -> None:
        """Nobody else commits."""

    def lost(self, failure: BaseException) -> bool:
        """Never: what a disk failed to sync may be read back and yet be gone after the next power cut."""
        return False

    def wipe(self) -> bool:
        """Copy the write-ahead log into the file and cut it to nothing; False if a reader was in the way.

        Afterwards no older version of any page is left in either.
        """
        # Past SQLAlchemy's transactions: a checkpoint cannot run inside one.
        connection = self.writer.raw_connection()
        try:
            busy, _, _ = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            connection.close()
        return not busy

    def partition(self) -> ColumnElement[int]:
        return func.partition_of(entry.c.gallery_id, entry.c.reference_id, type_=Integer())

    def dispose(self) -> None:
        self.reader.dispose()
        self.writer.dispose()


def _engine(path: Path, connections: int, begin: str, *pragmas: str) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
        connect_args={"check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _set_up(connection: SqliteConnection, _: object) -> None:
        # The driver is to begin no transactions of its own: `begin` says how they begin.
        connection.isolation_level = None
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
        connection.create_function("partition_of", 2, partition_of, deterministic=True)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine
