"""Searching every shard of a cluster through one replica each, and saying what is missing.

A shard is served by replicas. One of each is asked, another one as well if it takes long or fails. An answer counts
only if the replica knew itself caught up with the log within the freshness lease (law 5) and has applied what the
caller requires. What the answers that count hold together is the result; partitions that none of them holds are named
as missing (law 4). An answer that comes when nobody waits for it any more changes nothing but what is known of its
replica.

How a replica is reached stands behind the protocol `Replica`: nothing here knows of Triton.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from matcher_service.errors import CallerFault, MemoryRefused, ReplayBehind, ShardUnavailable
from matcher_service.merge import merge
from matcher_service.metrics import Metrics
from matcher_service.partitions import ALL_PARTITIONS, NO_PARTITIONS, Partitions, named
from matcher_service.replay import FRESHNESS_LEASE_S
from matcher_service.seams import Clock
from matcher_service.shards.exchange import ShardAnswer, ShardState
from matcher_service.terms import SearchRequest, SearchResult, ShardStatus

# How often each replica is asked how it is, and how often while somebody waits for what it has applied.
LOOK_EVERY_S = 0.2
LOOK_EVERY_AWAITED_S = 0.02

_log = structlog.get_logger(__name__)


class Replica(Protocol):
    """One server of a shard's partitions. `until` is in monotonic seconds. Calls raise ShardUnavailable for no answer
    by then, or none that makes sense; another replica may give one."""

    @property
    def name(self) -> str: ...

    async def search(self, request: SearchRequest, until: float) -> ShardAnswer:
        """Raises a CallerFault for what no replica would answer."""
        ...

    async def state(self, until: float) -> ShardState: ...


@dataclass(eq=False)
class Known:
    """What this process knows of a replica: whether its last call was answered, the state told last, that of the last
    look (which alone counts rows), and the searches that it lets wait."""

    replica: Replica
    up: bool = False
    state: ShardState | None = None
    looked: ShardState | None = None
    overdue: set[_Asked] = field(default_factory=set)

    def learn(self, state: ShardState) -> None:
        self.up, self.state = True, state

    @property
    def fresh(self) -> bool:
        return self.up and self.state is not None and not unfit(self.state, 0)

    @property
    def partitions(self) -> Partitions:
        return self.state.partitions if self.up and self.state is not None else NO_PARTITIONS

    def has_applied(self, sequence: int) -> bool:
        return self.state is not None and self.state.sequence >= sequence


_Asked = asyncio.Task[ShardAnswer | CallerFault | None]


def in_turn(replicas: Sequence[Known], min_sequence: int, turn: int) -> list[Known]:
    """Whom to ask, first choice first, of those that are up; among equals they take turns. Those that let somebody
    wait come last, before them those that were not fresh when last heard of, or had not applied `min_sequence`."""
    ranked = [
        (bool(one.overdue), not one.fresh, not one.has_applied(min_sequence), (number - turn) % len(replicas), number)
        for number, one in enumerate(replicas)
        if one.up
    ]
    return [replicas[number] for *_, number in sorted(ranked)]


def unfit(state: ShardState, min_sequence: int) -> str:
    """Why an answer given in this state does not count: "stale", "behind", or "" if it does."""
    age_ms = state.caught_up_age_ms
    if age_ms is None or age_ms > FRESHNESS_LEASE_S * 1000:
        return "stale"
    return "behind" if state.sequence < min_sequence else ""


def joined(answers: Sequence[ShardAnswer], request: SearchRequest) -> SearchResult:
    """One result of the answers that count, which also names the partitions that none of them holds."""
    results = [one.result for one in answers]
    found = results[0] if len(results) == 1 else merge(results, request.gallery_ids, request.rank_max)
    absent = ALL_PARTITIONS.difference(*(one.state.partitions for one in answers))
    return replace(found, missing=(*found.missing, named(absent))) if absent else found


class Scattered:
    """A Shard over several, each with its replicas. `watch` runs beside it for as long as it serves."""

    def __init__(
        self,
        shards: Sequence[Sequence[Replica]],
        clock: Clock,
        metrics: Metrics,
        *,
        hedge_after_s: float,
        answer_within_s: float,
    ) -> None:
        self._shards = [[Known(replica) for replica in replicas] for replicas in shards]
        self._replicas = [one for replicas in self._shards for one in replicas]
        self._clock = clock
        self._metrics = metrics
        self._hedge_after_s = hedge_after_s
        self._answer_within_s = answer_within_s
        self._turn = itertools.count()
        self._asked: set[_Asked] = set()
        self._engine_seconds = metrics.station_seconds.labels("shard_engine")
        self._news = asyncio.Condition()
        self._awaited = 0
        self._hurry = asyncio.Event()

    # --- searching ---------------------------------------------------------------------------------

    async def search(self, request: SearchRequest) -> SearchResult:
        """As the Shard seam says; what did not answer in time is named in `missing`."""
        turn = next(self._turn)
        per_shard = await asyncio.gather(*(self._answers(replicas, request, turn) for replicas in self._shards))
        answers: list[ShardAnswer] = []
        for found in per_shard:
            if isinstance(found, CallerFault):
                raise found
            answers += found
        return joined(answers, request)

    async def _answers(
        self, replicas: Sequence[Known], request: SearchRequest, turn: int
    ) -> list[ShardAnswer] | CallerFault:
        """The answers of one shard that count: one, or several if no replica holds all that the shard does."""
        ends = self._clock.monotonic() + self._answer_within_s
        waiting = deque(in_turn(replicas, request.min_sequence, turn))
        out: dict[_Asked, Known] = {}
        held: list[ShardAnswer] = []
        ask_at = self._clock.monotonic()
        try:
            while waiting or out:
                now = self._clock.monotonic()
                if waiting and ask_at <= now < ends:
                    one = waiting.popleft()
                    out[self._ask(one, request, ends)] = one
                    ask_at = now + self._hedge_after_s
                if not out:
                    break
                patience_s = (min(ask_at, ends) if waiting else ends) - now
                done, _ = await asyncio.wait(out, timeout=max(0.0, patience_s), return_when=asyncio.FIRST_COMPLETED)
                for asked in done:
                    del out[asked]
                    found = asked.result()
                    if isinstance(found, CallerFault):
                        return found
                    if found is not None:
                        held.append(found)
                        if self._is_whole(found, replicas):
                            return [found]
                ask_at = self._clock.monotonic()
                if not done:
                    if not waiting or ask_at >= ends:
                        break
                    _let_wait(out)
            return held
        finally:
            _let_wait(out)

    def _is_whole(self, answer: ShardAnswer, replicas: Sequence[Known]) -> bool:
        """Whether no other replica of the shard could add to it."""
        return not answer.result.missing and all(answer.state.partitions >= one.partitions for one in replicas)

    def _ask(self, one: Known, request: SearchRequest, ends: float) -> _Asked:
        # Not cancelled when nobody waits any more: it ends by itself at `ends`, and what comes of it is known then.
        asked = asyncio.create_task(self._answer_of(one, request, ends), name=f"search of {one.replica.name}")
        self._asked.add(asked)
        asked.add_done_callback(self._asked.discard)
        asked.add_done_callback(one.overdue.discard)
        return asked

    async def _answer_of(self, one: Known, request: SearchRequest, ends: float) -> ShardAnswer | CallerFault | None:
        counted = self._metrics.replica_answers.labels
        try:
            answer = await one.replica.search(request, ends)
        except ShardUnavailable as error:
            self._lost(one, error)
            counted("none").inc()
            return None
        except CallerFault as fault:
            return fault
        one.learn(answer.state)
        self._engine_seconds.observe(answer.state.searched_us / 1e6)
        reason = unfit(answer.state, request.min_sequence)
        counted(reason or "counted").inc()
        return None if reason else answer

    def _lost(self, one: Known, error: ShardUnavailable) -> None:
        if one.up:
            _log.warning("replica_lost", replica=one.replica.name, detail=str(error))
        one.up = False

    # --- watching ----------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look at every replica again and again, until cancelled. That is how one that was lost comes back."""
        async with asyncio.TaskGroup() as watching:
            for one in self._replicas:
                watching.create_task(self._watch(one))

    async def _watch(self, one: Known) -> None:
        while True:
            await self._look_at(one)
            if self._awaited:
                await asyncio.sleep(LOOK_EVERY_AWAITED_S)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await self._hurry.wait()

    async def look(self) -> None:
        """Look at every replica once."""
        await asyncio.gather(*(self._look_at(one) for one in self._replicas))

    async def _look_at(self, one: Known) -> None:
        try:
            state = await one.replica.state(self._clock.monotonic() + self._answer_within_s)
        except ShardUnavailable as error:
            self._lost(one, error)
        else:
            if not one.up:
                _log.info("replica_found", replica=one.replica.name, shard=state.shard, sequence=state.sequence)
            one.learn(state)
            one.looked = state
            self._metrics.replica_sequence.labels(one.replica.name).set(state.sequence)
            self._metrics.replica_index_bytes.labels(one.replica.name).set(state.bytes_in_memory)
        self._metrics.replica_fresh.labels(one.replica.name).set(one.fresh)
        fresh = NO_PARTITIONS.union(*(each.partitions for each in self._replicas if each.fresh))
        self._metrics.partitions_missing.set(len(ALL_PARTITIONS - fresh))
        async with self._news:
            self._news.notify_all()

    @property
    def refusal(self) -> MemoryRefused | None:
        """Why a shard cannot take in what is enrolled from now on, if all its replicas say so."""
        for replicas in self._shards:
            told = [one.state.refusal for one in replicas if one.up and one.state is not None]
            if told and all(told):
                return MemoryRefused(f"a shard cannot follow the log: {told[0]}", hint="give it memory, or add shards")
        return None

    @property
    def unready(self) -> str:
        # Whatever is wrong with one shard is the same to every gateway; with all of them, it may be the way to them.
        return "" if any(one.up for one in self._replicas) else "no replica of any shard answers"

    async def applied_by_all(self, sequence: int) -> None:
        """Return once every replica has told that it applied `sequence`; never, if one of them does not come back."""
        await self._until(lambda: all(one.has_applied(sequence) for one in self._replicas))

    async def reached(self, sequence: int, deadline: float) -> None:
        """Return once every shard has a replica that applied `sequence`. One that has lost all its replicas is not
        waited for: its partitions will be missing. Raises ReplayBehind at `deadline` (monotonic seconds)."""

        def reached(replicas: Sequence[Known]) -> bool:
            up = [one for one in replicas if one.up]
            return not up or any(one.has_applied(sequence) for one in up)

        try:
            async with asyncio.timeout(deadline - self._clock.monotonic()):
                await self._until(lambda: all(map(reached, self._shards)))
        except TimeoutError:
            raise ReplayBehind(
                f"sequence {sequence} is not applied by every shard yet",
                field="min_sequence",
                hint="ask again; if it stays so, look at matcher_replica_sequence",
                retry_after_ms=100,
            ) from None

    async def _until(self, told: Callable[[], bool]) -> None:
        if told():
            return
        self._awaited += 1
        self._hurry.set()
        try:
            async with self._news:
                await self._news.wait_for(told)
        finally:
            self._awaited -= 1
            if not self._awaited:
                self._hurry.clear()

    @property
    def uncoded_rows(self) -> int:
        """None here: shards on Triton follow the log at their own pace, and tell how far they are."""
        return 0

    async def status(self) -> ShardStatus:
        """The rows as last told, of each shard by the replica that has applied most. None are in this process."""
        newest = [
            max(looked, key=lambda state: state.sequence)
            for replicas in self._shards
            if (looked := [one.looked for one in replicas if one.looked is not None])
        ]
        live: Counter[str] = Counter()
        dead: Counter[str] = Counter()
        for state in newest:
            live.update(state.live)
            dead.update(state.dead)
        return ShardStatus(
            sequence=min((state.sequence for state in newest), default=0),
            live=live,
            dead=dead,
            bytes_in_memory=0,
            segments=sum(state.segments for state in newest),
        )

    async def told_keys(self) -> dict[str, Mapping[str, int] | None]:
        """Of each replica and gallery the oldest generation of its key that a file there is sealed under; None of a
        replica that cannot be asked."""
        return {
            one.replica.name: one.looked.keys if one.up and one.looked is not None else None for one in self._replicas
        }

    async def told_erased(self) -> dict[str, int]:
        """Of each replica the sequence through which it holds nothing that had ended; -1 if it cannot be asked."""
        return {
            one.replica.name: one.looked.erased_through if one.up and one.looked is not None else -1
            for one in self._replicas
        }

    async def close(self) -> None:
        """Wait for the calls that nobody waits for any more; each ends within `answer_within_s`."""
        while self._asked:
            await asyncio.wait(self._asked)


def _let_wait(out: dict[_Asked, Known]) -> None:
    for asked, one in out.items():
        if not asked.done():
            one.overdue.add(asked)
