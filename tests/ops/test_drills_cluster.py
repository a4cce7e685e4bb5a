"""Faults of a cluster on real servers, made on purpose under load: a shard's server killed, then its twin, and
PostgreSQL stopped; the right alert, and only that, waits and then fires in a real Prometheus with the real rules."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from matcher_service.partitions import share
from tests.cluster.farm import Farm, farm
from tests.cluster.served_postgres import ServedPostgres
from tests.cluster.server_environment import ServerEnvironment
from tests.ops.drilling import DIMENSION, PACE, Drill, Edge, minutes, searched
from tests.ops.prometheus_server import scraping
from tests.running_service import whole_service

pytestmark = pytest.mark.timeout(600 + 60 * int(minutes(1)))

ROWS = np.random.default_rng(7).normal(size=(300, DIMENSION)).astype(np.float32)
SERVERS = ({"shard_0": share(0, 2), "shard_1": share(1, 2)}, {"shard_0": share(0, 2), "shard_1": share(1, 2)})


@pytest.fixture(scope="module")
def cluster(server_environment: ServerEnvironment, postgres_server: ServedPostgres) -> Iterator[Farm]:
    """The session's PostgreSQL is asked for only so that a machine without one skips or fails with its reason."""
    with farm(server_environment, SERVERS, threads=1) as made:
        yield made


async def test_servers_of_shards_that_are_killed_and_a_database_that_is_stopped(cluster: Farm, tmp_path: Path) -> None:
    shards = [[cluster.replica(server, name) for server in (0, 1)] for name in ("shard_0", "shard_1")]
    async with whole_service(tmp_path / "gateway", **cluster.sections(shards)) as gateway:
        space = await gateway.space(DIMENSION)
        await gateway.gallery("g", space, threshold=0.9)
        await gateway.deployment("g")
        receipts = await gateway.enrol("g", space, ROWS, [f"r{at}" for at in range(len(ROWS))])
        await gateway.ask(space, ROWS[:1], min_sequence=receipts[-1].sequence)
        async with scraping(tmp_path / "prometheus", gateway.running.http_port, pace=PACE) as prometheus:
            drill, edge = Drill(prometheus), Edge(gateway.client, ROWS[0])
            async with searched(edge):
                await drill.calm()

                # One of two: whoever it held is held elsewhere as well, and every answer is complete.
                await asyncio.to_thread(cluster.servers[1].kill)
                await drill.raises({"MatcherReplicaStale"})
                assert "INCOMPLETE" not in edge.answers

                # Both: nobody is searched for, and every answer says so.
                await asyncio.to_thread(cluster.servers[0].kill)
                await drill.raises(
                    {"MatcherReplicaStale", "MatcherPartitionsMissing"}, {"MatcherCompletenessBurnsFast"}
                )
                assert edge.answers["INCOMPLETE"] > 0

                # Back, without hands on the gateway.
                for server in cluster.servers:
                    await asyncio.to_thread(server.start)
                await drill.ends({"MatcherReplicaStale", "MatcherPartitionsMissing"})

                await asyncio.to_thread(cluster.postgres.stop)
                await drill.raises(
                    {"MatcherLogUnavailable"},
                    {"MatcherAvailabilityBurnsFast"},
                    silenced={"MatcherReplicaStale", "MatcherPartitionsMissing", "MatcherReplayBehind"},
                )
                await asyncio.to_thread(cluster.postgres.start)
                await drill.ends({"MatcherLogUnavailable"})
