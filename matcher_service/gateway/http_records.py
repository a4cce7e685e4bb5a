"""What was recorded: alerts and the audit chain, in pages."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from matcher_service import policy
from matcher_service.access import bands
from matcher_service.gateway import encode_json
from matcher_service.gateway.http_exchange import actor_of, json_response
from matcher_service.gateway.http_queries import AlertPage, PageAfterIndex
from matcher_service.gateway.service import Service
from matcher_service.terms import AuditEvent


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["records"])

    @routes.get("/v1/alerts")
    async def list_alerts(request: Request, query: Annotated[AlertPage, Query()]) -> Response:
        """Recorded alerts, newest first: those whose candidates are all of galleries the caller has rights over."""
        actor = actor_of(request)
        found = await service.log.alerts(query.deployment_id, query.before, query.limit)
        detail = {"deployment_id": query.deployment_id, "alerts": len(found)}
        await service.log.record([AuditEvent(actor.name, "alerts.consulted", "", detail)], [])
        return json_response(
            {
                "alerts": [
                    encode_json.alert(bands.alert_for(actor, one)) for one in found if policy.may_see_alert(actor, one)
                ],
                "next_before": found[-1].alert_id if len(found) == query.limit else None,
            }
        )

    @routes.get("/v1/audit")
    async def list_audit(request: Request, query: Annotated[PageAfterIndex, Query()]) -> Response:
        """Audit records in order, each with its hash and that of the one before."""
        policy.require_every_gallery(actor_of(request))
        found = await service.log.audit(query.after, query.limit)
        return json_response(
            {"records": found, "next_after": found[-1].get("index") if len(found) == query.limit else None}
        )

    return routes
