"""Persons, by the OpenID Connect tokens (JWT) of the force's identity provider.

Everything is pinned by settings and nothing by the token: algorithms, issuer, audience. A token must expire, and
within `oidc_lifetime_s_max` of being issued, because nobody is told when a person's right ends.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from joserfc import jwt
from joserfc.errors import JoseError

from matcher_service.access.key_sets import KeySet, from_file, from_url
from matcher_service.access.verbs import EVERY_SCOPE
from matcher_service.errors import Unauthenticated
from matcher_service.seams import Clock
from matcher_service.settings import AccessSettings
from matcher_service.terms import Actor, Scope

TOKEN_BYTES_MAX = 16 * 1024
PERSON_BYTES_MAX = 120

# What a person's roles can open: an edge node is no person.
GRANTABLE = EVERY_SCOPE - {Scope.EDGE}


class People:
    def __init__(self, settings: AccessSettings, keys: KeySet) -> None:
        self._settings = settings
        self._keys = keys

    async def read(self, token: str, now_ms: int) -> Actor:
        """The person of a token; raises Unauthenticated with the reason, or ServiceFault if keys cannot be read."""
        settings = self._settings
        if len(token) > TOKEN_BYTES_MAX:
            raise _refused("the token is too long")
        header = _header(token)
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in settings.oidc_algorithms:
            raise _refused(f"the token's algorithm is not one of {', '.join(settings.oidc_algorithms)}")
        if not isinstance(kid, str) or not kid:
            raise _refused("the token names no key (kid)")
        key = await self._keys.key(kid)
        if key is None:
            raise _refused("the token's key (kid) is not one of the issuer's")
        try:
            claims = jwt.decode(token, key, algorithms=list(settings.oidc_algorithms)).claims
        except (JoseError, ValueError) as error:
            raise _refused("the token's signature is not valid") from error
        ends_at_s = _judge_times(claims, settings, now_ms / 1000)
        if claims.get("iss") != settings.oidc_issuer:
            raise _refused("the token is of another issuer")
        if settings.oidc_audience not in _texts(claims.get("aud")):
            raise _refused("the token is for another audience")
        person = claims.get("sub")
        if not isinstance(person, str) or not person or not person.isprintable() or len(person) > PERSON_BYTES_MAX:
            raise _refused("the token names no usable subject (sub)")
        return Actor(
            name=f"person-{person}",
            scopes=_scopes(claims, settings),
            person=person,
            galleries=_galleries(claims, settings),
            probes_per_s=settings.person_probes_per_s_max,
            ends_at_ms=int((ends_at_s + settings.oidc_leeway_s) * 1000),
        )


def people_of(settings: AccessSettings, clock: Clock) -> People | None:
    """The way in for persons that the settings name, None if they name none."""
    if not settings.oidc_issuer:
        return None
    read = from_url(settings.oidc_jwks_url) if settings.oidc_jwks_file is None else from_file(settings.oidc_jwks_file)
    return People(settings, KeySet(read, clock))


def _header(token: str) -> Mapping[str, Any]:
    """The header only: nothing of the payload is believed before its signature."""
    first = token.partition(".")[0]
    try:
        header = orjson.loads(urlsafe_b64decode(first + "=" * (-len(first) % 4)))
    except (ValueError, binascii.Error) as error:
        raise _refused("not a token that is known here") from error
    if not isinstance(header, dict) or token.count(".") != 2:
        raise _refused("not a token that is known here")
    return header


def _judge_times(claims: Mapping[str, Any], settings: AccessSettings, now_s: float) -> float:
    ends, issued, begins = (_number(claims.get(name, 0 if name == "nbf" else None)) for name in ("exp", "iat", "nbf"))
    if ends is None or issued is None or begins is None:
        raise _refused("the token must say when it was issued (iat) and when it expires (exp)")
    leeway = settings.oidc_leeway_s
    if now_s >= ends + leeway:
        raise _refused("the token has expired")
    if now_s < max(begins, issued) - leeway:
        raise _refused("the token is not valid yet: one of the two clocks is wrong")
    if ends - issued > settings.oidc_lifetime_s_max:
        raise _refused(f"the token lives longer than {settings.oidc_lifetime_s_max:g} s")
    return ends


def _number(value: Any) -> float | None:
    """Seconds since 1970, or None for what is no number or no time."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        return None
    return float(value)


def _scopes(claims: Mapping[str, Any], settings: AccessSettings) -> frozenset[Scope]:
    """What the roles in the token stand for here; a role that is not known stands for nothing."""
    found: set[Scope] = set()
    for role in _texts(_at(claims, settings.oidc_roles_claim)):
        mapped = settings.oidc_roles.get(role)
        found.update(Scope(one) for one in (mapped if mapped is not None else (role,)) if one in GRANTABLE)
    return frozenset(found)


def _galleries(claims: Mapping[str, Any], settings: AccessSettings) -> frozenset[str] | None:
    """None for the word "*", else exactly those named; without the claim none at all."""
    named = _texts(_at(claims, settings.oidc_galleries_claim))
    return None if "*" in named else frozenset(named)


def _at(claims: Mapping[str, Any], path: str) -> Any:
    """The claim at a path such as realm_access.roles; a claim whose whole name has dots is found first."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for part in path.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part)
    return found


def _texts(value: Any) -> Sequence[str]:
    """A list of texts, or one text with words, as both are in use."""
    if isinstance(value, str):
        return value.split()
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _refused(why: str) -> Unauthenticated:
    return Unauthenticated(why, field="authorization", hint="sign in again, and send the token of this service")
