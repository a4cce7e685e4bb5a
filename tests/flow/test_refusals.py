"""What the service refuses to do, each refusal tried on a real service."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from matcher_service.client import Probes
from matcher_service.errors import InvalidInput, MatcherError, StaleProbe
from matcher_service.gateway.http import build_http_app
from matcher_service.terms import SpaceId
from matcher_service.wire import matcher_pb2 as pb
from tests.running_service import WholeService, whole_service

SPACE = SpaceId("test", 1, 8)
ROWS = np.eye(8, dtype=np.float32)
INFERRED = re.compile(r"(^|_)(age|sex|gender|ethnicity|race|emotion|mood|skin)(_|$)")
# How old something is, in milliseconds, is not how old somebody is.
NOT_OF_A_FACE = {"probe_age_ms_max"}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def probes(**other: Any) -> Probes:
    said: dict[str, Any] = {
        "space": SPACE,
        "probe_ids": ["p"],
        "templates": ROWS[:1],
        "captured_at_ms": [now_ms()],
        "deployment_id": "op",
    }
    return Probes(**{**said, **other})


async def prepared(service: WholeService) -> None:
    await service.space(8)
    await service.gallery("custody", SPACE)
    await service.enrol("custody", SPACE, ROWS[:2], ["r0", "r1"])
    await service.deployment("custody", rank_max=1)


async def description(service: WholeService) -> dict[str, Any]:
    app: Any = build_http_app(service.running.service)
    found: dict[str, Any] = app._app.openapi()
    return found


def files_under(folder: Path) -> list[Path]:
    return [one for one in folder.rglob("*") if one.is_file()]


def fields_of_the_wire() -> set[str]:
    return {field.name for message in pb.DESCRIPTOR.message_types_by_name.values() for field in message.fields}


async def test_it_infers_nothing_from_a_face(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        schemas = (await description(service))["components"]["schemas"]
    names = fields_of_the_wire() | {field for schema in schemas.values() for field in schema.get("properties", {})}
    assert len(names) > 60
    assert not {name for name in names - NOT_OF_A_FACE if INFERRED.search(name)}


async def test_it_follows_nobody_across_cameras(tmp_path: Path) -> None:
    """A camera is named on the way in and on nothing that comes out; what was raised is found by deployment only."""
    async with whole_service(tmp_path) as service:
        described = await description(service)
    parameters = {
        (path, one["name"])
        for path, methods in described["paths"].items()
        for operation in methods.values()
        for one in operation.get("parameters", ())
    }
    assert not {one for one in parameters if "camera" in one[1]}
    assert {name for path, name in parameters if path in ("/v1/alerts", "/v1/alerts/stream")} <= {
        "deployment_id",
        "before",
        "limit",
        "last-event-id",
        "state",
    }
    with_camera = {
        message.name
        for message in pb.DESCRIPTOR.message_types_by_name.values()
        if any("camera" in field.name for field in message.fields)
    }
    assert with_camera == {"IdentifyRequest"}
    assert {field.name for field in pb.WatchAlertsRequest.DESCRIPTOR.fields} == {"deployment_ids"}


async def test_it_never_enrols_from_a_probe(tmp_path: Path) -> None:
    """Nothing that enrols can name a probe or an alert, and nothing that searches can ask for enrolment."""
    async with whole_service(tmp_path) as service:
        await prepared(service)
        enrolling = {field.name for field in pb.EnrolRequest.DESCRIPTOR.fields}
        assert not {name for name in enrolling if "probe" in name or "alert" in name}
        assert not {
            one.name for one in pb.IdentifyRequest.DESCRIPTOR.fields if "enrol" in one.name or "keep" in one.name
        }
        before = await service.running.service.log.head()
        await service.ask(SPACE, ROWS)
        held = await service.running.service.log.references("custody", "", 100)
        assert [one.reference_id for one in held] == ["r0", "r1"]
        assert await service.running.service.log.head() == before


async def test_it_returns_no_more_than_a_deployments_policy_allows(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        await prepared(service)
        with pytest.raises(InvalidInput, match="exceeds the 1 that the authority allows"):
            await service.client.identify(probes(rank_max=2))
        between = (ROWS[:1] + ROWS[1:2]) / np.sqrt(2)
        found = (await service.client.identify(probes(templates=between.astype(np.float32)))).decisions[0]
        assert len(found.candidates) == 1
        with pytest.raises(InvalidInput):
            await service.client.identify(probes(threshold=0.4))


async def test_it_searches_nothing_without_a_deployment_or_a_case(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        await prepared(service)
        headers = {"Authorization": f"Bearer {service.running.token}"}
        url = f"http://127.0.0.1:{service.running.http_port}"
        body = {
            "space": SPACE._asdict(),
            "gallery_ids": ["custody"],
            "probes": [{"probe_id": "p", "template": ROWS[0].tolist(), "captured_at_ms": now_ms()}],
        }
        async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as http:
            for authority in ({}, {"deployment_id": "op", "case_reference": "c"}, {"deployment_id": ""}):
                answer = await http.post("/v1/identify", json={**body, **authority})
                assert (answer.status_code, answer.json()["field"]) == (400, "deployment_id")
            answer = await http.post("/v1/identify", json={**body, "deployment_id": "nowhere"})
            assert answer.status_code == 404


async def test_it_takes_no_old_probe_for_a_live_one(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        await prepared(service)
        with pytest.raises(StaleProbe):
            await service.client.identify(probes(captured_at_ms=[now_ms() - 61_000]))
        with pytest.raises(MatcherError):
            await service.client.identify(probes(captured_at_ms=[now_ms() + 60_000]))
        assert await service.running.service.log.alerts("", "", 10) == []


async def test_it_keeps_nothing_of_who_was_not_alerted_on(tmp_path: Path) -> None:
    """Neither a listing nor a file tells that there was such a probe; see also test_no_trace."""
    async with whole_service(tmp_path) as service:
        await prepared(service)
        await service.client.identify(probes(probe_ids=["nobody-was-alerted"], templates=ROWS[7:]))
        headers = {"Authorization": f"Bearer {service.running.token}"}
        url = f"http://127.0.0.1:{service.running.http_port}"
        async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as http:
            for path in ("/v1/alerts", "/v1/audit", "/metrics"):
                assert "nobody-was-alerted" not in (await http.get(path)).text
    assert not any(b"nobody-was-alerted" in one.read_bytes() for one in files_under(tmp_path))
