"""POST /v1/identify: one message of probes, one reply."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from matcher_service.access import bands
from matcher_service.gateway import decode, decode_json, encode, encode_json, refusals
from matcher_service.gateway.http_exchange import (
    actor_of,
    documented,
    json_response,
    protobuf_response,
    read_body,
    sent_as_protobuf,
    unless_left,
    wants_protobuf,
)
from matcher_service.gateway.http_queries import NoQuery
from matcher_service.gateway.json_bodies import IdentifyBody
from matcher_service.gateway.service import Service
from matcher_service.wire import matcher_pb2 as pb


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["identify"])
    limits = service.settings.limits

    @routes.post("/v1/identify", openapi_extra=documented(IdentifyBody, protobuf="IdentifyRequest"))
    async def identify(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Search each probe in the galleries that the named deployment or case allows.

        Answers one decision per probe: ALERT with candidates, NO_CANDIDATE, INCOMPLETE, or REJECTED with a
        cause. If every probe was rejected for one cause, that is the problem answered.
        """
        protobuf, as_protobuf = sent_as_protobuf(request), wants_protobuf(request)
        data = await read_body(request)
        actor, received_at = actor_of(request), service.clock.monotonic()
        with nullcontext() if protobuf else decode_json.naming_fields_of("probes"):
            if protobuf:
                message = decode.probe_message(decode.parse(pb.IdentifyRequest, data), limits, actor, received_at)
            else:
                message = decode_json.probe_message(data, limits, actor, received_at)
            reply = await unless_left(request, service.identify(message))
            if refusal := refusals.of_all_probes(reply.decisions):
                raise refusal
        service.credentials.require_standing(actor)
        reply = bands.reply_for(actor, reply)
        if as_protobuf:
            return protobuf_response(encode.identify_reply(reply))
        return json_response(encode_json.identify_reply(reply, rows="" if protobuf else "probes"))

    return routes
