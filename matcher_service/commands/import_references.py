"""`matcher import`: enrol the references of a file."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matcher_service.commands.options import (
    GRPC_ADDRESS,
    HTTP_URL,
    AsJson,
    CaFile,
    Http,
    Server,
    TokenFile,
    client_to,
    space_from,
)
from matcher_service.commands.output import print_json
from matcher_service.commands.times import now_ms, time_ms

if TYPE_CHECKING:
    from matcher_service import importing

BAD_ROWS_SHOWN = 20


def import_references(
    gallery_id: Annotated[str, typer.Argument(metavar="GALLERY")],
    file: Annotated[
        Path,
        typer.Argument(
            help="An .npz or .parquet file: templates, reference_ids, subject_ids, and optionally expires_at_ms, "
            "review_by_ms and quality."
        ),
    ],
    replace: Annotated[bool, typer.Option("--replace", help="Replace live references of the same id.")] = False,
    bad_rows: Annotated[Path | None, typer.Option(help="Write every bad row to this file, as JSON lines.")] = None,
    space: Annotated[
        str, typer.Option(help="Template space of the file NAME/VERSION/DIMENSION. Without: the gallery's.")
    ] = "",
    source: Annotated[str, typer.Option(help="Where the pictures come from. Without: as the gallery says.")] = "",
    lawful_basis: Annotated[str, typer.Option(help="Under which law they are held. Without: the gallery's.")] = "",
    review: Annotated[
        str, typer.Option(help="When their ground is reviewed: +90d, or a time. A column review_by_ms wins.")
    ] = "",
    category: Annotated[str, typer.Option(help="On a watchlist: one of its categories.")] = "",
    entry_reason: Annotated[str, typer.Option("--reason", help="On a watchlist: why these people are on it.")] = "",
    window: Annotated[int, typer.Option(min=1, help="Most unanswered messages.")] = 16,
    server: Server = GRPC_ADDRESS,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Enrol the references of a file into a gallery.

    Interrupted, it goes on from where it was when it is run again: a small .progress file beside FILE
    remembers, and what was enrolled already is not enrolled twice. Bad rows are told by number, counted
    from 0, and the good ones go in; the exit code is then 1.
    """
    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from matcher_service import importing
    from matcher_service.commands.http_api import api_to, path_of
    from matcher_service.template_files import open_template_file
    from matcher_service.terms import Grounds, SpaceId

    templates = open_template_file(file)
    with api_to(http, token_file, ca_file) as api:
        gallery = api.get(path_of("galleries", gallery_id))
    with ExitStack() as open_now:
        sink = open_now.enter_context(bad_rows.open("w", encoding="utf-8")) if bad_rows else None
        told = 0
        progress = Progress(
            TextColumn("references"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

        def on_bad_row(bad: importing.BadRow) -> None:
            nonlocal told
            told += 1
            if sink is not None:
                sink.write(json.dumps(bad._asdict()) + "\n")
            if told <= BAD_ROWS_SHOWN:
                progress.console.print(
                    f"row {bad.row} ({bad.reference_id or '-'}): {bad.cause}: {bad.field}: {bad.detail}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            elif told == BAD_ROWS_SHOWN + 1:
                rest = "the rest are only counted" if sink is None else f"the rest are in {bad_rows}"
                progress.console.print(f"more bad rows: {rest}", markup=False)

        def on_progress(done: importing.Progress) -> None:
            progress.update(task, completed=done.rows_done, line=_counts(done))

        client = client_to(server, token_file, ca_file, in_flight_messages_max=window)
        job = importing.Import(
            client,
            templates,
            gallery_id,
            space_from(space) if space else SpaceId(**gallery["space"]),
            gallery_created_at_ms=gallery["created_at_ms"],
            replace=replace,
            grounds=Grounds(
                source, lawful_basis, time_ms(review, "review", now_ms()) if review else 0, category, entry_reason
            ),
            on_bad_row=on_bad_row,
            on_progress=on_progress,
        )
        task = progress.add_task("references", total=templates.rows, line="")
        if job.resumed:
            progress.console.print(f"going on from row {job.progress.rows_done}")

        async def run() -> importing.Progress:
            async with client:
                return await job.run()

        with progress:
            on_progress(job.progress)
            done = asyncio.run(run())
    if as_json:
        print_json(
            {
                "gallery_id": gallery_id,
                "rows": templates.rows,
                "enrolled": done.enrolled,
                "replaced": done.replaced,
                "repeated": done.repeated,
                "refused": done.refused,
                "resumed": job.resumed,
            }
        )
    else:
        typer.echo(f"{templates.rows} rows: {_counts(done)}.")
    raise typer.Exit(1 if done.refused else 0)


def _counts(done: importing.Progress) -> str:
    parts = [f"{done.enrolled} enrolled"]
    parts += [
        f"{count} {what}"
        for count, what in ((done.replaced, "replaced"), (done.repeated, "there already"), (done.refused, "refused"))
        if count
    ]
    return ", ".join(parts)
