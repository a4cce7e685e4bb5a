"""Alerts as they are raised, as server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated

import orjson
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import Field

from matcher_service import policy
from matcher_service.access import bands
from matcher_service.errors import MatcherError, Overloaded
from matcher_service.gateway import encode_json
from matcher_service.gateway.http_exchange import actor_of
from matcher_service.gateway.http_queries import NoQuery
from matcher_service.gateway.service import Service
from matcher_service.terms import Actor, Alert

# A comment this often keeps proxies from closing a quiet stream, and asks whether the watcher may still watch.
QUIET_S_MAX = 0.5
KEEP_ALIVE_EVERY = 20
WATCHERS_MAX = 32
CAUGHT_UP_MAX = 1000


class Watched(NoQuery):
    deployment_id: str = Field("", description="Empty: of all that the caller may see.")


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["records"])
    watching: set[object] = set()

    @routes.get("/v1/alerts/stream", response_class=StreamingResponse)
    async def stream_alerts(
        request: Request, query: Annotated[Watched, Query()], last_event_id: Annotated[str, Header()] = ""
    ) -> StreamingResponse:
        """Alerts as they are raised, as server-sent events.

        Each event is named `alert`, has the alert's id, and holds the same JSON as `/v1/alerts`. With the header
        `Last-Event-ID`, which browsers send when they reconnect, what was raised since comes first. A last event named
        `end` says why the stream ends.
        """
        if len(watching) >= WATCHERS_MAX:
            raise Overloaded(
                f"{WATCHERS_MAX} streams are open, which is the most",
                hint="share one stream among those who watch, or use gRPC",
                retry_after_ms=1000,
            )
        actor = actor_of(request)
        events = _events(service, actor, query.deployment_id, last_event_id)
        return StreamingResponse(
            _counted(events, watching), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    return routes


async def _counted(events: AsyncGenerator[bytes, None], watching: set[object]) -> AsyncIterator[bytes]:
    watching.add(events)
    try:
        async for event in events:
            yield event
    finally:
        watching.discard(events)
        await events.aclose()


async def _events(service: Service, actor: Actor, deployment_id: str, after: str) -> AsyncGenerator[bytes, None]:
    feed = service.alert_feed.subscribe([deployment_id] if deployment_id else [])
    coming = asyncio.ensure_future(anext(feed))
    try:
        # By now subscribed: from the first byte on, the watcher misses nothing.
        await asyncio.sleep(0)
        yield b": watching\n\n"
        missed = await _since(service, deployment_id, after) if after else []
        told = {one.alert_id for one in missed}
        for alert in missed:
            if policy.may_see_alert(actor, alert):
                yield _event(actor, alert)
        quiet = 0
        while True:
            await asyncio.wait((coming,), timeout=QUIET_S_MAX)
            # A credential that ended ends its streams, whether anything is raised or not.
            service.credentials.require_standing(actor)
            if not coming.done():
                quiet += 1
                if quiet % KEEP_ALIVE_EVERY == 0:
                    yield b":\n\n"
                continue
            alert = coming.result()
            coming = asyncio.ensure_future(anext(feed))
            if alert.alert_id not in told and policy.may_see_alert(actor, alert):
                yield _event(actor, alert)
    except MatcherError as refusal:
        problem = {"cause": refusal.cause, "detail": refusal.detail, "hint": refusal.hint}
        yield b"event: end\ndata: " + orjson.dumps(problem) + b"\n\n"
    finally:
        coming.cancel()
        await asyncio.wait((coming,))
        if isinstance(feed, AsyncGenerator):
            await feed.aclose()


async def _since(service: Service, deployment_id: str, after: str) -> list[Alert]:
    """What was recorded after an alert, oldest first; the newest of them if there are very many."""
    newest_first = await service.log.alerts(deployment_id, "", CAUGHT_UP_MAX)
    since: list[Alert] = []
    for alert in newest_first:
        if alert.alert_id == after:
            break
        since.append(alert)
    return since[::-1]


def _event(actor: Actor, alert: Alert) -> bytes:
    document = orjson.dumps(encode_json.alert(bands.alert_for(actor, alert)))
    return b"event: alert\nid: " + alert.alert_id.encode() + b"\ndata: " + document + b"\n\n"
