"""Searching the shards of a cluster: replicas that answer, fail, lag, lie still or hold only a part."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.errors import InvalidInput, ReplayBehind
from matcher_service.partitions import ALL_PARTITIONS, NO_PARTITIONS, partition_of, share
from matcher_service.shards.exchange import ShardState
from matcher_service.shards.scattered import Known, in_turn
from tests.log_writer import LogWriter, asking, unit_rows
from tests.oracle import FlatOracle, same
from tests.oracle_replicas import OracleReplica, scattered


def people(count: int = 60) -> LogWriter:
    log = LogWriter()
    log.create("g", 8)
    for number, row in enumerate(unit_rows(np.random.default_rng(5), count, 8)):
        log.enrol("g", f"r{number}", row, f"s{number % 40}")
    return log


PROBES = unit_rows(np.random.default_rng(6), 5, 8)


async def test_shards_answer_together_as_one_would() -> None:
    """Law 2, over 1, 2, 4 and 7 shards, with partitions of any sizes and with one that two shards hold."""
    log = people()
    whole = FlatOracle()
    whole.apply_now(log.entries)
    expected = whole.search_now(asking(PROBES))
    for count in (1, 2, 4, 7):
        replicas = [OracleReplica(f"{number}", share(number, count)) for number in range(count)]
        replicas[0].assigned |= share(count - 1, count)
        for one in replicas:
            one.apply(log.entries)
        cluster = scattered(*([one] for one in replicas))
        await cluster.look()
        found = await cluster.search(asking(PROBES))
        assert same(found, expected)
        assert (found.missing, found.sequence) == ((), expected.sequence)


@pytest.mark.parametrize("wrong", ["gone", "stale", "never caught up", "behind"])
async def test_what_no_replica_answers_for_is_named(wrong: str) -> None:
    """Laws 4 and 5: lost, older than the lease, never caught up, or behind what is required, it is missing."""
    log = people()
    lost, kept = OracleReplica("lost", share(1, 4)), OracleReplica("kept", ALL_PARTITIONS - share(1, 4))
    for one in (lost, kept):
        one.apply(log.entries)
    cluster = scattered([lost], [kept])
    await cluster.look()
    request = asking(PROBES, rank_max=100)
    match wrong:
        case "gone":
            lost.gone = True
        case "stale":
            lost.age_ms = 500.1
        case "never caught up":
            lost.age_ms = None
        case "behind":
            lost.held.sequence -= 1
            request = replace(request, min_sequence=log.entries[-1].sequence)
    found = await cluster.search(request)
    assert found.missing == ("partitions 64-127",)
    assert {partition_of("g", one) for one in found.reference_ids} <= set(kept.assigned)
    lost.gone, lost.age_ms, lost.held.sequence = False, 500.0, log.entries[-1].sequence
    await cluster.look()
    assert (await cluster.search(request)).missing == ()


async def test_with_every_shard_lost_nothing_is_found_and_all_is_missing() -> None:
    """Law 4: without an error, so that each probe gets its answer."""
    one = OracleReplica("one", gone=True)
    cluster = scattered([one])
    await cluster.look()
    found = await cluster.search(asking(PROBES))
    assert (found.missing, found.offsets.tolist(), found.sequence) == (("partitions 0-255",), [0] * 6, 0)
    assert one.asked == 0, "a replica that was lost is not asked until it is found again"


@pytest.mark.parametrize("wrong", ["gone", "stale", "behind", "still", "part", "rebuilding"])
async def test_another_replica_answers_for_one_that_does_not(wrong: str) -> None:
    """Within one search, whichever of them had the first turn."""
    log = people()
    expected = FlatOracle()
    expected.apply_now(log.entries)
    bad, good = OracleReplica("bad"), OracleReplica("good")
    for one in (bad, good):
        one.apply(log.entries)
    if wrong == "part":
        bad.assigned = share(0, 2)
        bad.held = FlatOracle()
        bad.apply(log.entries)
    cluster = scattered([bad, good])
    await cluster.look()
    match wrong:
        case "gone":
            bad.gone = True
        case "stale":
            bad.age_ms = 600
        case "behind":
            bad.held.sequence -= 1
        case "still":
            bad.still = True
        case "rebuilding":
            bad.missing = ("gallery/g",)
            bad.held = FlatOracle()
            bad.held.sequence = log.entries[-1].sequence
    request = replace(asking(PROBES, rank_max=100), min_sequence=log.entries[-1].sequence)
    for _ in range(4):
        found = await cluster.search(request)
        assert same(found, expected.search_now(request))
        assert found.missing == ()
    assert good.asked >= 4
    if wrong in ("gone", "stale", "behind", "still"):
        assert bad.asked == 1, "once it has failed, the other one is asked first"
    bad.released.set()
    await cluster.close()


async def test_what_two_replicas_hold_in_part_is_joined() -> None:
    """Neither is whole, both count, and the answer is complete."""
    log = people()
    expected = FlatOracle()
    expected.apply_now(log.entries)
    halves = [OracleReplica("low", share(0, 2) | share(2, 4)), OracleReplica("high", share(1, 2))]
    for one in halves:
        one.apply(log.entries)
    cluster = scattered(halves)
    await cluster.look()
    found = await cluster.search(asking(PROBES))
    assert same(found, expected.search_now(asking(PROBES)))
    assert found.missing == ()


async def test_a_late_answer_changes_nothing_but_what_is_known_of_its_replica() -> None:
    """It was given up, its partitions were named as missing, and it comes after all."""
    log = people()
    slow = OracleReplica("slow", still=True)
    slow.apply(log.entries)
    cluster = scattered([slow], answer_within_s=0.01)
    await cluster.look()
    found = await cluster.search(asking(PROBES))
    assert found.missing == ("partitions 0-255",)
    slow.released.set()
    await cluster.close()
    assert found.missing == ("partitions 0-255",)
    assert (await cluster.search(asking(PROBES))).missing == ()


async def test_a_fault_of_the_request_is_no_fault_of_a_replica() -> None:
    """WRONG_DIMENSION reaches the caller, and nobody is given up for it."""
    log = people()
    replicas = [OracleReplica("a", share(0, 2)), OracleReplica("b", share(1, 2))]
    for one in replicas:
        one.apply(log.entries)
    cluster = scattered(*([one] for one in replicas))
    await cluster.look()
    with pytest.raises(InvalidInput):
        await cluster.search(asking(np.eye(3, dtype=np.float32)))
    assert (await cluster.search(asking(PROBES))).missing == ()


async def test_a_withdrawal_waits_for_every_replica_a_read_for_one_of_each_shard() -> None:
    """Law 5."""
    log = people(3)
    fast, slow, other = (OracleReplica(name) for name in ("fast", "slow", "other"))
    cluster = scattered([fast, slow], [other])
    for one in (fast, other):
        one.apply(log.entries)
    head = log.entries[-1].sequence
    watching = asyncio.create_task(cluster.watch())
    try:
        async with asyncio.timeout(60):
            await cluster.reached(head, asyncio.get_running_loop().time() + 60)
            everyone = asyncio.create_task(cluster.applied_by_all(head))
            done, _ = await asyncio.wait([everyone], timeout=0.05)
            assert not done
            with pytest.raises(ReplayBehind):
                await cluster.reached(head + 1, 0.0)
            slow.apply(log.entries)
            await everyone
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_a_shard_that_is_lost_is_not_waited_for() -> None:
    """Its partitions will be missing, which is an answer; a lagging one is waited for."""
    log = people(3)
    lost, kept = OracleReplica("lost", gone=True), OracleReplica("kept")
    kept.apply(log.entries)
    cluster = scattered([lost], [kept])
    await cluster.look()
    await cluster.reached(log.entries[-1].sequence, asyncio.get_running_loop().time() + 60)


async def test_a_shard_that_cannot_follow_is_told_once_all_its_replicas_say_so() -> None:
    """While one of them can, what is enrolled is still searchable."""
    a, b = OracleReplica("a", refusal="the budget is full"), OracleReplica("b")
    cluster = scattered([a, b])
    await cluster.look()
    assert cluster.refusal is None
    b.refusal = "the budget is full"
    await cluster.look()
    assert cluster.refusal is not None
    assert "the budget is full" in cluster.refusal.detail


async def test_the_rows_of_a_cluster_are_those_of_one_replica_of_each_shard() -> None:
    """Not of all: the second replica holds the same people."""
    log = people()
    replicas = [[OracleReplica(f"{number}{name}", share(number, 2)) for name in "ab"] for number in range(2)]
    for pair in replicas:
        for one in pair:
            one.apply(log.entries)
    cluster = scattered(*replicas)
    await cluster.look()
    status = await cluster.status()
    assert (dict(status.live), status.sequence) == ({"g": 60}, log.entries[-1].sequence)


@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, 0.0, 900.0]), st.integers(0, 3)), max_size=5
    ),
    st.integers(0, 3),
    st.integers(0, 10),
)
def test_the_order_of_asking(drawn: list[tuple[bool, bool, float | None, int]], min_sequence: int, turn: int) -> None:
    """Everyone that is up is in it once; nobody stands behind one that is worse; among equals all have a turn."""
    replicas = [
        Known(
            OracleReplica(f"{number}"),
            up,
            ShardState("s", sequence, age, NO_PARTITIONS),
            overdue={object()} if late else set(),  # type: ignore[arg-type]
        )
        for number, (up, late, age, sequence) in enumerate(drawn)
    ]

    def worth(one: Known) -> tuple[bool, bool, bool]:
        return (bool(one.overdue), not one.fresh, not one.has_applied(min_sequence))

    order = in_turn(replicas, min_sequence, turn)
    assert sorted(map(id, order)) == sorted(id(one) for one in replicas if one.up)
    assert [worth(one) for one in order] == sorted(map(worth, order))
    if order:
        best = [one for one in order if worth(one) == worth(order[0])]
        firsts = {id(in_turn(replicas, min_sequence, one)[0]) for one in range(len(replicas))}
        assert firsts == set(map(id, best))
