"""What people decide: approval of a watchlist, reviews and ended grounds of references, adjudication of alerts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from matcher_service import policy, records
from matcher_service.access import bands
from matcher_service.errors import InvalidInput, NotFound
from matcher_service.gateway import decode, decode_json, encode_json
from matcher_service.gateway.http_exchange import actor_of, documented, json_response, read_body, require_json
from matcher_service.gateway.http_queries import NoQuery
from matcher_service.gateway.json_bodies import AdjudicationBody, ApprovalBody, GroundEndBody, ReviewBody
from matcher_service.gateway.service import Service
from matcher_service.seams import AlertRecords
from matcher_service.terms import Actor, Alert, ApproveWatchlist, AuditEvent, EndGround, ReviewReference

EVIDENCE_REFERENCE_BYTES_MAX = 256


def router(service: Service, alerts: AlertRecords) -> APIRouter:
    routes = APIRouter()

    async def sent(request: Request) -> bytes:
        require_json(request)
        return await read_body(request)

    @routes.post("/v1/watchlists/{gallery_id}/approval", openapi_extra=documented(ApprovalBody), tags=["galleries"])
    async def approve_watchlist(gallery_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Let a watchlist be searched, on the word of somebody other than its author; or reopen it."""
        body, actor = decode_json.body(ApprovalBody, await sent(request)), actor_of(request)
        by = _person(actor, body.approved_by, "approved_by")
        receipt = await service.change(ApproveWatchlist(gallery_id, by, body.reason, body.approved), actor)
        held = service.catalogue.galleries.get(gallery_id)
        known = {} if held is None else {"threshold": held.threshold, "evidence": records.evidence_dict(held.evidence)}
        told = {"gallery_id": gallery_id, "approved": body.approved, **known}
        return json_response({**told, "sequence": receipt.sequence})

    @routes.post("/v1/subjects/{subject_id}/ground-ended", openapi_extra=documented(GroundEndBody), tags=["references"])
    async def end_ground(subject_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """End the searchability of a subject's custody references, whose lawful ground has ended."""
        body, actor = decode_json.body(GroundEndBody, await sent(request)), actor_of(request)
        receipt = await service.change(EndGround(body.gallery_id, subject_id, body.ground, body.reason), actor)
        return json_response(encode_json.withdrawn(receipt))

    @routes.post(
        "/v1/galleries/{gallery_id}/references/{reference_id}/review",
        openapi_extra=documented(ReviewBody),
        tags=["references"],
    )
    async def review_reference(
        gallery_id: str, reference_id: str, request: Request, query: Annotated[NoQuery, Query()]
    ) -> Response:
        """Keep a reference until its next review, because somebody looked and its ground still stands."""
        body, actor = decode_json.body(ReviewBody, await sent(request)), actor_of(request)
        by = _person(actor, body.reviewed_by, "reviewed_by")
        write = ReviewReference(gallery_id, reference_id, body.review_by_ms, by, body.reason)
        receipt = await service.change(write, actor)
        return json_response({"reference_id": reference_id, "sequence": receipt.sequence})

    @routes.get("/v1/alerts/{alert_id}", tags=["records"])
    async def describe_alert(alert_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """A recorded alert with what people made of it."""
        actor = actor_of(request)
        found = await visible(alert_id, actor)
        await service.log.record([AuditEvent(actor.name, "alerts.consulted", alert_id)], [])
        return _told(actor, found)

    @routes.post(
        "/v1/alerts/{alert_id}/adjudications",
        openapi_extra=documented(AdjudicationBody),
        tags=["records"],
        status_code=201,
    )
    async def adjudicate_alert(alert_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """What a trained person made of an alert: confirmed, rejected or inconclusive, and why.

        Where a gallery asks for two people, the alert stays open until both have said something.
        """
        body, actor = decode_json.body(AdjudicationBody, await sent(request)), actor_of(request)
        decode.check_reason(body.reason)
        if len(body.evidence_reference.encode(errors="replace")) > EVIDENCE_REFERENCE_BYTES_MAX:
            raise InvalidInput(
                "it is too long to be a reference",
                field="evidence_reference",
                hint=f"at most {EVIDENCE_REFERENCE_BYTES_MAX} bytes; pictures stay in the evidence system",
            )
        by = _person(actor, body.by, "by")
        await visible(alert_id, actor)
        found = await alerts.adjudicate(alert_id, body.verdict, by, body.reason, body.evidence_reference, actor)
        service.metrics.adjudications.labels(body.verdict.value).inc()
        return _told(actor, found, 201)

    async def visible(alert_id: str, actor: Actor) -> Alert:
        found = await alerts.alert(alert_id)
        if not policy.may_see_alert(actor, found):
            raise NotFound(
                f"alert {alert_id} is not held", field="alert_id", hint="list the alerts; it may have been erased"
            )
        return found

    return routes


def _told(actor: Actor, alert: Alert, status: int = 200) -> Response:
    return json_response(encode_json.alert(bands.alert_for(actor, alert)), status)


def _person(actor: Actor, said: str, field: str) -> str:
    """Who decides: the person who signed in; on the loopback token, where nobody does, whoever is named."""
    if actor.person or said.strip():
        return actor.person or said
    raise InvalidInput("nobody is named", field=field, hint="name the person who decided")
