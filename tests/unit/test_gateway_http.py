"""The HTTP interface in memory: what is served, how it is described, and who is let in."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import trustme

from matcher_service.gateway import http_guard
from matcher_service.gateway.http import build_http_app
from matcher_service.gateway.json_bodies import BODIES
from matcher_service.terms import (
    Alert,
    Candidate,
    CreateCase,
    CreateDeployment,
    CreateGallery,
    DeleteGallery,
    EndCase,
    EndDeployment,
    Reference,
    RegisterSpace,
    TemplateSpace,
)
from matcher_service.wire import matcher_pb2 as pb
from tests.edges import HEADERS, SPACE, FlatService, probes, references, settings_of

PROTOBUF = {"content-type": "application/x-protobuf"}


def client_of(flat: FlatService, headers: Any = HEADERS, **sections: Any) -> httpx.AsyncClient:
    app = build_http_app(flat.service(settings_of(**sections)))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://matcher", headers=headers)


@pytest.fixture
def flat() -> FlatService:
    return FlatService()


@pytest.fixture
async def client(flat: FlatService) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(flat) as one:
        yield one


def identify_body(*templates: Any) -> dict[str, Any]:
    rows = [{"probe_id": f"p{at}", "template": one, "captured_at_ms": 1} for at, one in enumerate(templates)]
    return {"space": SPACE._asdict(), "deployment_id": "op", "probes": rows}


async def test_each_format_is_answered_in_kind_unless_another_is_asked_for(
    flat: FlatService, client: httpx.AsyncClient
) -> None:
    await client.post("/v1/galleries/wanted/references", content=references("r").SerializeToString(), headers=PROTOBUF)
    message, body = probes("p0").SerializeToString(), orjson.dumps(identify_body([1, 0, 0, 0]))
    as_json = {"content-type": "application/json"}
    for content, headers, answered in (
        (message, PROTOBUF, "application/x-protobuf"),
        (message, PROTOBUF | {"accept": "application/json"}, "application/json"),
        (body, as_json, "application/json"),
        (body, as_json | {"accept": "application/x-protobuf"}, "application/x-protobuf"),
        (body, {}, "application/json"),
    ):
        answer = await client.post("/v1/identify", content=content, headers=headers)
        assert answer.headers["content-type"] == answered
        if answered == "application/json":
            decision = answer.json()["decisions"][0]
            assert decision["candidates"] == [
                {
                    "subject_id": "s-r",
                    "reference_id": "r",
                    "gallery_id": "wanted",
                    "score": 1.0,
                    "rank": 1,
                    "false_match_rate": 1e-4,
                }
            ]
        else:
            decision = pb.IdentifyReply.FromString(answer.content).decisions[0]
            assert decision.candidates[0].reference_id == "r"


async def test_a_decision_without_a_candidate_carries_only_its_probe_id_and_outcome(client: httpx.AsyncClient) -> None:
    reply = (await client.post("/v1/identify", json=identify_body([1, 0, 0, 0]))).json()
    assert reply["decisions"] == [{"probe_id": "p0", "outcome": "NO_CANDIDATE"}]
    assert reply["complete"] is True
    assert reply["missing"] == []


async def test_references_are_listed_in_pages_described_and_withdrawn_without_a_template(
    flat: FlatService, client: httpx.AsyncClient
) -> None:
    body = {
        "space": SPACE._asdict(),
        "references": [
            {"reference_id": name, "subject_id": "s", "template": row}
            for name, row in zip("abc", np.eye(3, 4).tolist(), strict=True)
        ],
    }
    enrolled = (await client.post("/v1/galleries/wanted/references", json=body)).json()
    assert [one["outcome"] for one in enrolled["receipts"]] == ["ENROLLED"] * 3
    assert enrolled["sequence"] == enrolled["receipts"][-1]["sequence"]
    first = (await client.get("/v1/galleries/wanted/references?limit=2")).json()
    assert [one["reference_id"] for one in first["references"]] == ["a", "b"]
    rest = (await client.get(f"/v1/galleries/wanted/references?limit=2&after={first['next_after']}")).json()
    assert ([one["reference_id"] for one in rest["references"]], rest["next_after"]) == (["c"], None)
    one = (await client.get("/v1/galleries/wanted/references/b")).json()
    rests_on = {"source", "lawful_basis", "review_by_ms", "quality"}
    assert set(one) == (set(Reference._fields) - {"attributes"}) | rests_on
    assert len((await client.get("/v1/subjects/s")).json()["references"]) == 3
    gone = (await client.delete("/v1/galleries/wanted/references/b?reason=released")).json()
    assert gone["withdrawn"] == [{"gallery_id": "wanted", "reference_id": "b"}]
    assert (await client.get("/v1/galleries/wanted/references/b")).status_code == 404
    assert len((await client.delete("/v1/subjects/s?reason=released")).json()["withdrawn"]) == 2


async def test_one_refused_reference_is_a_problem_and_one_of_several_a_receipt(client: httpx.AsyncClient) -> None:
    path = "/v1/galleries/wanted/references"
    await client.post(path, content=references("r").SerializeToString(), headers=PROTOBUF)
    again = await client.post(path, content=references("r").SerializeToString(), headers=PROTOBUF)
    assert (again.status_code, again.json()["cause"]) == (409, "CONFLICT")
    both = await client.post(
        path, content=references("r", "s").SerializeToString(), headers=PROTOBUF | {"accept": "application/json"}
    )
    assert [one["outcome"] for one in both.json()["receipts"]] == ["REFUSED", "ENROLLED"]


async def test_a_message_may_not_name_another_gallery_than_its_path(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        "/v1/galleries/other/references", content=references("r").SerializeToString(), headers=PROTOBUF
    )
    assert (answer.status_code, answer.json()["field"]) == (400, "gallery_id")


async def test_changes_of_the_catalogue_reach_the_flow(flat: FlatService, client: httpx.AsyncClient) -> None:
    gallery = {
        "gallery_id": "g",
        "kind": "custody",
        "controller": "c",
        "lawful_basis": "l",
        "purpose": "p",
        "retention_ms": 5,
        "space": SPACE._asdict(),
        "threshold": 0.5,
    }
    common = {"gallery_ids": ["g"], "closes_at_ms": 2**42}
    deployment = common | {"deployment_id": "d", "probe_age_ms_max": 5, "authorised_by": "a", "reason": "r"}
    case = common | {"case_reference": "c", "requested_by": "q", "purpose": "p"}
    space = {"space": SPACE._asdict(), "centre": [0, 0, 0, 1]}
    for path, body, named in (
        ("/v1/spaces", space, {"space": SPACE._asdict()}),
        ("/v1/galleries", gallery, {"gallery_id": "g"}),
        ("/v1/deployments", deployment, {"deployment_id": "d"}),
        ("/v1/cases", case, {"case_reference": "c"}),
    ):
        answer = await client.post(path, json=body)
        assert answer.status_code == 201, answer.text
        assert answer.json() == named | {"sequence": len(flat.writes)}
    for method, path in (
        ("POST", "/v1/deployments/d/end"),
        ("POST", "/v1/cases/c/end"),
        ("DELETE", "/v1/galleries/g?reason=ended"),
    ):
        assert (await client.request(method, path)).status_code == 200
    assert [type(one) for one in flat.writes] == [
        RegisterSpace,
        CreateGallery,
        CreateDeployment,
        CreateCase,
        EndDeployment,
        EndCase,
        DeleteGallery,
    ]


async def test_the_catalogue_can_be_listed_and_described(flat: FlatService, client: httpx.AsyncClient) -> None:
    flat.catalogue.spaces = {SPACE: TemplateSpace(SPACE, np.zeros(4, np.float32))}
    assert (await client.get("/v1/spaces")).json() == {"spaces": [SPACE._asdict()]}
    assert (await client.get("/v1/spaces/test/1/4")).json()["centre"] == "AAAAAAAAAAAAAAAAAAAAAA=="
    for path in ("/v1/galleries/wanted", "/v1/watchlists/wanted"):
        assert (await client.get(path)).json()["gallery_id"] == "wanted"
    assert len((await client.get("/v1/watchlists")).json()["watchlists"]) == 1
    for kind in ("deployments", "cases"):
        assert (await client.get(f"/v1/{kind}")).json() == {kind: []}


async def test_alerts_and_audit_come_in_pages(flat: FlatService, client: httpx.AsyncClient) -> None:
    candidate = Candidate("s", "r", "g", 0.75, 1, float("nan"))
    flat.log.raised = [
        Alert(f"a{number}", "p", "op", "", 7, 5, (candidate,), {"g": 0.5}, 3, "1", True) for number in range(3)
    ]
    first = (await client.get("/v1/alerts?limit=2")).json()
    assert [one["alert_id"] for one in first["alerts"]] == ["a2", "a1"]
    assert first["alerts"][0]["candidates"][0]["false_match_rate"] is None
    rest = (await client.get(f"/v1/alerts?limit=2&before={first['next_before']}")).json()
    assert ([one["alert_id"] for one in rest["alerts"]], rest["next_before"]) == (["a0"], None)
    page = (await client.get("/v1/audit?limit=4")).json()
    assert page["next_after"] == 4
    assert (await client.get("/v1/audit?limit=4&after=4")).json() == {"records": [{"index": 5}], "next_after": None}


async def test_readiness_says_why_not(flat: FlatService, client: httpx.AsyncClient) -> None:
    assert (await client.get("/readyz")).json() == {"ready": True, "reason": ""}
    flat.ready = (False, "replaying")
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "replaying")
    # Nothing that it depends on is a reason to start it again.
    assert (await client.get("/livez")).status_code == 200
    assert (await client.get("/startupz")).status_code == 200


async def test_beyond_loopback_metrics_and_docs_are_guarded_too(
    flat: FlatService, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("tls")
    certificate = trustme.CA().issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(str(directory / "chain"))
    certificate.private_key_pem.write_to_path(str(directory / "key"))
    server = {
        "host": "0.0.0.0",
        "tls_certificate_file": directory / "chain",
        "tls_key_file": directory / "key",
    }
    async with client_of(flat, headers={}, server=server) as stranger:
        for path in ("/metrics", "/docs", "/openapi.json", "/", "/v1/galleries"):
            assert (await stranger.get(path)).status_code == 401, path
        for path in ("/livez", "/readyz", "/startupz"):
            assert (await stranger.get(path)).status_code == 200, path


async def test_law_3_more_requests_at_once_than_the_bound_are_refused_with_a_time_to_return(
    flat: FlatService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_guard, "REQUESTS_IN_FLIGHT_MAX", 0)
    async with client_of(flat) as client:
        answer = await client.get("/v1/galleries")
    assert (answer.status_code, answer.json()["cause"], answer.headers["retry-after"]) == (429, "OVERLOADED", "1")


async def test_a_connection_is_kept_after_a_request_that_was_read_whole(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.get("/v1/galleries"),
        await client.post("/v1/identify", json=identify_body([1, 0, 0, 0])),
        await client.post("/v1/identify", json={}),
        await client.get("/none"),
    ):
        assert "connection" not in answer.headers
    refused = await client.post("/v1/identify", content=b"x", headers={"content-encoding": "gzip"})
    assert refused.headers["connection"] == "close"


async def test_the_docs_page_stands_alone_and_shows_every_operation_and_body(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    description = (await client.get("/openapi.json")).json()
    # Nothing is fetched from anywhere: no script, no style sheet, no image, no link that leaves the service.
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(", page)
    assert set(re.findall(r'href="([^"#][^"]*)"', page)) == {"/openapi.json", "/metrics", "/readyz"}
    for path, operations in description["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in page
    for body in BODIES:
        assert f'id="{body.__name__}"' in page
    assert (await client.get("/")).headers["location"] == "/docs"


async def test_the_description_is_whole_and_every_error_a_problem(client: httpx.AsyncClient) -> None:
    description = (await client.get("/openapi.json")).json()
    named = set(re.findall(r"#/components/schemas/(\w+)", orjson.dumps(description).decode()))
    assert named <= set(description["components"]["schemas"])
    for operations in description["paths"].values():
        for operation in operations.values():
            assert "application/problem+json" in operation["responses"]["default"]["content"]
            assert "422" not in operation["responses"]
    identify = description["paths"]["/v1/identify"]["post"]["requestBody"]["content"]
    assert set(identify) == {"application/json", "application/x-protobuf"}


async def test_paths_hold_what_the_interface_promises(client: httpx.AsyncClient) -> None:
    description = (await client.get("/openapi.json")).json()
    assert set(description["paths"]) == {
        "/v1/identify",
        "/v1/galleries",
        "/v1/galleries/{gallery_id}",
        "/v1/galleries/{gallery_id}/threshold",
        "/v1/galleries/{gallery_id}/references",
        "/v1/galleries/{gallery_id}/references/{reference_id}",
        "/v1/subjects/{subject_id}",
        "/v1/watchlists",
        "/v1/watchlists/{gallery_id}",
        "/v1/spaces",
        "/v1/spaces/{name}/{version}/{dimension}",
        "/v1/deployments",
        "/v1/deployments/{deployment_id}",
        "/v1/deployments/{deployment_id}/end",
        "/v1/cases",
        "/v1/cases/{case_reference}",
        "/v1/cases/{case_reference}/end",
        "/v1/alerts",
        "/v1/alerts/stream",
        "/v1/audit",
        "/v1/templates",
        "/v1/credentials",
        "/v1/credentials/{credential_id}/rotate",
        "/v1/credentials/{credential_id}/revoke",
        "/v1/tokens",
        "/v1/proposals",
        "/v1/proposals/{proposal_id}/approve",
        "/v1/proposals/{proposal_id}/reject",
        "/metrics",
        "/livez",
        "/readyz",
        "/startupz",
    }
