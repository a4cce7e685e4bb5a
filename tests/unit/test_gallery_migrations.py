"""The migrations give exactly the tables that the code is written against."""

from __future__ import annotations

from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, select, text

from matcher_service.gallery.migrate import migrate
from matcher_service.gallery.schema import IS_CATALOGUE, entry, live, metadata
from matcher_service.gallery.sqlite import SqliteDatabase
from matcher_service.terms import EntryKind


def statements(connection: Connection) -> set[str]:
    rows = connection.execute(text("SELECT sql FROM sqlite_master WHERE name NOT LIKE 'alembic%' AND sql IS NOT NULL"))
    return {" ".join(sql.replace('"', "").split()) for (sql,) in rows}


def columns(connection: Connection) -> dict[str, list[tuple[object, ...]]]:
    return {
        name: [tuple(row) for row in connection.execute(text(f"PRAGMA table_xinfo({name})"))]
        for name in metadata.tables
    }


def test_migrations_give_exactly_the_metadatas_schema() -> None:
    migrated, made = create_engine("sqlite://"), create_engine("sqlite://")
    with migrated.begin() as one, made.begin() as other:
        migrate(one)
        metadata.create_all(other)
        assert compare_metadata(MigrationContext.configure(one), metadata) == []
        assert columns(one) == columns(other)
        indexes = [{sql for sql in statements(connection) if "INDEX" in sql} for connection in (one, other)]
        assert indexes[0] == indexes[1]
        for name in ("live", "enrolment_key"):
            for connection in (one, other):
                (sql,) = (sql for sql in statements(connection) if sql.startswith(f"CREATE TABLE {name} "))
                assert sql.endswith("WITHOUT ROWID")
    migrated.dispose()
    made.dispose()


def test_migrating_twice_changes_nothing_and_there_is_one_newest_version() -> None:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        migrate(connection)
        before = statements(connection)
        migrate(connection)
        assert statements(connection) == before
        config = Config()
        config.set_main_option("script_location", "matcher_service.gallery:migrations")
        config.set_main_option("path_separator", "os")
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
        assert ScriptDirectory.from_config(config).get_heads() == [version]
    engine.dispose()


def test_law_5_commits_are_synced_and_law_10_deleted_bytes_are_overwritten(tmp_path: Path) -> None:
    """Laws 5 and 10: the settings that they rest on are in force on the connection that writes."""
    database = SqliteDatabase(tmp_path / "gallery.db", 1, 100)
    database.prepare()
    with database.writer.begin() as connection:
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("secure_delete", 1), ("foreign_keys", 1)):
            assert connection.execute(text(f"PRAGMA {pragma}")).scalar_one() == value, pragma
    with database.reader.begin() as connection:
        assert connection.execute(text("PRAGMA query_only")).scalar_one() == 1
    database.dispose()


def test_reading_the_catalogue_visits_no_enrolment() -> None:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        metadata.create_all(connection)
        kinds = [int(kind) for kind in EntryKind if kind not in (EntryKind.ENROL, EntryKind.WITHDRAW)]
        wanted = select(entry.c.record).where(entry.c.sequence > 5, entry.c.kind.in_(kinds), IS_CATALOGUE)
        for query in (wanted.order_by(entry.c.sequence).limit(9), wanted.order_by(entry.c.sequence)):
            compiled = query.compile(engine, compile_kwargs={"literal_binds": True, "render_postcompile": True})
            plan = " ".join(str(row) for row in connection.execute(text(f"EXPLAIN QUERY PLAN {compiled}")))
            assert "ix_entry_catalogue" in plan, plan
            assert "TEMP B-TREE" not in plan, plan
    engine.dispose()


def test_a_subject_and_the_next_to_expire_are_found_through_an_index() -> None:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        metadata.create_all(connection)
        for query, index in (
            (select(live).where(live.c.subject_id == "s"), "ix_live_subject_id"),
            (select(live).where(live.c.expires_at_ms <= 5), "ix_live_expires_at_ms"),
        ):
            compiled = query.compile(engine, compile_kwargs={"literal_binds": True})
            plan = " ".join(str(row) for row in connection.execute(text(f"EXPLAIN QUERY PLAN {compiled}")))
            assert index in plan, plan
    engine.dispose()
