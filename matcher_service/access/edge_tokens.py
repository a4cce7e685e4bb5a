"""Edge credentials and the short-lived tokens that they are exchanged for.

A secret has 256 random bits, so its SHA-256 needs no salt and cannot be searched for. A token is a JWT signed with
HS256 under a key of the keys directory, which the gateways of a cluster share. It names the credential and nothing
else that counts: what the credential may do is read from the catalogue for every message, so a revoked credential's
tokens end with it.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import os
import secrets
import stat
from base64 import urlsafe_b64decode
from pathlib import Path

import orjson
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OctKey

from matcher_service.errors import StartRefused, Unauthenticated

SECRET_PREFIX = "edge"
KEY_FILE = "edge-token.key"
KEY_BYTES = 32
ISSUER = "matcher:edge"
ALGORITHM = "HS256"


def new_secret(credential_id: str) -> tuple[str, str]:
    """(what the edge node presents, the SHA-256 in hex that is stored)."""
    secret = secrets.token_urlsafe(32)
    return f"{SECRET_PREFIX}.{credential_id}.{secret}", _digest(secret)


def credential_of(presented: str) -> str:
    """The credential_id that a presented secret names, "" if it has not that form."""
    prefix, _, rest = presented.partition(".")
    credential_id, dot, secret = rest.rpartition(".")
    return credential_id if prefix == SECRET_PREFIX and dot and secret else ""


def secret_opens(presented: str, secret_sha256: str) -> bool:
    """In constant time; False for a credential without a secret."""
    secret = presented.rpartition(".")[2]
    return bool(secret_sha256) and hmac.compare_digest(_digest(secret), secret_sha256)


def is_edge_token(token: str) -> bool:
    """Whether a JWT claims to be one of ours: by its algorithm, which no person's token may have."""
    first = token.partition(".")[0]
    try:
        header = orjson.loads(urlsafe_b64decode(first + "=" * (-len(first) % 4)))
    except (ValueError, binascii.Error):
        return False
    return isinstance(header, dict) and header.get("alg") == ALGORITHM


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


class EdgeTokens:
    """Signs and reads the tokens of one service. `audience` keeps those of two services apart."""

    def __init__(self, key: bytes) -> None:
        self._key = OctKey.import_key(key)
        self._audience = hashlib.sha256(b"matcher edge tokens\n" + key).hexdigest()[:16]

    def issue(self, credential_id: str, now_ms: int, expires_at_ms: int) -> str:
        claims = {
            "iss": ISSUER,
            "aud": self._audience,
            "sub": credential_id,
            "iat": now_ms // 1000,
            "exp": expires_at_ms // 1000,
            "jti": secrets.token_hex(8),
        }
        return jwt.encode({"alg": ALGORITHM}, claims, self._key, algorithms=[ALGORITHM])

    def read(self, token: str, now_ms: int) -> tuple[str, int]:
        """(credential_id, ends_at_ms); raises Unauthenticated."""
        try:
            claims = jwt.decode(token, self._key, algorithms=[ALGORITHM]).claims
        except (JoseError, ValueError) as error:
            raise _invalid() from error
        credential_id, ends = claims.get("sub"), claims.get("exp")
        if (claims.get("iss"), claims.get("aud")) != (ISSUER, self._audience):
            raise _invalid()
        if not isinstance(credential_id, str) or not isinstance(ends, int):
            raise _invalid()
        if now_ms >= ends * 1000:
            raise Unauthenticated(
                "the token has expired", field="authorization", hint="exchange the credential for another at /v1/tokens"
            )
        return credential_id, ends * 1000


def _invalid() -> Unauthenticated:
    return Unauthenticated(
        "the token is not valid", field="authorization", hint="exchange the credential for a token at /v1/tokens"
    )


def load_or_create_key(keys_dir: Path) -> bytes:
    """The signing key, made at first start with mode 0600. Raises StartRefused if it cannot be read or written, or if
    others may read it.

    Two gateways that start at once agree: the file appears whole, and who comes second reads it.
    """
    path = keys_dir / KEY_FILE
    try:
        keys_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            draft = keys_dir / f".{KEY_FILE}.{secrets.token_hex(4)}"
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(os.urandom(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, path)
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise StartRefused(f"others may read {path}", hint=f"run: chmod 600 {path}")
        key = path.read_bytes()
    except OSError as error:
        raise StartRefused(
            f"cannot read or make {path}: {error.strerror}", hint="check that the keys directory is writable"
        ) from error
    if len(key) != KEY_BYTES:
        raise StartRefused(f"{path} holds no key", hint="delete it: edge nodes then exchange their credentials again")
    return key
