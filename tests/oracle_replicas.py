"""A cluster in this process: replicas that are flat oracles over their own partitions, and what searches them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import prometheus_client

from matcher_service.clock import SystemClock
from matcher_service.errors import ShardUnavailable
from matcher_service.metrics import Metrics
from matcher_service.partitions import ALL_PARTITIONS, Partitions, partition_of, share
from matcher_service.shards.exchange import ShardAnswer, ShardState
from matcher_service.shards.scattered import Scattered
from matcher_service.terms import LogEntry, SearchRequest, SearchResult, ShardStatus
from tests.oracle import FlatOracle

GONE = ShardUnavailable("no answer")


@dataclass(eq=False)
class OracleReplica:
    """A replica in this process: the flat oracle over its own partitions. A test sets what is wrong with it."""

    name: str
    assigned: Partitions = ALL_PARTITIONS
    age_ms: float | None = 0.0
    gone: bool = False
    still: bool = False
    missing: tuple[str, ...] = ()
    refusal: str = ""
    asked: int = 0
    held: FlatOracle = field(default_factory=FlatOracle)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def apply(self, entries: Sequence[LogEntry]) -> None:
        for entry in entries:
            if entry.reference_id and partition_of(entry.gallery_id, entry.reference_id) not in self.assigned:
                self.held.sequence = entry.sequence
            else:
                self.held.apply_now([entry])

    def told(self) -> ShardState:
        live = {gallery_id: len(rows) for gallery_id, rows in self.held.galleries.items()}
        return ShardState(
            "shard", self.held.sequence, self.age_ms, self.assigned, missing=self.missing, refusal=self.refusal,
            live=live, dead=dict.fromkeys(live, 0),
        )  # fmt: skip

    async def search(self, request: SearchRequest, until: float) -> ShardAnswer:
        self.asked += 1
        if self.gone:
            raise GONE
        if self.still:
            await self.released.wait()
        result = replace(self.held.search_now(request), missing=self.missing)
        return ShardAnswer(result, self.told())

    async def state(self, until: float) -> ShardState:
        if self.gone:
            raise GONE
        return self.told()


def scattered(*shards: Sequence[OracleReplica], hedge_after_s: float = 0.0, answer_within_s: float = 30.0) -> Scattered:
    return Scattered(
        shards,
        SystemClock(),
        Metrics(prometheus_client.CollectorRegistry()),
        hedge_after_s=hedge_after_s,
        answer_within_s=answer_within_s,
    )


class ScatteredOracles:
    """A ReplayedShard: three shards of two replicas each, which all follow what is applied."""

    def __init__(self) -> None:
        self._replicas = [[OracleReplica(f"{number}{name}", share(number, 3)) for name in "ab"] for number in range(3)]
        self._cluster = scattered(*self._replicas)

    async def apply(self, entries: Sequence[LogEntry]) -> None:
        for replica in (one for replicas in self._replicas for one in replicas):
            replica.apply(entries)

    async def search(self, request: SearchRequest) -> SearchResult:
        await self._cluster.look()
        return await self._cluster.search(request)

    async def status(self) -> ShardStatus:
        await self._cluster.look()
        return await self._cluster.status()

    async def close(self) -> None:
        await self._cluster.close()
