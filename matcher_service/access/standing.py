"""Whether a credential that was accepted still stands. Pure, and cheap enough to be asked for every message.

Revocations and the ends of deployments come through the log like everything else, so a gateway of a cluster obeys
those that another one recorded (law 11).
"""

from __future__ import annotations

from matcher_service.catalogue import Catalogue
from matcher_service.errors import Gone, MatcherError, Unauthenticated
from matcher_service.terms import Actor, EdgeCredential


def fault(actor: Actor, catalogue: Catalogue, now_ms: int) -> MatcherError | None:
    """Why the actor may do nothing more, or None."""
    if actor.ends_at_ms is not None and now_ms >= actor.ends_at_ms:
        return Unauthenticated(
            "what was presented has expired", field="authorization", hint="get a new token, and connect again"
        )
    if actor.credential_id:
        credential = catalogue.credentials.get(actor.credential_id)
        if credential is None or (refusal := credential_fault(credential, now_ms)) is not None:
            return refusal if credential is not None else unknown_credential()
    if actor.deployment_id:
        return _deployment_fault(actor.deployment_id, catalogue, now_ms)
    return None


def require(actor: Actor, catalogue: Catalogue, now_ms: int) -> None:
    """Raise Unauthenticated or Gone if the actor may do nothing more."""
    if (refusal := fault(actor, catalogue, now_ms)) is not None:
        raise refusal


def credential_fault(credential: EdgeCredential, now_ms: int) -> MatcherError | None:
    if credential.revoked_at_ms is not None and now_ms >= credential.revoked_at_ms:
        return Unauthenticated(
            "the credential has been revoked", field="authorization", hint="ask the authorising officer for another"
        )
    if now_ms >= credential.expires_at_ms:
        return Unauthenticated(
            "the credential has expired", field="authorization", hint="ask the authorising officer for another"
        )
    return None


def unknown_credential() -> MatcherError:
    return Unauthenticated("the credential is not valid", field="authorization", hint="check that it is the whole text")


def _deployment_fault(deployment_id: str, catalogue: Catalogue, now_ms: int) -> MatcherError | None:
    deployment = catalogue.deployments.get(deployment_id)
    if deployment is None or deployment.ended_at_ms is not None or now_ms >= deployment.closes_at_ms:
        return Gone(
            f"deployment {deployment_id!r} has ended",
            field="deployment_id",
            hint="a credential lives no longer than its deployment; get one of a current deployment",
        )
    return None
