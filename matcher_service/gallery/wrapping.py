"""What data keys are wrapped by: a key in a file, or a key service that never gives its key away.

The key service is spoken to as HashiCorp Vault's transit engine is (OpenBao speaks the same), over HTTP, JSON both
ways, bytes in base64, and a token in the header X-Vault-Token:

    POST <url>/encrypt/<key>  {"plaintext": ..., "associated_data": ...}   -> {"data": {"ciphertext": "vault:v1:..."}}
    POST <url>/decrypt/<key>  {"ciphertext": ..., "associated_data": ...}  -> {"data": {"plaintext": ...}}

The ciphertext is any text; the service is to refuse (400) one that it did not make for the same associated data, which
is the name of the wrapped key. Its own key is rotated there: it goes on decrypting what older versions made.
"""

from __future__ import annotations

import base64
import hashlib
import os
import ssl
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from matcher_service.errors import LogUnavailable, StartRefused
from matcher_service.settings import KeySettings

KEY_BYTES = 32
SERVICE = "service"
_NONCE_BYTES = 12
_REPLY_BYTES_MAX = 64 * 1024


class Unfit(Exception):
    """What was to be unwrapped is not what was wrapped, or was wrapped under another key or name."""


class Wrapping(Protocol):
    """Wraps small secrets under a name. Methods block, and are for any thread."""

    @property
    def id(self) -> str:
        """What it is called in the files that it wrapped; at most 255 bytes."""
        ...

    def wrap(self, name: str, secret: bytes) -> bytes:
        """Raises LogUnavailable if it cannot be done now."""
        ...

    def unwrap(self, name: str, wrapped: bytes) -> bytes:
        """Raises Unfit, or LogUnavailable if it cannot be told now."""
        ...


class KeyFile:
    """AES-256-GCM under the 32 bytes of a file; the nonce stands before what is wrapped."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        if len(content) != KEY_BYTES:
            raise StartRefused(f"{path} holds {len(content)} bytes, not {KEY_BYTES}", hint="restore the keys directory")
        if path.stat().st_mode & 0o077:
            raise StartRefused(f"the master key {path} is open to others", hint=f"chmod 600 {path}")
        self._cipher = AESGCM(content)
        self.id = "file:" + hashlib.sha256(b"matcher master key\n" + content).hexdigest()[:16]

    def wrap(self, name: str, secret: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, secret, name.encode())

    def unwrap(self, name: str, wrapped: bytes) -> bytes:
        try:
            return self._cipher.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], name.encode())
        except (InvalidTag, ValueError) as unfit:
            raise Unfit from unfit


class KeyService:
    """A key service, asked for each key once: data keys stay in memory, so that it may be away for a while."""

    id = SERVICE

    def __init__(self, settings: KeySettings) -> None:
        # Imported here: a service whose keys are wrapped by a file has no need of it.
        import httpx

        self._settings = settings
        self._failure = httpx.HTTPError
        try:
            trusted = ssl.create_default_context(cafile=settings.service_ca_file)
        except (OSError, ssl.SSLError) as error:
            raise StartRefused(
                f"cannot read {settings.service_ca_file}: {error}", field="keys.service_ca_file", hint="a PEM file"
            ) from error
        self._http = httpx.Client(
            base_url=settings.service_url.rstrip("/"),
            verify=trusted,
            timeout=settings.service_answers_within_s,
            trust_env=False,
            follow_redirects=False,
        )

    def wrap(self, name: str, secret: bytes) -> bytes:
        told = self._ask("encrypt", name, "plaintext", base64.b64encode(secret).decode(), "ciphertext")
        return told.encode()

    def unwrap(self, name: str, wrapped: bytes) -> bytes:
        try:
            told = self._ask("decrypt", name, "ciphertext", wrapped.decode(), "plaintext")
            return base64.b64decode(told, validate=True)
        except ValueError as unfit:
            raise Unfit from unfit

    def _ask(self, verb: str, name: str, given: str, value: str, wanted: str) -> str:
        body = {given: value, "associated_data": base64.b64encode(name.encode()).decode()}
        try:
            token = self._token()
            reply = self._http.post(f"/{verb}/{self._settings.service_key}", json=body, headers=token)
        except (OSError, self._failure) as broken:
            raise self._unavailable(f"{type(broken).__name__}: {broken}") from broken
        if reply.status_code == 400:
            raise Unfit
        try:
            if reply.status_code != 200:
                raise ValueError(f"status {reply.status_code}")
            told = reply.json()["data"][wanted]
            if not isinstance(told, str) or not told or len(told) > _REPLY_BYTES_MAX:
                raise ValueError(f"no {wanted} in its answer")
        except (ValueError, KeyError, TypeError) as senseless:
            raise self._unavailable(str(senseless)) from senseless
        return told

    def _token(self) -> dict[str, str]:
        # Read anew each time, since secrets are rotated.
        path = self._settings.service_token_file
        return {} if path is None else {"X-Vault-Token": path.read_text("utf-8").strip()}

    def _unavailable(self, why: str) -> LogUnavailable:
        return LogUnavailable(
            f"the key service at {self._settings.service_url} does not wrap or unwrap keys: {why}",
            hint="look at keys.service_url, its token and the service; keys in use stay in memory meanwhile",
            retry_after_ms=1000,
        )
