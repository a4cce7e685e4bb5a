"""What every Shard owes its callers (`seams.Shard`, `seams.ReplayedShard`): the engine in this process, the same
on a Triton server, several shards together, and the flat oracle that the other tests trust."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from matcher_service.errors import InvalidInput
from matcher_service.seams import ReplayedShard
from matcher_service.settings import IndexSettings
from matcher_service.shards.local import LocalShard
from matcher_service.terms import Cause, SearchRequest, SearchResult
from tests.fake_clock import FakeClock
from tests.log_writer import FAR_MS, NOW_MS, LogWriter, asking, unit_rows
from tests.one_key import one_key
from tests.oracle import FlatOracle, score_of
from tests.oracle_replicas import ScatteredOracles

KEY = bytes(32)


@asynccontextmanager
async def local(request: pytest.FixtureRequest) -> AsyncIterator[ReplayedShard]:
    settings = IndexSettings(memory_bytes_max=10**9)
    shard = await LocalShard.open(request.getfixturevalue("tmp_path"), one_key(KEY), settings, FakeClock(NOW_MS))
    yield shard
    await shard.close()


@asynccontextmanager
async def oracle(request: pytest.FixtureRequest) -> AsyncIterator[ReplayedShard]:
    yield FlatOracle()


@asynccontextmanager
async def in_shards(request: pytest.FixtureRequest) -> AsyncIterator[ReplayedShard]:
    shard = ScatteredOracles()
    yield shard
    await shard.close()


@asynccontextmanager
async def on_triton(request: pytest.FixtureRequest) -> AsyncIterator[ReplayedShard]:
    served = request.getfixturevalue("served_shard")
    # Imported only where there is a server: the default tests run without the client.
    from tests.cluster.hosted_shard import asked

    async with asked(served.server) as asking:
        shard = served.shard(asking)
        await shard.begin()
        yield shard


IMPLEMENTATIONS = [
    pytest.param(local, id="local"),
    pytest.param(oracle, id="oracle"),
    pytest.param(in_shards, id="scattered"),
    pytest.param(on_triton, id="triton", marks=pytest.mark.cluster),
]


@pytest.fixture(params=IMPLEMENTATIONS)
async def shard(request: pytest.FixtureRequest) -> AsyncIterator[ReplayedShard]:
    async with request.param(request) as made:
        yield made


@pytest.fixture
def log() -> LogWriter:
    return LogWriter()


def found(result: SearchResult, probe: int = 0) -> list[tuple[str, float]]:
    here = slice(*result.offsets[probe : probe + 2].tolist())
    return list(zip(result.reference_ids[here], result.scores[here].tolist(), strict=True))


async def test_an_empty_shard_answers_every_probe_with_nothing(shard: ReplayedShard) -> None:
    """A gallery that is not held yields no candidates."""
    result = await shard.search(asking(np.eye(3, dtype=np.float32), ("unknown",)))
    assert result.offsets.tolist() == [0, 0, 0, 0]
    assert result.sequence == 0
    assert result.missing == ()


async def test_a_search_after_apply_sees_all_of_it(shard: ReplayedShard, log: LogWriter) -> None:
    """Law 5, and law 2: the score is the float64 product rounded to float32."""
    rows = unit_rows(np.random.default_rng(1), 20, 16)
    log.create("g", 16)
    for number, row in enumerate(rows):
        log.enrol("g", f"r{number}", row)
    await shard.apply(log.entries)
    result = await shard.search(asking(rows, rank_max=1))
    stored = rows.astype(np.float16)
    for number, row in enumerate(rows):
        assert found(result, number) == [(f"r{number}", float(score_of(row, stored[number])))]
    assert result.sequence == log.entries[-1].sequence


async def test_replay_may_repeat_itself(shard: ReplayedShard, log: LogWriter) -> None:
    """Entries at or below the shard's sequence are skipped, in whatever blocks they come."""
    log.create("g", 2)
    log.enrol("g", "a", np.array([1, 0]))
    log.withdraw("g", "a")
    log.enrol("g", "b", np.array([1, 0]))
    await shard.apply(log.entries)
    await shard.apply(log.entries[:2])
    await shard.apply(log.entries[1:])
    assert [name for name, _ in found(await shard.search(asking(np.array([[1, 0]]))))] == ["b"]
    status = await shard.status()
    assert (status.sequence, dict(status.live)) == (4, {"g": 1})


async def test_a_replacement_leaves_one_and_a_withdrawal_none(shard: ReplayedShard, log: LogWriter) -> None:
    """Within one block and across blocks."""
    log.create("g", 2)
    log.enrol("g", "a", np.array([1, 0]), "old")
    await shard.apply(log.entries)
    log.enrol("g", "a", np.array([0, 1]), "new")
    await shard.apply(log.entries)
    result = await shard.search(asking(np.array([[0, 1]])))
    assert (list(result.reference_ids), list(result.subject_ids)) == (["a"], ["new"])
    log.withdraw("g", "a")
    log.enrol("g", "b", np.array([0, 1]))
    log.withdraw("g", "b")
    log.withdraw("g", "never there")
    await shard.apply(log.entries)
    assert found(await shard.search(asking(np.array([[0, 1]])))) == []


async def test_the_floor_is_inclusive_and_per_gallery(shard: ReplayedShard, log: LogWriter) -> None:
    """A reference is a candidate if its score >= its gallery's floor."""
    for gallery_id in ("g", "h"):
        log.create(gallery_id, 2)
        log.enrol(gallery_id, "a", np.array([0.5, 0.5]))
    await shard.apply(log.entries)
    floors = np.array([[0.5, np.nextafter(np.float32(0.5), np.float32(1))], [-np.inf, 0.0]], np.float32)
    probes = np.array([[1, 0], [0, 1]], np.float32)
    result = await shard.search(SearchRequest(("g", "h"), probes, floors, np.array([5, 5]), NOW_MS))
    assert result.offsets.tolist() == [0, 1, 3]
    assert result.gallery.tolist() == [0, 0, 1]


async def test_candidates_come_by_score_then_gallery_then_reference(shard: ReplayedShard, log: LogWriter) -> None:
    """Ties are ordered by (gallery_id, reference_id) as UTF-8 bytes; rank_max cuts after that."""
    for gallery_id in ("b", "ä", "a"):
        log.create(gallery_id, 2)
        for reference_id in ("z", "é", "Z"):
            log.enrol(gallery_id, reference_id, np.array([1, 0]))
    log.enrol("ä", "best", np.array([2, 0]))
    await shard.apply(log.entries)
    galleries = ("ä", "b", "a")
    result = await shard.search(asking(np.array([[1, 0]]), galleries, rank_max=6))
    names = [(galleries[number], name) for number, name in zip(result.gallery, result.reference_ids, strict=True)]
    assert names == [("ä", "best"), ("a", "Z"), ("a", "z"), ("a", "é"), ("b", "Z"), ("b", "z")]


async def test_a_subject_of_a_gallery_comes_once_with_its_best_reference(shard: ReplayedShard, log: LogWriter) -> None:
    """And does not take the place of another subject; in another gallery it is another candidate."""
    log.create("g", 2)
    log.create("h", 2)
    for number in range(6):
        log.enrol("g", f"many-{number}", np.array([1, number / 8]), "one")
    log.enrol("g", "other", np.array([0.25, 0]), "two")
    log.enrol("h", "again", np.array([0.5, 0]), "one")
    await shard.apply(log.entries)
    result = await shard.search(asking(np.array([[0.6, 0.8]]), ("g", "h"), rank_max=3))
    assert list(result.reference_ids) == ["many-5", "again", "other"]


async def test_a_reference_is_gone_at_the_moment_it_expires(shard: ReplayedShard, log: LogWriter) -> None:
    """Law 9: expiry is judged by the time that the search names."""
    log.create("g", 2)
    log.enrol("g", "a", np.array([1, 0]), expires_at_ms=NOW_MS + 5)
    log.enrol("g", "b", np.array([1, 0]), expires_at_ms=FAR_MS)
    await shard.apply(log.entries)
    for at_ms, names in ((NOW_MS + 4, ["a", "b"]), (NOW_MS + 5, ["b"]), (NOW_MS + 6, ["b"])):
        result = await shard.search(asking(np.array([[1, 0]]), at_ms=at_ms))
        assert list(result.reference_ids) == names


async def test_a_deleted_gallery_is_as_if_it_had_never_been(shard: ReplayedShard, log: LogWriter) -> None:
    """In the block that deletes it too."""
    log.create("g", 2)
    log.enrol("g", "a", np.array([1, 0]))
    await shard.apply(log.entries)
    log.enrol("g", "b", np.array([1, 0]))
    log.delete("g")
    await shard.apply(log.entries)
    assert found(await shard.search(asking(np.array([[1, 0]])))) == []
    assert dict((await shard.status()).live) == {}


async def test_an_erased_enrolment_counts_but_holds_nothing(shard: ReplayedShard, log: LogWriter) -> None:
    """Replay meets templates that the log has forgotten; its sequence goes on."""
    log.create("g", 2)
    log.enrol("g", "a", None)
    log.enrol("g", "b", np.array([1, 0]))
    log.enrol("g", "b", None)
    await shard.apply(log.entries)
    result = await shard.search(asking(np.array([[1, 0]])))
    assert (found(result), result.sequence) == ([], 4)


async def test_probes_of_another_dimension_are_refused(shard: ReplayedShard, log: LogWriter) -> None:
    """WRONG_DIMENSION, whichever of the galleries it is."""
    log.create("g", 2)
    log.create("h", 3)
    await shard.apply(log.entries)
    with pytest.raises(InvalidInput) as refused:
        await shard.search(asking(np.array([[1, 0]]), ("g", "h")))
    assert refused.value.cause is Cause.WRONG_DIMENSION


async def test_a_batch_of_no_probes_has_no_answers(shard: ReplayedShard, log: LogWriter) -> None:
    """And is not an error."""
    log.create("g", 2)
    await shard.apply(log.entries)
    result = await shard.search(asking(np.empty((0, 2), np.float32)))
    assert result.offsets.tolist() == [0]
