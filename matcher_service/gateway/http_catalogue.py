"""Galleries, watchlists, template spaces, deployments and cases: create, list, describe, end, delete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from matcher_service import evidence, policy, records
from matcher_service.errors import NotFound
from matcher_service.gateway import decode, decode_json
from matcher_service.gateway.http_exchange import actor_of, documented, json_response, read_body, require_json
from matcher_service.gateway.http_queries import NoQuery, Reason
from matcher_service.gateway.json_bodies import CaseBody, DeploymentBody, GalleryBody, TemplateSpaceBody, ThresholdBody
from matcher_service.gateway.service import Service
from matcher_service.terms import (
    Case,
    Cause,
    CreateCase,
    CreateDeployment,
    DeleteGallery,
    Deployment,
    EndCase,
    EndDeployment,
    Gallery,
    GalleryKind,
    RegisterSpace,
    SpaceId,
    TemplateSpace,
    Write,
)

Name = TypeVar("Name")
Kept = TypeVar("Kept", Gallery, Deployment, Case, TemplateSpace)


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    catalogue, limits = service.catalogue, service.settings.limits

    async def sent(request: Request) -> bytes:
        require_json(request)
        return await read_body(request)

    async def changed(write: Write, request: Request, status: int = 200, **named: Any) -> Response:
        receipt = await service.change(write, actor_of(request))
        return json_response({**named, "sequence": receipt.sequence}, status)

    def galleries_of(request: Request) -> dict[str, Gallery]:
        actor = actor_of(request)
        return {key: one for key, one in catalogue.galleries.items() if actor.has_rights_over(key)}

    def deployments_of(request: Request) -> dict[str, Deployment]:
        actor = actor_of(request)
        return {key: one for key, one in catalogue.deployments.items() if policy.may_see(actor, one)}

    def cases_of(request: Request) -> dict[str, Case]:
        actor = actor_of(request)
        return {key: one for key, one in catalogue.cases.items() if policy.may_see(actor, one)}

    def threshold_of(gallery_id: str) -> dict[str, Any]:
        """The gallery's threshold, with what is on record of it."""
        held = catalogue.galleries.get(gallery_id)
        if held is None:
            return {"gallery_id": gallery_id}
        known = records.evidence_dict(held.evidence)
        return {"gallery_id": gallery_id, "threshold": held.threshold, "evidence": known}

    def described(gallery: Gallery) -> Response:
        """`evidence_now` is what another calibration than that of the evidence says of the threshold, else null."""
        now = evidence.superseded(gallery, catalogue)
        return json_response({**records.gallery_dict(gallery), "evidence_now": records.evidence_dict(now)})

    # --- galleries and watchlists ----------------------------------------------------------------------

    @routes.post("/v1/galleries", openapi_extra=documented(GalleryBody), tags=["galleries"], status_code=201)
    async def create_gallery(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Create a gallery under one lawful basis, in one registered template space."""
        wish = decode_json.gallery(await sent(request), actor_of(request).person)
        receipt = await service.change(wish, actor_of(request))
        return json_response({**threshold_of(wish.gallery.gallery_id), "sequence": receipt.sequence}, 201)

    @routes.get("/v1/galleries", tags=["galleries"])
    async def list_galleries(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        return json_response({"galleries": [records.gallery_dict(one) for one in _sorted(galleries_of(request))]})

    @routes.get("/v1/galleries/{gallery_id}", tags=["galleries"])
    async def describe_gallery(gallery_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        found = _named(gallery_id, galleries_of(request), "gallery_id", Cause.UNKNOWN_GALLERY)
        return described(found)

    @routes.post("/v1/galleries/{gallery_id}/threshold", openapi_extra=documented(ThresholdBody), tags=["galleries"])
    async def change_threshold(gallery_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Give the gallery another threshold: a reason, what it does to the error rates, and two persons."""
        change = decode_json.threshold_change(await sent(request), gallery_id)
        # Authenticated persons come by /v1/proposals; here the two are named and nobody has checked them.
        receipt = await service.change(change, actor_of(request))
        told = {**threshold_of(gallery_id), "threshold": change.threshold, "persons": "stated"}
        return json_response({**told, "sequence": receipt.sequence})

    @routes.delete("/v1/galleries/{gallery_id}", tags=["galleries"])
    async def delete_gallery(gallery_id: str, request: Request, query: Annotated[Reason, Query()]) -> Response:
        """Withdraw every reference and destroy the gallery's key; its id is never used again."""
        decode.check_reason(query.reason)
        return await changed(DeleteGallery(gallery_id, query.reason), request, gallery_id=gallery_id)

    @routes.get("/v1/watchlists", tags=["galleries"])
    async def list_watchlists(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """The galleries of kind watchlist."""
        found = [one for one in _sorted(galleries_of(request)) if one.kind is GalleryKind.WATCHLIST]
        return json_response({"watchlists": [records.gallery_dict(one) for one in found]})

    @routes.get("/v1/watchlists/{gallery_id}", tags=["galleries"])
    async def describe_watchlist(gallery_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        watchlists = {key: one for key, one in galleries_of(request).items() if one.kind is GalleryKind.WATCHLIST}
        return described(_named(gallery_id, watchlists, "gallery_id", Cause.UNKNOWN_GALLERY))

    # --- template spaces -------------------------------------------------------------------------------

    @routes.post("/v1/spaces", openapi_extra=documented(TemplateSpaceBody), tags=["spaces"], status_code=201)
    async def register_space(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Register a template space with its centre; another centre is another version."""
        space = decode_json.template_space(await sent(request), limits)
        return await changed(RegisterSpace(space), request, 201, space=records.space_id_dict(space.id))

    @routes.get("/v1/spaces", tags=["spaces"])
    async def list_spaces(query: Annotated[NoQuery, Query()]) -> Response:
        return json_response({"spaces": [records.space_id_dict(one.id) for one in _sorted(catalogue.spaces)]})

    @routes.get("/v1/spaces/{name}/{version}/{dimension}", tags=["spaces"])
    async def describe_space(name: str, version: int, dimension: int, query: Annotated[NoQuery, Query()]) -> Response:
        """The space with its centre, maps and score table; arrays are base64 of little-endian float32."""
        found = _named(SpaceId(name, version, dimension), catalogue.spaces, "space", Cause.NOT_FOUND)
        return json_response(records.space_dict(found))

    # --- deployments and cases -------------------------------------------------------------------------

    @routes.post("/v1/deployments", openapi_extra=documented(DeploymentBody), tags=["authority"], status_code=201)
    async def create_deployment(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Record an authorised live operation; probes are searched only under one, or under a case."""
        data = await sent(request)
        alerts_live_ms = round(service.settings.storage.alert_retention_d * 86_400_000)
        deployment = decode_json.deployment(data, service.clock.wall_ms(), alerts_live_ms)
        return await changed(CreateDeployment(deployment), request, 201, deployment_id=deployment.deployment_id)

    @routes.get("/v1/deployments", tags=["authority"])
    async def list_deployments(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        found = [records.deployment_dict(one) for one in _sorted(deployments_of(request))]
        return json_response({"deployments": found})

    @routes.get("/v1/deployments/{deployment_id}", tags=["authority"])
    async def describe_deployment(deployment_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        found = _named(deployment_id, deployments_of(request), "deployment_id", Cause.NOT_FOUND)
        return json_response(records.deployment_dict(found))

    @routes.post("/v1/deployments/{deployment_id}/end", tags=["authority"])
    async def end_deployment(deployment_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """From now on nothing is searched under it, and its watchlists are destroyed with their keys."""
        lists = [
            one.gallery_id
            for one in _sorted(catalogue.galleries)
            if one.watchlist is not None and one.watchlist.deployment_id == deployment_id
        ]
        return await changed(
            EndDeployment(deployment_id), request, deployment_id=deployment_id, destroyed_watchlists=lists
        )

    @routes.post("/v1/cases", openapi_extra=documented(CaseBody), tags=["authority"], status_code=201)
    async def create_case(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Record the authority of a retrospective search; every search under it is audited."""
        case = decode_json.case(await sent(request), service.clock.wall_ms())
        return await changed(CreateCase(case), request, 201, case_reference=case.case_reference)

    @routes.get("/v1/cases", tags=["authority"])
    async def list_cases(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        return json_response({"cases": [records.case_dict(one) for one in _sorted(cases_of(request))]})

    @routes.get("/v1/cases/{case_reference}", tags=["authority"])
    async def describe_case(case_reference: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        found = _named(case_reference, cases_of(request), "case_reference", Cause.NOT_FOUND)
        return json_response(records.case_dict(found))

    @routes.post("/v1/cases/{case_reference}/end", tags=["authority"])
    async def end_case(case_reference: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """From now on nothing is searched under it."""
        return await changed(EndCase(case_reference), request, case_reference=case_reference)

    return routes


def _sorted(kept: Mapping[Any, Kept]) -> list[Kept]:
    return [kept[name] for name in sorted(kept)]


def _named(name: Name, kept: Mapping[Name, Kept], field: str, cause: Cause) -> Kept:
    found = kept.get(name)
    if found is None:
        raise NotFound("not found", field=field, cause=cause, hint="list what there is, or check the spelling")
    return found
