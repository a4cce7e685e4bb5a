"""`matcher alerts` and `matcher audit`: what was recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matcher_service.commands.http_api import api_to, path_of
from matcher_service.commands.options import (
    GRPC_ADDRESS,
    HTTP_URL,
    AsJson,
    CaFile,
    Http,
    Reason,
    Server,
    TokenFile,
    client_to,
)
from matcher_service.commands.output import print_fields, print_json, print_rows
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
    columns = ("raised_at_ms", "state", "alert_id", "deployment", "probe_id", "subject_id", "gallery_id", "score")
    print_rows(rows, columns, "There are no alerts.")


def _alert_row(alert: Mapping[str, Any]) -> dict[str, Any]:
    first = alert["candidates"][0] if alert["candidates"] else {}
    return {**alert, **first, "deployment": alert["deployment_id"] or alert["case_reference"]}


@alerts.command("show")
def show_alert(
    alert_id: str,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """An alert with what people made of it."""
    with api_to(http, token_file, ca_file) as api:
        held = api.get(path_of("alerts", alert_id))
    (print_json if as_json else print_fields)(held)


@alerts.command("adjudicate")
def adjudicate_alert(
    alert_id: str,
    verdict: Annotated[str, typer.Argument(help="confirmed, rejected or inconclusive.")],
    by: Annotated[str, typer.Option(help="Who looked.")],
    reason: Reason,
    evidence_reference: Annotated[str, typer.Option(help="Where the force's evidence system keeps it.")] = "",
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Record what a trained person made of an alert."""
    body = {"verdict": verdict, "by": by, "reason": reason, "evidence_reference": evidence_reference}
    with api_to(http, token_file, ca_file) as api:
        done = api.post(path_of("alerts", alert_id, "adjudications"), body)
    if as_json:
        print_json(done)
    else:
        typer.echo(f"Alert {alert_id} is {done['state']} after {len(done['adjudications'])} adjudications.")


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


@audit.command("checkpoint")
def make_checkpoint(
    file: Annotated[Path | None, typer.Option("--out", help="File to write it to; keep it on another system.")] = None,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Have all records of the audit covered by a signed checkpoint, to be kept elsewhere."""
    import json

    with api_to(http, token_file, ca_file) as api:
        made = api.post(path_of("audit", "checkpoints"))
    if file is not None:
        _write(file, [json.dumps(made, sort_keys=True, separators=(",", ":")).encode() + b"\n"])
    if as_json or file is None:
        print_json(made)
    else:
        typer.echo(f"Checkpoint of {made['size']} records, root {made['root']}, written to {file}.")


@audit.command("export")
def export_audit(
    file: Annotated[Path, typer.Argument(help="A new file; one line for each record, the checkpoint last.")],
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Write the whole audit to a file that `audit verify FILE` can check anywhere."""
    from itertools import islice

    from matcher_service import audit_proofs
    from matcher_service.terms import Checkpoint

    with api_to(http, token_file, ca_file) as api:
        made = Checkpoint(**api.post(path_of("audit", "checkpoints")))
        found = islice(api.pages(path_of("audit"), "records", "after", 0, after=0), made.size)
        _write(file, audit_proofs.export_lines(found, made))
    if as_json:
        print_json({"file": str(file), "records": made.size, "root": made.root})
    else:
        typer.echo(f"{made.size} records, root {made.root}, written to {file}.")


@audit.command("rotate-key")
def rotate_key(
    reason: Reason,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Sign checkpoints with a new key from now on. The old key vouches for it in the audit."""
    with api_to(http, token_file, ca_file) as api:
        done = api.post(path_of("audit", "keys"), reason=reason)
    if as_json:
        print_json(done)
    else:
        typer.echo(f"Checkpoints are signed with the key {done['key']} from now on.")


def _write(file: Path, lines: Iterable[bytes]) -> None:
    """Raises InvalidInput if the file is there already or cannot be written."""
    from matcher_service.errors import InvalidInput

    try:
        with file.open("xb") as out:
            out.writelines(lines)
    except OSError as error:
        raise InvalidInput(
            f"cannot write {file}: {error.strerror}", field="file", hint="name a new file in a folder that exists"
        ) from error


@audit.command("prove")
def prove(
    index: Annotated[int, typer.Option(min=0, help="Prove that this record is covered by the newest checkpoint.")] = 0,
    older: Annotated[
        int, typer.Option(min=0, help="Prove that the checkpoint of so many records is its past state.")
    ] = 0,
    file: Annotated[Path | None, typer.Option("--out", help="File to write the proof to, for verify-proof.")] = None,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a single proof of the audit: with --index of a record, with --older of an earlier checkpoint."""
    import json

    from matcher_service.errors import InvalidInput

    if (index > 0) == (older > 0):
        raise InvalidInput("one thing is proved at a time", field="index", hint="give --index or --older")
    with api_to(http, token_file, ca_file) as api:
        if index:
            made = api.get(path_of("audit", "proofs", "inclusion"), index=index)
        else:
            made = api.get(path_of("audit", "proofs", "consistency"), older=older)
    if file is not None:
        _write(file, [json.dumps(made, sort_keys=True, separators=(",", ":")).encode() + b"\n"])
    if as_json or file is None:
        print_json(made)
    else:
        typer.echo(f"A proof under the checkpoint of {made['checkpoint']['size']} records, written to {file}.")


@audit.command("verify-proof")
def verify_proof(
    proof: Annotated[Path, typer.Argument(help="What /v1/audit/proofs/inclusion or /consistency answered.")],
    record: Annotated[
        Path | None, typer.Option(help="For an inclusion proof: the record, as its line of an export.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint kept elsewhere; a consistency proof is of it.")
    ] = None,
    key: Annotated[str, typer.Option(help="The public signing key, hexadecimal, if no checkpoint is at hand.")] = "",
    as_json: AsJson = False,
) -> None:
    """Check a single proof of the audit, without the service: that a record is covered, or that nothing of a checkpoint
    kept elsewhere has changed."""
    from dataclasses import asdict

    from matcher_service import audit_proofs
    from matcher_service.errors import InvalidInput

    try:
        kept = audit_proofs.decode_checkpoint(checkpoint.read_bytes()) if checkpoint else None
        told = record.read_bytes() if record else None
        shown = audit_proofs.verify_proof(proof.read_bytes(), told, kept, key)
    except OSError as error:
        raise InvalidInput(
            f"cannot read {error.filename}: {error.strerror}", field="file", hint="check the path"
        ) from error
    if as_json:
        print_json({"proved": True, **asdict(shown)})
        return
    made = f"the checkpoint of {shown.checkpoint.size} records, root {shown.checkpoint.root}"
    if shown.index:
        typer.echo(f"Proved: audit record {shown.index} is as it was recorded, and covered by {made}.")
        if not shown.tied:
            typer.echo("That it is a later state of one you kept takes a consistency proof.")
    else:
        typer.echo(f"Proved: the first {shown.older} records are those of the checkpoint kept elsewhere, under {made}.")
    if not shown.key_known:
        typer.echo(f"Signed by {shown.checkpoint.key}: compare it with the key you know, or give --checkpoint.")


@audit.command("verify")
def verify_audit(
    file: Annotated[
        Path | None,
        typer.Argument(help="What `audit export` wrote; checked without the service. Without: the service's."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint kept elsewhere: what it covers must be unchanged.")
    ] = None,
    key: Annotated[str, typer.Option(help="The public signing key, hexadecimal, if no checkpoint is at hand.")] = "",
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte, link, root and signature of the audit, and that nothing of a checkpoint kept elsewhere is gone.

    Only a checkpoint or key kept elsewhere can show that the audit was not cut off or made anew as a whole.
    """
    from dataclasses import asdict
    from itertools import islice

    from matcher_service import audit_proofs
    from matcher_service.errors import InvalidInput
    from matcher_service.terms import Checkpoint

    try:
        kept = audit_proofs.decode_checkpoint(checkpoint.read_bytes()) if checkpoint else None
        if file is not None:
            with file.open("rb") as lines:
                verified = audit_proofs.verify_export(lines, kept, key)
        else:
            with api_to(http, token_file, ca_file) as api:
                made = Checkpoint(**api.post(path_of("audit", "checkpoints")))
                found = islice(api.pages(path_of("audit"), "records", "after", 0, after=0), made.size)
                verified = audit_proofs.verify_export(audit_proofs.export_lines(found, made), kept, key)
    except OSError as error:
        raise InvalidInput(
            f"cannot read {error.filename}: {error.strerror}", field="file", hint="check the path"
        ) from error
    if as_json:
        print_json({"intact": True, **asdict(verified)})
        return
    typer.echo(f"Intact: {verified.records} records, root {verified.checkpoint.root}.")
    if verified.compared:
        typer.echo(f"The first {verified.compared} are those of the checkpoint kept elsewhere.")
    if not verified.key_known:
        typer.echo(f"Signed by {verified.checkpoint.key}: compare it with the key you know, or give --checkpoint.")
