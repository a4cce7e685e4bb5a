"""The keyring: one AES-256 data key per gallery, wrapped by a master key, in files outside the database.

    keys_dir/                       mode 0700; belongs in no backup of the database
      master.key                    32 random bytes, mode 0600
      system.key                    wrapped; seals alerts and the personal details of the audit
      galleries/<digest>.key        wrapped; the digest is SHA-256 of the gallery id
      galleries/<digest>.destroyed  what is left of a destroyed key: when, and of which gallery

A wrapped key is a format byte, a 12-byte nonce and AES-256-GCM of the data key under the master key with the name
as associated data, so that files cannot change places. Files are written aside, synced, renamed, and their
directory is synced: a key is durable before anything is sealed under it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from matcher_service.errors import Conflict, DataDamaged, NotFound, StartRefused

KEY_BYTES = 32
_FORMAT = b"\x01"
_NONCE_BYTES = 12


class Keyring:
    """The data keys of one gallery log. Methods may be called from any thread, and several processes may share the
    directory: one at a time makes or destroys keys, and a key that any of them destroyed is gone for all at its next
    use.

    Removing a key overwrites and unlinks its file. On media that never overwrite in place (copy-on-write file
    systems, flash) the old blocks are beyond any program's reach; there, destroy the master key with the medium.
    """

    def __init__(self, keys_dir: Path) -> None:
        self._dir = keys_dir
        self._galleries = keys_dir / "galleries"
        self._lock = threading.Lock()
        self._ciphers: dict[str, tuple[bytes, AESGCM]] = {}
        self._gone: set[str] = set()
        self._master: AESGCM | None = None
        self._system: AESGCM | None = None

    @classmethod
    def open(cls, keys_dir: Path) -> Keyring:
        """The keyring of a directory, which may not exist yet; `prepare` makes what is missing.

        Raises StartRefused if the master key is readable by others or is no key.
        """
        keyring = cls(keys_dir)
        keyring._load()
        return keyring

    def prepare(self, *, fresh: bool) -> None:
        """Make the master key and the system key if they are missing; durable on return.

        `fresh`: nothing has been sealed yet. Otherwise a missing key is not made anew but raises StartRefused, since
        what was sealed under it could never be read again.
        """
        master, system = self._dir / "master.key", self._dir / "system.key"
        if not fresh and (missing := [path for path in (master, system) if not path.exists()]):
            raise StartRefused(
                f"no key at {missing[0]}, and the gallery log holds what was sealed under it",
                hint="restore the keys directory, or set storage.keys_dir to where it is",
            )
        self._galleries.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._dir.chmod(0o700)
        with alone(self._dir):
            if not master.exists():
                write_durably(master, os.urandom(KEY_BYTES))
                sync_directory(self._dir.parent)
            self._load()
            if not system.exists():
                write_durably(system, self._wrapped("system", os.urandom(KEY_BYTES)))
                self._load()

    def require(self) -> None:
        """Raises StartRefused if master key or system key are missing; makes nothing."""
        self._load()
        if self._system is None:
            raise StartRefused(
                f"no keys in {self._dir}",
                hint="set storage.keys_dir to the keys directory of the gateways; the first of them makes it",
            )

    def _load(self) -> None:
        master, system = self._dir / "master.key", self._dir / "system.key"
        if master.exists():
            if master.stat().st_mode & 0o077:
                raise StartRefused(f"the master key {master} is open to others", hint=f"chmod 600 {master}")
            self._master = AESGCM(_read_exactly(master, KEY_BYTES))
            if system.exists():
                self._system = AESGCM(self._unwrapped("system", system))

    @property
    def directory(self) -> Path:
        """Where it lives; what else must outlast a restored database lives there too."""
        return self._dir

    def create(self, gallery_id: str) -> None:
        """Make a gallery's key durable. One that is there already stays. Raises Conflict if it was destroyed."""
        with self._lock, alone(self._galleries):
            if self._tombstone(gallery_id).exists():
                raise Conflict(
                    f"the key of gallery {gallery_id} was destroyed",
                    field="gallery_id",
                    hint="an id is never used twice; choose another",
                )
            path = self._path(gallery_id)
            if not path.exists():
                write_durably(path, self._wrapped(f"gallery:{gallery_id}", os.urandom(KEY_BYTES)))
            self._gone.discard(gallery_id)

    def key(self, gallery_id: str) -> bytes:
        """The 32-byte data key of a gallery.

        Raises NotFound if there is none or it was destroyed, DataDamaged if its file fails its authentication.
        """
        found = self._find(gallery_id)
        if found is None:
            raise NotFound(
                f"no key for gallery {gallery_id}: what it sealed cannot be read",
                field="gallery_id",
                hint="restore the keys directory, unless the gallery was deleted",
            )
        return found[0]

    def cipher(self, gallery_id: str) -> AESGCM | None:
        """The cipher under a gallery's key; None if there is no key or it was destroyed."""
        found = self._find(gallery_id)
        return None if found is None else found[1]

    @property
    def system(self) -> AESGCM:
        """The cipher for what belongs to no gallery: alerts, and the personal details of the audit."""
        return _present(self._system)

    def destroyed(self, gallery_id: str) -> bool:
        return self._tombstone(gallery_id).exists()

    def destroy(self, gallery_id: str, at_ms: int) -> None:
        """Remove a gallery's key for good; durable on return. Repeating it, or there being no key, is no error."""
        with self._lock, alone(self._galleries):
            tombstone = self._tombstone(gallery_id)
            if not tombstone.exists():
                note = json.dumps({"gallery_id": gallery_id, "destroyed_at_ms": at_ms}, sort_keys=True)
                write_durably(tombstone, note.encode())
            path = self._path(gallery_id)
            if path.exists():
                with path.open("r+b", buffering=0) as file:
                    file.write(os.urandom(path.stat().st_size))
                    os.fsync(file.fileno())
                path.unlink()
                sync_directory(self._galleries)
            self._ciphers.pop(gallery_id, None)
            self._gone.add(gallery_id)

    def _find(self, gallery_id: str) -> tuple[bytes, AESGCM] | None:
        with self._lock:
            if gallery_id in self._gone:
                return None
            found, path = self._ciphers.get(gallery_id), self._path(gallery_id)
            # Looked for every time: another process may have made the key since, or destroyed it.
            if not path.exists():
                self._ciphers.pop(gallery_id, None)
                if self._tombstone(gallery_id).exists():
                    self._gone.add(gallery_id)
                return None
            if found is None and not self._tombstone(gallery_id).exists():
                data_key = self._unwrapped(f"gallery:{gallery_id}", path)
                found = self._ciphers[gallery_id] = (data_key, AESGCM(data_key))
            return found

    def wrap(self, name: str, secret: bytes) -> bytes:
        """A secret of the service under the master key, to be kept in a file."""
        return self._wrapped(name, secret)

    def unwrap(self, name: str, path: Path) -> bytes:
        """What `wrap` gave, from its file. Raises DataDamaged if it fails its authentication."""
        return self._unwrapped(name, path)

    def _path(self, gallery_id: str) -> Path:
        return self._galleries / f"{hashlib.sha256(gallery_id.encode()).hexdigest()}.key"

    def _tombstone(self, gallery_id: str) -> Path:
        return self._path(gallery_id).with_suffix(".destroyed")

    def _wrapped(self, name: str, data_key: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return _FORMAT + nonce + _present(self._master).encrypt(nonce, data_key, name.encode())

    def _unwrapped(self, name: str, path: Path) -> bytes:
        stored = path.read_bytes()
        try:
            if stored[:1] != _FORMAT:
                raise InvalidTag
            return _present(self._master).decrypt(
                stored[1 : 1 + _NONCE_BYTES], stored[1 + _NONCE_BYTES :], name.encode()
            )
        except (InvalidTag, ValueError) as unfit:
            raise DataDamaged(
                f"the key file {path} of {name} fails its authentication under the master key",
                hint="restore the keys directory: master key and data keys belong together",
            ) from unfit


def _present(cipher: AESGCM | None) -> AESGCM:
    if cipher is None:
        raise StartRefused("the keyring has no master key yet", hint="open the gallery log first: it makes one")
    return cipher


def _read_exactly(path: Path, size: int) -> bytes:
    content = path.read_bytes()
    if len(content) != size:
        raise StartRefused(f"{path} holds {len(content)} bytes, not {size}", hint="restore the keys directory")
    return content


def write_durably(path: Path, content: bytes) -> None:
    """Put the content in the place of the file, for its owner only; durable on return."""
    aside = path.with_name(path.name + ".tmp")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
    aside.rename(path)
    sync_directory(path.parent)


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep other processes from changing keys meanwhile: of two gateways that start together, one makes them."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
