"""Bad input against the whole service: for each fault one clear answer that names the cause, the field and what
to do, the same over HTTP with JSON, HTTP with protobuf, gRPC calls and gRPC streams. Nothing crashes, and
nothing is answered as a defect of the service.
"""

from __future__ import annotations

import gzip
import random
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import orjson
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from matcher_service.gateway import grpc_call, refusals
from matcher_service.terms import DeleteGallery
from matcher_service.wire import matcher_pb2 as pb
from matcher_service.wire.matcher_pb2_grpc import MatcherStub
from tests.running_service import TESTER, whole_service

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPACE = {"name": "test", "version": 1, "dimension": 4}
ROW = np.array([1, 0, 0, 0], "<f4")
PROBES_MAX = 8
BYTES_MAX = 65_536
JSON = {"content-type": "application/json"}
PROTOBUF = {"content-type": "application/x-protobuf"}
NAN, INF, ZERO = np.full(4, np.nan, "<f4"), np.array([1, 0, np.inf, 0], "<f4"), np.zeros(4, "<f4")


@dataclass(frozen=True)
class Served:
    """The running service as a caller reaches it. `identify` and `enrol` send one message and give back
    (cause, field, hint, status) of its refusal, or None if it was answered."""

    http: httpx.AsyncClient
    stub: MatcherStub
    channel: grpc.aio.Channel
    metadata: Any


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    data_dir: Path = tmp_path_factory.mktemp("data")
    limits = {
        "probes_per_message_max": PROBES_MAX,
        "references_per_message_max": PROBES_MAX,
        "message_bytes_max": BYTES_MAX,
        # A broken message may ask for a sequence that never comes, and waits for it this long.
        "deadline_ms_default": 1000,
        "deadline_ms_max": 1000,
    }
    async with whole_service(data_dir, limits=limits) as service:
        space = await service.space(4)
        for gallery_id in ("wanted", "deleted", "unnamed"):
            await service.gallery(gallery_id, space)
        await service.gallery("strict", space, threshold=0.7)
        await service.deployment("wanted", "deleted", "strict")
        change = service.running.service.change
        await change(DeleteGallery("deleted", "its basis ended"), TESTER)
        bearer = f"Bearer {service.running.token}"
        async with (
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{service.running.http_port}", headers={"authorization": bearer}
            ) as http,
            grpc.aio.insecure_channel(f"127.0.0.1:{service.running.grpc_port}") as channel,
        ):
            yield Served(http, MatcherStub(channel), channel, (("authorization", bearer),))


# --- the tables ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One kind of bad message, in both codecs (None: it cannot be said in that one), and its answer.

    `field` is its name in the wire message, `json_field` in the JSON body if that differs. `json` and `proto`
    may be raw bytes.
    """

    name: str
    cause: str
    field: str
    proto: Any
    json: Any
    json_field: str = ""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def probes(*rows: Any, ids: Any = None, **more: Any) -> dict[str, Any]:
    """Fields of a good IdentifyRequest, but for what `more` says (None: left out)."""
    fields: dict[str, Any] = {
        "space": SPACE,
        "dtype": pb.FLOAT32,
        "templates": b"".join(np.asarray(row, "<f4").tobytes() for row in rows),
        "probe_ids": ids if ids is not None else [f"p{row}" for row in range(len(rows))],
        "captured_at_ms": [now_ms()] * len(rows),
        "deployment_id": "op",
        "gallery_ids": ["wanted"],
    }
    return {key: value for key, value in (fields | more).items() if value is not None}


def probes_json(*templates: Any, ids: Any = None, **more: Any) -> dict[str, Any]:
    names = ids if ids is not None else [f"p{row}" for row in range(len(templates))]
    fields: dict[str, Any] = {
        "space": SPACE,
        "probes": [
            {"probe_id": name, "template": template, "captured_at_ms": now_ms()}
            for name, template in zip(names, templates, strict=True)
        ],
        "deployment_id": "op",
        "gallery_ids": ["wanted"],
    }
    return {key: value for key, value in (fields | more).items() if value is not None}


def text(row: Any) -> str:
    return b64encode(np.asarray(row, "<f4").tobytes()).decode()


OTHER_DIMENSION = SPACE | {"dimension": 5}
OTHER_SPACE = SPACE | {"name": "another"}
LIST = [1, 0, 0, 0]

IDENTIFY_FAULTS = [
    Fault(
        "wrong dimension",
        "WRONG_DIMENSION",
        "space.dimension",
        lambda: probes(np.ones(5), space=OTHER_DIMENSION),
        lambda: probes_json([1] * 5, space=OTHER_DIMENSION),
    ),
    Fault(
        "numbers of another dimension than declared",
        "WRONG_DIMENSION",
        "",
        None,
        lambda: probes_json(LIST, [1, 0]),
        "probes[1].template",
    ),
    Fault(
        "wrong byte length",
        "WRONG_LENGTH",
        "templates",
        lambda: probes(ROW, ROW, templates=bytes(31)),
        lambda: probes_json(text(ROW), b64encode(bytes(15)).decode()),
        "probes[1].template",
    ),
    Fault(
        "NaN",
        "NOT_FINITE",
        "templates[0]",
        lambda: probes(NAN),
        lambda: orjson.dumps(probes_json("X")).replace(b'"X"', b"[1,0,NaN,0]"),
        "probes[0].template",
    ),
    Fault(
        "NaN in base64",
        "NOT_FINITE",
        "templates[0]",
        None,
        lambda: probes_json(text(NAN)),
        "probes[0].template",
    ),
    Fault(
        "infinity",
        "NOT_FINITE",
        "templates[0]",
        lambda: probes(INF),
        lambda: orjson.dumps(probes_json("X")).replace(b'"X"', b"[1,0,-Infinity,0]"),
        "probes[0].template",
    ),
    Fault(
        "a number beyond float32",
        "NOT_FINITE",
        "templates[0]",
        None,
        lambda: probes_json([1, 0, 1e300, 0]),
        "probes[0].template",
    ),
    Fault(
        "null for a number",
        "INVALID",
        "",
        None,
        lambda: probes_json([1, 0, None, 0]),
        "probes[0].template",
    ),
    Fault(
        "zero vector",
        "ZERO_TEMPLATE",
        "templates[0]",
        lambda: probes(ZERO),
        lambda: probes_json([0, 0, 0, 0]),
        "probes[0].template",
    ),
    Fault(
        "unknown dtype",
        "UNKNOWN_DTYPE",
        "dtype",
        lambda: probes(ROW, dtype=7),
        lambda: probes_json(text(ROW), dtype="float64"),
    ),
    Fault("no dtype", "UNKNOWN_DTYPE", "dtype", lambda: probes(ROW, dtype=None), None),
    Fault(
        "unknown gallery",
        "UNKNOWN_GALLERY",
        "gallery_ids",
        lambda: probes(ROW, gallery_ids=["none"]),
        lambda: probes_json(LIST, gallery_ids=["none"]),
    ),
    Fault(
        "gallery that the authority does not name",
        "UNKNOWN_GALLERY",
        "gallery_ids",
        lambda: probes(ROW, gallery_ids=["unnamed"]),
        lambda: probes_json(LIST, gallery_ids=["unnamed"]),
    ),
    Fault(
        "deleted gallery",
        "UNKNOWN_GALLERY",
        "gallery_ids",
        lambda: probes(ROW, gallery_ids=["deleted"]),
        lambda: probes_json(LIST, gallery_ids=["deleted"]),
    ),
    Fault(
        "wrong template space",
        "WRONG_SPACE",
        "space",
        lambda: probes(ROW, space=OTHER_SPACE),
        lambda: probes_json(LIST, space=OTHER_SPACE),
    ),
    Fault(
        "no template space",
        "WRONG_SPACE",
        "space",
        lambda: probes(ROW, space=None),
        None,
    ),
    Fault("empty batch", "EMPTY", "probe_ids", lambda: probes(), lambda: probes_json(), "probes"),
    Fault(
        "too many probes",
        "TOO_MANY",
        "probe_ids",
        lambda: probes(*[ROW] * (PROBES_MAX + 1)),
        lambda: probes_json(*[LIST] * (PROBES_MAX + 1)),
        "probes",
    ),
    Fault(
        "rank_max over the limit",
        "RANK_MAX",
        "rank_max",
        lambda: probes(ROW, rank_max=101),
        lambda: probes_json(LIST, rank_max=101),
    ),
    Fault("rank_max negative", "RANK_MAX", "rank_max", None, lambda: probes_json(LIST, rank_max=-1)),
    Fault(
        "duplicate probe_id",
        "DUPLICATE_PROBE_ID",
        "probe_ids[1]",
        lambda: probes(ROW, ROW, ids=["a", "a"]),
        lambda: probes_json(LIST, LIST, ids=["a", "a"]),
        "probes[1].probe_id",
    ),
    Fault(
        "threshold under the floor",
        "THRESHOLD_BELOW_FLOOR",
        "threshold",
        lambda: probes(ROW, threshold=0.25),
        lambda: probes_json(LIST, threshold=0.25),
    ),
    Fault(
        "threshold that is no cosine",
        "INVALID",
        "threshold",
        lambda: probes(ROW, threshold=float("nan")),
        lambda: orjson.dumps(probes_json(LIST, threshold="X")).replace(b'"X"', b"NaN"),
    ),
    Fault(
        "no authority",
        "INVALID",
        "deployment_id",
        lambda: probes(ROW, deployment_id=None),
        lambda: probes_json(LIST, deployment_id=None),
    ),
    Fault(
        "unknown authority",
        "NOT_FOUND",
        "case_reference",
        lambda: probes(ROW, deployment_id=None, case_reference="none"),
        lambda: probes_json(LIST, deployment_id=None, case_reference="none"),
    ),
    Fault(
        "no capture time",
        "INVALID",
        "captured_at_ms",
        lambda: probes(ROW, captured_at_ms=[]),
        lambda: probes_json(LIST) | {"probes": [{"probe_id": "p0", "template": LIST}]},
        "probes[0].captured_at_ms",
    ),
    Fault(
        "captured too long ago",
        "STALE_PROBE",
        "captured_at_ms[0]",
        lambda: probes(ROW, captured_at_ms=[1]),
        lambda: probes_json(LIST) | {"probes": [{"probe_id": "p0", "template": LIST, "captured_at_ms": 1}]},
        "probes[0].captured_at_ms",
    ),
    Fault(
        "deadline over the limit",
        "INVALID",
        "deadline_ms",
        lambda: probes(ROW, deadline_ms=10**9),
        lambda: probes_json(LIST, deadline_ms=10**9),
    ),
    Fault(
        "sequence that is not there",
        "REPLAY_BEHIND",
        "min_sequence",
        lambda: probes(ROW, min_sequence=10**12, deadline_ms=50),
        lambda: probes_json(LIST, min_sequence=10**12, deadline_ms=50),
    ),
    Fault("malformed message", "MALFORMED", "", b"\xff\xff\xff", b'{"space": '),
    Fault("JSON where a list of probes is due", "INVALID", "", None, b'{"space": {}, "probes": 3}', "space.name"),
    Fault("unknown field", "UNKNOWN_FIELD", "", None, lambda: probes_json(LIST, rankmax=1), "rankmax"),
    Fault(
        "unknown field of a probe",
        "UNKNOWN_FIELD",
        "",
        None,
        lambda: probes_json() | {"probes": [{"probe_id": "a", "template": LIST, "captured_at_ms": 1, "image": ""}]},
        "probes[0].image",
    ),
]


def references(*rows: Any, ids: Any = None, **more: Any) -> dict[str, Any]:
    names = ids if ids is not None else [f"r{row}" for row in range(len(rows))]
    fields: dict[str, Any] = {
        "gallery_id": "wanted",
        "space": SPACE,
        "dtype": pb.FLOAT32,
        "templates": b"".join(np.asarray(row, "<f4").tobytes() for row in rows),
        "reference_ids": names,
        "subject_ids": [f"s{row}" for row in range(len(rows))],
    }
    return {key: value for key, value in (fields | more).items() if value is not None}


def references_json(*templates: Any, ids: Any = None, each: Any = None, **more: Any) -> dict[str, Any]:
    names = ids if ids is not None else [f"r{row}" for row in range(len(templates))]
    fields: dict[str, Any] = {
        "space": SPACE,
        "references": [
            {"reference_id": name, "subject_id": f"s{row}", "template": template} | (each or {})
            for row, (name, template) in enumerate(zip(names, templates, strict=True))
        ],
    }
    return fields | more


ENROL_FAULTS = [
    Fault(
        "wrong dimension",
        "WRONG_DIMENSION",
        "space.dimension",
        lambda: references(np.ones(5), space=OTHER_DIMENSION),
        lambda: references_json([1] * 5, space=OTHER_DIMENSION),
    ),
    Fault(
        "wrong byte length",
        "WRONG_LENGTH",
        "templates",
        lambda: references(ROW, templates=bytes(3)),
        lambda: references_json(b64encode(bytes(3)).decode()),
        "references[0].template",
    ),
    Fault(
        "NaN",
        "NOT_FINITE",
        "templates[0]",
        lambda: references(NAN),
        lambda: references_json(text(NAN)),
        "references[0].template",
    ),
    Fault(
        "infinity",
        "NOT_FINITE",
        "templates[0]",
        lambda: references(INF),
        lambda: references_json(text(INF)),
        "references[0].template",
    ),
    Fault(
        "zero vector",
        "ZERO_TEMPLATE",
        "templates[0]",
        lambda: references(ZERO),
        lambda: references_json([0, 0, 0, 0]),
        "references[0].template",
    ),
    Fault(
        "unknown dtype",
        "UNKNOWN_DTYPE",
        "dtype",
        lambda: references(ROW, dtype=9),
        lambda: references_json(LIST, dtype="int8"),
    ),
    Fault(
        "unknown gallery",
        "UNKNOWN_GALLERY",
        "gallery_id",
        lambda: references(ROW, gallery_id="none"),
        lambda: references_json(LIST) | {"": "none"},
    ),
    Fault(
        "deleted gallery",
        "UNKNOWN_GALLERY",
        "gallery_id",
        lambda: references(ROW, gallery_id="deleted"),
        lambda: references_json(LIST) | {"": "deleted"},
    ),
    Fault(
        "wrong template space",
        "WRONG_SPACE",
        "space",
        lambda: references(ROW, space=OTHER_SPACE),
        lambda: references_json(LIST, space=OTHER_SPACE),
    ),
    Fault("no reference", "EMPTY", "reference_ids", lambda: references(), lambda: references_json(), "references"),
    Fault(
        "too many references",
        "TOO_MANY",
        "reference_ids",
        lambda: references(*[ROW] * (PROBES_MAX + 1)),
        lambda: references_json(*[LIST] * (PROBES_MAX + 1)),
        "references",
    ),
    Fault(
        "expired reference",
        "EXPIRED",
        "expires_at_ms[0]",
        lambda: references(ROW, expires_at_ms=[1]),
        lambda: references_json(LIST, each={"expires_at_ms": 1}),
        "references[0].expires_at_ms",
    ),
    Fault(
        "no subject",
        "INVALID",
        "subject_ids[0]",
        lambda: references(ROW, subject_ids=[""]),
        lambda: references_json(LIST, each={"subject_id": ""}),
        "references[0].subject_id",
    ),
    Fault(
        "identifier that no path can name",
        "INVALID",
        "reference_ids[0]",
        lambda: references(ROW, ids=["a/b"]),
        lambda: references_json(LIST, ids=["a/b"]),
        "references[0].reference_id",
    ),
    Fault("malformed message", "MALFORMED", "", b"\xff\xff\xff", b"{]"),
    Fault(
        "unknown field",
        "UNKNOWN_FIELD",
        "",
        None,
        lambda: references_json(LIST, each={"name": "A. Person"}),
        "references[0].name",
    ),
]


def in_json(faults: list[Fault]) -> Any:
    return pytest.mark.parametrize("fault", [one for one in faults if one.json is not None], ids=lambda one: one.name)


def in_proto(faults: list[Fault]) -> Any:
    return pytest.mark.parametrize("fault", [one for one in faults if one.proto is not None], ids=lambda one: one.name)


def built(part: Any) -> Any:
    return part() if callable(part) else part


def message_bytes(kind: type[pb.IdentifyRequest] | type[pb.EnrolRequest], part: Any) -> bytes:
    fields = built(part)
    return fields if isinstance(fields, bytes) else kind(**fields).SerializeToString()


def check_problem(answer: httpx.Response, cause: str, field: str) -> None:
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert (problem["cause"], problem["field"]) == (cause, field), problem
    assert problem["hint"], problem
    assert problem["detail"], problem
    assert problem["status"] == answer.status_code
    assert answer.status_code != 500
    assert 400 <= answer.status_code < 500 or cause == "REPLAY_BEHIND"


# --- over each transport ---------------------------------------------------------------------------------


@in_json(IDENTIFY_FAULTS)
async def test_http_json_answers_a_problem(served: Served, fault: Fault) -> None:
    body = built(fault.json)
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    answer = await served.http.post("/v1/identify", content=content, headers=JSON)
    check_problem(answer, fault.cause, fault.json_field or fault.field)


@in_proto(IDENTIFY_FAULTS)
async def test_http_protobuf_answers_a_problem(served: Served, fault: Fault) -> None:
    content = message_bytes(pb.IdentifyRequest, fault.proto)
    check_problem(await served.http.post("/v1/identify", content=content, headers=PROTOBUF), fault.cause, fault.field)


@in_proto(IDENTIFY_FAULTS)
async def test_a_grpc_call_ends_with_a_status_and_its_details(served: Served, fault: Fault) -> None:
    call = served.channel.unary_unary("/matcher.v1.Matcher/Identify")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(message_bytes(pb.IdentifyRequest, fault.proto), metadata=served.metadata)
    status = rpc_status.from_call(refused.value)
    info, violation = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.metadata["field"]) == (fault.cause, fault.field)
    assert info.metadata["hint"]
    if fault.field:
        assert status.details[1].Unpack(violation)
        assert violation.field_violations[0].field == fault.field
    assert refused.value.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    # One table per edge, and both follow the same class.
    assert refused.value.code() in {
        grpc_call.status_of(kind("x")) for kind in refusals.error_classes() if not kind.__subclasses__()
    }


@in_proto(IDENTIFY_FAULTS)
async def test_a_stream_rejects_the_message_with_its_cause_and_goes_on(served: Served, fault: Fault) -> None:
    stream = served.channel.stream_stream("/matcher.v1.Matcher/IdentifyStream")(metadata=served.metadata)
    sent = message_bytes(pb.IdentifyRequest, fault.proto)
    await stream.write(sent)
    reply = pb.IdentifyReply.FromString(await stream.read())
    asked = [] if fault.cause == "MALFORMED" else list(pb.IdentifyRequest.FromString(sent).probe_ids)
    assert [one.probe_id for one in reply.decisions] == (asked or [""])
    for one in reply.decisions:
        assert (one.outcome, one.cause, one.field) == (pb.REJECTED, fault.cause, fault.field)
        assert one.detail
    await stream.write(pb.IdentifyRequest(**probes(ROW)).SerializeToString())
    assert pb.IdentifyReply.FromString(await stream.read()).decisions[0].outcome == pb.NO_CANDIDATE
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF


@in_json(ENROL_FAULTS)
async def test_http_json_refuses_to_enrol_with_a_problem(served: Served, fault: Fault) -> None:
    body = built(fault.json)
    gallery_id = body.pop("", "wanted") if isinstance(body, dict) else "wanted"
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    answer = await served.http.post(f"/v1/galleries/{gallery_id}/references", content=content, headers=JSON)
    check_problem(answer, fault.cause, fault.json_field or fault.field)


@in_proto(ENROL_FAULTS)
async def test_http_protobuf_refuses_to_enrol_with_a_problem(served: Served, fault: Fault) -> None:
    fields = built(fault.proto)
    gallery_id = "wanted" if isinstance(fields, bytes) else fields["gallery_id"]
    answer = await served.http.post(
        f"/v1/galleries/{gallery_id}/references",
        content=message_bytes(pb.EnrolRequest, fields),
        headers=PROTOBUF,
    )
    check_problem(answer, fault.cause, fault.field)


@in_proto(ENROL_FAULTS)
async def test_a_stream_refuses_to_enrol_with_a_cause_and_goes_on(served: Served, fault: Fault) -> None:
    stream = served.channel.stream_stream("/matcher.v1.Matcher/Enrol")(metadata=served.metadata)
    await stream.write(message_bytes(pb.EnrolRequest, fault.proto))
    reply = pb.EnrolReply.FromString(await stream.read())
    said = reply.receipts[0] if reply.receipts else reply
    assert (said.cause, said.field) == (fault.cause, fault.field)
    assert said.detail
    assert reply.sequence == 0
    # A refusal of the next message shows that the stream goes on, and changes nothing.
    await stream.write(b"\xff")
    assert pb.EnrolReply.FromString(await stream.read()).cause == "MALFORMED"
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF


# --- what is not in the message --------------------------------------------------------------------------


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic eDp5", "Bearer"])
async def test_a_missing_or_wrong_token_is_refused_everywhere(served: Served, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    async with httpx.AsyncClient(base_url=served.http.base_url, headers=headers) as stranger:
        for method, path in (("POST", "/v1/identify"), ("GET", "/v1/galleries"), ("DELETE", "/v1/subjects/s")):
            check_problem(await stranger.request(method, path), "UNAUTHENTICATED", "authorization")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.stub.Identify(pb.IdentifyRequest(**probes(ROW)), metadata=tuple(headers.items()))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "Bearer" in str(refused.value.details())


async def test_a_body_over_the_limit_is_refused_declared_chunked_or_compressed(served: Served) -> None:
    large = message_bytes(pb.IdentifyRequest, probes(ROW, templates=bytes(2 * BYTES_MAX)))

    async def chunks() -> AsyncIterator[bytes]:
        for begin in range(0, len(large), 8192):
            yield large[begin : begin + 8192]

    for headers in (JSON, PROTOBUF):
        check_problem(await served.http.post("/v1/identify", content=large, headers=headers), "TOO_LARGE", "body")
        check_problem(await served.http.post("/v1/identify", content=chunks(), headers=headers), "TOO_LARGE", "body")
        packed = await served.http.post(
            "/v1/identify", content=gzip.compress(large), headers=headers | {"content-encoding": "gzip"}
        )
        assert packed.status_code == 415
        check_problem(packed, "INVALID", "Content-Encoding")
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.channel.unary_unary("/matcher.v1.Matcher/Identify")(
                large, metadata=served.metadata, compression=compression
            )
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_unknown_field_of_a_protobuf_message_is_passed_over(served: Served) -> None:
    later = message_bytes(pb.IdentifyRequest, probes(ROW)) + b"\xfa\x3e\x03new"
    reply = await served.channel.unary_unary("/matcher.v1.Matcher/Identify")(later, metadata=served.metadata)
    assert pb.IdentifyReply.FromString(reply).decisions[0].outcome == pb.NO_CANDIDATE


async def test_one_bad_probe_is_rejected_and_the_others_of_its_message_are_answered(served: Served) -> None:
    rows, ids = [ROW, NAN, ROW, ZERO, INF, ROW], list("abcdef")
    wanted = ["NO_CANDIDATE", "NOT_FINITE", "NO_CANDIDATE", "ZERO_TEMPLATE", "NOT_FINITE", "NO_CANDIDATE"]
    message = pb.IdentifyRequest(**probes(*rows, ids=ids))
    stream = served.stub.IdentifyStream(metadata=served.metadata)
    await stream.write(message)
    replies = [await served.stub.Identify(message, metadata=served.metadata), await stream.read()]
    await stream.done_writing()
    for reply in replies:
        assert [one.probe_id for one in reply.decisions] == ids
        assert [one.cause or pb.Outcome.Name(one.outcome) for one in reply.decisions] == wanted
    answer = await served.http.post("/v1/identify", json=probes_json(*map(text, rows), ids=ids))
    assert answer.status_code == 200
    decisions = answer.json()["decisions"]
    assert [one.get("cause", one["outcome"]) for one in decisions] == wanted
    assert decisions[1]["field"] == "probes[1].template"


async def test_a_threshold_read_from_a_reply_and_sent_back_is_not_under_the_floor(served: Served) -> None:
    """0.7 is no float32: the nearest one is below it."""
    asked = probes(ROW, gallery_ids=["strict"])
    first = await served.stub.Identify(pb.IdentifyRequest(**asked), metadata=served.metadata)
    again = pb.IdentifyRequest(**asked, threshold=first.thresholds[0].threshold)
    assert (await served.stub.Identify(again, metadata=served.metadata)).thresholds == first.thresholds
    answer = await served.http.post("/v1/identify", json=probes_json(LIST, gallery_ids=["strict"], threshold=0.7))
    assert answer.json()["thresholds"] == [{"gallery_id": "strict", "threshold": 0.7}]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "field"),
    [
        ("POST", "/v1/identify?rank_max=3", probes_json(LIST), 400, "rank_max"),
        ("GET", "/v1/galleries?limit=3", None, 400, "limit"),
        ("GET", "/v1/galleries/wanted/references?limit=0", None, 400, "limit"),
        ("GET", "/v1/galleries/wanted/references?limit=x", None, 400, "limit"),
        ("GET", "/v1/audit?after=-1", None, 400, "after"),
        ("GET", f"/v1/audit?after={'9' * 30}", None, 400, "after"),
        ("GET", "/v1/galleries/none", None, 404, "gallery_id"),
        ("GET", "/v1/galleries/none/references", None, 404, "gallery_id"),
        ("GET", "/v1/galleries/deleted", None, 404, "gallery_id"),
        ("GET", "/v1/galleries/wanted/references/none", None, 404, "reference_id"),
        ("DELETE", "/v1/galleries/wanted/references/none?reason=x", None, 404, "reference_id"),
        ("DELETE", "/v1/galleries/wanted/references/none", None, 400, "reason"),
        ("DELETE", "/v1/galleries/none?reason=x", None, 404, "gallery_id"),
        ("DELETE", "/v1/subjects/none?reason=x", None, 404, "subject_id"),
        ("DELETE", "/v1/subjects/none", None, 400, "reason"),
        ("GET", "/v1/deployments/none", None, 404, "deployment_id"),
        ("POST", "/v1/deployments/none/end", None, 404, "deployment_id"),
        ("GET", "/v1/cases/none", None, 404, "case_reference"),
        ("POST", "/v1/cases/none/end", None, 404, "case_reference"),
        ("GET", "/v1/watchlists/wanted", None, 404, "gallery_id"),
        ("GET", "/v1/spaces/test/1/5", None, 404, "space"),
        ("GET", "/v1/spaces/test/x/4", None, 400, "version"),
        ("POST", "/v1/galleries", {"gallery_id": "g"}, 400, "kind"),
        ("POST", "/v1/spaces", {"space": SPACE, "centre": [1, 1, 1, 1]}, 409, "space"),
        ("POST", "/v1/spaces", {"space": SPACE, "centre": [1]}, 400, "centre"),
        ("PATCH", "/v1/galleries", None, 405, "method"),
        ("GET", "/v1/none", None, 404, "path"),
        ("GET", "/v1/galleries/wanted/", None, 404, "path"),
    ],
)
async def test_every_other_path_answers_bad_input_with_a_problem_that_names_the_field(
    served: Served, method: str, path: str, body: Any, status: int, field: str
) -> None:
    answer = await served.http.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["field"] == field, problem
    assert problem["hint"], problem


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "application/x-www-form-urlencoded", ";"])
async def test_a_body_of_another_type_is_refused(served: Served, content_type: str) -> None:
    answer = await served.http.post("/v1/identify", content=b"{}", headers={"content-type": content_type})
    assert answer.status_code == 415
    check_problem(answer, "INVALID", "Content-Type")


async def test_no_broken_message_crashes_the_service_or_is_answered_as_its_defect(served: Served) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    good = {
        "application/json": orjson.dumps(probes_json(LIST, text(ROW), rank_max=3, threshold=0.75)),
        "application/x-protobuf": message_bytes(pb.IdentifyRequest, probes(ROW, ROW, rank_max=3, threshold=0.75)),
    }

    def broken(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(changed))
            how = rng.random()
            if how < 0.6:
                changed[at] = rng.randrange(256)
            elif how < 0.8:
                del changed[at : at + rng.randint(1, 20)]
            else:
                changed[at:at] = rng.randbytes(rng.randint(1, 8))
            if not changed:
                return b""
        return bytes(changed)

    for _ in range(150):
        for content_type, data in good.items():
            sent = broken(data)
            answer = await served.http.post("/v1/identify", content=sent, headers={"content-type": content_type})
            assert answer.status_code in (200, 400, 403, 404, 413, 422, 503, 504), (sent, answer.text)
    stream = served.channel.stream_stream("/matcher.v1.Matcher/IdentifyStream")(metadata=served.metadata)
    for _ in range(150):
        sent = broken(good["application/x-protobuf"])
        await stream.write(sent)
        reply = pb.IdentifyReply.FromString(await stream.read())
        assert "INTERNAL" not in {one.cause for one in reply.decisions}, sent
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    answer = await served.http.post("/v1/identify", content=good["application/json"], headers=JSON)
    assert answer.status_code == 200, answer.text
