"""Law 5: an enrolment is acknowledged after it is durable; SIGKILL at any moment loses nothing acknowledged and
brings nothing withdrawn back."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from matcher_service.client import MatcherClient, Probes, ReceiptOutcome, References
from matcher_service.errors import MatcherError
from matcher_service.terms import SpaceId
from tests.served_process import Served, served

DIMENSION = 32
SPACE = SpaceId("kill", 1, DIMENSION)
ROUNDS = 30
ROUNDS_LONG = 200


def http(server: Served) -> httpx.Client:
    return httpx.Client(
        base_url=f"http://127.0.0.1:{server.http_port}", headers={"Authorization": f"Bearer {server.token}"}, timeout=30
    )


def prepare(server: Served) -> None:
    now = time.time_ns() // 1_000_000
    space = {"name": SPACE.name, "version": SPACE.version, "dimension": SPACE.dimension}
    with http(server) as api:
        for path, body in (
            ("/v1/spaces", {"space": space, "centre": [0.0] * DIMENSION}),
            (
                "/v1/galleries",
                {
                    "gallery_id": "g",
                    "kind": "custody",
                    "controller": "a force",
                    "lawful_basis": "PACE 1984 s.64A",
                    "purpose": "a test",
                    "retention_ms": 86_400_000,
                    "space": space,
                    "threshold": 0.9,
                },
            ),
            (
                "/v1/deployments",
                {
                    "deployment_id": "op",
                    "gallery_ids": ["g"],
                    "opens_at_ms": now - 1000,
                    "closes_at_ms": now + 86_400_000,
                    "probe_age_ms_max": 60_000,
                    "authorised_by": "Insp. Reed",
                    "reason": "a test",
                },
            ),
        ):
            answer = api.post(path, json=body)
            assert answer.status_code in (200, 201), answer.text


def held(server: Served) -> dict[str, str]:
    """reference_id to subject_id of everything live, read page by page."""
    found: dict[str, str] = {}
    after = ""
    with http(server) as api:
        while True:
            page = api.get("/v1/galleries/g/references", params={"limit": 1000, "after": after}).json()
            rows = page["references"]
            found |= {row["reference_id"]: row["subject_id"] for row in rows}
            if len(rows) < 1000:
                return found
            after = rows[-1]["reference_id"]


class Known:
    """What the service has acknowledged, and what it may or may not have done."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.templates: dict[str, np.ndarray] = {}
        self.live: set[str] = set()
        self.withdrawn: set[str] = set()
        self.uncertain: set[str] = set()
        self.number = 0


async def write_until_killed(server: Served, known: Known, after_s: float) -> None:
    async with MatcherClient(f"127.0.0.1:{server.grpc_port}", server.token) as client:

        async def enrolling() -> None:
            while True:
                names = [f"r{known.number + at:06d}" for at in range(5)]
                known.number += 5
                rows = known.rng.normal(size=(5, DIMENSION)).astype(np.float32)
                known.templates |= dict(zip(names, rows, strict=True))
                known.uncertain |= set(names)
                for receipt in await client.enrol(
                    References(
                        gallery_id="g",
                        space=SPACE,
                        reference_ids=names,
                        subject_ids=names,
                        templates=rows,
                        deadline_s=5,
                    )
                ):
                    if receipt.outcome is not ReceiptOutcome.REFUSED:
                        known.live.add(receipt.reference_id)
                        known.uncertain.discard(receipt.reference_id)

        async def withdrawing() -> None:
            while True:
                await asyncio.sleep(0.01)
                if known.live:
                    name = min(known.live)
                    known.live.discard(name)
                    known.uncertain.add(name)
                    await client.withdraw("g", reference_ids=[name], reason="a test")
                    known.uncertain.discard(name)
                    known.withdrawn.add(name)

        tasks = [asyncio.create_task(enrolling()) for _ in range(3)] + [asyncio.create_task(withdrawing())]
        await asyncio.sleep(after_s)
        server.kill()
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError | MatcherError), ended


async def searched(server: Served, known: Known, names: list[str]) -> dict[str, str]:
    """Whom each of these references' own templates finds."""
    found: dict[str, str] = {}
    async with MatcherClient(f"127.0.0.1:{server.grpc_port}", server.token) as client:
        for begin in range(0, len(names), 256):
            part = names[begin : begin + 256]
            reply = await client.identify(
                Probes(
                    space=SPACE,
                    probe_ids=part,
                    templates=np.stack([known.templates[name] for name in part]),
                    captured_at_ms=[time.time_ns() // 1_000_000] * len(part),
                    deployment_id="op",
                )
            )
            for decision in reply.decisions:
                found[decision.probe_id] = decision.candidates[0].reference_id if decision.candidates else ""
    return found


async def survive(tmp_path: Path, rounds: int, seed: int) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    known = Known(np.random.default_rng(seed))
    data_dir, log = tmp_path / "data", tmp_path / "log"
    for number in range(rounds + 1):
        with served(data_dir, log) as server:
            if number == 0:
                prepare(server)
            present = held(server)
            assert known.live <= set(present), f"round {number}: acknowledged and lost"
            assert not known.withdrawn & set(present), f"round {number}: withdrawn and back"
            assert set(present) <= known.live | known.uncertain
            for name in list(known.uncertain):
                (known.live if name in present else known.withdrawn).add(name)
            known.uncertain.clear()
            if number % 5 == 0 or number == rounds:
                names = sorted(known.live)[:200] + sorted(known.withdrawn & known.templates.keys())[-200:]
                found = await searched(server, known, names) if names else {}
                assert all(found[name] == (name if name in known.live else "") for name in names)
            if number < rounds:
                await write_until_killed(server, known, dice.uniform(0.02, 0.4))
    assert len(known.live) > rounds
    assert known.withdrawn


async def test_law_5_sigkill_at_any_moment_loses_nothing_acknowledged(tmp_path: Path) -> None:
    await survive(tmp_path, ROUNDS, int.from_bytes(os.urandom(4)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_law_5_sigkill_many_times(tmp_path: Path) -> None:
    await survive(tmp_path, ROUNDS_LONG, int.from_bytes(os.urandom(4)))


async def test_sigterm_finishes_what_was_admitted_and_exits_in_order(tmp_path: Path) -> None:
    with served(tmp_path / "data", tmp_path / "log") as server:
        prepare(server)
        rows = np.random.default_rng(1).normal(size=(4, DIMENSION)).astype(np.float32)
        names = [f"r{at}" for at in range(4)]
        async with MatcherClient(f"127.0.0.1:{server.grpc_port}", server.token) as client:
            enrolling = asyncio.create_task(
                client.enrol(
                    References(gallery_id="g", space=SPACE, reference_ids=names, subject_ids=names, templates=rows)
                )
            )
            receipts = await enrolling
            assert all(receipt.outcome is ReceiptOutcome.ENROLLED for receipt in receipts)
            assert await asyncio.to_thread(server.terminate) == 0
    with served(tmp_path / "data", tmp_path / "log") as server:
        assert set(held(server)) == set(names)


def test_one_process_per_data_directory(tmp_path: Path) -> None:
    with served(tmp_path / "data", tmp_path / "log") as first:
        with (
            pytest.raises(AssertionError, match=f"in use by process {first.process.pid}"),
            served(tmp_path / "data", tmp_path / "second"),
        ):
            pass
        assert first.process.poll() is None
