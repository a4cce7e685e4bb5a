"""An index that holds a share of the log's references, gains another share and loses one: exact at every moment."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable

import numpy as np
import pytest

from matcher_service.index.compaction import CompactionBudget
from matcher_service.index.engine import Engine
from matcher_service.index.scanners import BySize
from matcher_service.partitions import Partitions, mask_of, partition_of, partitions_of, share
from matcher_service.records import decode_gallery
from matcher_service.terms import EntryKind, LogEntry
from tests.log_writer import LogWriter, asking, unit_rows
from tests.oracle import FlatOracle, same

LEFT, RIGHT = share(0, 2), share(1, 2)
BUDGET = CompactionBudget(rows_max=1_000_000, erase_after_ms=10**9)
GALLERIES = ("g", "h")


def engine_of() -> Engine:
    return Engine(
        build=BySize().build,
        dimension_of=lambda entry: decode_gallery(entry.record).space.dimension,
        segment_rows_max=1_000_000,
        memory_bytes_max=10**10,
        tail_rows_max=300,
    )


def of(partitions: Partitions, entries: Iterable[LogEntry]) -> list[LogEntry]:
    mask = mask_of(partitions)
    return [
        one
        for one in entries
        if one.kind not in (EntryKind.ENROL, EntryKind.WITHDRAW) or mask[partition_of(one.gallery_id, one.reference_id)]
    ]


def oracle_of(partitions: Partitions, log: LogWriter) -> FlatOracle:
    oracle = FlatOracle()
    oracle.apply_now(of(partitions, log.entries))
    return oracle


def write(log: LogWriter, rng: np.random.Generator, rows: int) -> None:
    """Enrolments, replacements and withdrawals among 900 references of two galleries."""
    if not log.entries:
        for gallery_id in GALLERIES:
            log.create(gallery_id, 32)
    for row in unit_rows(rng, rows, 32):
        gallery_id, name = GALLERIES[int(rng.integers(2))], f"r{rng.integers(900)}"
        if rng.random() < 0.2:
            log.withdraw(gallery_id, name)
        else:
            log.enrol(gallery_id, name, row, f"s{rng.integers(200)}")


@pytest.fixture
def rng() -> np.random.Generator:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def assert_answers_as(engine: Engine, oracle: FlatOracle, rng: np.random.Generator) -> None:
    for floor in (-np.inf, 0.3):
        request = asking(unit_rows(rng, 8, 32), GALLERIES, floor)
        assert same(engine.search(request), oracle.search_now(request))


def test_what_the_log_has_beyond_the_share_moves_the_sequence_on() -> None:
    """A search then names a sequence of the log, though no entry there was for this index."""
    log, engine = LogWriter(), engine_of()
    log.create("g", 2)
    engine.apply(log.entries, through=9)
    assert engine.search(asking(np.array([[1, 0]]))).sequence == 9
    log.enrol("g", "a", np.array([1, 0]))
    engine.apply([log.entries[-1]._replace(sequence=9)])
    assert engine.sequence == 9
    assert len(engine.search(asking(np.array([[1, 0]]))).scores) == 0
    engine.apply([], through=3)
    assert engine.sequence == 9


def test_an_index_that_adopts_another_answers_for_both(rng: np.random.Generator) -> None:
    """Law 2: from that moment, and after whatever follows; the other is left with nothing."""
    log, mine, other = LogWriter(), engine_of(), engine_of()
    write(log, rng, 2000)
    head = log.entries[-1].sequence
    mine.apply(of(LEFT, log.entries), head)
    other.apply(of(RIGHT, log.entries), head)
    assert_answers_as(mine, oracle_of(LEFT, log), rng)
    mine.adopt(other)
    assert_answers_as(mine, oracle_of(LEFT | RIGHT, log), rng)
    assert other.status().live == {}
    assert not other.changed
    write(log, rng, 1000)
    mine.apply(log.entries)
    while mine.rewrite_one(BUDGET, log.entries[-1].at_ms, quiet=True):
        pass
    assert_answers_as(mine, oracle_of(LEFT | RIGHT, log), rng)


def test_two_moments_of_the_log_are_not_joined(rng: np.random.Generator) -> None:
    """An index adopts only what has applied as much as itself."""
    log, mine, other = LogWriter(), engine_of(), engine_of()
    write(log, rng, 50)
    mine.apply(of(LEFT, log.entries), 52)
    other.apply(of(RIGHT, log.entries[:-1]), 51)
    with pytest.raises(ValueError, match="52"):
        mine.adopt(other)


def test_rows_that_are_ended_leave_exactly_the_others(rng: np.random.Generator) -> None:
    """Law 2, for what is kept; the rows ended are compacted away like withdrawn ones."""
    log, engine = LogWriter(), engine_of()
    write(log, rng, 3000)
    engine.apply(log.entries)
    gone = mask_of(RIGHT)
    before = sum(engine.status().live.values())
    ended = engine.end_rows(lambda gallery_id, names: gone[partitions_of(gallery_id, names)], log.entries[-1].at_ms)
    assert ended == before - sum(engine.status().live.values()) > 0
    assert_answers_as(engine, oracle_of(LEFT, log), rng)
    write(log, rng, 500)
    engine.apply(of(LEFT, log.entries), log.entries[-1].sequence)
    while engine.rewrite_one(CompactionBudget(1_000_000, 0), log.entries[-1].at_ms + 1, quiet=True):
        pass
    assert_answers_as(engine, oracle_of(LEFT, log), rng)
    assert sum(engine.status().dead.values()) < ended


def test_rows_are_ended_while_segments_are_joined(rng: np.random.Generator) -> None:
    """A rewrite that took the rows before they ended, and publishes after, brings none of them back."""
    log, reached, go_on = LogWriter(), threading.Event(), threading.Event()
    scanners = BySize()
    engine = engine_of()
    write(log, rng, 6000)
    engine.apply(log.entries)

    def slow_build(stored: np.ndarray) -> object:
        reached.set()
        go_on.wait(30)
        return scanners.build(stored)

    engine._build = slow_build  # type: ignore[assignment]
    rewriting = threading.Thread(
        target=engine.rewrite_one, args=(BUDGET, log.entries[-1].at_ms), kwargs={"quiet": True}
    )
    rewriting.start()
    assert reached.wait(30)
    gone, looks = mask_of(RIGHT), 0

    def chosen(gallery_id: str, names: object) -> np.ndarray:
        nonlocal looks
        looks += 1
        if looks == 2:
            # The first part has been judged; the rewrite replaces it, and others that have not.
            go_on.set()
            rewriting.join()
        return gone[partitions_of(gallery_id, names)]  # type: ignore[arg-type]

    engine.end_rows(chosen, log.entries[-1].at_ms)
    assert not rewriting.is_alive()
    assert_answers_as(engine, oracle_of(LEFT, log), rng)


def test_a_view_taken_before_rows_are_ended_shows_all_of_them(rng: np.random.Generator) -> None:
    """A search sees one moment: what it guesses a floor from does not vanish before it scans."""
    log, engine = LogWriter(), engine_of()
    write(log, rng, 1500)
    engine.apply(log.entries)
    view, gone = engine.view, mask_of(RIGHT)
    assert engine.end_rows(lambda gallery_id, names: gone[partitions_of(gallery_id, names)], log.entries[-1].at_ms)
    request = asking(unit_rows(rng, 8, 32), GALLERIES)
    assert same(engine.search(request, view), oracle_of(LEFT | RIGHT, log).search_now(request))
    assert_answers_as(engine, oracle_of(LEFT, log), rng)
