"""From what a caller presents to who they are, over every way in."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import NamedTuple, Protocol

from matcher_service.access import edge_tokens, standing
from matcher_service.access.edge_tokens import EdgeTokens
from matcher_service.access.people import People
from matcher_service.catalogue import Catalogue
from matcher_service.clock import LawfulTime
from matcher_service.errors import MatcherError, Unauthenticated
from matcher_service.terms import Actor, EdgeCredential, Scope

HINT = (
    "send `Authorization: Bearer TOKEN`: on loopback the token from the file `token` of the data directory, "
    "elsewhere a person's or a deployment's token"
)

# Tokens whose signature was checked already; what they stand for is looked up anew for every message.
CHECKED_TOKENS_MAX = 1024


class ClientCertificate(NamedTuple):
    """A client certificate that the transport has verified: SHA-256 of its DER form in hex, and its subject
    alternative names."""

    sha256: str
    names: tuple[str, ...]

    def bindings(self) -> tuple[str, ...]:
        """How a credential may be bound to it."""
        return (f"sha256:{self.sha256}", *(f"san:{name}" for name in self.names))


class Presented(NamedTuple):
    """What a caller shows: the Authorization header or metadata value, where it comes from, and its certificate."""

    authorization: str | None
    from_loopback: bool
    certificate: ClientCertificate | None = None


class LoopbackToken(Protocol):
    def reads(self, presented: str) -> Actor | None:
        """Who presents the data directory's token, None if it is not that token."""
        ...


class Authentication:
    """All ways in. `people` and `tokens` None: there is no such way here."""

    def __init__(
        self,
        catalogue: Catalogue,
        time: LawfulTime,
        loopback: LoopbackToken,
        tokens: EdgeTokens | None = None,
        people: People | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._time = time
        self._loopback = loopback
        self._tokens = tokens
        self._people = people
        self._checked: OrderedDict[bytes, tuple[str, int]] = OrderedDict()

    async def authenticate(self, presented: Presented) -> Actor:
        """Raises Unauthenticated, Gone for the credential of an ended deployment, or ServiceFault if it cannot be
        found out. A caller who shows both a token and a certificate is who the token says."""
        if presented.authorization:
            actor = await self._bearer(presented)
        elif presented.certificate is not None:
            actor = self._certified(presented.certificate)
        else:
            raise Unauthenticated("no credential", field="authorization", hint=HINT)
        self.require_standing(actor)
        return actor

    def require_standing(self, actor: Actor) -> None:
        """Raises Unauthenticated or Gone if the actor, once authenticated, may do nothing more."""
        standing.require(actor, self._catalogue, self._time.now_ms())

    def standing_fault(self, actor: Actor) -> MatcherError | None:
        return standing.fault(actor, self._catalogue, self._time.now_ms())

    async def _bearer(self, presented: Presented) -> Actor:
        scheme, _, text = (presented.authorization or "").partition(" ")
        text = text.strip()
        if scheme.lower() != "bearer":
            raise Unauthenticated("not a bearer token", field="authorization", hint=HINT)
        local = self._loopback.reads(text)
        if local is not None:
            if presented.from_loopback:
                return local
            raise Unauthenticated(
                "the data directory's token opens on loopback only",
                field="authorization",
                hint="from elsewhere, use a person's token or an edge credential",
            )
        if credential_id := edge_tokens.credential_of(text):
            return self._exchanging(credential_id, text)
        if text.count(".") == 2:
            return await self._token(text, presented.certificate)
        raise Unauthenticated("the token is not valid", field="authorization", hint=HINT)

    def _exchanging(self, credential_id: str, secret: str) -> Actor:
        """Who presents an edge credential's own secret may only exchange it."""
        credential = self._catalogue.credentials.get(credential_id)
        if credential is None or not edge_tokens.secret_opens(secret, credential.secret_sha256):
            raise standing.unknown_credential()
        return edge_actor(credential, self._catalogue, frozenset((Scope.TOKEN_EXCHANGE,)), None)

    async def _token(self, text: str, certificate: ClientCertificate | None) -> Actor:
        now_ms = self._time.now_ms()
        if not edge_tokens.is_edge_token(text):
            if self._people is None:
                raise Unauthenticated(
                    "persons have no way in here", field="authorization", hint="set access.oidc_issuer"
                )
            return await self._people.read(text, now_ms)
        credential_id, ends_at_ms = self._read_edge_token(text, now_ms)
        credential = self._catalogue.credentials.get(credential_id)
        if credential is None:
            raise standing.unknown_credential()
        if certificate is not None and credential.certificate and credential.certificate not in certificate.bindings():
            raise Unauthenticated(
                "the token is of another certificate's credential", field="authorization", hint="connect with its own"
            )
        return edge_actor(credential, self._catalogue, frozenset((Scope.EDGE,)), ends_at_ms)

    def _read_edge_token(self, text: str, now_ms: int) -> tuple[str, int]:
        if self._tokens is None:
            raise Unauthenticated("the token is not valid", field="authorization", hint=HINT)
        digest = hashlib.sha256(text.encode(errors="replace")).digest()
        known = self._checked.get(digest)
        if known is not None and now_ms < known[1]:
            return known
        read = self._tokens.read(text, now_ms)
        self._checked[digest] = read
        if len(self._checked) > CHECKED_TOKENS_MAX:
            self._checked.popitem(last=False)
        return read

    def _certified(self, certificate: ClientCertificate) -> Actor:
        bindings = certificate.bindings()
        now_ms = self._time.now_ms()
        bound = [one for one in self._catalogue.credentials.values() if one.certificate in bindings]
        if not bound:
            raise Unauthenticated(
                "no edge credential is bound to this certificate",
                field="certificate",
                hint="issue one for its fingerprint: `matcher credentials issue --certificate`",
            )
        # A certificate may serve one deployment after another: the newest credential that still stands counts.
        bound.sort(key=lambda one: (standing.credential_fault(one, now_ms) is None, one.issued_at_ms))
        return edge_actor(bound[-1], self._catalogue, frozenset((Scope.EDGE,)), None)


def edge_actor(
    credential: EdgeCredential, catalogue: Catalogue, scopes: frozenset[Scope], ends_at_ms: int | None
) -> Actor:
    """The actor of an edge credential: its rights are those of its deployment, and end with it."""
    deployment = catalogue.deployments.get(credential.deployment_id)
    return Actor(
        name=f"edge-{credential.credential_id}",
        scopes=scopes,
        galleries=frozenset(deployment.gallery_ids if deployment is not None else ()),
        deployment_id=credential.deployment_id,
        credential_id=credential.credential_id,
        cameras=credential.cameras,
        probes_per_s=credential.probes_per_s,
        ends_at_ms=ends_at_ms,
    )
