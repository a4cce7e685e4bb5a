"""`matcher alerts` and `matcher audit`: what was recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matcher_service.commands.http_api import api_to, path_of
from matcher_service.commands.options import (
    GRPC_ADDRESS,
    HTTP_URL,
    AsJson,
    CaFile,
    Http,
    Server,
    TokenFile,
    client_to,
)
from matcher_service.commands.output import print_json, print_rows
from matcher_service.commands.times import in_words

if TYPE_CHECKING:
    from matcher_service.client import WatchGap
    from matcher_service.terms import Alert

alerts = typer.Typer(no_args_is_help=True, help="Decisions at or above the threshold.")
audit = typer.Typer(no_args_is_help=True, help="The chain of everything that was written, alerted and searched.")


@alerts.command("list")
def list_alerts(
    deployment: Annotated[str, typer.Option(help="Of this deployment only.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Most to list; 0: all.")] = 100,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """List recorded alerts, newest first; --json prints one line for each."""
    with api_to(http, token_file, ca_file) as api:
        found = api.pages(path_of("alerts"), "alerts", "before", limit, deployment_id=deployment)
        if as_json:
            for one in found:
                print_json(one)
            return
        rows = [_alert_row(one) for one in found]
    columns = ("raised_at_ms", "alert_id", "deployment", "probe_id", "subject_id", "gallery_id", "score")
    print_rows(rows, columns, "There are no alerts.")


def _alert_row(alert: Mapping[str, Any]) -> dict[str, Any]:
    first = alert["candidates"][0] if alert["candidates"] else {}
    return {**alert, **first, "deployment": alert["deployment_id"] or alert["case_reference"]}


@alerts.command("watch")
def watch_alerts(
    deployment: Annotated[list[str] | None, typer.Option(help="Only of this one; repeat for more.")] = None,
    count: Annotated[int, typer.Option(min=0, help="Stop after so many; 0: go on until Ctrl-C.")] = 0,
    server: Server = GRPC_ADDRESS,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Show alerts as they are raised. A broken connection is opened again, and the gap is told."""
    import asyncio
    from contextlib import aclosing

    async def watch() -> None:
        seen = 0
        async with (
            client_to(server, token_file, ca_file) as client,
            aclosing(client.watch_alerts(deployment or [], on_gap=_tell_gap)) as raised,
        ):
            async for alert in raised:
                _print_alert(alert, as_json)
                seen += 1
                if seen == count:
                    return

    asyncio.run(watch())


def _tell_gap(gap: WatchGap) -> None:
    typer.echo(
        f"matcher: not watching from {in_words(gap.from_ms)} to {in_words(gap.to_ms)} ({gap.error.detail}); "
        "`matcher alerts list` shows what was raised meanwhile",
        err=True,
    )


def _print_alert(alert: Alert, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        document = asdict(alert)
        document["candidates"] = [one._asdict() for one in alert.candidates]
        print_json(document)
        return
    best = alert.candidates[0] if alert.candidates else None
    who = f"{best.subject_id} ({best.gallery_id}) score {best.score:.3f}" if best else "no candidate"
    under = alert.deployment_id or alert.case_reference
    part = "" if alert.complete else " (not every part answered)"
    typer.echo(f"{in_words(alert.raised_at_ms)}  {under}  probe {alert.probe_id}: {who}{part}  [{alert.alert_id}]")


@audit.command("list")
def list_audit(
    after: Annotated[int, typer.Option(min=0, help="Only records beyond this index.")] = 0,
    limit: Annotated[int, typer.Option(min=0, help="Most to list; 0: all.")] = 100,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """List audit records in order; --json prints one line for each."""
    with api_to(http, token_file, ca_file) as api:
        found = api.pages(path_of("audit"), "records", "after", limit, after=after)
        if as_json:
            for one in found:
                print_json(one)
        else:
            print_rows(
                list(found), ("index", "at_ms", "actor", "action", "subject", "detail"), "There are no audit records."
            )


@audit.command("verify")
def verify_audit(
    noted: Annotated[
        str,
        typer.Option(help="INDEX:HASH noted elsewhere earlier; shows that nothing before it was cut off or redone."),
    ] = "",
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Check the whole chain: every hash, every link, every detail that has not been erased.

    Note the index and hash it ends with somewhere else: only that can show later that nothing was cut off its end.
    """
    from matcher_service import audit as chain
    from matcher_service.errors import DataDamaged, InvalidInput

    noted_index, noted_hash = 0, ""
    if noted:
        text, _, noted_hash = noted.partition(":")
        if not (text.isascii() and text.isdigit() and noted_hash):
            raise InvalidInput(f"{noted!r} is not INDEX:HASH", field="noted", hint="as `audit verify` printed it")
        noted_index = int(text)
    found_hash = ""

    def watched(records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        nonlocal found_hash
        for record in records:
            yield record
            # Resumed only after the record was found good.
            if record["index"] == noted_index:
                found_hash = record["hash"]

    with api_to(http, token_file, ca_file) as api:
        index, head = chain.verify(watched(api.pages(path_of("audit"), "records", "after", 0, after=0)))
    if noted and found_hash != noted_hash:
        raise DataDamaged(
            f"record {noted_index} "
            + (
                "does not exist: the chain was cut" if noted_index > index else f"has the hash {found_hash or '(none)'}"
            ),
            hint="keep the database as it is, and compare it with a backup",
        )
    if as_json:
        print_json({"intact": True, "index": index, "hash": head})
    else:
        typer.echo(f"Intact: {index} records. To note elsewhere: {index}:{head}")
