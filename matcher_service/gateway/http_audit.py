"""Proofs of the audit: checkpoints to be kept elsewhere, and proofs from the chain."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field

from matcher_service.gateway import decode
from matcher_service.gateway.http_exchange import actor_of, json_response
from matcher_service.gateway.http_queries import NoQuery, Page, Reason
from matcher_service.seams import AuditProofs


class OfRecord(NoQuery):
    index: int = Field(ge=1, description="The audit record to prove.")


class OfOlder(NoQuery):
    older: int = Field(ge=1, description="The size of an earlier checkpoint.")


def router(proofs: AuditProofs) -> APIRouter:
    routes = APIRouter(tags=["records"])

    @routes.get("/v1/audit/checkpoints")
    async def list_checkpoints(query: Annotated[Page, Query()]) -> Response:
        """Signed checkpoints of the audit, newest first."""
        found = await proofs.checkpoints(query.limit)
        return json_response({"checkpoints": [dataclasses.asdict(one) for one in found]})

    @routes.post("/v1/audit/checkpoints", status_code=201)
    async def make_checkpoint(query: Annotated[NoQuery, Query()]) -> Response:
        """A checkpoint of every record there is, signed now; keep it elsewhere."""
        return json_response(dataclasses.asdict(await proofs.checkpoint()), 201)

    @routes.get("/v1/audit/proofs/inclusion")
    async def prove_inclusion(query: Annotated[OfRecord, Query()]) -> Response:
        """That a record is covered by the newest checkpoint (RFC 9162, 2.1.3); its leaf is the record's hash."""
        checkpoint, proof = await proofs.inclusion(query.index)
        return json_response({"index": query.index, "checkpoint": dataclasses.asdict(checkpoint), "proof": proof})

    @routes.get("/v1/audit/proofs/consistency")
    async def prove_consistency(query: Annotated[OfOlder, Query()]) -> Response:
        """That an earlier checkpoint is a past state of the newest one (RFC 9162, 2.1.4)."""
        checkpoint, proof = await proofs.consistency(query.older)
        return json_response({"older": query.older, "checkpoint": dataclasses.asdict(checkpoint), "proof": proof})

    @routes.post("/v1/audit/keys")
    async def rotate_key(request: Request, query: Annotated[Reason, Query()]) -> Response:
        """Sign checkpoints with a new key from now on; the old one vouches for it in the audit."""
        decode.check_reason(query.reason)
        return json_response({"key": await proofs.rotate_key(query.reason, actor_of(request))}, 201)

    return routes
