"""Copies of the gallery log of one data directory, and their return.

A copy is taken of a running service through SQLite's online backup: one moment of the log, whole, without a pause of
searches or writes. It holds no keys, so by itself it opens for nobody. What was withdrawn after that moment stands in
the erasure ledger beside the keys, and a restored log obeys it before it serves.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import orjson

from matcher_service.errors import Conflict, DataDamaged, InvalidInput, NotFound
from matcher_service.gallery.sqlite import FILE_NAME

MANIFEST = "backup.json"
FORMAT = 1


class Backup(NamedTuple):
    """What a copy holds: the newest sequence and audit record, and the SHA-256 of the file."""

    taken_at_ms: int
    sequence: int
    audit_index: int
    bytes: int
    sha256: str


def back_up(data_dir: Path, into: Path, at_ms: int) -> Backup:
    """Copy the log of a data directory, in use or not, into a new folder. Durable on return.

    Raises NotFound if there is no log, Conflict if the folder exists.
    """
    source = data_dir / FILE_NAME
    if not source.is_file():
        raise NotFound(f"no gallery log at {source}", field="data_dir", hint="give the service's storage.data_dir")
    try:
        into.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise Conflict(f"{into} exists already", field="into", hint="name a new folder for each backup") from None
    target = into / FILE_NAME
    with (
        closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True)) as held,
        closing(sqlite3.connect(target)) as copy,
    ):
        held.backup(copy)
        # One file that is whole by itself; the copy of a log in write-ahead mode would make files beside it.
        copy.execute("PRAGMA journal_mode=DELETE")
        (sequence,) = copy.execute("SELECT coalesce(max(sequence), 0) FROM entry").fetchone()
        (audit_index,) = copy.execute("SELECT coalesce(max(position), 0) FROM audit_record").fetchone()
    os.chmod(target, 0o600)
    made = Backup(at_ms, sequence, audit_index, target.stat().st_size, _digest(target))
    (into / MANIFEST).write_bytes(orjson.dumps({"format": FORMAT, **made._asdict()}, option=orjson.OPT_INDENT_2))
    for path in (target, into / MANIFEST, into, into.parent):
        _sync(path)
    return made


def read_backup(folder: Path) -> Backup:
    """What stands in a backup, verified to the byte. Raises NotFound, or DataDamaged if a byte has changed."""
    try:
        told = orjson.loads((folder / MANIFEST).read_bytes())
        if told.pop("format") != FORMAT:
            raise InvalidInput(
                "the backup is of another format", field="backup", hint="restore it with its own release"
            )
        made = Backup(**told)
    except FileNotFoundError:
        raise NotFound(
            f"no backup in {folder}", field="backup", hint=f"give the folder that holds {MANIFEST}"
        ) from None
    except (ValueError, TypeError, KeyError) as senseless:
        raise DataDamaged(f"{folder / MANIFEST} makes no sense", hint="take another backup") from senseless
    copy = folder / FILE_NAME
    if not copy.is_file() or copy.stat().st_size != made.bytes or _digest(copy) != made.sha256:
        raise DataDamaged(f"{copy} is not what was backed up", hint="take another backup")
    return made


def restore(folder: Path, data_dir: Path) -> Backup:
    """Put a backup into a data directory that holds no log. Nothing is served here: the start obeys the ledger first.

    Raises as `read_backup`, and Conflict if the directory holds a log.
    """
    made = read_backup(folder)
    target = data_dir / FILE_NAME
    if any(data_dir.glob(f"{FILE_NAME}*")):
        raise Conflict(f"{data_dir} holds a log already", field="data_dir", hint="restore into an empty directory")
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = data_dir / "restoring"
    shutil.copyfile(folder / FILE_NAME, partial)
    os.chmod(partial, 0o600)
    _sync(partial)
    if _digest(partial) != made.sha256:
        partial.unlink()
        raise DataDamaged("the copy differs from the backup", hint="check the disks, and restore again")
    partial.rename(target)
    _sync(data_dir)
    return made


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)
