"""For those who run the service: metrics, liveness, readiness."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from matcher_service.gateway.http_exchange import json_response
from matcher_service.gateway.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["operation"])

    @routes.get("/metrics")
    async def metrics() -> Response:
        """In the Prometheus text format."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

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
