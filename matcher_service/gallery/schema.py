"""The tables. `entry` is the truth; the others serve the judgement of writes, erasure and accountability.

Catalogue state is not stored apart: it is the entries of the catalogue kinds, read in order. Identifiers sort as
UTF-8 bytes. `attributes` columns hold JSON that later features may fill (source, quality, review date, reason)
without a change of format.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    insert,
    literal_column,
)
from sqlalchemy.exc import DBAPIError

metadata = MetaData(naming_convention={"ix": "ix_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s"})

# SQLite makes only a plain INTEGER primary key the row's own address, which keeps appends at the end of the file.
Sequence = BigInteger().with_variant(Integer(), "sqlite")
Name = Text().with_variant(Text(collation="C"), "postgresql")


entry = Table(
    "entry",
    metadata,
    Column("sequence", Sequence, primary_key=True, autoincrement=False),
    Column("kind", Integer, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("gallery_id", Name, nullable=False),
    Column("reference_id", Name, nullable=False),
    Column("subject_id", Name, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
    Column("sealed", LargeBinary, comment="the sealed template of an ENROL; NULL once erased"),
    Column("record", LargeBinary, comment="JSON of a catalogue entry"),
    Column("attributes", LargeBinary, comment="JSON beside the entry, such as the reason of a withdrawal"),
)
# Written out, not a parameter: only so can a database see that the index on catalogue entries serves a query.
IS_CATALOGUE = entry.c.kind >= literal_column("3")
Index("ix_entry_catalogue", entry.c.sequence, sqlite_where=IS_CATALOGUE, postgresql_where=IS_CATALOGUE)
IS_ERASED = (entry.c.kind == literal_column("1")) & entry.c.sealed.is_(None)
"""An enrolment whose template was erased."""
Index("ix_entry_erased", entry.c.subject_id, sqlite_where=IS_ERASED, postgresql_where=IS_ERASED)

live = Table(
    "live",
    metadata,
    Column("gallery_id", Name, primary_key=True),
    Column("reference_id", Name, primary_key=True),
    Column("subject_id", Name, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("enrolled_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
    sqlite_with_rowid=False,
    comment="the references that a search may return",
)
Index("ix_live_subject_id", live.c.subject_id)
Index("ix_live_expires_at_ms", live.c.expires_at_ms)

erasure = Table(
    "erasure",
    metadata,
    Column("sequence", Sequence, primary_key=True, autoincrement=False),
    Column("due_at_ms", BigInteger, nullable=False),
    Column("held", LargeBinary, comment="JSON of the legal hold that pauses this erasure; NULL: none"),
    comment="entries whose template waits to be erased; those done are taken out",
)

data_key = Table(
    "data_key",
    metadata,
    Column("gallery_id", Name, primary_key=True),
    Column("generation", Integer, nullable=False, comment="what is sealed from now on is sealed under this"),
    Column("rotated_at_ms", BigInteger, nullable=False),
    Column("resealed_to", BigInteger, comment="entries up to here are under it; NULL: all of them are"),
    Column("resealed", BigInteger, nullable=False, comment="how many templates were sealed anew"),
    Column("resealed_at_ms", BigInteger),
    Column("retire_at_ms", BigInteger, nullable=False, comment="the generations before are not destroyed earlier"),
    Column("retired_at_ms", BigInteger, comment="when they were given up"),
    sqlite_with_rowid=False,
    comment="galleries whose key was rotated; of the others the first generation seals",
)

enrolment_key = Table(
    "enrolment_key",
    metadata,
    Column("gallery_id", Name, primary_key=True),
    Column("idempotency_key", Name, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("rows", BigInteger, comment="of how many entries from `sequence` on; NULL: of that one"),
    sqlite_with_rowid=False,
)
Index("ix_enrolment_key_at_ms", enrolment_key.c.at_ms)

audit_record = Table(
    "audit_record",
    metadata,
    Column("position", Sequence, primary_key=True, autoincrement=False),
    Column("chained", LargeBinary, nullable=False, comment="canonical JSON of the record and its hash"),
    Column("hash", Text, nullable=False),
    Column("sealed", LargeBinary, comment="salt and detail, sealed; NULL if there is none or it was erased"),
    Column("erase_at_ms", BigInteger, comment="when salt and detail are to be erased; NULL: with the log"),
    Column("held", Name, comment="the legal hold that has kept the detail beyond its time; NULL: none"),
)
Index("ix_audit_record_erase_at_ms", audit_record.c.erase_at_ms)

alert = Table(
    "alert",
    metadata,
    Column("position", Sequence, primary_key=True, autoincrement=False),
    Column("alert_id", Name, nullable=False),
    Column("deployment_id", Name, nullable=False),
    Column("raised_at_ms", BigInteger, nullable=False),
    Column("erase_at_ms", BigInteger, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("attributes", LargeBinary, comment="JSON beside the alert, such as its adjudication"),
    Column("held", Name, comment="the legal hold that has kept it beyond its time; NULL: none"),
)
Index("ix_alert_alert_id", alert.c.alert_id, unique=True)
Index("ix_alert_deployment_id_position", alert.c.deployment_id, alert.c.position)
Index("ix_alert_erase_at_ms", alert.c.erase_at_ms)

audit_checkpoint = Table(
    "audit_checkpoint",
    metadata,
    Column("size", Sequence, primary_key=True, autoincrement=False, comment="how many audit records it covers"),
    Column("signed", LargeBinary, nullable=False, comment="JSON of the signed checkpoint"),
    Column("peaks", LargeBinary, nullable=False, comment="the Merkle tree's perfect subtrees, to go on from"),
)

erasure_receipt = Table(
    "erasure_receipt",
    metadata,
    Column("receipt_id", Sequence, primary_key=True, autoincrement=False),
    Column("kind", Name, nullable=False),
    Column("gallery_id", Name, nullable=False, comment="empty: of no gallery"),
    Column("erased", BigInteger, nullable=False, comment="how many templates, alerts or details"),
    Column(
        "sequences", LargeBinary, nullable=False, comment="JSON: the entries whose templates went, as closed ranges"
    ),
    Column("erased_at_ms", BigInteger, nullable=False),
    Column("head", BigInteger, nullable=False, comment="the newest entry then: whatever was erased had ended by it"),
    Column("backups_until_ms", BigInteger, nullable=False, comment="when the last backup with it is destroyed"),
    Column("wiped_at_ms", BigInteger, comment="when database and write-ahead log held no older version of it"),
    Column("indexes", LargeBinary, comment="JSON: when which index held none of it any more"),
    Column("complete_at_ms", BigInteger),
)
Index("ix_erasure_receipt_gallery_id_receipt_id", erasure_receipt.c.gallery_id, erasure_receipt.c.receipt_id)
Index(
    "ix_erasure_receipt_open",
    erasure_receipt.c.receipt_id,
    sqlite_where=erasure_receipt.c.complete_at_ms.is_(None),
    postgresql_where=erasure_receipt.c.complete_at_ms.is_(None),
)

tally = Table(
    "tally",
    metadata,
    Column("authority", Name, primary_key=True, comment="deployment:ID or case:REFERENCE"),
    Column("name", Name, primary_key=True),
    Column("count", BigInteger, nullable=False),
    sqlite_with_rowid=False,
    comment="counters alone: nothing in it stands for one probe",
)

legal_hold = Table(
    "legal_hold",
    metadata,
    Column("hold_id", Name, primary_key=True),
    Column("gallery_id", Name, nullable=False, comment="empty: of every gallery"),
    Column("subject_id", Name, nullable=False),
    Column("review_by_ms", BigInteger, nullable=False),
    Column("released_at_ms", BigInteger),
    Column("sealed", LargeBinary, nullable=False, comment="who asked, who authorised, and why"),
)
Index("ix_legal_hold_subject_id", legal_hold.c.subject_id)


def insert_many(connection: Connection, table: Table, rows: list[tuple[object, ...]]) -> None:
    """Insert rows of plain values, one for each column in order; the driver gets them as they are, in one call."""
    if not rows:
        return
    if connection.dialect.name == "postgresql" and len(rows) >= _COPY_ROWS_MIN:
        _copy(connection, table, rows)
    else:
        connection.exec_driver_sql(_insertion(table, connection.dialect), rows)


# Below that the second round trip of a COPY costs more than it saves.
_COPY_ROWS_MIN = 32


def _copy(connection: Connection, table: Table, rows: list[tuple[object, ...]]) -> None:
    statement, types = _copying(table, connection.dialect)
    cursor: Any = connection.connection.cursor()
    try:
        with cursor.copy(statement) as copy:
            copy.set_types(types)
            for row in rows:
                copy.write_row(row)
    except connection.dialect.loaded_dbapi.Error as failure:
        # As SQLAlchemy does it for what it runs itself.
        lost = connection.dialect.is_disconnect(failure, connection.connection.dbapi_connection, cursor)
        if lost:
            connection.invalidate(failure)
        raise DBAPIError.instance(
            statement, None, failure, connection.dialect.loaded_dbapi.Error, connection_invalidated=lost
        ) from failure
    finally:
        cursor.close()


@lru_cache(maxsize=64)
def _copying(table: Table, dialect: Dialect) -> tuple[str, list[str]]:
    types = [str(column.type.compile(dialect=dialect)).lower().partition(" collate")[0] for column in table.columns]
    names = ", ".join(column.name for column in table.columns)
    return f"COPY {table.name} ({names}) FROM STDIN (FORMAT binary)", types


@lru_cache(maxsize=64)
def _insertion(table: Table, dialect: Dialect) -> str:
    if dialect.positional:
        return str(insert(table).compile(dialect=dialect))
    # The driver takes rows as they are, only not under the names that SQLAlchemy would give their values.
    names = ", ".join(column.name for column in table.columns)
    return f"INSERT INTO {table.name} ({names}) VALUES ({', '.join(['%s'] * len(table.columns))})"
