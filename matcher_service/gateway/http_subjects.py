"""The rights of those whose data is held, legal holds, and what is published of a deployment."""

from __future__ import annotations

import dataclasses
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import Field

from matcher_service import deployment_report, grounds, impact_assessment, policy, processing, records
from matcher_service.errors import InvalidInput, NotFound
from matcher_service.gateway import decode, decode_json
from matcher_service.gateway.http_exchange import actor_of, documented, json_response, read_body, require_json
from matcher_service.gateway.http_queries import NoQuery, Reason
from matcher_service.gateway.json_bodies import HoldBody, ReleaseBody
from matcher_service.gateway.service import Service
from matcher_service.seams import AlertRecords, LegalHolds
from matcher_service.terms import Actor, Alert, AuditEvent, LegalHold, LogEntry

_PAGE = 1000
HOLD_REVIEW_MS_MAX = 366 * 86_400_000


class ReportForm(NoQuery):
    form: str = Field("json", pattern="^(json|html)$", description="json or html.")


def router(service: Service, alerts: AlertRecords, holds: LegalHolds) -> APIRouter:
    routes = APIRouter()
    log, catalogue = service.log, service.catalogue

    @routes.get("/v1/subjects/{subject_id}/export", tags=["references"])
    async def export_subject(subject_id: str, request: Request, query: Annotated[Reason, Query()]) -> Response:
        """Everything held of a subject, for a request under section 45: references and what they rest on, alerts,
        what was done with them and by whom. Never a template; of other people in an alert, only how many they were."""
        decode.check_reason(query.reason)
        actor = actor_of(request)
        live = [one for one in await log.subject(subject_id) if actor.has_rights_over(one.gallery_id)]
        ended, kept_alerts = await holds.kept(subject_id)
        held = [*live, *(one for one in ended if actor.has_rights_over(one.gallery_id))]
        sequences = frozenset(one.sequence for one in held)
        own_alerts = [_of_subject(one, subject_id) async for one in _alerts(service, actor, subject_id)]
        own_alerts += [
            _of_subject(one, subject_id, kept=True) for one in kept_alerts if policy.may_see_alert(actor, one)
        ]
        about = {str(one["alert_id"]) for one in own_alerts}
        done = [
            {
                "at_ms": one["at_ms"],
                "operation": processing.OPERATIONS.get(str(one["action"])),
                "action": one["action"],
                "by": one["actor"],
            }
            async for one in _audited(service)
            if processing.covers(one, sequences) or one["subject"] in about
        ]
        paused = [one for one in await holds.holds() if one.subject_id == subject_id and _may_see(actor, one)]
        if not (held or own_alerts or paused):
            raise NotFound(
                "nothing is held of this subject", field="subject_id", hint="that is the answer to a request for access"
            )
        detail = {"subject_id": subject_id, "reason": query.reason, "references": len(held), "alerts": len(own_alerts)}
        await log.record([AuditEvent(actor.name, "subject.exported", "", detail)], [])
        return json_response(
            {
                "subject_id": subject_id,
                "references": [
                    {
                        "gallery_id": one.gallery_id,
                        "reference_id": one.reference_id,
                        "enrolled_at_ms": one.enrolled_at_ms,
                        "expires_at_ms": one.expires_at_ms,
                        "searchable": row < len(live),
                        **grounds.described(one, catalogue.galleries.get(one.gallery_id)),
                        **_controller(service, one.gallery_id),
                    }
                    for row, one in enumerate(held)
                ],
                "alerts": own_alerts,
                "processing": done,
                "legal_holds": [
                    {"hold_id": one.hold_id, "review_by_ms": one.review_by_ms, "released_at_ms": one.released_at_ms}
                    for one in paused
                ],
            }
        )

    # --- legal holds -------------------------------------------------------------------------------------

    @routes.post("/v1/holds", openapi_extra=documented(HoldBody), tags=["records"], status_code=201)
    async def place_hold(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Keep what is held of a subject from being erased, for a court or an inquiry. It is not searched for that."""
        require_json(request)
        body, actor = decode_json.body(HoldBody, await read_body(request)), actor_of(request)
        decode.check_reason(body.reason)
        authorised_by = actor.person or body.authorised_by
        for field, name in (("authorised_by", authorised_by), ("requested_by", body.requested_by)):
            if not name.strip():
                raise InvalidInput("nobody is named", field=field, hint="name who asked for it, and who authorised it")
        now_ms = service.clock.wall_ms()
        if not now_ms < body.review_by_ms <= now_ms + HOLD_REVIEW_MS_MAX:
            raise InvalidInput(
                "a hold is looked at again within a year", field="review_by_ms", hint="give a time within a year"
            )
        if body.gallery_id:
            policy.gallery_of(actor, body.gallery_id, catalogue)
        else:
            policy.require_every_gallery(actor)
        hold = LegalHold(
            hold_id=body.hold_id or secrets.token_hex(6),
            gallery_id=body.gallery_id,
            subject_id=body.subject_id,
            requested_by=body.requested_by,
            authorised_by=authorised_by,
            reason=body.reason,
            review_by_ms=body.review_by_ms,
        )
        return json_response(dataclasses.asdict(await holds.place(hold, actor)), 201)

    @routes.get("/v1/holds", tags=["records"])
    async def list_holds(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Every legal hold; `overdue` are those that nobody has looked at again in time."""
        policy.require_every_gallery(actor_of(request))
        now_ms = service.clock.wall_ms()
        return json_response(
            {
                "holds": [
                    {
                        **dataclasses.asdict(one),
                        "overdue": one.released_at_ms is None and one.review_by_ms <= now_ms,
                    }
                    for one in await holds.holds()
                ]
            }
        )

    @routes.post("/v1/holds/{hold_id}/release", openapi_extra=documented(ReleaseBody), tags=["records"])
    async def release_hold(hold_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """End a hold; what is due is erased within the stated time."""
        require_json(request)
        body, actor = decode_json.body(ReleaseBody, await read_body(request)), actor_of(request)
        decode.check_reason(body.reason)
        if hold_id not in {one.hold_id for one in await holds.holds() if _may_see(actor, one)}:
            raise NotFound(f"no hold {hold_id} stands", field="hold_id", hint="list the holds")
        await holds.release(hold_id, body.reason, actor.person or body.released_by, actor)
        return json_response({"hold_id": hold_id, "released": True})

    # --- what is published -------------------------------------------------------------------------------

    @routes.get("/v1/deployments/{deployment_id}/report", tags=["authority"])
    async def report_deployment(
        deployment_id: str, request: Request, query: Annotated[ReportForm, Query()]
    ) -> Response:
        """What a force publishes of a deployment: faces, alerts, outcomes, watchlist, thresholds; no person in it."""
        deployment = catalogue.deployments.get(deployment_id)
        if deployment is None or not policy.may_see(actor_of(request), deployment):
            raise NotFound("not found", field="deployment_id", hint="list the deployments")
        entries: list[LogEntry] = []
        while page := await log.read(entries[-1].sequence if entries else 0, _PAGE, deployment_report.KINDS):
            entries += page
        counts = await alerts.counts(records.authority_name(deployment_id, ""))
        made = deployment_report.build(
            deployment, entries, counts, service.clock.wall_ms(), await _listed(service, deployment_id)
        )
        return HTMLResponse(deployment_report.page(made)) if query.form == "html" else json_response(made)

    @routes.get("/v1/impact-assessment", tags=["operation"])
    async def export_assessment(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """The inputs of an impact assessment (section 64): galleries, their terms, clocks, ceilings, who may what."""
        policy.require_every_gallery(actor_of(request))
        shown = (one for family in service.metrics.references_live.collect() for one in family.samples)
        live = {one.labels["gallery"]: int(one.value) for one in shown}
        storage, now_ms = service.settings.storage, service.clock.wall_ms()
        return json_response(impact_assessment.inputs(catalogue, storage, live, now_ms))

    return routes


def _may_see(actor: Actor, hold: LegalHold) -> bool:
    """A hold over every gallery is seen by who has rights over every gallery."""
    return actor.has_rights_over(hold.gallery_id) if hold.gallery_id else actor.galleries is None


async def _alerts(service: Service, actor: Actor, subject_id: str) -> AsyncIterator[Alert]:
    before = ""
    while page := await service.log.alerts("", before, _PAGE):
        for alert in page:
            if policy.may_see_alert(actor, alert) and any(one.subject_id == subject_id for one in alert.candidates):
                yield alert
        before = page[-1].alert_id


async def _listed(service: Service, deployment_id: str) -> Counter[str]:
    """How many are on the watchlists of a deployment that still stand, by category."""
    found: Counter[str] = Counter()
    for gallery in list(service.catalogue.galleries.values()):
        if gallery.watchlist is None or gallery.watchlist.deployment_id != deployment_id:
            continue
        after = ""
        while page := await service.log.references(gallery.gallery_id, after, _PAGE):
            found.update(str(grounds.described(one, gallery).get("category") or "") for one in page)
            after = page[-1].reference_id
    return found


async def _audited(service: Service) -> AsyncIterator[dict[str, Any]]:
    after = 0
    while page := await service.log.audit(after, _PAGE):
        for record in page:
            yield record
        after = int(str(page[-1]["index"]))


def _of_subject(alert: Alert, subject_id: str, *, kept: bool = False) -> dict[str, Any]:
    """`kept`: beyond its time, under a legal hold."""
    own = [one for one in alert.candidates if one.subject_id == subject_id]
    return {
        "alert_id": alert.alert_id,
        "raised_at_ms": alert.raised_at_ms,
        "deployment_id": alert.deployment_id,
        "case_reference": alert.case_reference,
        "state": alert.state,
        "kept_under_a_hold": kept,
        "candidates": [
            {"gallery_id": one.gallery_id, "reference_id": one.reference_id, "rank": one.rank} for one in own
        ],
        "other_candidates": len(alert.candidates) - len(own),
    }


def _controller(service: Service, gallery_id: str) -> dict[str, Any]:
    gallery = service.catalogue.galleries.get(gallery_id)
    return {} if gallery is None else {"controller": gallery.controller, "purpose": gallery.purpose}
