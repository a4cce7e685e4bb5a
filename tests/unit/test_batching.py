"""Batching: Law 3, every probe gets exactly one answer, its own, and nobody starves."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Gauge

from matcher_service.admission import Admission, ServiceTime
from matcher_service.batching import Batch, Batcher, Found, Lane
from matcher_service.clock import SystemClock
from matcher_service.errors import DeadlineExceeded, InvalidInput, ServiceFault, ShardUnavailable
from matcher_service.metrics import Metrics
from matcher_service.terms import Actor, SearchResult, SpaceId
from matcher_service.traces import NoTraces

SPACE = SpaceId("s", 1, 2)
LANE = Lane(SPACE, SPACE, ("g",))
OTHER_LANE = Lane(SPACE, SPACE, ("h",))
POISON = 666.0


def answer(batch: Batch) -> Found:
    """One candidate per probe whose name is the probe's first number: each answer tells its question."""
    values = batch.templates[:, 0]
    count = len(values)
    names = [str(int(value)) for value in values]
    result = SearchResult(
        offsets=np.arange(count + 1, dtype=np.int64),
        gallery=np.zeros(count, np.int64),
        scores=values.astype(np.float32),
        reference_ids=names,
        subject_ids=names,
        sequence=7,
    )
    return Found(result, values.astype(np.float64), np.ones(count, bool))


class Searches:
    """Answers batches when let, and remembers them."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, batch: Batch) -> Found:
        self.batches.append([int(value) for value in batch.templates[:, 0]])
        await self.gate.wait()
        if POISON in batch.templates:
            raise InvalidInput("poison")
        return answer(batch)


Submit = Callable[..., "asyncio.Task[Found]"]


@asynccontextmanager
async def batching(
    search: Callable[[Batch], object], probes_max: int = 8, searchers: int = 1, seconds_per_probe: float = 0.0
) -> AsyncIterator[Submit]:
    clock = SystemClock()
    time = ServiceTime(probes_max, searchers)
    for rows in (1, probes_max) * 50 if seconds_per_probe else ():
        time.learn(rows, rows * seconds_per_probe)
    door = Admission(10_000, 10_000, time, clock, Gauge("permits", "permits", registry=CollectorRegistry()))
    batcher = Batcher(
        search,  # type: ignore[arg-type]
        time,
        clock,
        Metrics(CollectorRegistry()),
        probes_max=probes_max,
        searchers=searchers,
        traces=NoTraces(),
    )
    running = asyncio.create_task(batcher.run())

    def submit(
        *values: float, lane: Lane = LANE, actor: str = "van", within_s: float = 30.0, admitted_s: float | None = None
    ) -> asyncio.Task[Found]:
        templates = np.array([[value, 1] for value in values], np.float32)
        floors = np.zeros((len(values), 1), np.float32)

        async def ask() -> Found:
            door_s = within_s if admitted_s is None else admitted_s
            with door.admit(Actor(actor), len(values), clock.monotonic() + door_s) as permit:
                return await batcher.submit(permit, lane, templates, floors, 1, clock.monotonic() + within_s)

        return asyncio.create_task(ask())

    try:
        yield submit
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await running


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_each_caller_gets_the_answers_to_its_own_probes() -> None:
    searches = Searches()
    async with batching(searches) as submit:
        searches.gate.clear()
        asked = [submit(*range(10 * at, 10 * at + at + 1)) for at in range(7)]
        await settle()
        searches.gate.set()
        for at, task in enumerate(asked):
            found = await task
            assert found.result.reference_ids == [str(value) for value in range(10 * at, 10 * at + at + 1)]
            assert found.result.offsets.tolist() == list(range(at + 2))
    assert len(searches.batches) < 7


async def test_an_idle_searcher_takes_what_waits_at_once() -> None:
    searches = Searches()
    async with batching(searches) as submit:
        await submit(1)
        await submit(2)
    assert searches.batches == [[1], [2]]


async def test_a_batch_is_cut_by_count_and_never_splits_a_message() -> None:
    searches = Searches()
    async with batching(searches, probes_max=4) as submit:
        searches.gate.clear()
        first = submit(0)
        await settle()
        rest = [submit(1, 2, 3), submit(4, 5), submit(6, 7, 8, 9, 10)]
        await settle()
        searches.gate.set()
        await asyncio.gather(first, *rest)
    assert searches.batches == [[0], [1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]


async def test_a_batch_is_cut_where_more_would_make_the_most_urgent_late() -> None:
    searches = Searches()
    async with batching(searches, probes_max=1000, seconds_per_probe=1.0) as submit:
        searches.gate.clear()
        first = submit(0, within_s=1e9)
        await settle()
        # Four probes take about four seconds: the one that must be answered within 3.5 takes two others with it.
        urgent = submit(1, within_s=3.5, actor="a")
        rest = [submit(value, within_s=1e9, actor=f"other {value}") for value in (2, 3, 4, 5)]
        await settle()
        searches.gate.set()
        await asyncio.gather(first, urgent, *rest)
    assert searches.batches == [[0], [1, 2, 3], [4, 5]]


async def test_a_message_that_is_late_whatever_is_done_does_not_keep_batches_small() -> None:
    searches = Searches()
    async with batching(searches, probes_max=1000, seconds_per_probe=1.0) as submit:
        searches.gate.clear()
        first = submit(0, within_s=1e9)
        await settle()
        hopeless = submit(1, 2, within_s=1.9, admitted_s=1e9, actor="a")
        rest = [submit(value, within_s=1e9, actor=f"other {value}") for value in (3, 4)]
        await settle()
        searches.gate.set()
        await asyncio.gather(first, hopeless, *rest)
    assert searches.batches == [[0], [1, 2, 3, 4]]


async def test_what_is_too_late_is_dropped_at_the_queue_and_answered() -> None:
    searches = Searches()
    async with batching(searches) as submit:
        searches.gate.clear()
        first = submit(0)
        await settle()
        late, timely = submit(1, within_s=0.01), submit(2)
        with pytest.raises(DeadlineExceeded):
            await late
        searches.gate.set()
        await asyncio.gather(first, timely)
    assert searches.batches == [[0], [2]]


async def test_a_caller_that_left_costs_no_search() -> None:
    searches = Searches()
    async with batching(searches) as submit:
        searches.gate.clear()
        first = submit(0)
        await settle()
        gone, stays = submit(1), submit(2)
        await settle()
        gone.cancel()
        await settle()
        searches.gate.set()
        await asyncio.gather(first, stays)
    assert searches.batches == [[0], [2]]


async def test_one_messages_fault_does_not_fall_on_its_neighbours() -> None:
    searches = Searches()
    async with batching(searches) as submit:
        searches.gate.clear()
        first = submit(0)
        await settle()
        bad, good = submit(POISON), submit(2)
        await settle()
        searches.gate.set()
        await first
        with pytest.raises(InvalidInput):
            await bad
        assert (await good).result.reference_ids == ["2"]


async def test_a_failing_search_answers_all_its_callers() -> None:
    async def fails(batch: Batch) -> Found:
        raise ShardUnavailable("gone")

    async with batching(fails) as submit:
        for task in [submit(1), submit(2), submit(3)]:
            with pytest.raises(ShardUnavailable):
                await task


async def test_a_dying_batcher_answers_all_its_callers() -> None:
    async def breaks(batch: Batch) -> Found:
        raise ZeroDivisionError

    async with batching(breaks, probes_max=1) as submit:
        for task in [submit(1), submit(2), submit(3)]:
            with pytest.raises(ServiceFault):
                await asyncio.wait_for(task, 5)


async def test_a_noisy_edge_node_does_not_starve_another() -> None:
    searches = Searches()
    async with batching(searches, probes_max=2) as submit:
        searches.gate.clear()
        first = submit(0)
        await settle()
        noisy = [submit(100 + at, actor="noisy") for at in range(20)]
        quiet = submit(1, actor="quiet")
        await settle()
        searches.gate.set()
        await asyncio.gather(first, quiet, *noisy)
    assert 1 in searches.batches[1]


async def test_lanes_take_turns() -> None:
    searches = Searches()
    async with batching(searches, probes_max=2) as submit:
        searches.gate.clear()
        first = submit(0)
        await settle()
        busy = [submit(100 + at) for at in range(20)]
        other = submit(1, lane=OTHER_LANE)
        await settle()
        searches.gate.set()
        await asyncio.gather(first, other, *busy)
    assert [1] in searches.batches[1:4]


async def test_law_6_templates_are_let_go_of_with_the_answer_and_not_when_the_next_batch_comes() -> None:
    searched: list[weakref.ref[object]] = []

    async def search(batch: Batch) -> Found:
        searched.append(weakref.ref(batch.templates))
        return answer(batch)

    async with batching(search, searchers=2) as submit:
        # Alone in its batch, a message's templates are searched as they came.
        await submit(1, 2)
        await settle()
        assert [one() for one in searched] == [None] * len(searched)
