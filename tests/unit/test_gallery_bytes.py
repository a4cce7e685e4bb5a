"""Law 10: no template stands in the clear in any file, and what was erased is gone from the disk, sealed or not."""

from __future__ import annotations

import base64
import random
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matcher_service.gallery.log import SqlGalleryLog, open_sqlite_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import (
    Actor,
    CreateGallery,
    Enrol,
    Gallery,
    GalleryKind,
    Receipt,
    RegisterSpace,
    SpaceId,
    TemplateSpace,
    Withdraw,
    WithdrawSubject,
    Write,
)
from tests.fake_clock import FakeClock

DIMENSION = 128
SPACE = SpaceId("face", 1, DIMENSION)
CLERK = Actor("clerk")
PIECE_BYTES = 48


def forms(row: NDArray[np.float16]) -> dict[str, bytes]:
    """A template as it might be left behind."""
    wide = row.astype("<f4")
    return {
        "float16": row.tobytes(),
        "float32": wide.tobytes(),
        "float16 base64": base64.b64encode(row.tobytes()),
        "float32 base64": base64.b64encode(wide.tobytes()),
        "float16 hex": row.tobytes().hex().encode(),
        "numbers": ", ".join(str(float(value)) for value in row[:8]).encode(),
        "numbers, closer": ",".join(str(float(value)) for value in row[:8]).encode(),
    }


def pieces(blob: bytes) -> Iterable[bytes]:
    """Parts of a blob, so that a remnant of it is found too."""
    return (blob[start : start + PIECE_BYTES] for start in range(0, len(blob) - PIECE_BYTES + 1, PIECE_BYTES))


def all_bytes(directory: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


def found(directory: Path, needles: Iterable[bytes]) -> list[bytes]:
    content = all_bytes(directory)
    return [needle for needle in needles if needle in content]


def sealed_blobs(directory: Path) -> dict[int, bytes]:
    connection = sqlite3.connect(directory / "gallery.db")
    try:
        return dict(connection.execute("SELECT sequence, sealed FROM entry WHERE sealed IS NOT NULL"))
    finally:
        connection.close()


async def stocked(directory: Path) -> SqlGalleryLog:
    log = await open_sqlite_log(directory, directory / "keys", StorageSettings(), FakeClock())
    space = TemplateSpace(SPACE, np.zeros(DIMENSION, np.float32))
    made = Gallery("custody", GalleryKind.CUSTODY, "c", "l", "p", 10**9, SPACE, 0.5)
    await do(log, RegisterSpace(space), CreateGallery(made))
    return log


async def do(log: SqlGalleryLog, *writes: Write) -> None:
    for answer in await log.append(writes, CLERK):
        assert isinstance(answer, Receipt), answer


def enrolment(number: int, row: NDArray[np.float16]) -> Enrol:
    return Enrol("custody", f"r{number}", f"s{number % 7}", row.tobytes(), idempotency_key=f"k{number}")


async def test_law_10_no_enrolled_template_stands_in_any_file_in_the_clear(tmp_path: Path) -> None:
    """Law 10: searched for while the log is open, with its write-ahead log, and again when it is closed."""
    rows = np.random.default_rng(1).standard_normal((50, DIMENSION)).astype("<f2")
    data_dir, planted = tmp_path / "data", tmp_path / "planted"
    log = await stocked(data_dir)
    try:
        await do(log, *(enrolment(number, row) for number, row in enumerate(rows)))
        await do(log, *(enrolment(number, row) for number, row in enumerate(rows)))
        assert (data_dir / "gallery.db-wal").stat().st_size > rows.nbytes
        needles = [needle for row in rows for needle in forms(row).values()]
        assert found(data_dir, needles) == []
    finally:
        await log.close()
    assert found(data_dir, needles) == []

    # The search is only worth something if it finds what is there.
    planted.mkdir()
    for name, form in forms(rows[7]).items():
        (planted / name).write_bytes(b"before " + form + b" after")
        assert found(planted, forms(rows[7]).values()), name
        (planted / name).unlink()
    assert found(planted, forms(rows[7]).values()) == []


async def test_law_10_what_was_erased_is_gone_from_database_and_write_ahead_log(tmp_path: Path) -> None:
    """Law 10: not even a part of the sealed bytes remains, in whatever order and however often erasure runs."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    count = 600
    rows = np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype("<f2")
    log = await stocked(tmp_path)
    try:
        for start in range(0, count, 100):
            await do(log, *(enrolment(number, rows[number]) for number in range(start, start + 100)))
        sequence_of = {number: 3 + number for number in range(count)}
        before = sealed_blobs(tmp_path)
        assert len(before) == count
        order = list(range(count))
        dice.shuffle(order)
        gone: set[int] = set()
        while len(gone) < 480:
            some = [order.pop() for _ in range(dice.randrange(1, 60))]
            present = [number for number in some if number not in gone]
            await do(log, *(Withdraw("custody", f"r{number}", "released") for number in present))
            gone.update(present)
            assert await log.erase(0) == len(present)
        remnants = [piece for number in gone for piece in pieces(before[sequence_of[number]])]
        assert found(tmp_path, remnants) == []
        # Cut to nothing; what stands in it came after, and says so: the page of the receipt.
        assert (tmp_path / "gallery.db-wal").stat().st_size < 4 * 8192
        left = sealed_blobs(tmp_path)
        assert left == {sequence_of[number]: before[sequence_of[number]] for number in order}
        for blob in left.values():
            assert found(tmp_path, [blob]) == [blob]

        await do(log, *(WithdrawSubject("", f"s{number}", "asked") for number in range(7)))
        assert await log.erase(0) == len(order)
        assert found(tmp_path, (piece for blob in before.values() for piece in pieces(blob))) == []
    finally:
        await log.close()


async def test_law_10_alerts_and_details_of_the_audit_stand_sealed(tmp_path: Path) -> None:
    """Law 10 reaches what names persons: the reason of a withdrawal is in no file in the clear."""
    log = await stocked(tmp_path)
    try:
        await do(log, enrolment(1, np.ones(DIMENSION, "<f2")), Withdraw("custody", "r1", "found innocent in court"))
        assert (await log.audit(0, 99))[-1]["detail"] == {"reason": "found innocent in court"}
        assert found(tmp_path, [b"found innocent"]) == []
    finally:
        await log.close()
