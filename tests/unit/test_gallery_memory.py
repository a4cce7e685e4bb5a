"""The gallery log holds as much memory after a year of alerts as after a minute of them."""

from __future__ import annotations

import _sqlite3
import ctypes
from pathlib import Path

import pytest

from matcher_service.gallery.log import READERS, open_sqlite_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import AuditEvent
from tests.fake_clock import FakeClock

MIB = 1 << 20


def sqlite_bytes() -> int:
    """What SQLite has taken of the memory of this process, by its own count."""
    # The driver's module, so that the library counted is the one that it uses.
    library = ctypes.CDLL(_sqlite3.__file__)
    if not hasattr(library, "sqlite3_memory_used"):
        pytest.skip("SQLite is hidden inside its driver")
    library.sqlite3_memory_used.restype = ctypes.c_int64
    return int(library.sqlite3_memory_used())


async def test_what_the_log_keeps_in_memory_does_not_follow_what_is_recorded_and_read(tmp_path: Path) -> None:
    before = sqlite_bytes()
    log = await open_sqlite_log(tmp_path, tmp_path / "keys", StorageSettings(), FakeClock())
    try:
        held = []
        for _ in range(2):
            for _ in range(4):
                events = [AuditEvent("clerk", "looked", f"{at}", {"why": "x" * 64_000}) for at in range(64)]
                await log.record(events, [])
            for start in range(0, 256, 64):
                await log.audit(start, 64)
            held.append(sqlite_bytes() - before)
    finally:
        await log.close()
    assert (tmp_path / "gallery.db").stat().st_size > 32 * MIB
    # Eight megabytes of the writer, two of each reader, and what statements take.
    assert held[0] < (8 + 2 * READERS + 2) * MIB
    assert held[1] < held[0] + MIB
