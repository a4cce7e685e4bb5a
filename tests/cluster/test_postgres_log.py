"""What the gallery log owes its callers when it is in PostgreSQL and several processes have it open."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from benchmarks import postgres_log as benchmark
from matcher_service import audit
from matcher_service.clock import SystemClock
from matcher_service.errors import DataDamaged, LogUnavailable, NotFound, StartRefused
from matcher_service.gallery import postgres
from matcher_service.gallery.keys import Keyring
from matcher_service.gallery.log import SqlGalleryLog
from matcher_service.gallery.postgres import PostgresDatabase, open_postgres_log
from matcher_service.gallery.schema import metadata
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
from tests.cluster.served_postgres import USER, ServedPostgres, served_postgres

pytestmark = pytest.mark.cluster

SPACE = SpaceId("face", 1, 4)
CLERK = Actor("clerk")
PATIENCE_S = 30


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
    """Sequences 1 and 2."""
    await done(log, RegisterSpace(TemplateSpace(SPACE, np.zeros(4, np.float32))), gallery("custody"))


class Gateways:
    """Logs as several processes would have them: each with its own connections, threads and keyring."""

    def __init__(self, url: str, keys: Path, stack: AsyncExitStack) -> None:
        self.url = url
        self.keys = keys
        self._stack = stack

    async def open(self, *, read_only: bool = False) -> SqlGalleryLog:
        log = await open_postgres_log(self.url, self.keys, StorageSettings(), SystemClock(), read_only=read_only)
        self._stack.push_async_callback(log.close)
        return log


@pytest.fixture
async def gateways(postgres_url: str, tmp_path: Path) -> AsyncIterator[Gateways]:
    async with AsyncExitStack() as stack:
        yield Gateways(postgres_url, tmp_path / "keys", stack)


async def tail(log: SqlGalleryLog, until: int) -> list[tuple[int, str]]:
    """What a reader sees who goes on from the last entry that it has read, as a shard does."""
    seen: list[tuple[int, str]] = []
    while not seen or seen[-1][0] < until:
        after = seen[-1][0] if seen else 0
        await log.wait_beyond(after)
        seen += [(entry.sequence, entry.reference_id) for entry in await log.read(after, 50)]
    return seen


# --- law 1 ---------------------------------------------------------------------------------------------


class NaiveLog:
    """The log as one would write it first: the database numbers the rows."""

    def __init__(self, url: str) -> None:
        self._url = url
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE naive (sequence bigint GENERATED ALWAYS AS IDENTITY, name text)")

    def begin(self, name: str) -> psycopg.Connection[Any]:
        connection = psycopg.connect(self._url)
        connection.execute("INSERT INTO naive (name) VALUES (%s)", (name,))
        return connection

    def beyond(self, after: int) -> list[tuple[int, str]]:
        with psycopg.connect(self._url) as connection:
            return connection.execute(
                "SELECT sequence, name FROM naive WHERE sequence > %s ORDER BY sequence", (after,)
            ).fetchall()


async def test_law_1_sequence_order_is_commit_order_where_a_naive_sequence_skips_an_entry(gateways: Gateways) -> None:
    """Law 1: of two writers the one that is numbered first commits last. A reader of a naive sequence goes past its
    entry for ever; here the second cannot even be numbered before the first has committed."""
    naive = NaiveLog(gateways.url)
    slow, quick = naive.begin("slow"), naive.begin("quick")
    quick.commit()
    seen = naive.beyond(0)
    slow.commit()
    seen += naive.beyond(seen[-1][0])
    assert [name for _, name in seen] == ["quick"], "the naive sequence has become safe: the lock may go"
    slow.close()
    quick.close()

    first, second, reader = await gateways.open(), await gateways.open(), await gateways.open(read_only=True)
    await stock(first)
    inside, go_on = threading.Event(), threading.Event()
    writes = first._database.announce

    def announce(connection: Connection, sequence: int, at_ms: int) -> None:
        """Called when the sequence has been given out and the entry inserted."""
        inside.set()
        assert go_on.wait(PATIENCE_S / 10)
        writes(connection, sequence, at_ms)

    first._database.announce = announce  # type: ignore[method-assign]
    slow_write = asyncio.create_task(done(first, enrol("slow")))
    assert await asyncio.to_thread(inside.wait, PATIENCE_S)
    quick_write = asyncio.create_task(done(second, enrol("quick")))
    await _waits_for_its_turn(gateways.url)
    assert await reader.read(2, 9) == []
    assert not quick_write.done()
    go_on.set()
    assert [(await slow_write)[0].sequence, (await quick_write)[0].sequence] == [3, 4]
    assert [entry.reference_id for entry in await reader.read(2, 9)] == ["slow", "quick"]


async def _waits_for_its_turn(url: str) -> None:
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    async with asyncio.timeout(PATIENCE_S), await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        while True:
            found = await (await connection.execute(waiting)).fetchone()
            if found and found[0]:
                return
            await asyncio.sleep(0.01)


async def test_law_1_gateways_that_write_at_once_make_one_sequence_and_one_audit_chain(gateways: Gateways) -> None:
    """Laws 1 and 7: no gap, no repeat, nothing skipped by a reader; every entry is named by the one chain."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    logs = [await gateways.open() for _ in range(3)]
    reader = await gateways.open(read_only=True)
    await stock(logs[0])
    received: dict[int, str] = {}

    async def caller(number: int, log: SqlGalleryLog) -> None:
        for turn in range(12):
            names = [f"{number}.{turn}.{at}" for at in range(dice.choice((1, 1, 2, 40)))]
            for name, receipt in zip(names, await done(log, *map(enrol, names)), strict=True):
                assert receipt.sequence not in received
                received[receipt.sequence] = name
            if dice.random() < 0.3:
                await log.record([AuditEvent("clerk", "looked", "custody", {"turn": turn})], [])

    async with asyncio.timeout(120):
        writing = asyncio.gather(*(caller(number, logs[number % 3]) for number in range(6)))
        seen: list[tuple[int, str]] = []
        while not writing.done() or seen[-1][0] < await reader.head():
            found = await reader.read(seen[-1][0] if seen else 0, 1000)
            seen += [(entry.sequence, entry.reference_id) for entry in found]
        await writing
    assert [sequence for sequence, _ in seen] == list(range(1, len(seen) + 1))
    assert dict(seen[2:]) == received
    chain = await logs[1].audit(0, 10_000)
    audit.verify(chain)
    named: list[int] = []
    for record in chain:
        facts: Any = record["facts"]
        named += [one for first, last in facts.get("sequences", ()) for one in range(first, last + 1)]
    assert sorted(named) == [sequence for sequence, _ in seen]


async def test_every_gateway_judges_by_what_the_others_have_written(gateways: Gateways) -> None:
    """A reference, a key and a deletion of one gateway bind the next write of another."""
    one, other = await gateways.open(), await gateways.open()
    await stock(one)
    (receipt,) = await done(other, enrol("a"))
    assert await done(one, enrol("a")) == [Receipt(WriteOutcome.REPEATED, receipt.sequence)]
    await done(one, Withdraw("custody", "a", "x"))
    (refusal,) = await other.append([Withdraw("custody", "a", "x")], CLERK)
    assert isinstance(refusal, NotFound)
    await done(other, DeleteGallery("custody", "over"))
    (refusal,) = await one.append([enrol("b")], CLERK)
    assert isinstance(refusal, NotFound)


async def test_gateways_that_start_at_once_make_tables_and_keys_once(gateways: Gateways) -> None:
    """Of several that find an empty database one makes the tables and the keys, and all go on with them."""
    logs = await asyncio.gather(*(gateways.open() for _ in range(4)))
    await stock(logs[0])
    for number, log in enumerate(logs):
        await log.record([AuditEvent("clerk", "looked", "custody", {"number": number})], [])
    for log in logs:
        chain = await log.audit(0, 99)
        audit.verify(chain)
        assert [record["detail"] for record in chain][-4:] == [{"number": number} for number in range(4)]


def test_the_migrations_give_exactly_the_metadatas_tables(postgres_url: str) -> None:
    database = PostgresDatabase(postgres_url, 1)
    database.prepare()
    database.prepare()
    with database.writer.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    database.dispose()


async def test_identifiers_are_in_byte_order_whatever_the_language_of_the_database(gateways: Gateways) -> None:
    log = await gateways.open()
    await stock(log)
    names = ["b", "B", "a", "Z", "ä", "-", "_"]
    await done(log, *map(enrol, names))
    in_order = sorted(names, key=str.encode)
    assert [one.reference_id for one in await log.references("custody", "", 99)] == in_order
    assert [one.reference_id for one in await log.references("custody", "Z", 99)] == in_order[in_order.index("Z") + 1 :]


# --- news ------------------------------------------------------------------------------------------------


async def test_a_commit_wakes_those_who_wait_in_other_processes(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By notification: nobody looks of his own accord here."""
    monkeypatch.setattr(postgres, "POLL_S", 3600.0)
    writer, reader = await gateways.open(), await gateways.open(read_only=True)
    async with asyncio.timeout(PATIENCE_S):
        waiting = asyncio.create_task(tail(reader, 12))
        await stock(writer)
        for number in range(10):
            await done(writer, enrol(f"r{number}"))
        assert [sequence for sequence, _ in await waiting] == list(range(1, 13))


async def test_a_commit_that_nobody_was_told_of_is_found_by_looking(gateways: Gateways) -> None:
    writer, reader = await gateways.open(), await gateways.open(read_only=True)
    await stock(writer)
    writer._database.announce = lambda *_: None  # type: ignore[method-assign]
    async with asyncio.timeout(PATIENCE_S):
        waiting = asyncio.create_task(reader.wait_beyond(2))
        await done(writer, enrol("a"))
        await waiting


async def test_a_listener_whose_connection_was_ended_listens_again(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was committed in between is found, and what comes after is heard."""
    monkeypatch.setattr(postgres, "POLL_S", 3600.0)
    writer, reader = await gateways.open(), await gateways.open(read_only=True)
    await stock(writer)
    async with asyncio.timeout(PATIENCE_S):
        await reader.wait_beyond(1)
        with psycopg.connect(gateways.url, autocommit=True) as connection:
            listening = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ~ 'FROM entry|LISTEN' "
            connection.execute(listening + "AND pid <> pg_backend_pid()")
        await done(writer, enrol("a"))
        await reader.wait_beyond(2)
        # It has told, so it listens again: from here on nobody looks of his own accord.
        await done(writer, enrol("b"))
        await reader.wait_beyond(3)


# --- reading only ----------------------------------------------------------------------------------------


async def test_what_is_opened_for_reading_writes_nothing(gateways: Gateways) -> None:
    with pytest.raises(StartRefused, match="no tables yet"):
        await gateways.open(read_only=True)
    writer = await gateways.open()
    await stock(writer)
    await done(writer, enrol("a"))
    reader = await gateways.open(read_only=True)
    assert [entry.template for entry in await reader.read(2, 9)] == [b"12345678"]
    assert await reader.head() == 3
    for attempt in (reader.append([enrol("b")], CLERK), reader.erase(0)):
        with pytest.raises(LogUnavailable, match="for reading only"):
            await attempt
    with pytest.raises(StartRefused, match="no keys in"):
        await open_postgres_log(gateways.url, gateways.keys / "other", StorageSettings(), SystemClock(), read_only=True)
    assert not (gateways.keys / "other").exists()
    with psycopg.connect(gateways.url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    for read_only in (True, False):
        with pytest.raises(StartRefused, match="of version 9999"):
            await gateways.open(read_only=read_only)


async def test_law_10_a_key_is_at_hand_everywhere_once_made_and_nowhere_once_destroyed(gateways: Gateways) -> None:
    """Law 10: also in processes that used it before."""
    one, other, reader = await gateways.open(), await gateways.open(), await gateways.open(read_only=True)
    assert reader.keyring.cipher("custody") is None
    await stock(one)
    await done(other, enrol("a"))
    assert [entry.template for entry in await reader.read(2, 9)] == [b"12345678"]
    await done(other, DeleteGallery("custody", "over"))
    for log in (one, other, reader):
        assert log.keyring.cipher("custody") is None
        assert [entry.template for entry in await log.read(2, 1)] == [None]


async def test_law_4_a_missing_key_is_not_taken_for_an_erased_template(gateways: Gateways) -> None:
    """Law 4: the people of that gallery would be lost without a word."""
    writer, reader = await gateways.open(), await gateways.open(read_only=True)
    await stock(writer)
    await done(writer, enrol("a"))
    (path,) = (gateways.keys / "galleries").iterdir()
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(LogUnavailable, match="the key of gallery custody is missing"):
        await reader.read(0, 9)
    path.write_bytes(kept)
    assert len(await reader.read(0, 9)) == 3


# --- servers that cannot be relied on, or go away ------------------------------------------------------


async def test_law_5_a_server_that_could_lose_what_it_acknowledged_is_overruled_or_refused(tmp_path: Path) -> None:
    """Law 5: `synchronous_commit = off` of the server does not hold for what writes here; without `fsync` nothing
    helps."""
    keys = tmp_path / "keys"
    with served_postgres("synchronous_commit=off") as served:
        url = served.create("log")
        database = PostgresDatabase(url, 1)
        with database.writer.begin() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
        database.dispose()
        await asyncio.to_thread(served.stop)
        await asyncio.to_thread(served.start, "fsync=off")
        with pytest.raises(StartRefused, match="fsync"):
            await open_postgres_log(url, keys, StorageSettings(), SystemClock())
    with pytest.raises(StartRefused, match="cannot be opened"):
        await open_postgres_log(url, keys, StorageSettings(), SystemClock())
    for address in ("nonsense", "mysql://here/log"):
        with pytest.raises(StartRefused) as refused:
            await open_postgres_log(address, keys, StorageSettings(), SystemClock())
        assert refused.value.field == "cluster.log_url"


Break = Callable[[Any, Callable[[Any], None]], None]


def commit_then_break(connection: Any, commit: Callable[[Any], None]) -> None:
    commit(connection)
    connection.dbapi_connection.close()
    raise psycopg.OperationalError("the answer was lost")


def break_before_commit(connection: Any, commit: Callable[[Any], None]) -> None:
    connection.dbapi_connection.close()
    raise psycopg.OperationalError("the question was lost")


@asynccontextmanager
async def breaking(log: SqlGalleryLog, how: Break) -> AsyncIterator[list[int]]:
    """The next commit breaks its connection; the list gets an item when it did."""
    dialect = log._database.writer.dialect
    commit = dialect.do_commit
    broken: list[int] = []

    def broke(connection: Any) -> None:
        dialect.do_commit = commit  # type: ignore[method-assign]
        broken.append(1)
        how(connection, commit)

    dialect.do_commit = broke  # type: ignore[method-assign]
    try:
        yield broken
    finally:
        dialect.do_commit = commit  # type: ignore[method-assign]


@pytest.mark.parametrize("how", [commit_then_break, break_before_commit])
async def test_law_5_a_commit_whose_answer_was_lost_is_found_out_and_not_done_twice(
    gateways: Gateways, how: Break
) -> None:
    """Law 5: the connection breaks while committing. Committed or not, everything is stored once, and answered."""
    log = await gateways.open()
    await stock(log)
    works: list[tuple[Callable[[], Awaitable[Any]], int]] = [
        (lambda: done(log, enrol("a"), enrol("b")), 2),
        (lambda: done(log, *(enrol(f"r{number}") for number in range(200))), 200),
        (lambda: done(log, Withdraw("custody", "a", "x")), 1),
        (lambda: done(log, gallery("other")), 1),
        (lambda: log.record([AuditEvent("clerk", "looked", "custody", {"why": "a test"})], []), 0),
        (lambda: log.erase(0), 0),
    ]
    head, position = 2, len(await log.audit(0, 99))
    for work, entries in works:
        async with breaking(log, how) as broken:
            await work()
        assert broken
        head += entries
        assert await log.head() == head
        chain = await log.audit(0, 99)
        audit.verify(chain)
        assert len(chain) == position + 1
        position += 1
    assert [entry.sequence for entry in await log.read(0, 999)] == list(range(1, head + 1))


async def test_a_commit_whose_outcome_cannot_be_found_out_is_not_acknowledged(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laws 1 and 5: the answer is lost, and so is the server for longer than callers wait. The repeat tells."""
    log = await gateways.open()
    await stock(log)

    def no_connection(*_: Any, **__: Any) -> None:
        raise psycopg.OperationalError("no route")

    with monkeypatch.context() as without:
        without.setattr(postgres, "_connect", no_connection)
        async with breaking(log, commit_then_break):
            with pytest.raises(LogUnavailable, match="not known whether") as caught:
                await log.append([enrol("a")], CLERK)
    assert caught.value.retryable
    assert await done(log, enrol("a")) == [Receipt(WriteOutcome.REPEATED, 3)]
    audit.verify(await log.audit(0, 99))


async def test_writes_and_reads_outlast_a_restart_of_the_server(tmp_path: Path) -> None:
    """In order or by SIGKILL: connections of before are replaced, and callers notice at most a delay or a refusal."""
    with served_postgres() as served:
        async with AsyncExitStack() as stack:
            gateways = Gateways(served.create("log"), tmp_path / "keys", stack)
            log, reader = await gateways.open(), await gateways.open(read_only=True)
            await stock(log)
            for number, end in enumerate((served.stop, served.kill)):
                end()
                with pytest.raises(LogUnavailable) as caught:
                    await log.append([enrol(f"lost-{number}")], CLERK)
                assert caught.value.retryable
                with pytest.raises(LogUnavailable):
                    await reader.read(0, 9)
                await asyncio.to_thread(served.start)
                (receipt,) = await done(log, enrol(f"kept-{number}"))
                assert receipt.sequence == 3 + number
                async with asyncio.timeout(PATIENCE_S):
                    await reader.wait_beyond(receipt.sequence - 1)
                assert [entry.reference_id for entry in await reader.read(receipt.sequence - 1, 9)] == [
                    f"kept-{number}"
                ]


async def test_law_5_a_synchronous_standby_takes_over_with_all_that_was_acknowledged(tmp_path: Path) -> None:
    """Law 5: the primary is killed and its standby promoted. The address names both; nobody is started anew."""
    with ExitStack() as servers:
        primary = servers.enter_context(served_postgres())
        primary.create("log")
        standby = ServedPostgres(standby_of=primary)
        servers.callback(standby.remove)
        standby.start()
        primary.ask("ALTER SYSTEM SET synchronous_standby_names = '*'")
        primary.ask("SELECT pg_reload_conf()")
        hosts = "&".join(f"host=127.0.0.1:{one.port}" for one in (standby, primary))
        url = f"postgresql://{USER}@/log?{hosts}"
        async with AsyncExitStack() as stack:
            with pytest.raises(StartRefused, match="standby"):
                await open_postgres_log(standby.url("log"), tmp_path / "keys", StorageSettings(), SystemClock())
            gateways = Gateways(url, tmp_path / "keys", stack)
            log, reader = await gateways.open(), await gateways.open(read_only=True)
            await stock(log)
            await done(log, *(enrol(f"r{number}") for number in range(50)))
            primary.kill()
            await asyncio.to_thread(standby.ask, "SELECT pg_promote()")
            (receipt,) = await done(log, enrol("after"))
            assert receipt.sequence == 53
            async with asyncio.timeout(PATIENCE_S):
                await reader.wait_beyond(52)
            assert [entry.sequence for entry in await reader.read(0, 99)] == list(range(1, 54))
            audit.verify(await log.audit(0, 99))


async def test_a_log_restored_to_a_point_in_time_lacks_what_came_later_and_nobody_withdrawn_comes_back(
    tmp_path: Path,
) -> None:
    """A base backup and the archived write-ahead log, as docs/OPERATIONS.md has it; law 10: the erasure ledger beside
    the keys is obeyed before anybody can read the log."""
    with ExitStack() as servers:
        primary = servers.enter_context(served_postgres("archive_mode=on"))
        archive = primary.archive()
        primary.create("log")
        async with AsyncExitStack() as stack:
            log = await Gateways(primary.url("log"), tmp_path / "keys", stack).open()
            await stock(log)
            await done(log, *(enrol(f"r{number}") for number in range(10)))
            copied = ServedPostgres(standby_of=primary)
            servers.callback(copied.remove)
            await done(log, *(enrol(f"after the copy {number}") for number in range(5)))
            await done(log, Withdraw("custody", "r1", "before the moment"))
            expected = await log.read(0, 99)
            ((moment,),) = primary.ask("SELECT clock_timestamp()::text")
            await done(log, enrol("too late"), enrol("r2", template=b"87654321", replace=True, idempotency_key=""))
            await done(log, Withdraw("custody", "r3", "after the moment"))
        await asyncio.to_thread(primary.archive_now)
        primary.kill()

        await asyncio.to_thread(copied.return_to, moment, archive)
        async with AsyncExitStack() as stack:
            gateways = Gateways(copied.url("log"), tmp_path / "keys", stack)
            log, reader = await gateways.open(), await gateways.open(read_only=True)
            restored = await reader.read(0, 99)
            # r1's template is erased in both; r3 is withdrawn again as the last entry, and its template with it.
            again = restored[len(expected) :]
            assert [(one.kind, one.reference_id) for one in again] == [(EntryKind.WITHDRAW, "r3")]
            assert [one for one in restored if one.reference_id != "r3"] == [
                one for one in expected if one.reference_id != "r3"
            ]
            (receipt,) = await done(log, enrol("from now on"))
            assert receipt.sequence == again[-1].sequence + 1
            audit.verify(await log.audit(0, 99))


async def test_a_server_that_stands_still_is_given_up_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP: nothing is refused and nothing answered. What was told to be unknown is stored once when repeated."""
    monkeypatch.setattr(postgres.BoundedConnection, "reply_s_max", 0.5)
    with served_postgres() as served:
        async with AsyncExitStack() as stack:
            gateways = Gateways(served.create("log"), tmp_path / "keys", stack)
            log = await gateways.open()
            await stock(log)
            served.pause()
            try:
                with pytest.raises(LogUnavailable):
                    await log.append([enrol("a")], CLERK)
                with pytest.raises(LogUnavailable):
                    await log.read(0, 9)
            finally:
                served.resume()
            (receipt,) = await done(log, enrol("a"))
            assert receipt.sequence == 3
            assert await log.head() == 3


async def test_law_1_a_log_that_has_lost_entries_is_neither_read_nor_written(gateways: Gateways) -> None:
    """Law 1: as when a standby that lagged behind takes over. Numbers that were read would be given out again, and
    whoever had read them would pass over what bears them now."""
    writer, log, reader = await gateways.open(), await gateways.open(), await gateways.open(read_only=True)
    await stock(writer)
    await done(writer, enrol("a"), enrol("b"))
    async with asyncio.timeout(PATIENCE_S):
        for each in (log, reader):
            await each.wait_beyond(3)
        waiting = asyncio.create_task(reader.wait_beyond(4))
        with psycopg.connect(gateways.url) as connection:
            connection.execute("DELETE FROM entry WHERE sequence > 3")
        await waiting
        with pytest.raises(DataDamaged, match="ends at 3, although 4 was read"):
            await reader.read(0, 9)
        while True:
            try:
                await log.head()
            except DataDamaged:
                break
            await asyncio.sleep(0.01)
        with pytest.raises(DataDamaged):
            await log.append([enrol("c")], CLERK)
    assert [entry.sequence for entry in await (await gateways.open(read_only=True)).read(0, 9)] == [1, 2, 3]


async def test_a_gateway_that_stands_still_inside_its_turn_does_not_stop_the_others(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends its transaction, nothing of it is stored, and it is done again when the gateway goes on."""
    monkeypatch.setattr(postgres, "_TURN_S_MAX", 1)
    stopped, other = await gateways.open(), await gateways.open()
    await stock(other)
    inside, go_on = threading.Event(), threading.Event()
    announce = stopped._database.announce

    def stand_still(connection: Connection, sequence: int, at_ms: int) -> None:
        inside.set()
        go_on.wait(PATIENCE_S)
        announce(connection, sequence, at_ms)

    stopped._database.announce = stand_still  # type: ignore[method-assign]
    late = asyncio.create_task(stopped.append([enrol("late")], CLERK))
    assert await asyncio.to_thread(inside.wait, PATIENCE_S)
    assert (await done(other, enrol("a")))[0].sequence == 3
    go_on.set()
    assert await asyncio.gather(late, return_exceptions=True) in (
        [[Receipt(WriteOutcome.ENROLLED, 4)]],
        [late.exception()],
    )
    if late.exception() is not None:
        assert isinstance(late.exception(), LogUnavailable)
        assert (await done(stopped, enrol("late")))[0].sequence == 4
    audit.verify(await other.audit(0, 99))


# --- erasure -----------------------------------------------------------------------------------------------


async def test_law_10_erasure_is_not_reported_while_somebody_can_see_the_old_rows(gateways: Gateways) -> None:
    """Law 10: vacuumed away, also from the side table in which large values lie; erasing again finishes it."""
    log = await gateways.open()
    large = SpaceId("large", 1, 4096)
    await done(
        log,
        RegisterSpace(TemplateSpace(large, np.zeros(4096, np.float32))),
        CreateGallery(Gallery("custody", GalleryKind.CUSTODY, "c", "l", "p", 10**9, large, 0.5)),
    )
    await log.erase(0)
    templates = np.random.default_rng(1).standard_normal((50, 4096)).astype("<f2")
    await done(log, *(enrol(f"r{row}", template=templates[row].tobytes()) for row in range(50)))
    await done(log, *(Withdraw("custody", f"r{row}", "x") for row in range(50)))
    with psycopg.connect(gateways.url) as watcher:
        watcher.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        watcher.execute("SELECT count(*) FROM entry")
        with pytest.raises(LogUnavailable, match="reader"):
            await log.erase(0)
        # Later writes do not wait for it, and still nothing is reported.
        await done(log, enrol("next", template=templates[0].tobytes()))
        with pytest.raises(LogUnavailable, match="reader"):
            await log.erase(0)
    assert await log.erase(0) == 0
    with psycopg.connect(gateways.url, autocommit=True) as connection:
        assert connection.execute("SELECT count(sealed) FROM entry").fetchone() == (1,)
        toast = "SELECT reltoastrelid::regclass::text FROM pg_class WHERE oid = 'entry'::regclass"
        (side_table,) = connection.execute(toast).fetchone() or ("",)
        connection.execute("CREATE EXTENSION pageinspect")
        pages = f"SELECT pg_relation_size('{side_table}') / 8192"
        (count,) = connection.execute(pages.encode()).fetchone() or (0,)
        kept = f"SELECT count(t_data) FROM generate_series(0, {count - 1}) AS page, "
        kept += f"heap_page_items(get_raw_page('{side_table}', page::int)) WHERE lp_len > 0"
        (rows,) = connection.execute(kept.encode()).fetchone() or (0,)
        assert rows <= 5, "row versions of erased templates are left"


async def test_a_keyring_that_is_handed_over_is_used(postgres_url: str, tmp_path: Path) -> None:
    keyring = Keyring.open(tmp_path / "keys")
    log = await open_postgres_log(postgres_url, keyring, StorageSettings(), SystemClock())
    assert log.keyring is keyring
    assert (await log.read(0, 1, [EntryKind.ENROL])) == []
    await log.close()


async def test_the_benchmark_measures_every_way_of_writing() -> None:
    """Its withdrawals and enrolments are each acknowledged; no time is asserted."""
    found = await benchmark.measure(rows=200, messages=2, dimension=16)
    ways = {f"{way}_references_per_s" for way in ("copy", "inserts", "sqlite", "stream")}
    waits = {
        f"withdrawal_ms_{situation}_{gateway}_{figure}"
        for situation in ("idle", "importing")
        for gateway in ("same", "other")
        for figure in ("median", "max")
    }
    assert found.keys() == ways | waits | {"direct_ms", "appended_ms", "copy_over_inserts", "appended_over_direct",
                                           "transaction_ms"}  # fmt: skip
    assert min(found.values()) > 0
