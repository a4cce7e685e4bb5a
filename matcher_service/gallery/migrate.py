"""Brings the tables of a database to the newest version, and tells which version they are of."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from matcher_service.errors import StartRefused


def migrate(connection: Connection) -> None:
    """Run the migrations that are missing, on this connection and inside its transaction. Raises StartRefused if the
    tables are newer than this program."""
    config = _config()
    known = {one.revision for one in ScriptDirectory.from_config(config).walk_revisions()}
    found = MigrationContext.configure(connection).get_current_revision()
    if found is not None and found not in known:
        raise _of_another_version(found)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def check_version(connection: Connection) -> None:
    """Raises StartRefused unless the tables are there and of this program's version."""
    found = MigrationContext.configure(connection).get_current_revision()
    if found == newest_version():
        return
    if found is None:
        raise StartRefused(
            "the gallery log's database has no tables yet", hint="start a gateway on it first: it makes them"
        )
    raise _of_another_version(found)


def newest_version() -> str:
    """That of this program's tables."""
    newest = ScriptDirectory.from_config(_config()).get_current_head()
    assert newest is not None
    return newest


def _of_another_version(found: str) -> StartRefused:
    return StartRefused(
        f"the gallery log's tables are of version {found}, and this program's of version {newest_version()}",
        hint="run the same version everywhere; a gateway of the newer one brings the tables to it",
    )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "matcher_service.gallery:migrations")
    config.set_main_option("path_separator", "os")
    return config
