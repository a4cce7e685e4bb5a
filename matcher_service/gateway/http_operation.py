"""For those who run the service: metrics, startup, liveness, readiness."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client.exposition import choose_encoder

from matcher_service.gateway.http_exchange import json_response
from matcher_service.gateway.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["operation"])

    @routes.get("/metrics")
    async def metrics(request: Request) -> Response:
        """In the Prometheus text format, or as OpenMetrics for those who ask for it: only that has exemplars."""
        encoded, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoded(service.metrics.registry), media_type=media_type)

    @routes.get("/startupz")
    async def started() -> Response:
        """200 once the start is over, whatever becomes of readiness later; until then 503."""
        is_over = service.started()
        return json_response({"started": is_over}, 200 if is_over else 503)

    @routes.get("/livez")
    async def live() -> Response:
        """The process answers; says nothing of what it depends on."""
        return PlainTextResponse("live\n")

    @routes.get("/readyz")
    async def ready() -> Response:
        """200 if requests can be served, else 503 and why."""
        is_ready, why = service.ready()
        return json_response({"ready": is_ready, "reason": why}, 200 if is_ready else 503)

    return routes
