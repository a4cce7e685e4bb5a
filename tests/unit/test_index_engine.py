"""The engine: exact at every moment of a changing gallery, within its memory, with few parts."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import structlog.testing
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.errors import DataDamaged, MemoryRefused, ShuttingDown
from matcher_service.index import choose, scanner
from matcher_service.index.compaction import PLAIN_ROWS_MAX, CompactionBudget, SegmentSize, to_rewrite
from matcher_service.index.engine import BuildScanner, Engine
from matcher_service.index.rows import HashIndex, Names, id_hashes, joined_names
from matcher_service.index.scanner import Scanner
from matcher_service.index.scanners import BySize
from matcher_service.index.segment import Segment, TailView
from matcher_service.records import decode_gallery
from matcher_service.settings import IndexSettings
from matcher_service.shards.local import LocalShard
from matcher_service.terms import SearchRequest
from tests.fake_clock import FakeClock
from tests.log_writer import FAR_MS, NOW_MS, LogWriter, asking, unit_rows
from tests.one_key import one_key
from tests.oracle import FlatOracle, same

KEY = bytes(32)
ANY_TIME = 10**9
BUDGET = CompactionBudget(rows_max=1_000_000, erase_after_ms=ANY_TIME)


def engine_of(tail_rows_max: int = 8192, memory_bytes_max: int = 10**10, build: BuildScanner | None = None) -> Engine:
    return Engine(
        build=build or BySize().build,
        dimension_of=lambda entry: decode_gallery(entry.record).space.dimension,
        segment_rows_max=1_000_000,
        memory_bytes_max=memory_bytes_max,
        tail_rows_max=tail_rows_max,
    )


def row_files(directory: Path) -> set[Path]:
    return set(directory.glob("*.rows"))


@pytest.fixture
def seed() -> int:
    chosen = random.SystemRandom().randrange(2**32)
    print(f"seed {chosen}")
    return chosen


# --- exactness -------------------------------------------------------------------------------------


def test_a_streaming_runbook_is_answered_exactly_at_every_step(seed: int) -> None:
    """Law 2: inserts, deletes, replacements and expiry in steps, as in the big-ann streaming track, over coded
    segments: recall 1.0, with equal scores and order, for thresholds and for the best ten."""
    rng = np.random.default_rng(seed)
    dimension, log, engine, oracle = 64, LogWriter(), engine_of(700), FlatOracle()
    log.create("g", dimension)
    people = unit_rows(rng, 900, dimension)
    applied, live = 0, np.zeros(0, np.int64)
    runbook = ["insert"] * 4 + ["search", "delete", "insert", "search", "replace", "merge", "search"]
    runbook += ["insert", "insert", "delete", "merge", "search", "replace", "delete", "merge", "search"]
    for step in runbook:
        if step == "insert":
            start = len(log.entries)
            for number in range(start, start + 900):
                person = int(rng.integers(900))
                row = people[person] + 0.08 * rng.standard_normal(dimension)
                expires_at_ms = FAR_MS if number % 10 else NOW_MS
                log.enrol("g", f"r{number}", row / np.linalg.norm(row), f"s{person}", expires_at_ms)
            live = np.append(live, np.arange(start, start + 900))
        elif step == "delete":
            gone = rng.choice(live, len(live) // 5, replace=False)
            live = np.setdiff1d(live, gone)
            for number in gone:
                log.withdraw("g", f"r{number}")
        elif step == "replace":
            for number in rng.choice(live, 200, replace=False):
                log.enrol("g", f"r{number}", unit_rows(rng, 1, dimension)[0], f"s{number}")
        elif step == "merge":
            assert engine.rewrite_one(BUDGET, NOW_MS, quiet=True)
        fresh, applied = log.entries[applied:], len(log.entries)
        engine.apply(fresh)
        oracle.apply_now(fresh)
        if step == "search":
            probes = np.concatenate([people[:6], unit_rows(rng, 3, dimension)])
            for floor, rank_max in ((0.6, 100), (0.4, 3), (-np.inf, 10)):
                request = asking(probes, ("g",), floor, rank_max)
                assert same(engine.search(request), oracle.search_now(request)), (step, floor)
    parts = engine.view.galleries["g"].parts
    assert any(isinstance(part, Segment) and part.code_bytes() for part in parts)


@given(st.data())
def test_the_best_few_are_exact_among_ties_duplicates_and_hubs(data: st.DataObject) -> None:
    """Law 2: floors raised on the way never cut a candidate that ties with the last one."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    log, engine, oracle = LogWriter(), engine_of(40), FlatOracle()
    for gallery_id in ("g", "h"):
        log.create(gallery_id, 3)
    corners = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
    for number in range(data.draw(st.integers(0, 200))):
        gallery_id = "gh"[int(rng.integers(2))]
        row = corners[rng.integers(4)] if rng.random() < 0.7 else rng.standard_normal(3)
        # A hub: one subject with very many references.
        subject = "hub" if rng.random() < 0.5 else f"s{rng.integers(30)}"
        log.enrol(gallery_id, f"r{int(rng.integers(150))}-{number % 3}", row, subject)
    engine.apply(log.entries)
    oracle.apply_now(log.entries)
    for _ in range(data.draw(st.integers(0, 3))):
        engine.rewrite_one(BUDGET, NOW_MS, quiet=True)
    count = 4
    request = SearchRequest(
        ("g", "h"),
        np.concatenate([corners[:3], unit_rows(rng, 1, 3)]).astype(np.float32),
        rng.choice(np.array([-np.inf, -0.5, 0.0, 0.5, 1.0], np.float32), (count, 2)),
        rng.integers(1, 9, count),
        NOW_MS,
    )
    assert same(engine.search(request), oracle.search_now(request))


@pytest.mark.parametrize("count", [1200, 9000])
def test_a_crowd_that_every_probe_meets_is_gone_through_probe_by_probe(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 2, with bounded memory: of thousands of equal rows no more than a few probes' hits are held at once."""
    monkeypatch.setattr(scanner, "HITS_MAX", 2000)
    rng = np.random.default_rng(5)
    log, engine, oracle = LogWriter(), engine_of(), FlatOracle()
    log.create("g", 64)
    people = unit_rows(rng, 3, 64)
    for number in range(count):
        log.enrol("g", f"r{number}", people[number % 3], f"s{number % 400}")
    engine.apply(log.entries)
    oracle.apply_now(log.entries)
    engine.snapshot()
    while engine.rewrite_one(BUDGET, NOW_MS, quiet=True):
        pass
    request = asking(np.concatenate([people, people, unit_rows(rng, 3, 64)]), ("g",), 0.9, 20)
    with pytest.raises(scanner.TooManyHits):
        engine.view.galleries["g"].parts[0].scanner.scan(request.probes, np.full(9, 0.9, np.float32))
    assert same(engine.search(request), oracle.search_now(request))


def test_rows_below_the_floor_of_their_gallery_take_no_place_from_those_of_another() -> None:
    """Law 2: each gallery has a threshold of its own, and what is below it is no candidate."""
    log, engine, oracle = LogWriter(), engine_of(40), FlatOracle()
    for gallery_id, cosine in (("strict", 0.4), ("mild", 0.3)):
        log.create(gallery_id, 3)
        for number in range(42 if gallery_id == "strict" else 41):
            log.enrol(gallery_id, f"{gallery_id}-{number}", np.array([cosine, 1 - number / 100, 0.1]), f"s{number}")
    engine.apply(log.entries)
    oracle.apply_now(log.entries)
    probe = np.array([[1, 0, 0]], np.float32)
    request = SearchRequest(
        ("strict", "mild"), probe, np.array([[0.5, -0.5]], np.float32), np.array([5], np.int64), NOW_MS
    )
    assert same(engine.search(request), oracle.search_now(request))


def test_a_batch_without_candidates_costs_no_python_per_probe(seed: int) -> None:
    """Less than half a call for each more of them: their codes are made some dozens at a time."""
    rng = np.random.default_rng(seed)
    log, engine = LogWriter(), engine_of()
    log.create("g", 32)
    for number, row in enumerate(unit_rows(rng, 300, 32)):
        log.enrol("g", f"r{number}", row)
    engine.apply(log.entries)

    def calls(probe_count: int) -> int:
        request = asking(unit_rows(rng, probe_count, 32), ("g",), 0.99)
        counted = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal counted
            counted += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            result = engine.search(request)
        finally:
            sys.setprofile(None)
        assert not len(result.reference_ids)
        return counted

    calls(64)
    assert calls(256) - calls(64) < (256 - 64) / 2


# --- views -----------------------------------------------------------------------------------------


def test_a_search_sees_one_moment_whatever_happens_meanwhile(seed: int) -> None:
    """Laws 1 and 5: while references are replaced, withdrawn, merged and enrolled, every search finds each
    replaced reference exactly once, and none that was withdrawn before it began."""
    dimension, references = 8, 40
    row = np.eye(1, dimension)[0]
    log, engine = LogWriter(), engine_of(64)
    log.create("g", dimension)
    for number in range(references):
        log.enrol("g", f"kept-{number}", row)
    for number in range(2000):
        log.enrol("g", f"gone-{number}", row)
    engine.apply(log.entries)
    withdrawn = 0
    wrong: list[str] = []
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            before = withdrawn
            result = engine.search(asking(row[None], ("g",), 0.9, rank_max=5000))
            names = list(result.reference_ids)
            kept = sorted(name for name in names if name.startswith("kept"))
            if kept != sorted(f"kept-{number}" for number in range(references)):
                wrong.append(f"kept: {kept}")
            if any(name.startswith("gone") and int(name[5:]) < before for name in names):
                wrong.append(f"returned after its withdrawal, {before} were")

    def merge() -> None:
        while not done.is_set():
            engine.rewrite_one(BUDGET, NOW_MS, quiet=True)

    threads = [threading.Thread(target=work) for work in (search, search, merge)]
    for thread in threads:
        thread.start()
    try:
        chance = random.Random(seed)
        for number in range(0, 2000, 10):
            start = len(log.entries)
            for place in range(10):
                log.withdraw("g", f"gone-{number + place}")
                # Each time as another subject: with both or neither row visible the names above would differ.
                log.enrol("g", f"kept-{chance.randrange(references)}", row, f"subject-{number}-{place}")
            engine.apply(log.entries[start:])
            withdrawn = number + 10
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert dict(engine.status().live) == {"g": references}


def test_a_view_taken_before_an_entry_never_shows_it() -> None:
    """A search that began before a replacement sees the old row, to its end."""
    log, engine = LogWriter(), engine_of(2)
    log.create("g", 2)
    log.enrol("g", "a", np.array([1, 0]), "old")
    log.enrol("g", "b", np.array([1, 0]), "other")
    engine.apply(log.entries)
    view = engine.view
    log.enrol("g", "a", np.array([1, 0]), "new")
    log.withdraw("g", "b")
    engine.apply(log.entries)
    engine.rewrite_one(BUDGET, NOW_MS, quiet=True)
    request = asking(np.array([[1, 0]]))
    assert sorted(engine.search(request, view).subject_ids) == ["old", "other"]
    assert list(engine.search(request).subject_ids) == ["new"]


def test_what_ends_while_segments_are_joined_ends_in_the_new_one_too() -> None:
    """Law 5: between the copying of the rows and the publishing of the new segment."""
    log = LogWriter()

    class Interrupted(BySize):
        def build(self, stored: np.ndarray) -> Scanner:
            start = len(log.entries)
            log.withdraw("g", "r0")
            log.enrol("g", "r5", np.array([0, 1]), "new")
            engine.apply(log.entries[start:])
            return super().build(stored)

    engine = engine_of(4, build=Interrupted().build)
    log.create("g", 2)
    for number in range(8):
        log.enrol("g", f"r{number}", np.array([1, 0]))
        engine.apply(log.entries)
    assert engine.rewrite_one(BUDGET, NOW_MS, quiet=True) == 8
    assert [part.rows for part in engine.view.galleries["g"].parts] == [8, 1]
    found = engine.search(asking(np.array([[0.6, 0.8]])))
    assert list(found.reference_ids) == ["r5", "r1", "r2", "r3", "r4", "r6", "r7"]
    assert dict(engine.status().live) == {"g": 7}


def test_in_a_quiet_moment_open_rows_join_the_segment_that_codes_them() -> None:
    """Else a watchlist of 10,000 is served by codes for four fifths of its rows and in full for the others."""
    rng = np.random.default_rng(5)
    log, engine, oracle = LogWriter(), engine_of(4000), FlatOracle()
    log.create("g", 64)
    people = unit_rows(rng, 5000, 64)
    for number, row in enumerate(people):
        log.enrol("g", f"r{number}", row)
    engine.apply(log.entries)
    oracle.apply_now(log.entries)
    while engine.rewrite_one(BUDGET, NOW_MS, quiet=False):
        pass
    assert [type(part) for part in engine.view.galleries["g"].parts] == [Segment, TailView]
    while engine.rewrite_one(BUDGET, NOW_MS, quiet=True):
        pass
    (part,) = engine.view.galleries["g"].parts
    assert isinstance(part, Segment)
    assert part.code_bytes()
    request = asking(people[3990:4010], ("g",), 0.5, 3)
    assert same(engine.search(request), oracle.search_now(request))


def test_open_rows_after_a_full_tail_are_written_once_and_not_copied_as_they_grow() -> None:
    log, engine = LogWriter(), engine_of(400)
    log.create("g", 2)
    for number in range(790):
        log.enrol("g", f"r{number}", np.array([0.6, 0.8]))
    engine.apply(log.entries[:401])
    places = []
    for start in range(401, 791, 39):
        engine.apply(log.entries[start : start + 39])
        places.append(engine.view.galleries["g"].parts[-1].died_at)
    assert all(place is places[0] for place in places)
    assert engine.view.galleries["g"].parts[-1].rows == 390


def test_rows_are_in_few_parts_however_they_came(seed: int) -> None:
    """In quiet moments each part outweighs all that is smaller by eight, at least."""
    rng = np.random.default_rng(seed)
    log, engine = LogWriter(), engine_of(50)
    log.create("g", 2)
    for number in range(3000):
        log.enrol("g", f"r{number}", rng.standard_normal(2))
    for start in range(0, 3001, 40):
        engine.apply(log.entries[start : start + 40])
        while engine.rewrite_one(BUDGET, NOW_MS, quiet=False):
            pass
    parts = engine.view.galleries["g"].parts
    assert len(parts) < 16
    while engine.rewrite_one(BUDGET, NOW_MS, quiet=True):
        pass
    segments = [part for part in engine.view.galleries["g"].parts if not isinstance(part, TailView)]
    sizes = sorted(part.rows for part in segments)
    assert all(sum(sizes[:place]) < size / 8 for place, size in enumerate(sizes) if place)


# --- limits ----------------------------------------------------------------------------------------


def test_memory_is_refused_before_anything_of_a_block_is_applied() -> None:
    """And withdrawals still go through, and make room."""
    log, engine = LogWriter(), engine_of(4, memory_bytes_max=40_000)
    log.create("g", 64)
    rows = unit_rows(np.random.default_rng(1), 400, 64)
    engine.apply(log.entries)
    for number in range(400):
        log.enrol("g", f"r{number}", rows[number])
    with pytest.raises(MemoryRefused) as refused:
        engine.apply(log.entries)
    assert engine.sequence == 1
    assert dict(engine.status().live) == {"g": 0}
    assert refused.value.hint
    engine.apply(log.entries[:11])
    before = engine.status().bytes_in_memory
    assert before < 40_000
    withdrawals = LogWriter()
    withdrawals.entries = log.entries[:11]
    for number in range(10):
        withdrawals.withdraw("g", f"r{number}")
    engine.apply(withdrawals.entries)
    while engine.rewrite_one(CompactionBudget(1000, 0), NOW_MS + ANY_TIME, quiet=False):
        pass
    assert engine.status().bytes_in_memory < before


def test_entries_that_make_no_sense_are_refused_as_a_whole() -> None:
    """A template of another length, a gallery that was never created."""
    log, engine = LogWriter(), engine_of()
    log.create("g", 4)
    log.enrol("g", "a", np.zeros(4))
    log.enrol("g", "b", np.zeros(3))
    with pytest.raises(DataDamaged):
        engine.apply(log.entries)
    assert engine.sequence == 0
    other = LogWriter()
    other.enrol("nowhere", "a", np.zeros(4))
    with pytest.raises(DataDamaged):
        engine.apply(other.entries)


def test_a_reference_takes_at_most_1280_bytes() -> None:
    """Stored template, codes, columns and ids of 512-d references, but for what a segment holds once."""
    count, dimension = 17_000, 512  # fewer would be held as float32 too
    log, engine = LogWriter(), engine_of()
    log.create("g", dimension)
    for number, row in enumerate(unit_rows(np.random.default_rng(1), count, dimension)):
        log.enrol("g", f"ref-{number:09d}", row, f"sub-{number:09d}")
    engine.apply(log.entries)
    assert engine.snapshot() is not None
    while engine.rewrite_one(BUDGET, NOW_MS, quiet=True):
        pass
    (segment,) = [part for part in engine.view.galleries["g"].parts if isinstance(part, Segment)]
    assert segment.rows == count
    assert segment.code_bytes()
    rotation = 4 * dimension * dimension
    foreseen = 4 * choose.FLOORS.size * choose.BINS * (len(choose.blocks(dimension)) + 1)
    assert (segment.bytes_in_memory() - rotation - foreseen) / count <= 1280


# --- upkeep ----------------------------------------------------------------------------------------

sizes = st.lists(
    st.builds(
        SegmentSize,
        st.integers(0, 2000),
        st.integers(0, 300),
        st.integers(0, 200),
        st.booleans(),
    ),
    max_size=12,
)


@given(sizes, st.integers(100, 3000), st.booleans(), st.integers(0, 300))
def test_what_to_rewrite_is_due_or_worth_it_and_within_the_budget(
    sizes: list[SegmentSize], rows_max: int, quiet: bool, now_ms: int
) -> None:
    """More than one segment only within the budget; what must be erased before anything else."""
    chosen = to_rewrite(sizes, CompactionBudget(rows_max, 100), now_ms, quiet=quiet)
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) < 2 or sum(sizes[i].live for i in chosen) <= rows_max
    due = {i for i, size in enumerate(sizes) if size.dead and now_ms - size.died_ms_min >= 100}
    if due:
        assert chosen
        assert set(chosen) <= due


def test_while_rows_stream_in_a_row_is_coded_once_and_rarely_again() -> None:
    """A million rows in tails of 8192: few are ever without codes, and each is coded little more than once."""
    held: list[SegmentSize] = []
    budget = CompactionBudget(65_536, ANY_TIME)
    coded = plain_most = 0
    for _ in range(122):
        held.append(SegmentSize(8192, 0, ANY_TIME, plain=True))
        plain_most = max(plain_most, sum(one.live for one in held if one.plain))
        while chosen := to_rewrite(held, budget, 0, quiet=False):
            rows = sum(held[i].live for i in chosen)
            coded += rows
            held = [one for i, one in enumerate(held) if i not in chosen]
            held.append(SegmentSize(rows, 0, ANY_TIME))
    assert plain_most <= PLAIN_ROWS_MAX
    assert coded <= 1.1 * 122 * 8192
    assert len(held) <= 40


@given(st.lists(st.binary(max_size=5), max_size=20), st.data())
def test_names_and_their_index_survive_choosing_and_joining(names: list[bytes], data: st.DataObject) -> None:
    """Every reference is found by its hash, and by no other."""
    chosen = np.flatnonzero(np.array([data.draw(st.booleans()) for _ in names], np.bool_))
    held = Names.of(names)
    joined = joined_names([(held, chosen), (held, np.arange(len(names)))])
    assert [joined[row] for row in range(len(joined))] == [names[row] for row in chosen] + names
    index = HashIndex.of(id_hashes(names))
    np.testing.assert_array_equal(index.by_row(), id_hashes(names))
    wanted = [*names, b"not there at all"]
    positions, rows = index.candidates(id_hashes(wanted))
    found = {(wanted[position], int(row)) for position, row in zip(positions, rows, strict=True)}
    assert {(name, row) for row, name in enumerate(names)} <= found


async def test_withdrawn_rows_leave_every_file_in_time_and_the_report_says_so(tmp_path: Path) -> None:
    """Law 9: with the report only after the files are gone."""
    clock, log = FakeClock(NOW_MS), LogWriter()
    shard = await LocalShard.open(tmp_path, one_key(KEY), IndexSettings(memory_bytes_max=10**9), clock)
    log.create("g", 4)
    for number, row in enumerate(unit_rows(np.random.default_rng(1), 30, 4)):
        log.enrol("g", f"r{number}", row)
    await shard.apply(log.entries)
    clock.advance(61)
    assert (await shard.maintain()).erased == ()
    before = row_files(tmp_path)
    log.withdraw("g", "r7")
    log.withdraw("g", "r9")
    await shard.apply(log.entries)
    erased = []
    for _ in range(40):  # the stated hour, a round every minute and a half
        clock.advance(90)
        erased += (await shard.maintain()).erased
    assert [(one.gallery_id, one.rows, one.sequence_min, one.sequence_max) for one in erased] == [("g", 2, 9, 11)]
    assert not before & row_files(tmp_path)
    log.delete("g")
    await shard.apply(log.entries)
    clock.advance(61)
    assert [one.rows for one in (await shard.maintain()).erased] == [28]
    assert not row_files(tmp_path)
    await shard.close()


async def test_a_shard_opens_where_it_was_closed(tmp_path: Path) -> None:
    """Without a replay; closed twice is closed, and then it answers nothing."""
    clock, log = FakeClock(NOW_MS), LogWriter()
    settings = IndexSettings(memory_bytes_max=10**9)
    shard = await LocalShard.open(tmp_path, one_key(KEY), settings, clock)
    log.create("g", 4)
    log.enrol("g", "a", np.array([1, 0, 0, 0]))
    await shard.apply(log.entries)
    await shard.close()
    await shard.close()
    with pytest.raises(ShuttingDown):
        await shard.search(asking(np.eye(4)))
    again = await LocalShard.open(tmp_path, one_key(KEY), settings, clock)
    assert again.applied_sequence == 2
    assert list((await again.search(asking(np.eye(1, 4)))).reference_ids) == ["a"]
    await again.close()


async def test_law_1_files_that_reach_beyond_the_log_are_of_another_history(tmp_path: Path) -> None:
    """Law 1: after an older log was restored, the index holds nothing that the log does not."""
    clock, log = FakeClock(NOW_MS), LogWriter()
    settings = IndexSettings(memory_bytes_max=10**9)
    shard = await LocalShard.open(tmp_path, one_key(KEY), settings, clock)
    log.create("g", 2)
    log.enrol("g", "kept", np.array([1, 0]))
    log.enrol("g", "later", np.array([1, 0]))
    await shard.apply(log.entries)
    await shard.close()
    with structlog.testing.capture_logs() as told:
        again = await LocalShard.open(tmp_path, one_key(KEY), settings, clock, log_head=2)
    assert [one["event"] for one in told] == ["index_beyond_log"]
    assert again.applied_sequence == 0
    assert not row_files(tmp_path)
    await again.apply(log.entries[:2])
    assert list((await again.search(asking(np.array([[1, 0]])))).reference_ids) == ["kept"]
    await again.close()
    same = await LocalShard.open(tmp_path, one_key(KEY), settings, clock, log_head=2)
    assert same.applied_sequence == 2
    await same.close()


async def test_a_gallery_being_rebuilt_is_named_as_missing(tmp_path: Path) -> None:
    """Law 4: until replay has reached what the files had."""
    clock, log = FakeClock(NOW_MS), LogWriter()
    settings = IndexSettings(memory_bytes_max=10**9)
    shard = await LocalShard.open(tmp_path, one_key(KEY), settings, clock)
    for gallery_id in ("g", "h"):
        log.create(gallery_id, 2)
        log.enrol(gallery_id, "a", np.array([1, 0]))
    log.enrol("g", "b", np.array([1, 0]))
    await shard.apply(log.entries)
    await shard.close()
    damaged = min(row_files(tmp_path))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with structlog.testing.capture_logs():
        again = await LocalShard.open(tmp_path, one_key(KEY), settings, clock)
    assert again.applied_sequence == 0
    request = asking(np.array([[1, 0]]), ("g", "h"))
    result = await again.search(request)
    assert len(result.missing) == 1
    await again.apply(log.entries[:4])
    assert (await again.search(request)).missing == result.missing
    await again.apply(log.entries[:5])
    whole = await again.search(request)
    assert (whole.missing, list(whole.reference_ids)) == ((), ["a", "b", "a"])
    await again.close()


async def test_a_full_disk_stops_no_search_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Erasure is reported only when the files could be written."""
    clock, log = FakeClock(NOW_MS), LogWriter()
    shard = await LocalShard.open(tmp_path, one_key(KEY), IndexSettings(memory_bytes_max=10**9), clock)
    log.create("g", 2)
    log.enrol("g", "a", np.array([1, 0]))
    log.withdraw("g", "a")
    await shard.apply(log.entries[:2])
    await shard.apply(log.entries)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    clock.advance(61)
    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logged:
        patch.setattr("matcher_service.index.disk.os.fsync", full)
        assert (await shard.maintain()).erased == ()
    assert logged[0]["event"] == "index_files_not_written"
    assert (await shard.search(asking(np.array([[1, 0]])))).sequence == 3
    clock.advance(61)
    assert [one.rows for one in (await shard.maintain()).erased] == [1]
    await shard.close()
