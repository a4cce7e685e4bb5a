"""A real directory whose owner can lose power between any two steps, and in the middle of one.

What the index must survive: a file written in part; a renaming or a removal that was not yet synced, of which
any subset is undone. What was synced stays.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from matcher_service.index.disk import UNFINISHED_SUFFIX, Disk, Written


class PowerLost(Exception):
    pass


class FaultyDisk(Disk):
    def __init__(self, directory: Path, seed: int = 0) -> None:
        super().__init__(directory)
        self.steps_left: int | None = None
        self.steps = 0
        self._chance = random.Random(seed)
        # What each name held before it was changed since the last sync; None: nothing.
        self._unsynced: dict[str, bytes | None] = {}

    def write(self, name: str, chunks: Iterable[bytes | bytearray | memoryview]) -> Written:
        pieces = [bytes(chunk) for chunk in chunks]
        if self._exhausted():
            whole = b"".join(pieces)
            torn = whole[: self._chance.randrange(len(whole) + 1)]
            (self.directory / (name + UNFINISHED_SUFFIX)).write_bytes(torn)
            self._lose_power()
        self._remember(name)
        return super().write(name, pieces)

    def sync(self) -> None:
        if self._exhausted():
            self._lose_power()
        super().sync()
        self._unsynced.clear()

    def remove(self, name: str) -> None:
        if self._exhausted():
            self._lose_power()
        self._remember(name)
        super().remove(name)

    def _exhausted(self) -> bool:
        self.steps += 1
        if self.steps_left is None:
            return False
        self.steps_left -= 1
        return self.steps_left < 0

    def _remember(self, name: str) -> None:
        path = self.directory / name
        self._unsynced.setdefault(name, path.read_bytes() if path.exists() else None)

    def _lose_power(self) -> None:
        for name, before in self._unsynced.items():
            if self._chance.random() < 0.5:
                continue
            path = self.directory / name
            if before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(before)
        raise PowerLost

    def _flush(self, descriptor: int) -> None:
        """Syncing is what this disk pretends; the pages need not reach a platter in a test."""
