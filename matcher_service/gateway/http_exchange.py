"""Reading a request and writing a response: bodies, media types, and callers who leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import Response
from google.protobuf.message import Message
from starlette.requests import ClientDisconnect

from matcher_service.errors import DeadlineExceeded
from matcher_service.gateway.http_guard import UnsupportedEncoding
from matcher_service.gateway.json_bodies import Body
from matcher_service.terms import Actor

JSON = "application/json"
PROTOBUF = "application/x-protobuf"
BODY_READ_S_MAX = 30.0

Answer = TypeVar("Answer")


def actor_of(request: Request) -> Actor:
    """Who the guard found to be asking."""
    actor = request.state.actor
    assert isinstance(actor, Actor)
    return actor


async def read_body(request: Request) -> bytes:
    """The whole body; the guard bounds its length. Raises DeadlineExceeded if it comes too slowly."""
    try:
        async with asyncio.timeout(BODY_READ_S_MAX):
            return await request.body()
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"the body did not arrive within {BODY_READ_S_MAX:g} s", field="body", hint="send smaller messages"
        ) from error


def sent_as_protobuf(request: Request) -> bool:
    """Raises UnsupportedEncoding for anything but JSON and protobuf; no type means JSON."""
    kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if kind not in (JSON, PROTOBUF):
        raise UnsupportedEncoding(
            "the body is neither JSON nor protobuf",
            field="Content-Type",
            hint=f"send `Content-Type: {JSON}` or `{PROTOBUF}`",
        )
    return kind == PROTOBUF


def require_json(request: Request) -> None:
    if sent_as_protobuf(request):
        raise UnsupportedEncoding(
            "this body has no protobuf form", field="Content-Type", hint=f"send `Content-Type: {JSON}`"
        )


def wants_protobuf(request: Request) -> bool:
    """By the Accept header; if that leaves it open, as the request was sent."""
    accepted = request.headers.get("accept", "*/*").lower()
    if PROTOBUF in accepted:
        return True
    return JSON not in accepted and sent_as_protobuf(request)


def json_response(document: Any, status: int = 200, media_type: str = JSON) -> Response:
    return Response(orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS), status, media_type=media_type)


def protobuf_response(message: Message) -> Response:
    return Response(message.SerializeToString(), media_type=PROTOBUF)


async def unless_left(request: Request, work: Awaitable[Answer]) -> Answer:
    """The result of the work, which is cancelled if the caller hangs up first. The body must have been read.

    Raises ClientDisconnect.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def documented(body: type[Body], *, protobuf: str = "") -> dict[str, Any]:
    """`openapi_extra` of a route whose body we decode ourselves; `protobuf` names its message, if it has one."""
    content: dict[str, Any] = {JSON: {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
    if protobuf:
        content[PROTOBUF] = {"schema": {"type": "string", "format": "binary", "description": f"matcher.v1.{protobuf}"}}
    return {"requestBody": {"required": True, "content": content}}
