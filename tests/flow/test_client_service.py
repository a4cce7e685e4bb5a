"""The client and the import against the real service: restarts, kills, alerts, refusals."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matcher_service import importing
from matcher_service.client import Backoff, MatcherClient, ProbeAnswer, Probes, References
from matcher_service.commands.http_api import HttpApi
from matcher_service.errors import Forbidden, Gone, InvalidInput, MatcherError, NotFound
from matcher_service.importing import Import
from matcher_service.template_files import open_template_file
from matcher_service.terms import Alert, Outcome, SpaceId
from tests.running_service import whole_service
from tests.served_process import Served, served

SPACE = SpaceId("test", 1, 16)
QUICK = Backoff(first_s=0.005, most_s=0.05)


def unit_rows(rows: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, SPACE.dimension))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def api_of(process: Served) -> HttpApi:
    return HttpApi(f"http://127.0.0.1:{process.http_port}", process.token)


def client_of(process: Served, **more: Any) -> MatcherClient:
    return MatcherClient(f"127.0.0.1:{process.grpc_port}", process.token, backoff=QUICK, **more)


def set_up(process: Served) -> None:
    with api_of(process) as api:
        api.post("/v1/spaces", {"space": SPACE._asdict(), "centre": [0.0] * SPACE.dimension})
        api.post(
            "/v1/galleries",
            {
                "gallery_id": "custody",
                "kind": "custody",
                "controller": "a force",
                "lawful_basis": "PACE 1984 s.64A",
                "purpose": "a test",
                "retention_ms": 86_400_000,
                "space": SPACE._asdict(),
                "threshold": 0.95,
            },
        )
        api.post(
            "/v1/deployments",
            {
                "deployment_id": "op",
                "gallery_ids": ["custody"],
                "closes_at_ms": time.time_ns() // 1_000_000 + 3_600_000,
                "probe_age_ms_max": 60_000,
                "authorised_by": "Insp. Reed",
                "reason": "a test",
            },
        )


def held(process: Served) -> Counter[tuple[str, str]]:
    with api_of(process) as api:
        found = api.pages("/v1/galleries/custody/references", "references", "after", 0)
        return Counter((one["reference_id"], one["subject_id"]) for one in found)


def probes(templates: np.ndarray, first: int, rows: int, **more: Any) -> Probes:
    fields: dict[str, Any] = {
        "space": SPACE,
        "probe_ids": [f"p{first + row}" for row in range(rows)],
        "templates": templates[first : first + rows],
        "captured_at_ms": [time.time_ns() // 1_000_000] * rows,
        "deployment_id": "op",
    }
    return Probes(**(fields | more))


async def test_a_restart_under_a_stream_of_probes_costs_no_answer(tmp_path: Path) -> None:
    """Law 3, across SIGTERM and SIGKILL: each probe streamed is answered once, and names its own person."""
    templates = unit_rows(60, 1)
    sizes, data_dir, log = 200, tmp_path / "data", tmp_path / "log"
    answers: list[ProbeAnswer] = []
    some = asyncio.Event()

    async def source() -> AsyncIterator[Probes]:
        for message in range(sizes):
            yield probes(templates[np.arange(4) + message % 50], 0, 4, message_id=str(message))
            # A camera's pace rather than a flood, so that both stops fall into the stream.
            await asyncio.sleep(0.002)

    async def stream(client: MatcherClient) -> None:
        async with client, aclosing(client.identify_stream(source())) as stream:
            async for answer in stream:
                answers.append(answer)
                some.set()

    async def next_answers() -> None:
        for _ in range(40):
            some.clear()
            await some.wait()

    with served(data_dir, log) as first:
        set_up(first)
        ports = {
            "MATCHER_SERVER__HTTP_PORT": str(first.http_port),
            "MATCHER_SERVER__GRPC_PORT": str(first.grpc_port),
        }
        async with client_of(first) as client:
            ids = [f"r{row}" for row in range(60)]
            await client.enrol(
                References(gallery_id="custody", space=SPACE, reference_ids=ids, subject_ids=ids, templates=templates)
            )
        client = client_of(first, deadline_s=60.0, rng=random.Random(3))
        streaming = asyncio.create_task(stream(client))
        await next_answers()
        assert await asyncio.to_thread(first.terminate) == 0
    with served(data_dir, log, **ports) as second:
        await next_answers()
        await asyncio.to_thread(second.kill)
    with served(data_dir, log, **ports):
        await streaming
    assert client.counts.breaks >= 2
    seen = Counter((answer.message_id, answer.decision.probe_id) for answer in answers)
    assert seen == Counter((str(message), f"p{row}") for message in range(sizes) for row in range(4))
    for answer in answers:
        assert answer.decision.outcome is Outcome.ALERT, answer
        row = int(answer.message_id) % 50 + int(answer.decision.probe_id[1:])
        assert answer.decision.candidates[0].subject_id == f"r{row}"


async def test_an_import_through_sigkill_gives_the_gallery_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service is killed twice in the middle: the import that gave up is run again, the next one waits for the
    service to come back. In the end each good row is held once, and the bad rows were told."""
    monkeypatch.setattr(importing, "BLOCK_ROWS", 20)
    rows = 1400
    ids = [f"r{row}" for row in range(rows)]
    ids[777] = ids[776]
    templates = unit_rows(rows, 2)
    templates[1234] = np.nan
    file = tmp_path / "refs.npz"
    np.savez(file, templates=templates, reference_ids=np.array(ids), subject_ids=np.array([f"s-{one}" for one in ids]))
    data_dir, log = tmp_path / "data", tmp_path / "log"
    bad: set[tuple[int, str]] = set()

    def job(client: MatcherClient, stop_at: int, reached: asyncio.Event) -> Import:
        def on_progress(done: importing.Progress) -> None:
            if done.rows_done >= stop_at:
                reached.set()

        return Import(
            client,
            open_template_file(file),
            "custody",
            SPACE,
            on_progress=on_progress,
            on_bad_row=lambda one: bad.add((one.row, one.cause)),
        )

    reached = asyncio.Event()
    with served(data_dir, log) as first:
        set_up(first)
        ports = {
            "MATCHER_SERVER__HTTP_PORT": str(first.http_port),
            "MATCHER_SERVER__GRPC_PORT": str(first.grpc_port),
        }
        async with client_of(first, enrol_deadline_s=2.0, in_flight_messages_max=4) as client:
            running = asyncio.create_task(job(client, 300, reached).run())
            await reached.wait()
            first.kill()
            with pytest.raises(MatcherError, match="again"):
                await running
    reached.clear()
    client = client_of(first, in_flight_messages_max=4)
    again = job(client, 800, reached)
    assert again.resumed
    with served(data_dir, log, **ports) as second:
        running = asyncio.create_task(again.run())
        await reached.wait()
        second.kill()
    with served(data_dir, log, **ports) as third:
        async with client:
            done = await running
        assert held(third) == Counter((one, f"s-{one}") for one in set(ids) - {"r1234"})
    assert client.counts.breaks >= 1
    assert bad == {(777, "CONFLICT"), (1234, "NOT_FINITE")}
    assert done.rows_done == rows
    assert done.refused == 2


async def test_an_alert_reaches_those_who_watch(tmp_path: Path) -> None:
    """What identify answers as ALERT, watch_alerts shows with the same record and the same person."""
    async with whole_service(tmp_path / "data") as service:
        space = await service.space(SPACE.dimension)
        await service.gallery("custody", space, threshold=0.9)
        await service.deployment("custody")
        await service.enrol("custody", space, unit_rows(5, 4), [f"r{row}" for row in range(5)])
        seen: list[Alert] = []
        watching = asyncio.Event()

        async def watch() -> None:
            async with aclosing(service.client.watch_alerts(["op"])) as alerts:
                async for alert in alerts:
                    seen.append(alert)
                    watching.set()

        task = asyncio.create_task(watch())
        raised: list[str] = []
        # Alerts count from the subscription on; ask until the watch has begun.
        while not watching.is_set():
            reply = await service.client.identify(probes(unit_rows(5, 4), 2, 1))
            raised.append(reply.decisions[0].alert_id)
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert {alert.alert_id for alert in seen} <= set(raised)
        assert [candidate.subject_id for candidate in seen[0].candidates] == ["r2"]
        assert seen[0].deployment_id == "op"


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        ({"deployment_id": "none"}, (NotFound, Forbidden), "deployment_id"),
        ({"gallery_ids": ["none"]}, (NotFound, Forbidden), "gallery_ids"),
        ({"rank_max": 10_000}, InvalidInput, "rank_max"),
        ({"threshold": -0.5}, InvalidInput, "threshold"),
        ({"space": SpaceId("other", 1, 16)}, InvalidInput, "space"),
    ],
)
async def test_a_refusal_of_the_service_comes_back_as_its_error(
    tmp_path: Path, change: dict[str, Any], error: type[MatcherError], field: str
) -> None:
    """One call and a stream tell the same cause and field, and what to do."""
    async with whole_service(tmp_path / "data") as service:
        space = await service.space(SPACE.dimension)
        await service.gallery("custody", space)
        await service.deployment("custody")
        wrong = probes(unit_rows(2, 5), 0, 2, **change)
        with pytest.raises(error) as refused:
            await service.client.identify(wrong)
        assert refused.value.field == field
        assert refused.value.hint

        async def one() -> AsyncIterator[Probes]:
            yield wrong

        for answer in [answer async for answer in service.client.identify_stream(one())]:
            told = answer.error
            assert told is not None
            assert (type(told), told.cause, told.field, told.hint) == (
                type(refused.value),
                refused.value.cause,
                field,
                refused.value.hint,
            )


async def test_a_withdrawn_reference_and_a_deleted_gallery_are_no_longer_found(tmp_path: Path) -> None:
    """withdraw() returns when no later search finds them; withdrawing again is NotFound."""
    async with whole_service(tmp_path / "data") as service:
        space = await service.space(SPACE.dimension)
        await service.gallery("custody", space, threshold=0.9)
        await service.deployment("custody")
        templates = unit_rows(4, 6)
        await service.enrol("custody", space, templates, ["r0", "r1", "r2", "r3"], ["a", "b", "b", "c"])
        done = await service.client.withdraw("custody", reference_ids=["r0"], reason="a test")
        assert done.reference_ids == ("r0",)
        done = await service.client.withdraw("", subject_id="b", reason="a test")
        assert sorted(done.reference_ids) == ["r1", "r2"]
        reply = await service.client.identify(probes(templates, 0, 4))
        outcomes = [one.outcome for one in reply.decisions]
        assert outcomes == [Outcome.NO_CANDIDATE] * 3 + [Outcome.ALERT]
        with pytest.raises((NotFound, Gone)):
            await service.client.withdraw("custody", reference_ids=["r0"], reason="a test")
