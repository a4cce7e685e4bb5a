"""`matcher deployments` and `matcher cases`: the authority under which anything is searched."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from matcher_service.commands.http_api import api_to, path_of
from matcher_service.commands.options import HTTP_URL, AsJson, CaFile, Http, TokenFile
from matcher_service.commands.output import print_fields, print_json, print_rows
from matcher_service.commands.times import duration_ms, time_ms

deployments = typer.Typer(no_args_is_help=True, help="Authorised live operations.")
cases = typer.Typer(no_args_is_help=True, help="The authority of retrospective searches.")

Galleries = Annotated[list[str], typer.Option("--gallery", help="A gallery it may search; repeat for more.")]
Opens = Annotated[str, typer.Option(help="From when: now, +1h, or 2026-03-01T08:00:00Z.")]
Closes = Annotated[str, typer.Option(help="Until when: +12h, or 2026-03-01T20:00:00Z.")]
RankMax = Annotated[int, typer.Option(help="Most candidates that a search may return.")]


@deployments.command("create")
def create_deployment(
    deployment_id: str,
    gallery: Galleries,
    closes: Closes,
    authorised_by: Annotated[str, typer.Option(help="Who authorised it.")],
    reason: Annotated[str, typer.Option(help="Why.")],
    opens: Opens = "now",
    probe_age: Annotated[str, typer.Option(help="A probe captured longer ago is refused.")] = "60s",
    place: Annotated[str, typer.Option(help="Where.")] = "",
    legal_authority: Annotated[str, typer.Option(help="The law and the decision that it rests on.")] = "",
    necessity: Annotated[str, typer.Option(help="Why nothing less would do.")] = "",
    camera: Annotated[
        list[str] | None, typer.Option(help="A camera it is authorised for; repeat. Without: any.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Raises the galleries' thresholds.")] = None,
    alert_retention: Annotated[
        str, typer.Option(help="How long its alerts live, like 24h. Without: as the service is set.")
    ] = "",
    rank_max: RankMax = 10,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Record an authorised live operation."""
    now_ms = _now_ms()
    body: dict[str, Any] = {
        "deployment_id": deployment_id,
        "gallery_ids": gallery,
        "closes_at_ms": time_ms(closes, "closes", now_ms),
        "probe_age_ms_max": duration_ms(probe_age, "probe_age"),
        "authorised_by": authorised_by,
        "reason": reason,
        "place": place,
        "legal_authority": legal_authority,
        "necessity": necessity,
        "cameras": camera or [],
        "threshold": threshold,
        "rank_max": rank_max,
        "alert_retention_ms": duration_ms(alert_retention, "alert_retention") if alert_retention else 0,
    }
    if opens != "now":  # left out, the service's own clock says
        body["opens_at_ms"] = time_ms(opens, "opens", now_ms)
    with api_to(http, token_file, ca_file) as api:
        done = api.post(path_of("deployments"), body)
    if as_json:
        print_json(done)
    else:
        typer.echo(f"Created deployment {deployment_id} (sequence {done['sequence']}).")


@deployments.command("list")
def list_deployments(
    http: Http = HTTP_URL, token_file: TokenFile = None, ca_file: CaFile = None, as_json: AsJson = False
) -> None:
    """List the deployments."""
    with api_to(http, token_file, ca_file) as api:
        found = api.get(path_of("deployments"))
    if as_json:
        print_json(found)
    else:
        columns = ("deployment_id", "gallery_ids", "opens_at_ms", "closes_at_ms", "ended_at_ms", "place")
        print_rows(found["deployments"], columns, "There are no deployments.")


@deployments.command("show")
def show_deployment(
    deployment_id: str,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Describe a deployment."""
    with api_to(http, token_file, ca_file) as api:
        found = api.get(path_of("deployments", deployment_id))
    (print_json if as_json else print_fields)(found)


@deployments.command("end")
def end_deployment(
    deployment_id: str,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """End a deployment: from now on nothing is searched under it."""
    with api_to(http, token_file, ca_file) as api:
        done = api.post(path_of("deployments", deployment_id, "end"))
    if as_json:
        print_json(done)
    else:
        typer.echo(f"Ended deployment {deployment_id} (sequence {done['sequence']}).")


@cases.command("create")
def create_case(
    case_reference: str,
    gallery: Galleries,
    closes: Closes,
    requested_by: Annotated[str, typer.Option(help="Who asks.")],
    purpose: Annotated[str, typer.Option(help="What for.")],
    opens: Opens = "now",
    immigration_authority: Annotated[
        str, typer.Option(help="What an immigration gallery among them is searched on.")
    ] = "",
    rank_max: RankMax = 50,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Record the authority of a retrospective search; each search under it is audited."""
    now_ms = _now_ms()
    body: dict[str, Any] = {
        "case_reference": case_reference,
        "gallery_ids": gallery,
        "closes_at_ms": time_ms(closes, "closes", now_ms),
        "requested_by": requested_by,
        "purpose": purpose,
        "immigration_authority": immigration_authority,
        "rank_max": rank_max,
    }
    if opens != "now":
        body["opens_at_ms"] = time_ms(opens, "opens", now_ms)
    with api_to(http, token_file, ca_file) as api:
        done = api.post(path_of("cases"), body)
    if as_json:
        print_json(done)
    else:
        typer.echo(f"Created case {case_reference} (sequence {done['sequence']}).")


@cases.command("list")
def list_cases(
    http: Http = HTTP_URL, token_file: TokenFile = None, ca_file: CaFile = None, as_json: AsJson = False
) -> None:
    """List the cases."""
    with api_to(http, token_file, ca_file) as api:
        found = api.get(path_of("cases"))
    if as_json:
        print_json(found)
    else:
        columns = ("case_reference", "gallery_ids", "opens_at_ms", "closes_at_ms", "ended_at_ms", "requested_by")
        print_rows(found["cases"], columns, "There are no cases.")


@cases.command("show")
def show_case(
    case_reference: str,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Describe a case."""
    with api_to(http, token_file, ca_file) as api:
        found = api.get(path_of("cases", case_reference))
    (print_json if as_json else print_fields)(found)


@cases.command("end")
def end_case(
    case_reference: str,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """End a case: from now on nothing is searched under it."""
    with api_to(http, token_file, ca_file) as api:
        done = api.post(path_of("cases", case_reference, "end"))
    if as_json:
        print_json(done)
    else:
        typer.echo(f"Ended case {case_reference} (sequence {done['sequence']}).")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
