"""What is particular to SQLite: where the file is, how connections are set up, when the disk has been wiped.

`journal_mode=WAL` with `synchronous=FULL`: every commit syncs the write-ahead log before it returns.
`secure_delete=ON`: what is removed from a page is overwritten with zeros. The write-ahead log keeps older pages
until it is truncated, so erasure ends with `truncate_log`.
"""

from __future__ import annotations

from pathlib import Path
from sqlite3 import Connection as SqliteConnection

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, Table, create_engine, event, insert
from sqlalchemy.pool import QueuePool

FILE_NAME = "gallery.db"

# Pages of 8 KiB hold seven sealed 512-d templates; 4 KiB pages would hold three and waste a quarter.
_PAGE_BYTES = 8192
# Checkpoints sync the database file; at 4 MiB, SQLite's default, they would dominate an import.
_CHECKPOINT_PAGES = 64 * 1024 * 1024 // _PAGE_BYTES


def writer_engine(path: Path, busy_timeout_ms: int) -> Engine:
    """One connection, for the thread that owns all writes. Its transactions take the write lock at once."""
    engine = _engine(path, 1)

    @event.listens_for(engine, "connect")
    def _set_up(connection: SqliteConnection, _: object) -> None:
        connection.isolation_level = None
        for pragma in (
            f"busy_timeout={busy_timeout_ms}",
            f"page_size={_PAGE_BYTES}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "secure_delete=ON",
            "foreign_keys=ON",
            "cache_size=-65536",
            f"wal_autocheckpoint={_CHECKPOINT_PAGES}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def reader_engine(path: Path, connections: int, busy_timeout_ms: int) -> Engine:
    """Connections that cannot write."""
    engine = _engine(path, connections)

    @event.listens_for(engine, "connect")
    def _set_up(connection: SqliteConnection, _: object) -> None:
        connection.isolation_level = None
        for pragma in (f"busy_timeout={busy_timeout_ms}", "query_only=ON", "cache_size=-16384"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def _engine(path: Path, connections: int) -> Engine:
    return create_engine(
        f"sqlite:///{path}",
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
        connect_args={"check_same_thread": False},
        # A connection that stood idle holds no lock and no snapshot.
        pool_reset_on_return="rollback",
    )


def migrate(engine: Engine) -> None:
    """Bring the tables to the newest version, in one transaction."""
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", "matcher_service.gallery:migrations")
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def insert_many(connection: Connection, table: Table, rows: list[tuple[object, ...]]) -> None:
    """Insert rows of plain values, one for each column in order. Values are passed to the driver as they are."""
    if rows:
        connection.exec_driver_sql(str(insert(table).compile(dialect=connection.dialect)), rows)


def truncate_log(engine: Engine) -> bool:
    """Copy the write-ahead log into the database and cut it to nothing; False if a reader was in the way.

    Afterwards no older version of any page is left in either file.
    """
    # Past SQLAlchemy's transactions: a checkpoint cannot run inside one.
    connection = engine.raw_connection()
    try:
        busy, _, _ = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.close()
    return not busy
