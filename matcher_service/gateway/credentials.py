"""The bearer token of a data directory: made at first start, kept in a file that only its owner can read."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from matcher_service.access.verbs import EVERY_SCOPE
from matcher_service.errors import StartRefused
from matcher_service.terms import Actor

TOKEN_FILE = "token"


class BearerToken:
    """One token for all callers of a loopback service, with every scope. Its actor is named by a digest of the
    token, so that the audit can tell one token from the next without holding either."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._actor = Actor(f"token-{hashlib.sha256(self._token).hexdigest()[:12]}", EVERY_SCOPE)

    def reads(self, presented: str) -> Actor | None:
        """Who presents it, None for any other text; compares in constant time."""
        return self._actor if hmac.compare_digest(presented.encode(errors="replace"), self._token) else None


def load_or_create(data_dir: Path) -> tuple[str, Path]:
    """The token of this data directory and its file, which is created with mode 0600 if there is none.

    The caller holds the directory's lock. Raises StartRefused if others may read the file or it is empty.
    """
    path = data_dir / TOKEN_FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read(path), path
    except OSError as error:
        raise StartRefused(
            f"cannot write the token file {path}: {error.strerror}", hint="check that storage.data_dir is writable"
        ) from error
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
        file.flush()
        os.fsync(file.fileno())
    return token, path


def _read(path: Path) -> str:
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise StartRefused(f"others may read the token file {path}", hint=f"run: chmod 600 {path}")
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartRefused(
            f"cannot read the token file {path}: {error}", hint="make it readable to the service, or delete it"
        ) from error
    if len(token) < 32:
        raise StartRefused(
            f"the token file {path} holds no token", hint="delete it, and a new token is made at the next start"
        )
    return token
