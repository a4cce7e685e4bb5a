"""The erasure ledger: which references were withdrawn, kept outside the database, so that a restored one forgets them.

A backup of the database brings back who was withdrawn since. The ledger holds a line for each of them, a digest that
names nobody, and the log's sequence at that time. A database that is opened with an older head than the ledger has
seen was restored: what of it stands in the ledger is withdrawn again before anything is searched. Deleted galleries
need no line: their keys are destroyed. Files are named by month and removed once no backup can be older.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from matcher_service.gallery.keys import sync_directory


class Ended(NamedTuple):
    """A reference that was withdrawn before it expired, as `live` had it."""

    gallery_id: str
    reference_id: str
    sequence: int
    enrolled_at_ms: int

    @property
    def digest(self) -> str:
        text = f"{self.gallery_id}\0{self.reference_id}\0{self.sequence}\0{self.enrolled_at_ms}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class ErasureLedger:
    """Used by one thread. Methods raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unwritten: list[str] = []

    def add(self, ended: Iterable[Ended], head: int, at_ms: int) -> None:
        """Durable on return; what could not be written is kept for the next call."""
        self._unwritten += [f"{one.digest} {head}\n" for one in ended]
        if not self._unwritten:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m}.ledger"
        fresh = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, "".join(self._unwritten).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if fresh:
            sync_directory(self._folder)
        self._unwritten = []

    def read(self) -> tuple[frozenset[str], int]:
        """(digests of all that ended, the newest sequence at which one did). A torn last line is passed over: what it
        stood for was not acknowledged."""
        digests: set[str] = set()
        newest = 0
        for path in sorted(self._folder.glob("*.ledger")):
            for line in path.read_text().splitlines():
                digest, _, head = line.partition(" ")
                if len(digest) == 32 and head.isdecimal():
                    digests.add(digest)
                    newest = max(newest, int(head))
        return frozenset(digests), newest

    def drop_before(self, at_ms: int) -> None:
        """Remove the files of months that ended before this time."""
        month = f"{datetime.fromtimestamp(max(0, at_ms) / 1000, UTC):%Y-%m}"
        for path in self._folder.glob("*.ledger"):
            if path.stem < month:
                path.unlink()


def returned(live: Iterable[Sequence[object]], digests: frozenset[str]) -> list[Ended]:
    """Which of the rows (gallery_id, reference_id, sequence, enrolled_at_ms) stand in the ledger."""
    rows = (Ended(str(row[0]), str(row[1]), int(str(row[2])), int(str(row[3]))) for row in live)
    return [one for one in rows if one.digest in digests]
