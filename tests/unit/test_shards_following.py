"""A shard that follows the log and owns a share of it: exact, fresh or saying that it is not, whatever is assigned."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matcher_service.errors import LogUnavailable, ShardUnavailable, StartRefused
from matcher_service.index import scanners
from matcher_service.index.engine import Engine
from matcher_service.index.scanners import Scanners
from matcher_service.index.search import View
from matcher_service.merge import merge
from matcher_service.partitions import ALL_PARTITIONS, Partitions, partition_of, share
from matcher_service.settings import IndexSettings
from matcher_service.shards import following, local
from matcher_service.shards.exchange import ShardAnswer
from matcher_service.shards.following import FollowingShard
from matcher_service.terms import EntryKind, LogEntry, SearchRequest, SearchResult
from tests.fake_clock import FakeClock
from tests.log_writer import NOW_MS, LogWriter, asking, unit_rows
from tests.one_key import one_key
from tests.oracle import FlatOracle, same

KEY = bytes(32)
LEFT, RIGHT = share(0, 2), share(1, 2)
SETTINGS = IndexSettings(memory_bytes_max=10**9, threads=1)
GALLERIES = ("g", "h")


class ReadableLog:
    """The reading half of a GalleryLog over the entries of a LogWriter, which a test adds to, and may take away."""

    def __init__(self, written: LogWriter) -> None:
        self.written = written
        self.down = False
        self.reads = 0

    async def read(self, after: int, limit: int, kinds: Collection[EntryKind] | None = None) -> list[LogEntry]:
        await asyncio.sleep(0)
        self.reads += 1
        if self.down:
            raise LogUnavailable("the log is down", hint="wait")
        return [one for one in self.written.entries if one.sequence > after][:limit]

    async def read_share(self, partitions: Collection[int], after: int, upto: int, limit: int) -> list[LogEntry]:
        return [
            one
            for one in await self.read(after, len(self.written.entries))
            if one.sequence <= upto
            and (
                one.kind not in (EntryKind.ENROL, EntryKind.WITHDRAW)
                or partition_of(one.gallery_id, one.reference_id) in partitions
            )
        ][:limit]

    async def head(self) -> int:
        return len(self.written.entries)

    async def wait_beyond(self, sequence: int) -> None:
        """Never any news: the shard looks by itself."""
        await asyncio.Event().wait()


@pytest.fixture
def rng() -> np.random.Generator:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "READ_EVERY_S", 0.005)
    monkeypatch.setattr(following, "RETRY_S", 0.005)
    monkeypatch.setattr(following, "TEND_EVERY_S", 0.02)


@asynccontextmanager
async def following_shard(
    directory: Path, log: ReadableLog | None, configured: Partitions = LEFT, *, crash: bool = False
) -> AsyncIterator[FollowingShard]:
    """`crash`: it ends without writing its files."""
    shard = await FollowingShard.open(
        "a", directory, one_key(KEY), SETTINGS, FakeClock(NOW_MS), configured=configured, erase_within_s=3600
    )
    running = asyncio.create_task(shard.run(lambda: nullcontext(log))) if log else None  # type: ignore[arg-type]
    try:
        yield shard
    finally:
        if running:
            if running.done():
                running.result()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        if crash:
            shard._standing.shard._engine._changed = False
        await shard.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def answer(shard: FollowingShard, request: SearchRequest | None = None) -> ShardAnswer:
    return shard.search(request or asking(np.ones((1, 32)), GALLERIES))


def stands_at(shard: FollowingShard, log: LogWriter, partitions: Partitions) -> Callable[[], bool]:
    def it_does() -> bool:
        try:
            state = answer(shard).state
        except ShardUnavailable:
            return False  # it begins anew
        return (
            state.sequence == len(log.entries)
            and state.partitions == partitions
            and bool(state.caught_up_age_ms is not None)
        )

    return it_does


def write(log: LogWriter, rng: np.random.Generator, rows: int, subjects: int = 200) -> None:
    """Enrolments, replacements and withdrawals; `subjects` 0: each reference is of a subject of its own."""
    if not log.entries:
        for gallery_id in GALLERIES:
            log.create(gallery_id, 32)
    for row in unit_rows(rng, rows, 32):
        gallery_id, name = GALLERIES[int(rng.integers(2))], f"r{rng.integers(500)}"
        if rng.random() < 0.3:
            log.withdraw(gallery_id, name)
        else:
            log.enrol(gallery_id, name, row, f"s{rng.integers(subjects)}" if subjects else "")


def oracle_of(log: LogWriter, partitions: Partitions) -> FlatOracle:
    oracle = FlatOracle()
    oracle.apply_now(
        [
            one
            for one in log.entries
            if one.kind not in (EntryKind.ENROL, EntryKind.WITHDRAW)
            or partition_of(one.gallery_id, one.reference_id) in partitions
        ]
    )
    return oracle


def of(result: SearchResult, partitions: Partitions) -> list[tuple[str, str, float]]:
    """The candidates of the first probe that fall into the partitions."""
    stop = int(result.offsets[1])
    found = zip(result.gallery[:stop], result.reference_ids[:stop], result.scores[:stop], strict=True)
    return [
        (GALLERIES[gallery], name, float(score))
        for gallery, name, score in found
        if partition_of(GALLERIES[gallery], name) in partitions
    ]


def assert_exact(shard: FollowingShard, log: LogWriter, partitions: Partitions, rng: np.random.Generator) -> None:
    for floor in (-np.inf, 0.3):
        request = asking(unit_rows(rng, 5, 32), GALLERIES, floor)
        assert same(answer(shard, request).result, oracle_of(log, partitions).search_now(request))


async def test_it_answers_exactly_for_its_share(tmp_path: Path, rng: np.random.Generator) -> None:
    """Law 2 within its partitions; the sequence is the log's, whoever's the last entry was."""
    log = LogWriter()
    write(log, rng, 1500)
    async with following_shard(tmp_path, ReadableLog(log)) as shard:
        await until(stands_at(shard, log, LEFT))
        assert_exact(shard, log, LEFT, rng)
        write(log, rng, 300)
        await until(stands_at(shard, log, LEFT))
        assert_exact(shard, log, LEFT, rng)


@pytest.mark.parametrize("count", [1, 2, 4])
async def test_the_merged_answers_of_all_shards_are_those_of_one(
    tmp_path: Path, rng: np.random.Generator, count: int
) -> None:
    """Law 2, however many shards there are."""
    log = LogWriter()
    write(log, rng, 1200)
    whole = oracle_of(log, ALL_PARTITIONS)
    request = asking(unit_rows(rng, 6, 32), GALLERIES, 0.1)
    answers = []
    for number in range(count):
        async with following_shard(tmp_path / str(number), ReadableLog(log), share(number, count)) as shard:
            await until(stands_at(shard, log, share(number, count)))
            answers.append(answer(shard, request))
    assert frozenset().union(*(one.state.partitions for one in answers)) == ALL_PARTITIONS
    assert same(merge([one.result for one in answers], GALLERIES, request.rank_max), whole.search_now(request))


async def test_gained_partitions_are_claimed_when_all_of_them_is_there(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Law 4: at every moment of a re-assignment an answer is complete for the partitions that it claims."""
    log = LogWriter()
    write(log, rng, 1500, subjects=0)
    async with following_shard(tmp_path, ReadableLog(log)) as shard:
        await until(stands_at(shard, log, LEFT))
        before = oracle_of(log, ALL_PARTITIONS)
        claims = set()
        for wanted in (ALL_PARTITIONS, RIGHT, share(2, 3), LEFT, frozenset(), ALL_PARTITIONS, LEFT):
            await shard.assign(wanted)
            assert answer(shard).state.assigned == wanted

            def settled(wanted: Partitions = wanted) -> bool:
                request = asking(unit_rows(rng, 1, 32), GALLERIES, rank_max=1000)
                got = answer(shard, request)
                claims.add(got.state.partitions)
                assert got.state.partitions <= wanted
                expected = before.search_now(request)
                assert of(got.result, got.state.partitions) == of(expected, got.state.partitions)
                return got.state.partitions == wanted

            await until(settled)
        assert len(claims) >= 5
        assert_exact(shard, log, LEFT, rng) if not shard._leaving else None


async def test_nothing_withdrawn_comes_back_from_a_partition_that_was_lost(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Law 5: rows of a lost partition that are still there go on being ended, and once gone none stays behind when
    the partition is gained again."""
    log = LogWriter()
    write(log, rng, 1500)
    async with following_shard(tmp_path, ReadableLog(log), ALL_PARTITIONS) as shard:
        await until(stands_at(shard, log, ALL_PARTITIONS))
        for _ in range(6):
            await shard.assign(LEFT)
            write(log, rng, 200)
            await shard.assign(ALL_PARTITIONS)
            await until(stands_at(shard, log, ALL_PARTITIONS))
            assert_exact(shard, log, ALL_PARTITIONS, rng)


def during_the_next_search(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do this in the shard's loop when the next search has taken its view, and before it goes through it."""
    loop, search = asyncio.get_running_loop(), Engine.search

    def searched(engine: Engine, request: SearchRequest, view: View) -> SearchResult:
        monkeypatch.setattr(Engine, "search", search)
        asyncio.run_coroutine_threadsafe(work(), loop).result(30)
        return search(engine, request, view)

    monkeypatch.setattr(Engine, "search", searched)


async def test_what_is_assigned_during_a_search_changes_nothing_of_its_answer(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 4: nothing is named as missing that was searched, and nothing claimed that was not."""
    log = LogWriter()
    write(log, rng, 1000)
    request = asking(unit_rows(rng, 5, 32), GALLERIES, rank_max=1000)
    async with following_shard(tmp_path, ReadableLog(log), ALL_PARTITIONS) as shard:
        await until(stands_at(shard, log, ALL_PARTITIONS))

        async def lose() -> None:
            await shard.assign(LEFT)
            await until(lambda: not shard._leaving)

        during_the_next_search(monkeypatch, lose)
        before = await asyncio.to_thread(answer, shard, request)
        assert before.state.partitions == ALL_PARTITIONS
        assert same(before.result, oracle_of(log, ALL_PARTITIONS).search_now(request))

        async def gain() -> None:
            await shard.assign(ALL_PARTITIONS)
            await until(stands_at(shard, log, ALL_PARTITIONS))

        during_the_next_search(monkeypatch, gain)
        between = await asyncio.to_thread(answer, shard, request)
        assert between.state.partitions == LEFT
        assert same(between.result, oracle_of(log, LEFT).search_now(request))


async def test_a_search_of_rows_whose_log_is_no_more_counts_as_stale(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laws 1 and 5: whatever it was caught up with."""
    log = LogWriter()
    write(log, rng, 300)
    readable = ReadableLog(log)
    async with following_shard(tmp_path, readable) as shard:
        await until(stands_at(shard, log, LEFT))

        async def another() -> None:
            readable.written = LogWriter(NOW_MS + 60_000)
            await until(lambda: shard._standing.logs == 1)

        during_the_next_search(monkeypatch, another)
        assert (await asyncio.to_thread(answer, shard)).state.caught_up_age_ms is None
        await until(stands_at(shard, readable.written, LEFT))


async def test_a_stale_volume_is_caught_up_and_says_meanwhile_that_it_is_stale(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Law 5: before the log was read to its end no lease covers an answer."""
    log = LogWriter()
    write(log, rng, 800)
    async with following_shard(tmp_path, ReadableLog(log)) as shard:
        await until(stands_at(shard, log, LEFT))
    write(log, rng, 800)
    async with following_shard(tmp_path, None) as shard:
        state = answer(shard).state
        assert (state.sequence, state.caught_up_age_ms) == (802, None)
    readable = ReadableLog(log)
    async with following_shard(tmp_path, readable) as shard:
        await until(stands_at(shard, log, LEFT))
        assert_exact(shard, log, LEFT, rng)


@pytest.mark.parametrize("damage", ["rows", "state", "manifest.json", "assignment.json", "lost"])
async def test_a_corrupt_volume_is_made_anew_from_the_log(
    tmp_path: Path, rng: np.random.Generator, damage: str
) -> None:
    """Whichever file it is; until then no lease covers an answer."""
    log = LogWriter()
    write(log, rng, 800)
    async with following_shard(tmp_path, ReadableLog(log)) as shard:
        await until(stands_at(shard, log, LEFT))
    if damage == "lost":
        (tmp_path / "assignment.json").unlink()
    else:
        damage_files(tmp_path, damage)
    async with following_shard(tmp_path, None) as shard:
        assert answer(shard).state.caught_up_age_ms is None
    async with following_shard(tmp_path, ReadableLog(log)) as shard:
        await until(stands_at(shard, log, LEFT))
        assert_exact(shard, log, LEFT, rng)


def damage_files(directory: Path, ending: str) -> None:
    for path in directory.rglob(f"*{ending}"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


async def test_an_assignment_outlives_a_restart_until_the_configuration_changes(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """What was assigned live holds; what an operator configures anew overrules it."""
    log = LogWriter()
    write(log, rng, 600)
    for configured, assigned, expected in ((LEFT, RIGHT, RIGHT), (LEFT, None, RIGHT), (share(0, 4), None, share(0, 4))):
        async with following_shard(tmp_path, ReadableLog(log), configured) as shard:
            if assigned is not None:
                await shard.assign(assigned)
            await until(stands_at(shard, log, expected))
            assert_exact(shard, log, expected, rng) if not shard._leaving else None


@pytest.mark.parametrize("moment", ["assigned", "gained", "let go"])
async def test_a_crash_while_partitions_change_hands_leaves_nothing_wrong(
    tmp_path: Path, rng: np.random.Generator, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a start from what the files then held, and after it, every answer is exact for what it claims."""
    log = LogWriter()
    write(log, rng, 1000)
    async with following_shard(tmp_path, ReadableLog(log)) as shard:
        await until(stands_at(shard, log, LEFT))
    wanted = share(1, 3) | share(3, 4)
    async with following_shard(tmp_path, ReadableLog(log), crash=True) as shard:
        await until(stands_at(shard, log, LEFT))
        if moment != "assigned":
            # The files are not written any more, as on a full disk.
            monkeypatch.setattr(following.LocalShard, "write_files", _full_disk)
        await shard.assign(wanted)
        if moment == "gained":
            await until(stands_at(shard, log, wanted))
        elif moment == "let go":
            await until(lambda: not shard._leaving)
    monkeypatch.undo()
    write(log, rng, 200)
    async with following_shard(tmp_path, ReadableLog(log)) as shard:
        await until(stands_at(shard, log, wanted))
        await until(lambda: shard._assigned.settled and not (tmp_path / "gaining").exists())
        assert_exact(shard, log, wanted, rng)


async def _full_disk(_: object) -> None:
    raise OSError("no space left")


async def test_a_log_that_cannot_be_read_is_named_and_tried_again(tmp_path: Path, rng: np.random.Generator) -> None:
    """The answers grow old meanwhile, and say why."""
    log = LogWriter()
    write(log, rng, 100)
    readable = ReadableLog(log)
    async with following_shard(tmp_path, readable) as shard:
        await until(stands_at(shard, log, LEFT))
        readable.down = True
        await until(lambda: "the log is down" in answer(shard).state.refusal)
        shard._clock.advance(3)  # type: ignore[attr-defined]
        age = answer(shard).state.caught_up_age_ms
        assert age is not None
        assert age >= 3000
        readable.down = False
        write(log, rng, 50)
        await until(stands_at(shard, log, LEFT))
        await until(lambda: answer(shard).state.refusal == "" and answer(shard).state.caught_up_age_ms == 0)


@pytest.mark.parametrize("kept", [1200, 300, 0])
async def test_a_log_that_lost_what_was_applied_is_not_believed_to_be_the_same(
    tmp_path: Path, rng: np.random.Generator, kept: int
) -> None:
    """Law 1: a standby that had not everything took over, or a backup came back: the rows are of another log."""
    log = LogWriter()
    write(log, rng, 1000)
    readable = ReadableLog(log)
    async with following_shard(tmp_path, readable) as shard:
        await until(stands_at(shard, log, LEFT))
        # At other times: else, by one chance in 1,700, an entry of the same reference tells nothing of another log.
        other = LogWriter(NOW_MS + 60_000)
        if kept:
            other.entries = log.entries[:300]
            write(other, rng, kept - 300)
        readable.written = other
        await until(stands_at(shard, other, LEFT))
        assert_exact(shard, other, LEFT, rng)
    async with following_shard(tmp_path, ReadableLog(log)) as shard:
        await until(stands_at(shard, log, LEFT)) if kept != 300 else None


@pytest.mark.parametrize("step", ["_removed", "_open_index"])
async def test_what_is_assigned_while_a_shard_begins_anew_holds(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Law 4: an assignment is durable once it is answered, and nothing else is answered for."""
    log = LogWriter()
    write(log, rng, 300)
    readable = ReadableLog(log)
    async with following_shard(tmp_path, readable) as shard:
        await until(stands_at(shard, log, LEFT))
        owner = following if step == "_removed" else shard
        work = getattr(owner, step)

        async def assigned_meanwhile(*given: object) -> object:
            monkeypatch.setattr(owner, step, work)
            await shard.assign(RIGHT)
            return await work(*given)

        monkeypatch.setattr(owner, step, assigned_meanwhile)
        readable.written = LogWriter(NOW_MS + 60_000)
        write(readable.written, rng, 400)
        await until(stands_at(shard, readable.written, RIGHT))
        assert_exact(shard, readable.written, RIGHT, rng)
    async with following_shard(tmp_path, readable) as shard:
        await until(stands_at(shard, readable.written, RIGHT))


async def test_expiry_is_judged_by_the_newest_log_time_too(tmp_path: Path) -> None:
    """Law 9: whatever clock the gateway's time comes from."""
    log = LogWriter()
    log.create("g", 2)
    log.enrol("g", "short", np.array([1, 0]), expires_at_ms=NOW_MS + 3)
    log.enrol("g", "long", np.array([1, 0]))
    async with following_shard(tmp_path, ReadableLog(log), ALL_PARTITIONS) as shard:
        await until(lambda: answer(shard, asking(np.array([[1, 0]]))).state.sequence == 3)
        assert list(answer(shard, asking(np.array([[1, 0]]), at_ms=0)).result.reference_ids) == ["long"]


async def test_what_a_gain_cannot_hold_is_refused_and_the_rest_goes_on(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory budget is the shard's as a whole; what is held already is answered for."""
    log = LogWriter()
    write(log, rng, 1000)
    async with following_shard(tmp_path, ReadableLog(log)) as shard:
        await until(stands_at(shard, log, LEFT))
        held = (await shard.status()).bytes_in_memory
        shard._settings = SETTINGS.model_copy(update={"memory_bytes_max": held + 10_000})
        await shard.assign(ALL_PARTITIONS)
        await until(lambda: "memory_bytes_max" in answer(shard).state.refusal)
        write(log, rng, 100)
        await until(stands_at(shard, log, LEFT))
        assert_exact(shard, log, LEFT, rng)
        shard._settings = SETTINGS
        await until(stands_at(shard, log, ALL_PARTITIONS))
        assert_exact(shard, log, ALL_PARTITIONS, rng)


async def test_the_state_counts_rows_for_a_request_without_probes(tmp_path: Path, rng: np.random.Generator) -> None:
    """Live rows per gallery are those of the share."""
    log = LogWriter()
    write(log, rng, 500)
    async with following_shard(tmp_path, ReadableLog(log)) as shard:
        await until(stands_at(shard, log, LEFT))
        state = await shard.status()
        assert dict(state.live) == {name: len(rows) for name, rows in oracle_of(log, LEFT).galleries.items()}
        assert state.bytes_in_memory > 0
        assert state.partitions == LEFT


async def test_a_log_that_refuses_for_good_is_opened_anew(tmp_path: Path, rng: np.random.Generator) -> None:
    """What is held stays open, and is dropped only if the log proves to be another one."""
    log = LogWriter()
    write(log, rng, 200)
    logs = [ReadableLog(log)]
    opened = 0

    @asynccontextmanager
    async def open_log() -> AsyncIterator[ReadableLog]:
        nonlocal opened
        opened += 1
        if opened == 2:
            raise StartRefused("not yet", hint="wait")
        yield logs[-1]

    shard = await FollowingShard.open(
        "a", tmp_path, one_key(KEY), SETTINGS, clock := FakeClock(NOW_MS), configured=LEFT, erase_within_s=3600
    )
    running = asyncio.create_task(shard.run(open_log))  # type: ignore[arg-type]
    await until(stands_at(shard, log, LEFT))
    held = shard._standing.shard
    logs[-1].down = True
    logs.append(ReadableLog(log))
    await until(lambda: "down" in answer(shard).state.refusal)
    assert opened == 1
    clock.advance(following.GIVE_UP_S + 1)
    await until(lambda: answer(shard).state.refusal == "")
    write(log, rng, 50)
    await until(stands_at(shard, log, LEFT))
    assert (opened, shard._standing.shard) == (3, held)
    assert_exact(shard, log, LEFT, rng)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await shard.close()


async def test_what_scans_adopted_rows_goes_on_when_the_index_aside_is_closed(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads are those of the shard."""
    made: list[Scanners] = []

    def scanners_for(settings: IndexSettings) -> Scanners:
        made.append(scanners.scanners_for(settings))
        return made[-1]

    monkeypatch.setattr(local, "scanners_for", scanners_for)
    log = LogWriter()
    write(log, rng, 3000)
    several = SETTINGS.model_copy(update={"threads": 2})
    shard = await FollowingShard.open(
        "a", tmp_path, one_key(KEY), several, FakeClock(NOW_MS), configured=LEFT, erase_within_s=3600
    )
    running = asyncio.create_task(shard.run(lambda: nullcontext(ReadableLog(log))))  # type: ignore[arg-type]
    await until(stands_at(shard, log, LEFT))
    await shard.assign(ALL_PARTITIONS)
    await until(stands_at(shard, log, ALL_PARTITIONS))
    await until(lambda: shard._assigned.settled)
    assert_exact(shard, log, ALL_PARTITIONS, rng)
    (lent,) = made
    assert lent._crew.run([int, int]) == [0, 0]  # type: ignore[attr-defined]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await shard.close()
