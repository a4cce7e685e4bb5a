"""Cuts batches out of admitted messages, answers every waiter.

Work-conserving: a free searcher takes what waits at once, there is no timer. Messages of one lane (same
spaces and galleries) share a batch; lanes take turns, and within a lane the credentials do, so that neither a
busy gallery nor a noisy edge node starves another. A message is never split over batches.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service.admission import Permit, ServiceTime
from matcher_service.errors import CallerFault, DeadlineExceeded, MatcherError, ServiceFault
from matcher_service.metrics import Metrics
from matcher_service.seams import Clock
from matcher_service.terms import Float32, Float64, Int64, SearchResult, SpaceId
from matcher_service.traces import Traces


class Lane(NamedTuple):
    """What messages must share to be searched together."""

    source: SpaceId
    target: SpaceId
    gallery_ids: tuple[str, ...]
    # A search without a floor takes longer: it must not be in one batch with those that have one.
    best_only: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """`templates` float32 [n, source.dimension], `floors` float32 [n, galleries], `rank_max` int64 [n].
    `min_sequence` is the greatest that one of its messages requires."""

    lane: Lane
    templates: Float32
    floors: Float32
    rank_max: Int64
    min_sequence: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """A search result with what the models say: `rates` float64 per candidate, `usable` bool per probe (False:
    the template has no direction in the target space and was not searched)."""

    result: SearchResult
    rates: Float64
    usable: NDArray[np.bool_]


Search = Callable[[Batch], Awaitable[Found]]


@dataclass(slots=True)
class _Waiting:
    templates: Float32
    floors: Float32
    rank_max: int
    deadline: float
    min_sequence: int
    since: float
    answer: asyncio.Future[Found]
    span: Any

    @property
    def rows(self) -> int:
        return int(self.templates.shape[0])


class Batcher:
    def __init__(
        self,
        search: Search,
        service_time: ServiceTime,
        clock: Clock,
        metrics: Metrics,
        *,
        probes_max: int,
        searchers: int,
        traces: Traces,
    ) -> None:
        self._search = search
        self._service_time = service_time
        self._clock = clock
        self._metrics = metrics
        self._traces = traces
        self._probes_max = probes_max
        self._searchers = searchers
        metrics.batches_in_flight_max.set(searchers)
        # Bounded by the permits: nothing enters without one.
        self._lanes: OrderedDict[Lane, OrderedDict[str, deque[_Waiting]]] = OrderedDict()
        self._waiting_rows = 0
        self._work = asyncio.Event()

    async def submit(
        self,
        permit: Permit,
        lane: Lane,
        templates: Float32,
        floors: Float32,
        rank_max: int,
        deadline: float,
        min_sequence: int = 0,
    ) -> Found:
        """Wait for the candidates of these probes. Raises DeadlineExceeded when `deadline` (monotonic seconds)
        passes first, and whatever the search raised."""
        if templates.shape[0] > permit.rows:
            raise ServiceFault("more probes than permits", hint="report this")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Found] = loop.create_future()
        here, now = self._traces.here(), self._clock.monotonic()
        waiting = _Waiting(templates, floors, rank_max, deadline, min_sequence, now, answer, here)
        lanes = self._lanes.setdefault(lane, OrderedDict())
        lanes.setdefault(permit.actor.name, deque()).append(waiting)
        self._count(waiting.rows)
        # No lock: nothing here waits. One would pass from message to message once a turn of the loop, and a thousand
        # that came at once would stand in line before the searchers.
        self._work.set()
        timer = loop.call_later(deadline - now, _expire, answer)
        try:
            return await answer
        finally:
            timer.cancel()

    async def run(self) -> None:
        """Search until cancelled. The owner of this task sees its death; waiters get an answer even then."""
        try:
            async with asyncio.TaskGroup() as searchers:
                for _ in range(self._searchers):
                    searchers.create_task(self._serve())
        finally:
            for waiting in self._drain():
                _fail(waiting, ServiceFault("the search stopped", hint="send again"))

    async def _serve(self) -> None:
        while True:
            while not self._lanes:
                self._work.clear()
                await self._work.wait()
            lane, batch = self._cut()
            if batch:
                with self._metrics.batches_in_flight.track_inprogress():
                    await self._answer(lane, batch)
            # Not until the next batch comes: nothing of a probe outlives its answer (law 6).
            del batch

    def _cut(self) -> tuple[Lane, list[_Waiting]]:
        """Take the next lane's next batch, one message of each credential in turn, dropping what is too late.

        It is full at `probes_max` probes, or earlier if more would make the most urgent of its messages miss a
        deadline that it can still meet.
        """
        lane, credentials = self._lanes.popitem(last=False)
        now = self._clock.monotonic()
        batch: list[_Waiting] = []
        rows = 0
        earliest = math.inf
        while credentials:
            name, queue = credentials.popitem(last=False)
            head = queue[0]
            dropped = head.answer.done() or head.deadline <= now
            if (
                not dropped
                and batch
                and (rows + head.rows > self._probes_max or self._would_be_late(rows, head.rows, earliest - now))
            ):
                credentials[name] = queue
                credentials.move_to_end(name, last=False)
                break
            queue.popleft()
            self._count(-head.rows)
            if queue:
                credentials[name] = queue
            if head.deadline <= now:
                _fail(head, _too_late())
            elif not head.answer.done():
                self._metrics.queue_seconds.observe(now - head.since)
                batch.append(head)
                rows += head.rows
                earliest = min(earliest, head.deadline)
        if credentials:
            self._lanes[lane] = credentials
        return lane, batch

    def _would_be_late(self, rows: int, more: int, left_s: float) -> bool:
        """Whether a batch of `rows` that is expected within `left_s` seconds would no longer be with `more`."""
        return self._service_time.batch_s(rows) <= left_s < self._service_time.batch_s(rows + more)

    async def _answer(self, lane: Lane, batch: list[_Waiting]) -> None:
        began = self._clock.monotonic()
        rows = sum(waiting.rows for waiting in batch)
        try:
            with self._traces.batch([waiting.span for waiting in batch], rows):
                found = await self._search(_joined(lane, batch))
        except CallerFault as fault:
            # One message's fault must not fall on its neighbours.
            if len(batch) == 1:
                _fail(batch[0], fault)
            else:
                for waiting in batch:
                    await self._answer(lane, [waiting])
        except MatcherError as error:
            for waiting in batch:
                _fail(waiting, error)
        except BaseException:
            for waiting in batch:
                _fail(waiting, ServiceFault("the search failed", hint="send again; the log of the service says why"))
            raise
        else:
            self._metrics.batch_probes.observe(rows)
            self._service_time.learn(rows, self._clock.monotonic() - began)
            begin = 0
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_result(_part(found, begin, begin + waiting.rows))
                begin += waiting.rows

    def _count(self, rows: int) -> None:
        self._waiting_rows += rows
        self._metrics.queue_probes.set(self._waiting_rows)

    def _drain(self) -> list[_Waiting]:
        left = [waiting for lane in self._lanes.values() for queue in lane.values() for waiting in queue]
        self._lanes.clear()
        return left


def _joined(lane: Lane, batch: list[_Waiting]) -> Batch:
    if len(batch) == 1:
        only = batch[0]
        ranks = np.full(only.rows, only.rank_max, dtype=np.int64)
        return Batch(lane, only.templates, only.floors, ranks, only.min_sequence)
    return Batch(
        lane,
        np.concatenate([waiting.templates for waiting in batch]),
        np.concatenate([waiting.floors for waiting in batch]),
        np.repeat(
            np.array([waiting.rank_max for waiting in batch], dtype=np.int64),
            [waiting.rows for waiting in batch],
        ),
        max(waiting.min_sequence for waiting in batch),
    )


def _part(found: Found, begin: int, end: int) -> Found:
    """The rows begin:end of a batch's result, as a result of its own."""
    result = found.result
    first, last = int(result.offsets[begin]), int(result.offsets[end])
    return Found(
        SearchResult(
            offsets=result.offsets[begin : end + 1] - first,
            gallery=result.gallery[first:last],
            scores=result.scores[first:last],
            reference_ids=result.reference_ids[first:last],
            subject_ids=result.subject_ids[first:last],
            sequence=result.sequence,
            missing=result.missing,
        ),
        found.rates[first:last],
        found.usable[begin:end],
    )


def _fail(waiting: _Waiting, error: MatcherError) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)


def _expire(answer: asyncio.Future[Found]) -> None:
    if not answer.done():
        answer.set_exception(_too_late())


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("not answered within the deadline", hint="allow more time, or send fewer probes")
