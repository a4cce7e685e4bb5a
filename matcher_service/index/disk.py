"""What the index does to its directory: the only module in it that writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

UNFINISHED_SUFFIX = ".unfinished"


class Written(NamedTuple):
    """Size in bytes and hexadecimal SHA-256 of a file written."""

    size: int
    sha256: str


class Disk:
    """Files of one directory. A file appears under its name only when it is complete and durable."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open(self) -> None:
        """Make the directory if need be, readable by its owner alone."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, name: str, chunks: Iterable[bytes | bytearray | memoryview]) -> Written:
        """Write aside, sync, rename. `sync` makes the renaming durable."""
        unfinished = self.directory / (name + UNFINISHED_SUFFIX)
        digest = hashlib.sha256()
        size = 0
        with open(unfinished, "wb", buffering=0, opener=_private) as file:
            for chunk in chunks:
                view = memoryview(chunk)
                digest.update(view)
                size += len(view)
                while len(view):
                    view = view[file.write(view) :]
            self._flush(file.fileno())
        os.replace(unfinished, self.directory / name)
        return Written(size, digest.hexdigest())

    def sync(self) -> None:
        """Make what was renamed and removed durable."""
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._flush(descriptor)
        finally:
            os.close(descriptor)

    def _flush(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir() if path.is_file())

    def remove(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
