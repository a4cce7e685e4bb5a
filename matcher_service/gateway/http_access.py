"""Edge credentials and their tokens, and proposals that two persons stand for."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from matcher_service import change_policy, policy, records
from matcher_service.access.edge_tokens import new_secret
from matcher_service.errors import NotFound
from matcher_service.gateway import decode_json
from matcher_service.gateway.http_exchange import actor_of, documented, json_response, read_body, require_json
from matcher_service.gateway.http_queries import NoQuery
from matcher_service.gateway.json_bodies import CredentialBody, ProposalBody, ReasonBody, RotationBody
from matcher_service.gateway.service import Service
from matcher_service.terms import (
    CloseProposal,
    EdgeCredential,
    IssueCredential,
    MakeProposal,
    Proposal,
    ProposalAction,
    RateChange,
    RevokeCredential,
)

PROPOSAL_OPEN_MS = policy.PROPOSAL_MS_MAX


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["access"])
    catalogue = service.catalogue

    async def sent(request: Request) -> bytes:
        require_json(request)
        return await read_body(request)

    def answered(credential: EdgeCredential, secret: str, sequence: int) -> Response:
        told: dict[str, Any] = {**records.credential_dict(credential), "sequence": sequence}
        if secret:
            told["secret"] = secret
        return json_response(told, 201)

    # --- edge credentials --------------------------------------------------------------------------------

    @routes.post("/v1/credentials", openapi_extra=documented(CredentialBody), status_code=201)
    async def issue_credential(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Issue an edge node's credential for one deployment.

        Bound to a client certificate, or with a secret that is told once, here, and of which only a digest is kept.
        """
        body = decode_json.body(CredentialBody, await sent(request))
        actor = actor_of(request)
        deployment = catalogue.deployments.get(body.deployment_id)
        credential_id = body.credential_id or secrets.token_hex(6)
        secret, digest = ("", "") if body.certificate else new_secret(credential_id)
        closes_at_ms = deployment.closes_at_ms if deployment is not None else 0
        credential = EdgeCredential(
            credential_id=credential_id,
            deployment_id=body.deployment_id,
            issued_by=actor.name,
            issued_at_ms=service.clock.wall_ms(),
            expires_at_ms=closes_at_ms if body.expires_at_ms is None else body.expires_at_ms,
            secret_sha256=digest,
            certificate=body.certificate,
            cameras=tuple(body.cameras),
            probes_per_s=body.probes_per_s,
        )
        receipt = await service.change(IssueCredential(credential), actor)
        return answered(credential, secret, receipt.sequence)

    @routes.get("/v1/credentials")
    async def list_credentials(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Edge credentials of the deployments that the caller may see; never a secret."""
        actor = actor_of(request)
        found = [
            records.credential_dict(one)
            for name, one in sorted(catalogue.credentials.items())
            if (deployment := catalogue.deployments.get(one.deployment_id)) and policy.may_see(actor, deployment)
        ]
        return json_response({"credentials": found})

    @routes.post("/v1/credentials/{credential_id}/rotate", openapi_extra=documented(RotationBody), status_code=201)
    async def rotate_credential(credential_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Issue a successor with the same rights; the old credential ends after the overlap."""
        body = decode_json.body(RotationBody, await sent(request))
        actor = actor_of(request)
        old = change_policy.credential_of(actor, credential_id, catalogue)
        successor_id = secrets.token_hex(6)
        certificate = body.certificate or ""
        secret, digest = ("", "") if certificate else new_secret(successor_id)
        now_ms = service.clock.wall_ms()
        successor = dataclasses.replace(
            old,
            credential_id=successor_id,
            issued_by=actor.name,
            issued_at_ms=now_ms,
            secret_sha256=digest,
            certificate=certificate,
            replaces=credential_id,
            revoked_at_ms=None,
        )
        await service.change(IssueCredential(successor), actor)
        ending = RevokeCredential(credential_id, f"replaced by {successor_id}", now_ms + body.overlap_s * 1000)
        receipt = await service.change(ending, actor)
        return answered(successor, secret, receipt.sequence)

    @routes.post("/v1/credentials/{credential_id}/revoke", openapi_extra=documented(ReasonBody))
    async def revoke_credential(credential_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """End a credential now: its streams are closed within a second, its tokens end with it."""
        body = decode_json.body(ReasonBody, await sent(request))
        receipt = await service.change(RevokeCredential(credential_id, body.reason), actor_of(request))
        return json_response({"credential_id": credential_id, "sequence": receipt.sequence})

    @routes.post("/v1/tokens", status_code=201)
    async def exchange_token(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Exchange an edge credential's secret, sent as the bearer token, for a short-lived token."""
        actor = actor_of(request)
        if service.tokens is None:
            raise NotFound("no tokens are given here", field="path", hint="see /docs")
        credential, now_ms = catalogue.credentials[actor.credential_id], service.clock.wall_ms()
        ends_at_ms = min(now_ms + service.settings.access.edge_token_s * 1000, credential.expires_at_ms)
        token = service.tokens.issue(credential.credential_id, now_ms, ends_at_ms)
        return json_response(
            {"token": token, "expires_at_ms": ends_at_ms // 1000 * 1000, "deployment_id": credential.deployment_id},
            201,
        )

    # --- what two persons stand for ----------------------------------------------------------------------

    @routes.post("/v1/proposals", openapi_extra=documented(ProposalBody), status_code=201)
    async def make_proposal(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Propose a change of threshold, a gallery's deletion or a bulk withdrawal, for another person to approve."""
        body = decode_json.body(ProposalBody, await sent(request))
        actor, now_ms = actor_of(request), service.clock.wall_ms()
        proposal = Proposal(
            proposal_id=secrets.token_hex(8),
            action=ProposalAction(body.action),
            gallery_id=body.gallery_id,
            reason=body.reason,
            proposed_by=actor.person,
            proposed_at_ms=now_ms,
            expires_at_ms=now_ms + PROPOSAL_OPEN_MS,
            threshold=body.threshold,
            rates=tuple(RateChange(one.measure, one.group, one.before, one.after) for one in body.rates),
            reference_ids=tuple(body.reference_ids),
        )
        receipt = await service.change(MakeProposal(proposal), actor)
        held = catalogue.proposals.get(proposal.proposal_id)
        known = None if held is None else records.evidence_dict(held.evidence)
        told = {"proposal_id": proposal.proposal_id, "evidence": known}
        return json_response({**told, "sequence": receipt.sequence}, 201)

    @routes.get("/v1/proposals")
    async def list_proposals(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Proposals over the galleries that the caller has rights over, the newest last."""
        actor = actor_of(request)
        found = [one for one in catalogue.proposals.values() if actor.has_rights_over(one.gallery_id)]
        found.sort(key=lambda one: (one.proposed_at_ms, one.proposal_id))
        return json_response({"proposals": [records.proposal_dict(one) for one in found]})

    @routes.post("/v1/proposals/{proposal_id}/approve", openapi_extra=documented(ReasonBody))
    async def approve_proposal(proposal_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Approve and do what another person proposed."""
        body = decode_json.body(ReasonBody, await sent(request))
        if service.approve is None:
            raise NotFound("nothing is approved here", field="path", hint="see /docs")
        receipt = await service.approve(proposal_id, body.reason, actor_of(request))
        return json_response({"proposal_id": proposal_id, "sequence": receipt.sequence})

    @routes.post("/v1/proposals/{proposal_id}/reject", openapi_extra=documented(ReasonBody))
    async def reject_proposal(proposal_id: str, request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Close a proposal without doing it."""
        body = decode_json.body(ReasonBody, await sent(request))
        actor = actor_of(request)
        closing = CloseProposal(proposal_id, "rejected", actor.person or actor.name, body.reason)
        receipt = await service.change(closing, actor)
        return json_response({"proposal_id": proposal_id, "sequence": receipt.sequence})

    return routes
