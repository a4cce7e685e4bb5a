"""The order of a rolling upgrade (docs/OPERATIONS.md) on real servers: tables, then shards one replica at a time, then
gateways one at a time; nobody is told less meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from matcher_service.client import MatcherClient
from matcher_service.clock import SystemClock
from matcher_service.gallery.migrate import newest_version
from matcher_service.gallery.postgres import open_postgres_log
from matcher_service.partitions import share
from matcher_service.settings import StorageSettings
from tests.cluster.farm import Farm, farm
from tests.cluster.served_postgres import ServedPostgres
from tests.cluster.served_triton import ServedTriton
from tests.cluster.server_environment import ROOT, ServerEnvironment
from tests.cluster.test_cluster import (
    PATIENCE_S,
    asked,
    complete,
    enrolled,
    found,
    free_ports,
    gateway,
    named,
    prepared,
    someone,
    until,
)
from tests.running_service import WholeService, whole_service
from tests.served_process import Served, served

pytestmark = pytest.mark.cluster

SHARD_READY = ROOT / "ops/image/shard_ready.py"
# Two servers hold both shards, so that restarting one takes one replica of each shard.
SHARDS = {"shard_0": share(0, 2), "shard_1": share(1, 2)}
TOKEN = "t" * 43
# A machine that is busy with something else is no replica that was lost: looks at it are waited for. One that was
# stopped refuses at once.
PATIENT = {"answer_within_ms": 20_000}
DEADLINE_MS = 30_000


@pytest.fixture(scope="module")
def cluster(server_environment: ServerEnvironment, postgres_server: ServedPostgres) -> Iterator[Farm]:
    with farm(server_environment, (SHARDS, SHARDS), threads=1) as made:
        yield made


def pairs(made: Farm) -> list[list[str]]:
    return [[made.replica(server, name) for server in (0, 1)] for name in SHARDS]


def shard_ready(server: ServedTriton, model: str) -> subprocess.CompletedProcess[str]:
    """As the readiness probe of a shard's pod asks."""
    told = {**os.environ, "MATCHER_SHARD_HTTP_PORT": str(server.http_port), "MATCHER_SHARD_MODEL": model}
    return subprocess.run([sys.executable, SHARD_READY], env=told, capture_output=True, text=True, timeout=60)


async def until_ready(server: ServedTriton) -> None:
    async with asyncio.timeout(PATIENCE_S):
        for model in SHARDS:
            while (await asyncio.to_thread(shard_ready, server, model)).returncode:  # noqa: ASYNC110
                await asyncio.sleep(0.1)


# --- the tables ---------------------------------------------------------------------------------------


async def test_migrate_makes_tables_and_keys_on_which_a_shard_can_start_and_may_be_repeated(
    postgres_url: str, tmp_path: Path
) -> None:
    told = os.environ | {"MATCHER_CLUSTER__LOG_URL": postgres_url, "MATCHER_STORAGE__KEYS_DIR": str(tmp_path / "keys")}
    told["MATCHER_CLUSTER__SHARDS"] = '[["shard.invalid:8001"]]'
    command = [sys.executable, "-m", "matcher_service", "migrate", "--json"]
    for _ in range(2):
        done = await asyncio.to_thread(subprocess.run, command, env=told, capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout) == {"version": newest_version(), "sequence": 0}, done.stderr
    # As a shard opens it: without tables, and without keys, that is refused.
    log = await open_postgres_log(postgres_url, tmp_path / "keys", StorageSettings(), SystemClock(), read_only=True)
    await log.close()


# --- shards -------------------------------------------------------------------------------------------


class Watched:
    """Searches for the same people, again and again. A round in which somebody was told less counts as incomplete,
    unless meanwhile an answer was too old to count: then the machine was too busy for the lease, which is no matter of
    the order of an upgrade."""

    def __init__(self, one: WholeService, name: str, ids: list[str], rows: np.ndarray) -> None:
        self._one, self._name, self._ids, self._rows = one, name, ids, rows
        self.rounds = self.excused = 0
        self.incomplete: list[object] = []

    def _stale(self) -> float:
        counted = self._one.running.service.metrics.replica_answers.labels("stale")
        return float(counted._value.get())

    async def run(self) -> None:
        while True:
            before = self._stale()
            answers = await asked(self._one.client, self._name, self._rows)
            told = [answer for answer, mate in zip(answers, self._ids, strict=True) if found(answer) != mate]
            told += [answer for answer in answers if answer.missing]
            self.rounds += 1
            if told and self._stale() > before:
                self.excused += 1
            elif told:
                self.incomplete.append(told[0])


@asynccontextmanager
async def watched(one: WholeService, name: str, ids: list[str], rows: np.ndarray) -> AsyncIterator[Watched]:
    watch = Watched(one, name, ids, rows)
    watching = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.slow
async def test_every_reply_is_complete_while_one_replica_of_each_shard_after_the_other_is_replaced(
    cluster: Farm, tmp_path: Path
) -> None:
    """Law 4, with enrolment under way: a replica is stopped in order, started, and waited for as the readiness probe
    does; the next is stopped only when the gateway has heard of it. A replica that is not waited for costs answers."""
    name = "upgrade"
    ids, rows = named(name, 60), someone(21, 60)
    sections = cluster.sections(pairs(cluster), **PATIENT)
    async with whole_service(tmp_path, limits={"deadline_ms_default": DEADLINE_MS}, **sections) as one:
        fresh = one.running.service.metrics.replica_fresh
        await prepared(one, name)
        head = await enrolled(one.client, name, ids[:40], rows[:40])
        await complete(one.client, name, rows[:40], min_sequence=head)
        async with watched(one, name, ids[:40], rows[:40]) as watch:
            for number, server in enumerate(cluster.servers):
                reached = watch.rounds
                await asyncio.to_thread(server.stop)
                refused = await asyncio.to_thread(shard_ready, server, "shard_0")
                assert refused.returncode == 1
                # What is enrolled while the replica is away, it must have before it counts again.
                head = await enrolled(one.client, name, ids[40 + 10 * number :][:10], rows[40 + 10 * number :][:10])
                await asyncio.to_thread(server.start)
                await until_ready(server)
                heard_of = [fresh.labels(cluster.replica(number, model))._value for model in SHARDS]
                await until(lambda heard_of=heard_of: all(value.get() == 1 for value in heard_of))
                assert watch.rounds > reached
        assert not watch.incomplete, watch.incomplete[0]
        assert watch.excused < watch.rounds / 2
        answers = await complete(one.client, name, rows, min_sequence=head)
        assert [found(answer) for answer in answers] == ids


async def test_a_shard_whose_log_cannot_be_reached_is_not_ready_though_its_server_is(cluster: Farm) -> None:
    """So that a rollout waits, while Triton's own readiness, by which a pod is restarted, stays."""
    server = cluster.servers[0]
    await until_ready(server)
    cluster.postgres.pause()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not (done := await asyncio.to_thread(shard_ready, server, "shard_0")).returncode:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert "whole log" in done.stderr or "stuck" in done.stderr, done.stderr
        assert await asyncio.to_thread(server.is_ready)
    finally:
        cluster.postgres.resume()
    await until_ready(server)


# --- gateways -----------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_gateways_are_replaced_one_by_one_and_every_probe_gets_its_complete_answer(
    cluster: Farm, tmp_path: Path
) -> None:
    """Laws 3 and 4: two gateways on one address; each is told to stop only when its successor answers. A reply lacks
    something only while a shard was late, as above."""
    name = "gateways"
    ids, rows = named(name, 20), someone(22, 20)
    http_port, grpc_port, *metrics_ports = free_ports(6)
    environment = {
        **cluster.environment(pairs(cluster), **PATIENT),
        "MATCHER_LIMITS__DEADLINE_MS_DEFAULT": str(DEADLINE_MS),
        "MATCHER_SERVER__SHARE_PORTS": "true",
        "MATCHER_SERVER__HTTP_PORT": str(http_port),
        "MATCHER_SERVER__GRPC_PORT": str(grpc_port),
    }
    async with gateway(cluster, tmp_path / "setup", pairs(cluster)) as setup:
        await prepared(setup, name)
        head = await enrolled(setup.client, name, ids, rows)

    @asynccontextmanager
    async def one_gateway(number: int) -> AsyncIterator[Served]:
        folder = tmp_path / f"g{number}"
        folder.mkdir(mode=0o700)
        (folder / "token").touch(0o600)
        (folder / "token").write_text(TOKEN)
        port = str(metrics_ports[number])
        starting = served(folder, tmp_path / f"g{number}.log", **environment, MATCHER_SERVER__METRICS_PORT=port)
        process = await asyncio.to_thread(starting.__enter__)
        try:
            metrics = f"http://127.0.0.1:{port}/metrics"
            async with httpx.AsyncClient() as http, asyncio.timeout(PATIENCE_S):
                while "matcher_partitions_missing 0.0" not in (await http.get(metrics)).text:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            yield process
        finally:
            await asyncio.to_thread(starting.__exit__, None, None, None)

    async def stale() -> dict[int, float]:
        """Answers that were too old to count, by each gateway that is there."""
        told = {}
        async with httpx.AsyncClient() as http:
            for port in metrics_ports:
                with suppress(httpx.TransportError):
                    text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
                    counted = re.search(r'^matcher_replica_answers_total\{result="stale"\} (\S+)', text, re.MULTILINE)
                    told[port] = float(counted[1]) if counted else 0.0
        return told

    async def answered() -> None:
        # A client of its own each time, as edge nodes come and go: the kernel gives connections to any of them.
        nonlocal rounds, excused
        while True:
            before = await stale()
            async with MatcherClient(f"127.0.0.1:{grpc_port}", TOKEN) as client:
                answers = await asked(client, name, rows, min_sequence=head)
            rounds += 1
            if [found(one) for one in answers] != ids:
                after = await stale()
                assert any(after[port] > before.get(port, 0.0) for port in after), answers
                excused += 1

    rounds = excused = 0
    async with one_gateway(0) as first, one_gateway(1) as second:
        asking = asyncio.create_task(answered())
        async with one_gateway(2):
            assert await asyncio.to_thread(first.terminate) == 0
            async with one_gateway(3):
                assert await asyncio.to_thread(second.terminate) == 0
                reached = rounds
                await until(lambda: asking.done() or rounds > reached + 2)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
    assert excused < rounds / 2
