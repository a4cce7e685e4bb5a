"""The references of a gallery, and those of a subject over all galleries. Templates go in and never come out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from matcher_service.errors import InvalidInput, MatcherError, NotFound
from matcher_service.gateway import decode, decode_json, encode, encode_json, refusals
from matcher_service.gateway.http_exchange import (
    actor_of,
    documented,
    json_response,
    protobuf_response,
    read_body,
    sent_as_protobuf,
    wants_protobuf,
)
from matcher_service.gateway.http_queries import NoQuery, PageAfterName, Reason, ReasonInGallery
from matcher_service.gateway.json_bodies import EnrolBody
from matcher_service.gateway.service import Service
from matcher_service.terms import Actor, AuditEvent, Cause
from matcher_service.wire import matcher_pb2 as pb


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["references"])
    limits = service.settings.limits

    def require_gallery(gallery_id: str, actor: Actor) -> None:
        if gallery_id not in service.catalogue.galleries or not actor.has_rights_over(gallery_id):
            raise NotFound(
                "no such gallery",
                field="gallery_id",
                cause=Cause.UNKNOWN_GALLERY,
                hint="GET /v1/galleries lists them; a deleted gallery does not come back",
            )

    async def consulted(actor: Actor, action: str, subject: str, detail: dict[str, object]) -> None:
        """Put on record that somebody looked; without that record nothing is shown (law 7)."""
        await service.log.record([AuditEvent(actor.name, action, subject, detail)], [])

    @routes.post("/v1/galleries/{gallery_id}/references", openapi_extra=documented(EnrolBody, protobuf="EnrolRequest"))
    async def enrol(gallery_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Enrol one or many references; answers one receipt each, after they are durable.

        If every reference was refused for one cause, that is the problem answered.
        """
        protobuf, as_protobuf = sent_as_protobuf(request), wants_protobuf(request)
        data = await read_body(request)
        actor, received_at = actor_of(request), service.clock.monotonic()
        with nullcontext() if protobuf else decode_json.naming_fields_of("references"):
            if protobuf:
                sent = _in_gallery(decode.parse(pb.EnrolRequest, data), gallery_id)
                message = decode.enrol_message(sent, limits, actor, received_at)
            else:
                message = decode_json.enrol_message(data, gallery_id, limits, actor, received_at)
            receipts = await service.enrol(message)
            if refusal := refusals.of_all_references(receipts):
                raise refusal
        ids, message_id = message.reference_ids, message.message_id
        if as_protobuf:
            in_columns = protobuf and sent.receipts_in_columns
            return protobuf_response(encode.enrol_reply(ids, receipts, message_id, in_columns=in_columns))
        rows = "" if protobuf else "references"
        return json_response(encode_json.enrol_reply(ids, receipts, message_id, rows=rows))

    @routes.get("/v1/galleries/{gallery_id}/references")
    async def list_references(gallery_id: str, request: Request, query: Annotated[PageAfterName, Query()]) -> Response:
        """What is held in a gallery, in order of reference_id, without templates."""
        require_gallery(gallery_id, actor_of(request))
        found = await service.log.references(gallery_id, query.after, query.limit)
        await consulted(actor_of(request), "references.consulted", gallery_id, {"references": len(found)})
        return json_response(
            {
                "references": [
                    encode_json.reference(one, service.catalogue.galleries.get(one.gallery_id)) for one in found
                ],
                "next_after": found[-1].reference_id if len(found) == query.limit else None,
            }
        )

    @routes.get("/v1/galleries/{gallery_id}/references/{reference_id}")
    async def describe_reference(
        gallery_id: str, reference_id: str, request: Request, query: Annotated[NoQuery, Query()]
    ) -> Response:
        """What is held of a live reference, without its template."""
        require_gallery(gallery_id, actor_of(request))
        found = await service.log.reference(gallery_id, reference_id)
        await consulted(actor_of(request), "references.consulted", gallery_id, {"reference_id": reference_id})
        if found is None:
            raise NotFound(
                "no such live reference", field="reference_id", hint="it was never enrolled, or has been withdrawn"
            )
        return json_response(encode_json.reference(found, service.catalogue.galleries.get(gallery_id)))

    @routes.delete("/v1/galleries/{gallery_id}/references/{reference_id}")
    async def withdraw_reference(
        gallery_id: str, reference_id: str, request: Request, query: Annotated[Reason, Query()]
    ) -> Response:
        """End the searchability of a reference; answered after no search that starts later can return it."""
        decode.check_reason(query.reason)
        try:
            receipt = await service.withdraw(gallery_id, [reference_id], query.reason, actor_of(request))
        except MatcherError as refusal:
            # The flow withdraws many at once; this path names one.
            refusal.field = refusal.field.replace("reference_ids", "reference_id")
            raise
        return json_response(encode_json.withdrawn(receipt))

    @routes.get("/v1/subjects/{subject_id}")
    async def describe_subject(subject_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Every live reference of a subject, over all galleries that the caller has rights over."""
        actor = actor_of(request)
        found = [one for one in await service.log.subject(subject_id) if actor.has_rights_over(one.gallery_id)]
        await consulted(actor, "subject.consulted", "", {"subject_id": subject_id, "references": len(found)})
        return json_response(
            {
                "subject_id": subject_id,
                "references": [
                    encode_json.reference(one, service.catalogue.galleries.get(one.gallery_id)) for one in found
                ],
            }
        )

    @routes.delete("/v1/subjects/{subject_id}")
    async def withdraw_subject(
        subject_id: str, request: Request, query: Annotated[ReasonInGallery, Query()]
    ) -> Response:
        """Withdraw every live reference of a subject, in one gallery or in all."""
        decode.check_reason(query.reason)
        receipt = await service.withdraw_subject(query.gallery_id, subject_id, query.reason, actor_of(request))
        return json_response(encode_json.withdrawn(receipt))

    return routes


def _in_gallery(message: pb.EnrolRequest, gallery_id: str) -> pb.EnrolRequest:
    """The message with the path's gallery; raises InvalidInput if it names another."""
    if message.gallery_id not in ("", gallery_id):
        raise InvalidInput(
            "the message names another gallery than the path", field="gallery_id", hint="make them the same"
        )
    message.gallery_id = gallery_id
    return message
