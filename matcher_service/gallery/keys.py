"""The keyring: AES-256 data keys, each gallery's in generations, wrapped, in files outside the database.

    keys_dir/                         mode 0700; belongs in no backup of the database
      master.key                      32 random bytes, mode 0600; missing where a key service wraps
      master-<id>.key                 the master key before, while something is still wrapped under it
      system.key                      wrapped; seals alerts and the personal details of the audit
      galleries/<digest>.key          wrapped: the first generation of a gallery's key; digest: SHA-256 of its id
      galleries/<digest>.<n>.key      generation n, made by a rotation
      galleries/<digest>.destroyed    what is left of a destroyed key: when, and of which gallery
      audit/<n>.key                   wrapped: what signs the audit (`signing.py`)

A wrapped key is the format byte 2, the length and text of the id of what wrapped it (`wrapping.py`), and what that made
of the key under its name, so that files cannot change places. Format 1 was without the id: a nonce and AES-256-GCM
under master.key, and names of its own. Files are written aside, synced, renamed, and their directory is synced: a key
is durable before anything is sealed under it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from matcher_service.errors import Conflict, DataDamaged, LogUnavailable, NotFound, StartRefused
from matcher_service.gallery.wrapping import KEY_BYTES, SERVICE, KeyFile, KeyService, Unfit, Wrapping
from matcher_service.settings import KeySettings
from matcher_service.terms import DataKey

_BY_MASTER_FILE, _BY_NAMED = b"\x01", b"\x02"
_MASTER = "master.key"


class Rewrapped(NamedTuple):
    """How many keys were wrapped anew and under what; how many are still under another, because they are of format 1
    and their gallery is not known any more."""

    keys: int
    by: str
    left: int


class Keyring:
    """The data keys of one gallery log. Methods may be called from any thread, and several processes may share the
    directory: one at a time makes, wraps or destroys keys, and a key that any of them destroyed is gone for all at its
    next use.

    Removing a key overwrites and unlinks its file. On media that never overwrite in place (copy-on-write file
    systems, flash) the old blocks are beyond any program's reach; there, destroy the master key with the medium.
    """

    def __init__(self, keys_dir: Path, settings: KeySettings) -> None:
        self._dir = keys_dir
        self._galleries = keys_dir / "galleries"
        self._by_service = settings.wrapped_by == "service"
        self._lock = threading.Lock()
        self._ciphers: dict[tuple[str, int], tuple[bytes, AESGCM]] = {}
        self._newest: dict[str, int] = {}
        self._gone: set[str] = set()
        self._service: Wrapping | None = KeyService(settings) if settings.service_url else None
        # The master keys by id; that of master.key, if there is one, is the current.
        self._masters: dict[str, KeyFile] = {}
        self._current: KeyFile | None = None
        self._system: AESGCM | None = None

    @classmethod
    def open(cls, keys_dir: Path, settings: KeySettings | None = None) -> Keyring:
        """The keyring of a directory, which may not exist yet; `prepare` makes what is missing.

        Raises StartRefused if the master key is readable by others or is no key, or if the key service cannot be asked.
        """
        keyring = cls(keys_dir, settings or KeySettings())  # type: ignore[call-arg]
        keyring._load()
        return keyring

    def prepare(self, *, fresh: bool) -> None:
        """Make the master key and the system key if they are missing; durable on return.

        `fresh`: nothing has been sealed yet. Otherwise a missing key is not made anew but raises StartRefused, since
        what was sealed under it could never be read again.
        """
        master, system = self._dir / _MASTER, self._dir / "system.key"
        needed = [system] if self._by_service or self._service else [master, system]
        if not fresh and (missing := [path for path in needed if not path.exists()]):
            raise StartRefused(
                f"no key at {missing[0]}, and the gallery log holds what was sealed under it",
                hint="restore the keys directory, or set storage.keys_dir to where it is; if a key service wraps the "
                "keys, name it in keys.service_url",
            )
        self._galleries.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._dir.chmod(0o700)
        with alone(self._dir):
            if fresh and not self._by_service and not master.exists():
                write_durably(master, os.urandom(KEY_BYTES))
                sync_directory(self._dir.parent)
            self._load()
            if not system.exists():
                try:
                    write_durably(system, self._wrapped("system", os.urandom(KEY_BYTES)))
                except LogUnavailable as away:
                    raise StartRefused(away.detail, hint=away.hint) from away
                self._load()

    def require(self) -> None:
        """Raises StartRefused if the system key is missing; makes nothing."""
        self._load()
        if self._system is None:
            raise StartRefused(
                f"no keys in {self._dir}",
                hint="set storage.keys_dir to the keys directory of the gateways; the first of them makes it",
            )

    def _load(self) -> None:
        self._load_masters()
        system = self._dir / "system.key"
        if self._system is None and system.exists() and (self._masters or self._service):
            try:
                self._system = AESGCM(self._unwrapped("system", system))
            except LogUnavailable as away:
                raise StartRefused(away.detail, hint=away.hint) from away

    def _load_masters(self) -> None:
        found = {one.id: one for path in self._dir.glob("master-*.key") if (one := KeyFile(path))}
        master = self._dir / _MASTER
        self._current = KeyFile(master) if master.exists() else None
        if self._current is not None:
            found[self._current.id] = self._current
        self._masters = found

    @property
    def directory(self) -> Path:
        """Where it lives; what else must outlast a restored database lives there too."""
        return self._dir

    # --- keys of galleries -------------------------------------------------------------------------

    def create(self, gallery_id: str, generation: int = 1) -> None:
        """Make a generation of a gallery's key durable. One that is there already stays.

        Raises Conflict if the gallery's key was destroyed, LogUnavailable if it cannot be wrapped now.
        """
        with self._lock, alone(self._dir):
            if self._tombstone(gallery_id).exists():
                raise Conflict(
                    f"the key of gallery {gallery_id} was destroyed",
                    field="gallery_id",
                    hint="an id is never used twice; choose another",
                )
            path = self._path(gallery_id, generation)
            if not path.exists():
                self._load_masters()  # another process may have changed it
                write_durably(path, self._wrapped(_name_of(path), os.urandom(KEY_BYTES)))
            self._gone.discard(gallery_id)

    def key(self, gallery_id: str, generation: int = 0) -> DataKey | None:
        """A generation of a gallery's key; 0: the newest that there is.

        Raises NotFound if the gallery has none or it was destroyed, DataDamaged if its file fails its authentication,
        LogUnavailable if the key service cannot be asked for it. None if only this generation is gone.
        """
        newest = self.newest(gallery_id)
        found = self._find(gallery_id, generation or newest) if newest else None
        if found is None and (not newest or not generation):
            raise NotFound(
                f"no key for gallery {gallery_id}: what it sealed cannot be read",
                field="gallery_id",
                hint="restore the keys directory, unless the gallery was deleted",
            )
        return None if found is None else DataKey(generation or newest, found[0])

    def cipher(self, gallery_id: str, generation: int = 1) -> AESGCM | None:
        """The cipher under a generation of a gallery's key; None if there is no such key or it was destroyed."""
        found = self._find(gallery_id, generation)
        return None if found is None else found[1]

    def newest(self, gallery_id: str) -> int:
        """The newest generation of a gallery's key that there is; 0 if it has none, or it was destroyed."""
        with self._lock:
            if self._is_gone(gallery_id):
                return 0
            newest = self._newest.get(gallery_id, 0)
            if not newest:
                digest = self._path(gallery_id).stem
                newest = max((_generation_of(one) for one in self._galleries.glob(f"{digest}*.key")), default=0)
            # Looked for every time: another process may have made one.
            while newest and self._path(gallery_id, newest + 1).exists():
                newest += 1
            if newest:
                self._newest[gallery_id] = newest
            return newest

    @property
    def system(self) -> AESGCM:
        """The cipher for what belongs to no gallery: alerts, and the personal details of the audit."""
        if self._system is None:
            raise StartRefused("the keyring has no system key yet", hint="open the gallery log first: it makes one")
        return self._system

    def destroyed(self, gallery_id: str) -> bool:
        return self._tombstone(gallery_id).exists()

    def destroyed_at_ms(self, gallery_id: str) -> int | None:
        """When the key of a gallery was destroyed; None if it was not."""
        try:
            return int(json.loads(self._tombstone(gallery_id).read_bytes())["destroyed_at_ms"])
        except FileNotFoundError:
            return None

    def destroy(self, gallery_id: str, at_ms: int) -> None:
        """Remove a gallery's key for good, in all its generations; durable on return. Repeating it, or there being no
        key, is no error."""
        with self._lock, alone(self._dir):
            tombstone = self._tombstone(gallery_id)
            if not tombstone.exists():
                note = json.dumps({"gallery_id": gallery_id, "destroyed_at_ms": at_ms}, sort_keys=True)
                write_durably(tombstone, note.encode())
            self._remove(self._generations(gallery_id))
            self._drop(gallery_id)
            self._gone.add(gallery_id)

    def forget(self, gallery_id: str, before: int) -> None:
        """Remove the generations of a gallery's key before this one, for good; durable on return, and repeatable."""
        with self._lock, alone(self._dir):
            self._remove(one for one in self._generations(gallery_id) if _generation_of(one) < before)
            self._drop(gallery_id)

    def _drop(self, gallery_id: str) -> None:
        self._newest.pop(gallery_id, None)
        for place in [place for place in self._ciphers if place[0] == gallery_id]:
            del self._ciphers[place]

    def _find(self, gallery_id: str, generation: int) -> tuple[bytes, AESGCM] | None:
        with self._lock:
            if self._is_gone(gallery_id):
                return None
            place = (gallery_id, generation)
            found, path = self._ciphers.get(place), self._path(*place)
            # Looked for every time: another process may have made the key since, or destroyed it.
            if not path.exists():
                self._ciphers.pop(place, None)
                return None
            if found is None:
                data_key = self._unwrapped(_name_of(path), path, f"gallery:{gallery_id}")
                found = self._ciphers[place] = (data_key, AESGCM(data_key))
            return found

    def _is_gone(self, gallery_id: str) -> bool:
        if gallery_id not in self._gone and self.destroyed(gallery_id):
            self._drop(gallery_id)
            self._gone.add(gallery_id)
        return gallery_id in self._gone

    def _generations(self, gallery_id: str) -> list[Path]:
        return sorted(self._galleries.glob(f"{self._path(gallery_id).stem}*.key"))

    def _path(self, gallery_id: str, generation: int = 1) -> Path:
        digest = hashlib.sha256(gallery_id.encode()).hexdigest()
        return self._galleries / (f"{digest}.key" if generation == 1 else f"{digest}.{generation}.key")

    def _tombstone(self, gallery_id: str) -> Path:
        return self._path(gallery_id).with_suffix(".destroyed")

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            with path.open("r+b", buffering=0) as file:
                file.write(os.urandom(path.stat().st_size))
                os.fsync(file.fileno())
            path.unlink()
            sync_directory(path.parent)

    # --- wrapping ----------------------------------------------------------------------------------

    def store(self, name: str, path: Path, secret: bytes) -> None:
        """Keep another secret of the service, wrapped, in a file; durable on return. Raises LogUnavailable."""
        with self._lock, alone(self._dir):
            self._load_masters()
            write_durably(path, self._wrapped(name, secret))

    def unwrap(self, name: str, path: Path) -> bytes:
        """What `store` put into a file. Raises DataDamaged if it fails its authentication, LogUnavailable."""
        return self._unwrapped(name, path)

    def rewrap(self, gallery_ids: Iterable[str]) -> Rewrapped:
        """Wrap every key anew: by a new master key, or by the key service, as the settings say. The master key before
        is destroyed when nothing is wrapped under it any more.

        Goes on where one that broke off had stopped. `gallery_ids` are all there are: keys of format 1 can be unwrapped
        only by the name of their gallery. Raises LogUnavailable or DataDamaged, and every key stays as readable as it
        was.
        """
        with self._lock, alone(self._dir):
            self._load_masters()
            if not self._by_service and len(self._masters) < 2:
                if self._current is not None:
                    # Under its own name first, so that no moment is without it.
                    before = self._dir / f"master-{self._current.id.removeprefix('file:')}.key"
                    write_durably(before, (self._dir / _MASTER).read_bytes())
                write_durably(self._dir / _MASTER, os.urandom(KEY_BYTES))
                self._load_masters()
            by = self._wraps_now()
            old_names = {self._path(one).stem: f"gallery:{one}" for one in gallery_ids}
            done = left = 0
            for path in sorted([*self._galleries.glob("*.key"), *self._dir.glob("audit/*.key")]):
                done, left = self._rewrap(path, _name_of(path), old_names.get(path.stem, ""), by, done, left)
            done, left = self._rewrap(self._dir / "system.key", "system", "", by, done, left)
            if not left:
                stale = list(self._dir.glob("master-*.key"))
                self._remove([*stale, self._dir / _MASTER] if self._by_service and self._current else stale)
            self._load_masters()
            return Rewrapped(done, by.id, left)

    def _rewrap(self, path: Path, name: str, old_name: str, by: Wrapping, done: int, left: int) -> tuple[int, int]:
        stored = path.read_bytes()
        # What the key service wrapped is wrapped anew by the newest version of its key.
        if by.id != SERVICE and stored.startswith(_before(by)):
            return done, left
        if stored[:1] == _BY_MASTER_FILE and path.parent == self._galleries and not old_name:
            return done, left + 1
        secret = self._unwrapped(name, path, old_name)
        write_durably(path, _named(by, name, secret))
        return done + 1, left

    def _wraps_now(self) -> Wrapping:
        wrapping = self._service if self._by_service else self._current or self._service
        if wrapping is None:
            raise StartRefused("the keyring has no master key yet", hint="open the gallery log first: it makes one")
        return wrapping

    def _wrapped(self, name: str, data_key: bytes) -> bytes:
        return _named(self._wraps_now(), name, data_key)

    def _unwrapped(self, name: str, path: Path, old_name: str = "") -> bytes:
        """The key in a file. `old_name` is what it was called in format 1, if it was called otherwise."""
        stored = path.read_bytes()
        try:
            if stored[:1] == _BY_MASTER_FILE:
                return self._by_some_master(old_name or name, stored[1:])
            by = _wrapped_by(stored)
            wrapping: Wrapping | None = self._service if by == SERVICE else self._master(by)
            if wrapping is None:
                raise Unfit
            return wrapping.unwrap(name, stored[2 + len(by) :])
        except Unfit as unfit:
            raise DataDamaged(
                f"the key file {path} of {name} fails its authentication under what wrapped it",
                hint="restore the keys directory: master key and data keys belong together; "
                "or name the key service that wrapped it (keys.service_url)",
            ) from unfit

    def _master(self, by: str) -> KeyFile | None:
        if by not in self._masters:
            self._load_masters()  # another process may have changed it
        return self._masters.get(by)

    def _by_some_master(self, name: str, wrapped: bytes) -> bytes:
        for one in [*self._masters.values()]:
            try:
                return one.unwrap(name, wrapped)
            except Unfit:
                continue
        raise Unfit


def _before(by: Wrapping) -> bytes:
    """How the file of a key begins that this wrapped."""
    told = by.id.encode()
    return _BY_NAMED + bytes([len(told)]) + told


def _named(by: Wrapping, name: str, secret: bytes) -> bytes:
    return _before(by) + by.wrap(name, secret)


def _wrapped_by(stored: bytes) -> str:
    """The id of what wrapped a key; "" in format 1. Raises Unfit."""
    if stored[:1] == _BY_MASTER_FILE:
        return ""
    if stored[:1] != _BY_NAMED or len(stored) < 2 or len(stored) < 2 + stored[1]:
        raise Unfit
    return stored[2 : 2 + stored[1]].decode(errors="replace")


def _name_of(path: Path) -> str:
    """What a key is called by its file: gallery-key:<digest>, gallery-key:<digest>.<n>, audit:<n>."""
    return f"{'gallery-key' if path.parent.name == 'galleries' else path.parent.name}:{path.stem}"


def _generation_of(path: Path) -> int:
    _, dot, number = path.stem.partition(".")
    return int(number) if dot else 1


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
