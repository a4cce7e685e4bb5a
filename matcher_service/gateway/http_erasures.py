"""Receipts of what was erased: out of which store, and when."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field

from matcher_service.errors import NotFound
from matcher_service.gateway.http_exchange import actor_of, json_response
from matcher_service.gateway.http_queries import NoQuery, PageAfterIndex
from matcher_service.gateway.service import Service
from matcher_service.seams import ErasureReceipts
from matcher_service.terms import Actor, AuditEvent, ErasureReceipt


class ErasurePage(PageAfterIndex):
    gallery_id: str = Field("", description="Empty: of every gallery.")
    subject_id: str = Field("", description="Only erasures of this subject's templates; empty: of anybody's.")


def router(service: Service, erasures: ErasureReceipts) -> APIRouter:
    routes = APIRouter(tags=["records"])

    @routes.get("/v1/erasures")
    async def list_erasures(request: Request, query: Annotated[ErasurePage, Query()]) -> Response:
        """Receipts of erasures, of a gallery or of a subject, and what still waits to be erased."""
        actor = actor_of(request)
        waiting = None
        if actor.has_rights_over(query.gallery_id) if query.gallery_id else actor.galleries is None:
            waiting = (await erasures.waiting(query.gallery_id, query.subject_id))._asdict()
        found = await erasures.receipts(query.gallery_id, query.subject_id, query.after, query.limit)
        if query.subject_id:
            detail = {"subject_id": query.subject_id, "receipts": len(found)}
            await service.log.record([AuditEvent(actor.name, "erasures.consulted", query.gallery_id, detail)], [])
        return json_response(
            {
                "waiting": waiting,
                "receipts": [_told(one) for one in found if _may_see(actor, one)],
                "next_after": found[-1].receipt_id if len(found) == query.limit else None,
            }
        )

    @routes.get("/v1/erasures/{receipt_id}")
    async def describe_erasure(receipt_id: int, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """One erasure: what it took, and since when each store holds nothing of it."""
        found = await erasures.receipt(receipt_id)
        if not _may_see(actor_of(request), found):
            raise NotFound(f"no receipt {receipt_id}", field="receipt_id", hint="list the receipts of a gallery")
        return json_response(_told(found))

    return routes


def _may_see(actor: Actor, receipt: ErasureReceipt) -> bool:
    return actor.has_rights_over(receipt.gallery_id) if receipt.gallery_id else actor.galleries is None


def _told(receipt: ErasureReceipt) -> dict[str, Any]:
    return {
        "receipt_id": receipt.receipt_id,
        "kind": receipt.kind,
        "gallery_id": receipt.gallery_id,
        "erased": receipt.erased,
        "sequences": receipt.sequences,
        "erased_at_ms": receipt.erased_at_ms,
        "complete": receipt.complete_at_ms is not None,
        "complete_at_ms": receipt.complete_at_ms,
        "stores": [one._asdict() for one in receipt.stores],
    }
