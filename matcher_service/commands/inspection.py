"""`matcher inspect`: what the index files of a data directory hold, and whether they are intact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matcher_service.commands.options import AsJson
from matcher_service.commands.output import print_json, print_rows

_SEGMENT_COLUMNS = ("gallery", "file", "rows", "dead", "dimension", "bytes", "sequence_min", "sequence_max")


def inspect(
    data_dir: Annotated[Path, typer.Argument(metavar="DATA_DIR", help="A data directory that no service is using.")],
    keys_dir: Annotated[Path | None, typer.Option(help="Where its keys are. Without: DATA_DIR/keys.")] = None,
    as_json: AsJson = False,
) -> None:
    """Verify every block and checksum of the index files of a data directory.

    The exit code is 1 if there is a problem. What is damaged is rebuilt from the log at the next start.
    """
    from dataclasses import asdict

    from matcher_service import process_lock
    from matcher_service.errors import InvalidInput
    from matcher_service.gallery.keys import Keyring
    from matcher_service.index.inspect import inspect as inspected
    from matcher_service.settings import load

    if not data_dir.is_dir():
        raise InvalidInput(f"no directory at {data_dir}", field="data_dir", hint="check the path")
    # Held, because a service at work moves the files that are being verified.
    with process_lock.held(data_dir):
        report = inspected(data_dir, Keyring.open(keys_dir or data_dir / "keys", load().keys).key)
    if as_json:
        print_json(asdict(report) | {"directory": str(report.directory)})
    else:
        typer.echo(
            f"{report.directory}: {report.live} live and {report.dead} dead rows, {report.bytes} bytes, "
            f"up to sequence {report.sequence}"
        )
        rows = [
            {"gallery": gallery.gallery_id, **asdict(one)} for gallery in report.galleries for one in gallery.segments
        ]
        print_rows(rows, _SEGMENT_COLUMNS, "There are no segment files.")
        for problem in report.problems:
            typer.echo(f"problem: {problem}")
        if not report.problems:
            typer.echo("Intact.")
    raise typer.Exit(1 if report.problems else 0)
