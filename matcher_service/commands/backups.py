"""`matcher backup` and `matcher restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matcher_service.commands.options import AsJson
from matcher_service.commands.output import print_json


def backup(
    data_dir: Annotated[Path, typer.Argument(metavar="DATA_DIR", help="Of a service that may be running.")],
    into: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    as_json: AsJson = False,
) -> None:
    """Copy the gallery log as it is at this moment, without a pause of the service.

    The copy holds no keys: without the keys directory it opens for nobody. Back the keys up elsewhere, under other
    hands. A cluster's log is PostgreSQL's: use its own backups.
    """
    from matcher_service.clock import SystemClock
    from matcher_service.gallery.backup import back_up

    made = back_up(data_dir, into, SystemClock().wall_ms())
    if as_json:
        print_json(made._asdict())
    else:
        typer.echo(f"{into}: the log up to sequence {made.sequence}, {made.bytes:,} bytes, SHA-256 {made.sha256}")


def restore(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `matcher backup` wrote.")],
    data_dir: Annotated[Path, typer.Argument(metavar="DATA_DIR", help="A directory that holds no log.")],
    as_json: AsJson = False,
) -> None:
    """Put a backup into an empty data directory, verified to the byte.

    Put the keys in place before the start, with the newest erasure ledger (keys/erasures): what it says was withdrawn
    after the backup is withdrawn again before anything is searched.
    """
    from matcher_service import process_lock
    from matcher_service.gallery.backup import restore as restored

    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with process_lock.held(data_dir):
        made = restored(folder, data_dir)
    if as_json:
        print_json(made._asdict())
    else:
        typer.echo(
            f"{data_dir}: the log up to sequence {made.sequence}. Put the keys in place, then start the service."
        )
