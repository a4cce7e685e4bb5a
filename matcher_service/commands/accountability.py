"""`matcher report`, `matcher holds`, `matcher subjects export`: what is owed to the public, to courts and to people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matcher_service.commands.http_api import api_to, path_of
from matcher_service.commands.options import HTTP_URL, AsJson, CaFile, Http, Reason, TokenFile
from matcher_service.commands.output import print_fields, print_json, print_rows
from matcher_service.commands.times import now_ms, time_ms

holds = typer.Typer(no_args_is_help=True, help="Legal holds: what must not be erased yet.")


def report(
    deployment: Annotated[str, typer.Argument(help="The deployment to report on.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json; made if there is none.")],
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Write what a force publishes of a deployment: faces, alerts, outcomes, watchlist, thresholds, erasure."""
    import json

    from matcher_service import deployment_report
    from matcher_service.errors import InvalidInput

    with api_to(http, token_file, ca_file) as api:
        made = api.get(path_of("deployments", deployment, "report"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        (out / "report.html").write_text(deployment_report.page(made), encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write to {out}: {error.strerror}", field="out", hint="check the path") from error
    if as_json:
        print_json(made)
    else:
        typer.echo(f"Wrote {out / 'report.html'} and {out / 'report.json'}.")


def export_subject(
    subject_id: str,
    reason: Reason,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Everything held of a subject and what was done with it, for a request for access."""
    with api_to(http, token_file, ca_file) as api:
        held = api.get(path_of("subjects", subject_id, "export"), reason=reason)
    (print_json if as_json else print_fields)(held)


def impact_assessment(
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """The inputs of an impact assessment: galleries and their terms, clocks, ceilings, who may do what."""
    with api_to(http, token_file, ca_file) as api:
        found = api.get(path_of("impact-assessment"))
    (print_json if as_json else print_fields)(found)


@holds.command("place")
def place_hold(
    subject_id: str,
    requested_by: Annotated[str, typer.Option(help="Who asked for it: a court, an inquiry, a defence.")],
    authorised_by: Annotated[str, typer.Option(help="The officer who authorises it.")],
    review: Annotated[str, typer.Option(help="When it is looked at again: +90d, or a time; within a year.")],
    reason: Reason,
    gallery: Annotated[str, typer.Option(help="In this gallery only; without it, in every one.")] = "",
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Keep what is held of a subject from being erased. It is not searched for that."""
    body = {
        "subject_id": subject_id,
        "requested_by": requested_by,
        "authorised_by": authorised_by,
        "review_by_ms": time_ms(review, "review", now_ms()),
        "reason": reason,
        "gallery_id": gallery,
    }
    with api_to(http, token_file, ca_file) as api:
        done = api.post(path_of("holds"), body)
    if as_json:
        print_json(done)
    else:
        typer.echo(f"Hold {done['hold_id']} stands.")


@holds.command("list")
def list_holds(
    http: Http = HTTP_URL, token_file: TokenFile = None, ca_file: CaFile = None, as_json: AsJson = False
) -> None:
    """Every legal hold there was, and which of them are overdue for review."""
    with api_to(http, token_file, ca_file) as api:
        found = api.get(path_of("holds"))
    if as_json:
        print_json(found)
    else:
        columns = ("hold_id", "subject_id", "gallery_id", "authorised_by", "review_by_ms", "released_at_ms", "overdue")
        print_rows(found["holds"], columns, "There are no legal holds.")


@holds.command("release")
def release_hold(
    hold_id: str,
    released_by: Annotated[str, typer.Option(help="Who releases it.")],
    reason: Reason,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """End a hold; what is due is erased within the service's stated time."""
    with api_to(http, token_file, ca_file) as api:
        done = api.post(path_of("holds", hold_id, "release"), {"reason": reason, "released_by": released_by})
    if as_json:
        print_json(done)
    else:
        typer.echo(f"Hold {hold_id} is released.")
