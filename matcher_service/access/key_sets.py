"""The public keys of an identity provider (JWKS), from a file or from an address, cached within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import orjson
from joserfc.errors import JoseError
from joserfc.jwk import JWKRegistry, Key

from matcher_service.errors import ServiceFault
from matcher_service.seams import Clock
from matcher_service.terms import Cause

# Fetched again after so long, or for a key that is not known, but not more often than at RETRY_S.
REFRESH_S = 300.0
RETRY_S = 10.0
# Without a successful fetch for so long, nobody is let in any more: a key may have been withdrawn meanwhile.
STALE_S = 3600.0
KEY_SET_BYTES_MAX = 256 * 1024
KEYS_MAX = 100
FETCH_S_MAX = 5.0

ASYMMETRIC = frozenset(("RSA", "EC", "OKP"))

Read = Callable[[], Awaitable[bytes]]


def from_file(path: Path) -> Read:
    async def read() -> bytes:
        return await asyncio.to_thread(path.read_bytes)

    return read


def from_url(url: str) -> Read:
    """Reads at most KEY_SET_BYTES_MAX within FETCH_S_MAX; follows no redirect and no proxy of the environment."""

    async def read() -> bytes:
        async with (
            asyncio.timeout(FETCH_S_MAX),
            httpx.AsyncClient(trust_env=False, follow_redirects=False) as client,
            client.stream("GET", url, headers={"Accept": "application/json"}) as reply,
        ):
            reply.raise_for_status()
            data = bytearray()
            async for chunk in reply.aiter_bytes():
                data += chunk
                if len(data) > KEY_SET_BYTES_MAX:
                    raise ValueError(f"the key set is longer than {KEY_SET_BYTES_MAX} bytes")
            return bytes(data)

    return read


class KeySet:
    """Keys by their id. One fetch at a time; a failed one leaves the keys as they were until they are stale."""

    def __init__(self, read: Read, clock: Clock) -> None:
        self._read = read
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._read_at: float | None = None
        self._tried_at: float | None = None
        self._why = "not read yet"
        self._fetching = asyncio.Lock()

    async def key(self, kid: str) -> Key | None:
        """The key of that id, None if there is none. Raises ServiceFault (IDENTITY_UNAVAILABLE) while no fresh
        enough set of keys could be read."""
        if self._age() > REFRESH_S or kid not in self._keys:
            async with self._fetching:
                if (self._age() > REFRESH_S or kid not in self._keys) and self._may_try():
                    await self._fetch()
        if self._age() > STALE_S:
            raise ServiceFault(
                f"the identity provider's keys cannot be read: {self._why}",
                cause=Cause.IDENTITY_UNAVAILABLE,
                hint="try again; if it stays so, check access.oidc_jwks_url or access.oidc_jwks_file",
                retry_after_ms=int(RETRY_S * 1000),
            )
        return self._keys.get(kid)

    def _age(self) -> float:
        return float("inf") if self._read_at is None else self._clock.monotonic() - self._read_at

    def _may_try(self) -> bool:
        return self._tried_at is None or self._clock.monotonic() - self._tried_at >= RETRY_S

    async def _fetch(self) -> None:
        self._tried_at = self._clock.monotonic()
        try:
            self._keys = parsed(await self._read())
        except (OSError, ValueError, TimeoutError, httpx.HTTPError) as error:
            self._why = f"{type(error).__name__}: {error}"
            return
        self._read_at = self._clock.monotonic()


def parsed(data: bytes) -> dict[str, Key]:
    """Public signing keys by id. Secret (symmetric) keys, keys for encryption, and keys without an id are left out:
    none of them may ever verify a token. Raises ValueError."""
    if len(data) > KEY_SET_BYTES_MAX:
        raise ValueError(f"the key set is longer than {KEY_SET_BYTES_MAX} bytes")
    document = orjson.loads(data)
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("not a JSON Web Key Set")
    found: dict[str, Key] = {}
    for one in document["keys"][:KEYS_MAX]:
        if not isinstance(one, dict) or one.get("kty") not in ASYMMETRIC or one.get("use", "sig") != "sig":
            continue
        kid = one.get("kid")
        if not isinstance(kid, str) or not kid:
            continue
        try:
            found[kid] = JWKRegistry.import_key(one)
        except (JoseError, ValueError, KeyError, TypeError):
            continue  # a key of a kind that is not spoken here leaves the others usable
    return found
