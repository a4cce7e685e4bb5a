"""SIGTERM to the real process under load: health is told first, what was taken in is answered, and it ends in time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from matcher_service.client import MatcherClient, Probes
from matcher_service.errors import MatcherError
from matcher_service.settings import ServerSettings
from matcher_service.terms import Outcome
from tests.fault.test_kill_server import DIMENSION, SPACE, prepare
from tests.served_process import served


async def test_a_process_told_to_stop_says_so_answers_and_ends_within_its_grace_period(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    with served(tmp_path / "data", tmp_path / "log") as server:
        prepare(server)
        address = f"127.0.0.1:{server.grpc_port}"
        answered: list[str] = []
        refused: list[MatcherError] = []

        async def ask(client: MatcherClient) -> None:
            while not refused:
                rows = random.normal(size=(64, DIMENSION)).astype(np.float32)
                probes = Probes(
                    space=SPACE,
                    probe_ids=[f"p{at}" for at in range(64)],
                    templates=rows,
                    captured_at_ms=[time.time_ns() // 1_000_000] * 64,
                    deployment_id="op",
                    deadline_s=2,
                )
                try:
                    reply = await client.identify(probes)
                except MatcherError as refusal:
                    refused.append(refusal)
                else:
                    answered.extend(one.outcome for one in reply.decisions)

        async with MatcherClient(address, server.token) as client, grpc.aio.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            asking = [asyncio.create_task(ask(client)) for _ in range(4)]
            async with asyncio.timeout(60):
                while len(answered) < 64 * 20:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            server.process.terminate()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await watch.read() is grpc.aio.EOF
            await asyncio.gather(*asking)
        # Raises if it takes longer than the grace period allows: admitted work, open connections, farewell.
        grace_s = 2 * ServerSettings().drain_s_max + 1  # type: ignore[call-arg]
        code = await asyncio.to_thread(server.process.wait, grace_s)
    assert code == 0
    # Whoever was let in was answered in full; who came later was told to go elsewhere.
    assert set(answered) == {Outcome.NO_CANDIDATE}
    assert {one.cause.value for one in refused} <= {"SHUTTING_DOWN", "UNREACHABLE", "DEADLINE"}
    said = (tmp_path / "log").read_text()
    assert "drain_cut_short" not in said
    assert "task_died" not in said
