"""A small identity provider: real keys, their JWKS as a file, and tokens for persons."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey, Key, RSAKey

ISSUER = "https://id.force.example"
AUDIENCE = "matcher"


class IdentityProvider:
    def __init__(self, folder: Path) -> None:
        self.file = folder / "jwks.json"
        self.keys: dict[str, Key] = {}
        self.add("rsa-1", RSAKey.generate_key(2048, auto_kid=False))
        self.add("ec-1", ECKey.generate_key("P-256", auto_kid=False))

    def add(self, kid: str, key: Key) -> None:
        self.keys[kid] = key
        self.publish()

    def publish(self) -> None:
        public = [{**key.as_dict(private=False), "kid": kid, "use": "sig"} for kid, key in self.keys.items()]
        self.file.write_text(json.dumps({"keys": public}))

    def settings(self, **other: Any) -> dict[str, Any]:
        """For [access]."""
        return {"oidc_issuer": ISSUER, "oidc_audience": AUDIENCE, "oidc_jwks_file": self.file, **other}

    def token(
        self,
        person: str,
        *roles: str,
        galleries: tuple[str, ...] = ("*",),
        kid: str = "ec-1",
        algorithm: str = "ES256",
        header: dict[str, Any] | None = None,
        key: Any = None,
        now_s: float | None = None,
        **claims: Any,
    ) -> str:
        """A good token unless `claims` say otherwise; a claim of None is left out."""
        now = int(time.time() if now_s is None else now_s)
        said = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": person,
            "iat": now,
            "exp": now + 600,
            "roles": list(roles),
            "galleries": list(galleries),
            **claims,
        }
        return jwt.encode(
            {"alg": algorithm, "kid": kid, **(header or {})},
            {name: value for name, value in said.items() if value is not None},
            key or self.keys[kid],
            algorithms=[algorithm],
        )
