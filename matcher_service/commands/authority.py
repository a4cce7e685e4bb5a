"""`matcher deployments` and `matcher cases`: the authority under which anything is searched."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from matcher_service.commands.asking import Answer, asking, lists, shows
from matcher_service.commands.http_api import HttpApi, path_of
from matcher_service.commands.times import duration_ms, now_ms, time_ms

deployments = typer.Typer(no_args_is_help=True, help="Authorised live operations.")
cases = typer.Typer(no_args_is_help=True, help="The authority of retrospective searches.")

Galleries = Annotated[list[str], typer.Option("--gallery", help="A gallery it may search; repeat for more.")]
Opens = Annotated[str, typer.Option(help="From when: now, +1h, or 2026-03-01T08:00:00Z.")]
Closes = Annotated[str, typer.Option(help="Until when: +12h, or 2026-03-01T20:00:00Z.")]
RankMax = Annotated[int, typer.Option(help="Most candidates that a search may return.")]


@deployments.command("create")
@asking
def create_deployment(
    api: HttpApi,
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
) -> Answer:
    """Record an authorised live operation."""
    at_ms = now_ms()
    body: dict[str, Any] = {
        "deployment_id": deployment_id,
        "gallery_ids": gallery,
        "closes_at_ms": time_ms(closes, "closes", at_ms),
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
        body["opens_at_ms"] = time_ms(opens, "opens", at_ms)
    done = api.post(path_of("deployments"), body)
    return Answer(done, f"Created deployment {deployment_id} (sequence {done['sequence']}).")


deployments.command("list")(
    lists(
        "deployments",
        ("deployment_id", "gallery_ids", "opens_at_ms", "closes_at_ms", "ended_at_ms", "place"),
        "There are no deployments.",
        "List the deployments.",
    )
)
deployments.command("show")(shows("deployments", "deployment_id", "Describe a deployment."))


@deployments.command("end")
@asking
def end_deployment(api: HttpApi, deployment_id: str) -> Answer:
    """End a deployment: from now on nothing is searched under it."""
    done = api.post(path_of("deployments", deployment_id, "end"))
    return Answer(done, f"Ended deployment {deployment_id} (sequence {done['sequence']}).")


@cases.command("create")
@asking
def create_case(
    api: HttpApi,
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
) -> Answer:
    """Record the authority of a retrospective search; each search under it is audited."""
    at_ms = now_ms()
    body: dict[str, Any] = {
        "case_reference": case_reference,
        "gallery_ids": gallery,
        "closes_at_ms": time_ms(closes, "closes", at_ms),
        "requested_by": requested_by,
        "purpose": purpose,
        "immigration_authority": immigration_authority,
        "rank_max": rank_max,
    }
    if opens != "now":
        body["opens_at_ms"] = time_ms(opens, "opens", at_ms)
    done = api.post(path_of("cases"), body)
    return Answer(done, f"Created case {case_reference} (sequence {done['sequence']}).")


cases.command("list")(
    lists(
        "cases",
        ("case_reference", "gallery_ids", "opens_at_ms", "closes_at_ms", "ended_at_ms", "requested_by"),
        "There are no cases.",
        "List the cases.",
    )
)
cases.command("show")(shows("cases", "case_reference", "Describe a case."))


@cases.command("end")
@asking
def end_case(api: HttpApi, case_reference: str) -> Answer:
    """End a case: from now on nothing is searched under it."""
    done = api.post(path_of("cases", case_reference, "end"))
    return Answer(done, f"Ended case {case_reference} (sequence {done['sequence']}).")
