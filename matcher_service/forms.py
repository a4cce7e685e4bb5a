"""The two forms of the service, as sets of implementations of the same seams, from opened to closed.

*Embedded*: SQLite, an index and the models in this process, which alone has its data directory. *Cluster*: one gateway
of several over a log in PostgreSQL, and shards on Triton servers that follow it by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from matcher_service import upkeep
from matcher_service.alerts import AlertFeed, RelayedAlerts
from matcher_service.catalogue import Catalogue
from matcher_service.catalogue_replay import CatalogueReplay
from matcher_service.clock import LawfulTime
from matcher_service.gallery.keys import Keyring
from matcher_service.gallery.log import SqlGalleryLog, open_sqlite_log
from matcher_service.index.memory import budget_bytes
from matcher_service.metrics import Metrics
from matcher_service.models.local import LocalModels
from matcher_service.replay import Following, Replay
from matcher_service.seams import Clock, Models, Shard
from matcher_service.settings import Settings
from matcher_service.shards.local import LocalShard


class ToldShard(Shard, upkeep.Erasing, upkeep.Keyed, Protocol):
    """A shard, or several, that can say what has left it, and what its files are sealed under."""


class Followed(Following, Protocol):
    async def catch_up(self) -> None: ...
    async def run(self) -> None: ...


@dataclass(frozen=True)
class Form:
    """`follow` makes what brings the log into this process; `beside` are tasks, by name, that run while it serves."""

    log: SqlGalleryLog
    shard: ToldShard
    models: Models
    feed: AlertFeed
    follow: Callable[[Catalogue, LawfulTime], Followed]
    beside: Mapping[str, Callable[[], Coroutine[Any, Any, None]]]


@asynccontextmanager
async def opened(settings: Settings, clock: Clock, metrics: Metrics) -> AsyncIterator[Form]:
    """The form that the settings choose. Raises StartRefused, and in a cluster LogUnavailable or ModelsUnavailable."""
    async with (_cluster if settings.cluster.on else _embedded)(settings, clock, metrics) as form:
        yield form


@asynccontextmanager
async def _embedded(settings: Settings, clock: Clock, metrics: Metrics) -> AsyncIterator[Form]:
    data_dir, models = settings.storage.data_dir, LocalModels()
    keyring = await asyncio.to_thread(Keyring.open, settings.keys_dir, settings.keys)
    log = await open_sqlite_log(data_dir, keyring, settings.storage, clock)
    try:
        shard = await LocalShard.open(
            data_dir / "index",
            log.keyring.key,
            settings.index,
            clock,
            erase_within_s=settings.storage.erase_within_h * 3600,
            log_head=await log.head(),
        )
        metrics.index_budget_bytes.set(budget_bytes(settings.index.memory_bytes_max))
        try:
            yield Form(
                log,
                shard,
                models,
                AlertFeed(),
                lambda catalogue, time: Replay(log, shard, catalogue, models, time, clock, metrics),
                {"tend": lambda: upkeep.tend(shard, log, metrics)},
            )
        finally:
            await shard.close()
    finally:
        await log.close()


@asynccontextmanager
async def _cluster(settings: Settings, clock: Clock, metrics: Metrics) -> AsyncIterator[Form]:
    # Imported here, because only the extras `triton` and `postgres` bring the client and the driver.
    from matcher_service.gallery.postgres import open_postgres_log
    from matcher_service.models.triton import TritonModels
    from matcher_service.shards.scattered import Scattered
    from matcher_service.shards.triton import TritonReplica
    from matcher_service.triton_endpoints import TritonAddress, TritonClients, TritonEndpoints, credentials_of

    cluster = settings.cluster
    async with AsyncExitStack() as closing:
        url = cluster.log_url.get_secret_value()
        keyring = await asyncio.to_thread(Keyring.open, settings.keys_dir, settings.keys)
        log = await open_postgres_log(url, keyring, settings.storage, clock)
        closing.push_async_callback(log.close)
        clients = TritonClients(credentials_of(settings.triton))
        closing.push_async_callback(clients.close)
        models: Models = LocalModels()
        if cluster.models:
            way = TritonEndpoints(TritonAddress(cluster.models), clock, clients)
            models = await TritonModels.open(way, one_is_enough=True)
        shard = Scattered(
            [[TritonReplica(one, clients, clock) for one in replicas] for replicas in cluster.shards],
            clock,
            metrics,
            hedge_after_s=cluster.hedge_after_ms / 1000,
            answer_within_s=cluster.answer_within_ms / 1000,
        )
        closing.push_async_callback(shard.close)
        await shard.look()
        feed = RelayedAlerts()
        yield Form(
            log,
            shard,
            models,
            feed,
            lambda catalogue, time: CatalogueReplay(log, shard, catalogue, models, time, clock, metrics),
            {
                "watch": shard.watch,
                "relay": lambda: feed.relay(log),
                "show": lambda: upkeep.show(shard, metrics),
            },
        )
