"""What stands before every HTTP handler: authentication, then the limits on the body, then the count.

Plain ASGI, outside the framework, so that nothing of a stranger's request is parsed and no body is held beyond
the limit, whether its length was declared, chunked or compressed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from matcher_service import logs
from matcher_service.access import verbs
from matcher_service.access.authentication import Presented
from matcher_service.errors import InvalidInput, MatcherError, Overloaded, TooLarge
from matcher_service.gateway import refusals
from matcher_service.gateway.service import Service
from matcher_service.settings import is_loopback

HEALTH_PATHS = frozenset(("/livez", "/readyz", "/startupz"))
LOOPBACK_PATHS = frozenset(("/metrics", "/docs", "/openapi.json", "/"))

# What lasts as long as its reader likes.
ENDLESS_VERBS = frozenset(("stream_alerts",))

# Authenticated requests at once; with the limit of one body this bounds what all bodies hold.
REQUESTS_IN_FLIGHT_MAX = 128

# How much of a refused body is still taken in and dropped, in bodies of the largest size, and for how long.
LINGER_BODIES_MAX = 4
LINGER_S_MAX = 2.0


class UnsupportedEncoding(InvalidInput):
    """The body or the answer is wanted in an encoding that is not spoken here (415)."""


class Guard:
    def __init__(self, app: ASGIApp, service: Service, answer: Callable[[MatcherError], Response]) -> None:
        self._app = app
        self._service = service
        self._answer = answer
        self._in_flight = 0
        loopback = is_loopback(service.settings.server.host)
        self._open_paths = HEALTH_PATHS | LOOPBACK_PATHS if loopback else HEALTH_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        began = self._service.clock.monotonic()
        logs.request_begins()
        request = _Request(scope, receive, send, self._service.settings.limits.message_bytes_max)
        try:
            await self._pass(request, scope)
        except ClientDisconnect:
            scope["state"]["result"] = "left"
            self._count(scope, began)
            return
        except Exception as error:
            refusal = refusals.of(error)
        else:
            self._count(scope, began)
            return
        scope["state"]["result"] = refusal.cause
        self._count(scope, began)
        if not request.answering:
            await self._answer(refusal)(scope, receive, request.send)

    async def _pass(self, request: _Request, scope: Scope) -> None:
        state = scope.setdefault("state", {})
        state["result"] = "ok"
        if scope["path"] not in self._open_paths:
            state["actor"] = await self._service.credentials.authenticate(_presented(scope))
        if self._in_flight >= REQUESTS_IN_FLIGHT_MAX:
            raise Overloaded(
                "too many requests at once", hint="send fewer at a time, or use a stream", retry_after_ms=100
            )
        self._in_flight += 1
        try:
            request.check_headers()
            await self._app(scope, request.receive, request.send)
        finally:
            self._in_flight -= 1

    def _count(self, scope: Scope, began: float) -> None:
        # The name of the route, never its path: a path may hold an identifier.
        verb = getattr(scope.get("route"), "name", "none")
        metrics = self._service.metrics
        metrics.requests.labels("http", verb, scope["state"]["result"]).inc()
        if verb not in ENDLESS_VERBS:
            metrics.request_seconds.labels("http", verb).observe(self._service.clock.monotonic() - began)


def _presented(scope: Scope) -> Presented:
    """The peer is the one that the server names: behind a proxy on loopback, who the proxy says."""
    client = scope.get("client")
    return Presented(Headers(scope=scope).get("authorization"), client is not None and is_loopback(client[0]))


async def require_scope(request: Request) -> None:
    """Raises Forbidden unless the actor's scopes open the route; run before anything of the request is judged."""
    actor = getattr(request.state, "actor", None)
    if actor is not None:  # an open path has none
        verbs.require(actor, request.scope["route"].name, verbs.HTTP_VERBS)


class _Request:
    """One request's channels: counts what comes in, and knows whether an answer has begun."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, bytes_max: int) -> None:
        self._headers = Headers(scope=scope)
        self._receive = receive
        self._send = send
        self._bytes_max = bytes_max
        self._bytes = 0
        self._all_read = self._headers.get("content-length", "0") == "0" and "transfer-encoding" not in self._headers
        self.answering = False

    def check_headers(self) -> None:
        """Raises UnsupportedEncoding or TooLarge by what the headers declare."""
        encoding = self._headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedEncoding(
                "compressed bodies are not accepted",
                field="Content-Encoding",
                hint="send the body as it is; templates hardly compress",
            )
        length = self._headers.get("content-length", "")
        # The server has checked that it is a number; one of twenty digits is too large whatever it says.
        if length.isdecimal() and int(length[:20]) > self._bytes_max:
            raise self._too_large()

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"the body is longer than {self._bytes_max} bytes",
            field="body",
            hint="split it into smaller messages; protobuf or base64 is half the size of JSON numbers or less",
        )

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._all_read = not message.get("more_body", False)
            if self._bytes > self._bytes_max:
                raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.answering = True
            MutableHeaders(scope=message)["X-Request-ID"] = logs.request_id()
            if not self._all_read:
                MutableHeaders(scope=message)["Connection"] = "close"
        elif not self._all_read and not message.get("more_body", False):
            # The answer goes out now, and the connection closes a little later: closing it under a caller who
            # still writes would reset it, and the answer would be lost.
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _linger(self) -> None:
        """Take in and drop the rest of the body, within bounds of length and time."""
        dropped = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S_MAX):
                while dropped <= LINGER_BODIES_MAX * self._bytes_max:
                    message = await self._receive()
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
                    dropped += len(message.get("body", b""))
