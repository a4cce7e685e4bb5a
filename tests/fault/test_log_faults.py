"""The log on a disk that is full, locked, damaged or lying: nothing is acknowledged falsely."""

from __future__ import annotations

import asyncio
import resource
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matcher_service import audit
from matcher_service.errors import AuditUnavailable, DataDamaged, LogUnavailable, StartRefused
from matcher_service.gallery.keys import Keyring
from matcher_service.gallery.log import SqlGalleryLog, open_sqlite_log
from matcher_service.gallery.sqlite import FILE_NAME, SqliteDatabase
from matcher_service.settings import StorageSettings
from matcher_service.terms import (
    Actor,
    AuditEvent,
    CreateGallery,
    DeleteGallery,
    Enrol,
    EntryKind,
    Gallery,
    GalleryKind,
    Receipt,
    RegisterSpace,
    SpaceId,
    TemplateSpace,
    Withdraw,
    WriteOutcome,
)
from tests.fake_clock import FakeClock

SPACE = SpaceId("face", 1, 4)
CLERK = Actor("clerk")
EVENT = AuditEvent("clerk", "looked", "custody")


async def opened(directory: Path) -> SqlGalleryLog:
    return await open_sqlite_log(directory, directory / "keys", StorageSettings(), FakeClock(), busy_timeout_ms=50)


def gallery(gallery_id: str) -> CreateGallery:
    return CreateGallery(Gallery(gallery_id, GalleryKind.CUSTODY, "c", "l", "p", 10**9, SPACE, 0.5))


def enrol(name: str, **changes: Any) -> Enrol:
    return Enrol("custody", name, name, b"12345678", idempotency_key=name)._replace(**changes)


async def done(log: SqlGalleryLog, *writes: Any) -> list[Receipt]:
    answers = await log.append(writes, CLERK)
    for answer in answers:
        assert isinstance(answer, Receipt), answer
    return [answer for answer in answers if isinstance(answer, Receipt)]


async def stock(log: SqlGalleryLog) -> None:
    await done(log, RegisterSpace(TemplateSpace(SPACE, np.zeros(4, np.float32))), gallery("custody"), enrol("first"))


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[SqlGalleryLog]:
    made = await opened(tmp_path)
    await stock(made)
    try:
        yield made
    finally:
        await made.close()


async def untouched(log: SqlGalleryLog) -> None:
    """Nothing but what `stock` wrote is there, and writing works again."""
    assert await log.head() == 3
    assert [entry.sequence for entry in await log.read(0, 99)] == [1, 2, 3]
    chain = await log.audit(0, 99)
    audit.verify(chain)
    assert len(chain) == 3
    assert (await done(log, enrol("next")))[0].sequence == 4
    await log.record([EVENT], [])
    audit.verify(await log.audit(0, 99))


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_full_disk_acknowledges_nothing_and_loses_nothing(log: SqlGalleryLog, tmp_path: Path) -> None:
    """Laws 5 and 7: a write that does not fit is refused whole, and so is an audit event."""
    with files_no_larger_than((tmp_path / f"{FILE_NAME}-wal").stat().st_size + 50_000):
        with pytest.raises(LogUnavailable) as caught:
            await log.append([enrol(f"r{number}") for number in range(5000)], CLERK)
        assert caught.value.retryable
        with pytest.raises(AuditUnavailable):
            await log.record([AuditEvent("clerk", "looked", "custody", {"long": "x" * 200_000})], [])
    await untouched(log)


async def test_a_locked_database_is_unavailable_until_it_is_free(log: SqlGalleryLog, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(LogUnavailable):
            await log.append([enrol("a")], CLERK)
        with pytest.raises(AuditUnavailable):
            await log.record([EVENT], [])
        with pytest.raises(LogUnavailable):
            await log.erase(0)
        assert [entry.sequence for entry in await log.read(0, 99)] == [1, 2, 3]
    finally:
        other.execute("ROLLBACK")
        other.close()
    await untouched(log)


async def test_law_10_erasure_is_not_reported_while_a_reader_keeps_the_old_pages(
    log: SqlGalleryLog, tmp_path: Path
) -> None:
    """Law 10: the write-ahead log holds what was erased until it is truncated; erasing again finishes it."""
    (sealed,) = (bytes(row[0]) for row in _rows(tmp_path, "SELECT sealed FROM entry WHERE sealed IS NOT NULL"))
    await done(log, Withdraw("custody", "first", "x"))
    reader = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM entry").fetchone()
    with pytest.raises(LogUnavailable, match="reader"):
        await log.erase(0)
    reader.execute("ROLLBACK")
    reader.close()
    assert await log.erase(0) == 0
    for name in (FILE_NAME, f"{FILE_NAME}-wal"):
        assert sealed[20:60] not in (tmp_path / name).read_bytes(), name


def _rows(directory: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(directory / FILE_NAME)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


async def test_one_callers_unusable_write_fails_nobody_else(log: SqlGalleryLog) -> None:
    """A defect in one caller must not fail those whose writes were committed with it."""
    text: Any = "8 letters"[:8]
    jobs = [asyncio.create_task(log.append([enrol(f"r{number}")], CLERK)) for number in range(10)]
    jobs.insert(5, asyncio.create_task(log.append([enrol("bad", template=text)], CLERK)))
    answers = await asyncio.gather(*jobs, return_exceptions=True)
    assert isinstance(answers.pop(5), TypeError)
    assert sorted(answer[0].sequence for answer in answers) == list(range(4, 14))  # type: ignore[index,union-attr]
    audit.verify(await log.audit(0, 99))


async def test_an_altered_template_is_named_and_never_returned(log: SqlGalleryLog, tmp_path: Path) -> None:
    """Law 10: reading stops at the row, and says which it is."""
    await done(log, enrol("second"))
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    with connection:
        connection.execute("UPDATE entry SET sealed = (SELECT sealed FROM entry WHERE sequence = 3) WHERE sequence = 4")
    connection.close()
    assert len(await log.read(0, 3)) == 3
    with pytest.raises(DataDamaged, match="gallery custody, reference second, sequence 4"):
        await log.read(0, 99)
    # Judged by the same row: refused alone, and not the writes beside it.
    refusal, receipt = await log.append([enrol("second"), enrol("third")], CLERK)
    assert isinstance(refusal, DataDamaged)
    assert isinstance(receipt, Receipt)


async def test_a_file_that_is_no_database_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database, but long enough to look" * 100)
    with pytest.raises(StartRefused, match="cannot be opened"):
        await opened(tmp_path)


async def test_damaged_pages_make_the_log_unavailable(tmp_path: Path) -> None:
    log = await opened(tmp_path)
    await stock(log)
    await done(log, *(enrol(f"r{number}") for number in range(2000)))
    await log.close()
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    content[3 * 8192 :] = b"\xa5" * (len(content) - 3 * 8192)
    path.write_bytes(content)
    try:
        log = await opened(tmp_path)
    except StartRefused:
        return
    try:
        with pytest.raises((LogUnavailable, DataDamaged)):
            await log.read(0, 10_000)
        with pytest.raises(LogUnavailable):
            await log.append([enrol("new")], CLERK)
    finally:
        await log.close()


async def test_a_commit_whose_outcome_is_unknown_is_not_acknowledged_and_can_be_repeated(tmp_path: Path) -> None:
    """Laws 1 and 5: the disk committed, and then said that it had not."""
    database = SqliteDatabase(tmp_path / FILE_NAME, 2, 50)
    log = SqlGalleryLog(database, Keyring.open(tmp_path / "keys"), StorageSettings(), FakeClock())
    await asyncio.to_thread(log.open)
    try:
        await stock(log)
        commit = database.writer.dialect.do_commit

        def lie(connection: Any) -> None:
            commit(connection)
            raise sqlite3.OperationalError("disk I/O error")

        waiting = asyncio.create_task(log.wait_beyond(3))
        await asyncio.sleep(0)
        database.writer.dialect.do_commit = lie  # type: ignore[method-assign]
        with pytest.raises(LogUnavailable):
            await log.append([enrol("a")], CLERK)
        database.writer.dialect.do_commit = commit  # type: ignore[method-assign]
        async with asyncio.timeout(10):
            await waiting
        assert await log.head() == 4
        assert [entry.sequence for entry in await log.read(3, 9)] == [4]
        assert await done(log, enrol("a")) == [Receipt(WriteOutcome.REPEATED, 4)]
        assert (await done(log, enrol("b")))[0].sequence == 5
        audit.verify(await log.audit(0, 99))
    finally:
        await log.close()


async def test_law_10_without_its_key_a_gallery_cannot_be_read_and_at_start_it_is_deleted(tmp_path: Path) -> None:
    """Law 10: a destroyed key erases its gallery also from a database that knows nothing of it, as after a
    restore."""
    log = await opened(tmp_path)
    await stock(log)
    await done(log, gallery("other"), enrol("a", gallery_id="other"))
    log.keyring.destroy("custody", 1)
    assert [entry.template for entry in await log.read(0, 99)] == [None, None, None, None, b"12345678"]
    (refusal,) = await log.append([enrol("b")], CLERK)
    assert isinstance(refusal, LogUnavailable)
    await log.close()
    log = await opened(tmp_path)
    try:
        assert (await log.read(5, 9))[0][1:5:2] == (EntryKind.GALLERY_DELETED, "custody")
        assert await log.references("custody", "", 9) == []
        assert [entry.template for entry in await log.read(0, 5)][-1] == b"12345678"
        assert await log.erase(0) == 1
    finally:
        await log.close()


async def test_a_missing_key_refuses_the_start_rather_than_serve_without_its_people(tmp_path: Path) -> None:
    """Law 4: nothing partial is silent."""
    log = await opened(tmp_path)
    await stock(log)
    await log.close()
    (path,) = (tmp_path / "keys" / "galleries").iterdir()
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(StartRefused, match="gallery custody"):
        await opened(tmp_path)
    path.write_bytes(kept)
    for name in ("master.key", "system.key"):
        key = tmp_path / "keys" / name
        held = key.read_bytes()
        key.unlink()
        with pytest.raises(StartRefused, match=name):
            await opened(tmp_path)
        key.write_bytes(held)
        key.chmod(0o600)
    log = await opened(tmp_path)
    assert len(await log.read(0, 9)) == 3
    await log.close()


async def test_a_deletion_whose_key_resists_is_not_answered_as_done_and_is_finished_later(tmp_path: Path) -> None:
    """Law 10: `deleted` means that the key is gone."""
    log = await opened(tmp_path)
    try:
        await stock(log)
        (path,) = (tmp_path / "keys" / "galleries").iterdir()
        kept = path.read_bytes()
        path.unlink()
        path.mkdir()
        beside, refusal = await log.append([enrol("a"), DeleteGallery("custody", "over")], CLERK)
        assert isinstance(beside, Receipt)
        assert isinstance(refusal, LogUnavailable)
        assert [entry.kind for entry in await log.read(4, 9)] == [EntryKind.GALLERY_DELETED]
        path.rmdir()
        path.write_bytes(kept)
        await done(log, gallery("other"))
        assert not path.exists()
        assert log.keyring.cipher("custody") is None
    finally:
        await log.close()
