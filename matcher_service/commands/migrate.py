"""`matcher migrate`: the tables of a cluster's log, before anything of a new version runs on them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import typer

from matcher_service.commands.options import AsJson
from matcher_service.commands.output import print_json
from matcher_service.commands.serving import Config

if TYPE_CHECKING:
    from matcher_service.settings import Settings


def migrate(config: Config = None, as_json: AsJson = False) -> None:
    """Make the tables of a cluster's log, or bring them to this version; repeatable.

    A gateway does the same when it starts. Run by itself it makes the new version's tables before anything of that
    version serves, so that its shards can be started first.
    """
    from matcher_service.errors import StartRefused
    from matcher_service.settings import load

    settings = load(config)
    if not settings.cluster.on:
        raise StartRefused(
            "no cluster is configured",
            field="cluster.log_url",
            hint="a single process brings its tables to its version when it starts",
        )
    head, version = asyncio.run(_migrated(settings))
    if as_json:
        print_json({"version": version, "sequence": head})
    else:
        typer.echo(f"tables of version {version}, log at sequence {head}")


async def _migrated(settings: Settings) -> tuple[int, str]:
    from matcher_service.clock import SystemClock
    from matcher_service.gallery.migrate import newest_version
    from matcher_service.gallery.postgres import open_postgres_log

    url = settings.cluster.log_url.get_secret_value()
    log = await open_postgres_log(url, settings.keys_dir, settings.storage, SystemClock())
    try:
        return await log.head(), newest_version()
    finally:
        await log.close()
