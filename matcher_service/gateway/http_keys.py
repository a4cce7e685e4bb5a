"""Keys of galleries: rotating them, and wrapping them anew."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import Field

from matcher_service import policy
from matcher_service.gateway import decode
from matcher_service.gateway.http_exchange import actor_of, json_response
from matcher_service.gateway.http_queries import NoQuery, Reason
from matcher_service.gateway.service import Service
from matcher_service.seams import KeyRotations


class Rotation(Reason):
    backups_too: bool = Field(
        False, description="Destroy the old key without waiting for backups: none made until now can be restored then."
    )


def router(service: Service, rotations: KeyRotations) -> APIRouter:
    routes = APIRouter(tags=["operation"])

    @routes.get("/v1/keys")
    async def list_keys(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """How far the rotations of galleries' keys have come."""
        actor = actor_of(request)
        found = [one for one in await rotations.keys() if actor.has_rights_over(one.gallery_id)]
        return json_response({"keys": [dataclasses.asdict(one) for one in found]})

    @routes.post("/v1/keys/rewrap")
    async def rewrap_keys(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Wrap every key anew: by a new master key, or by the key service, as the settings say."""
        keys, by, left = await rotations.rewrap(actor_of(request))
        return json_response({"keys": keys, "by": by, "left": left})

    @routes.post("/v1/galleries/{gallery_id}/key", status_code=202)
    async def rotate_gallery_key(gallery_id: str, request: Request, query: Annotated[Rotation, Query()]) -> Response:
        """Seal a gallery under a new key from now on, and everything it holds in the background."""
        actor = actor_of(request)
        policy.gallery_of(actor, gallery_id, service.catalogue)
        decode.check_reason(query.reason)
        begun = await rotations.rotate(gallery_id, query.reason, query.backups_too, actor)
        return json_response(dataclasses.asdict(begun), 202)

    return routes
