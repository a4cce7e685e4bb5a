"""The laws of the two edges, over real connections: streams, flow control, cancellation, drain, credentials."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import itertools
import random
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import trustme
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from structlog.testing import capture_logs

from matcher_service.errors import NotFound, Overloaded, StartRefused
from matcher_service.gateway.grpc_server import SERVICE_NAME, GrpcServer
from matcher_service.terms import Alert
from matcher_service.wire import matcher_pb2 as pb
from matcher_service.wire.matcher_pb2_grpc import MatcherStub
from tests.edges import HEADERS, METADATA, Edges, FlatService, probes, references, served, settings_of, until

PROTOBUF = {"content-type": "application/x-protobuf", **HEADERS}
METHODS = ("Identify", "IdentifyStream", "Enrol", "Withdraw", "WatchAlerts")


def raw_stream(channel: grpc.aio.Channel, method: str, metadata: Any = METADATA) -> Any:
    """A call that sends the bytes it is given and hands back the bytes it gets."""
    return channel.stream_stream(f"/{SERVICE_NAME}/{method}")(metadata=metadata)


def outcomes(reply: pb.IdentifyReply) -> list[tuple[str, str, str]]:
    return [(one.probe_id, pb.Outcome.Name(one.outcome), one.cause) for one in reply.decisions]


async def seen(channel: grpc.aio.Channel, calls: int = 5) -> None:
    """The server has seen what was sent before: the same connection goes on serving others."""
    for _ in range(calls):
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


async def full(flat: FlatService, channel: grpc.aio.Channel) -> None:
    """Nobody reads, and everything between both ends is full of replies: no more is answered."""
    before = -1
    while before != flat.answered or not flat.answered:
        before = flat.answered
        await seen(channel, 20)


# --- streams -------------------------------------------------------------------------------------------


async def test_answers_leave_as_soon_as_they_are_ready_in_any_order() -> None:
    flat = FlatService()
    flat.gates["slow"] = asyncio.Event()
    async with served(flat) as edges, edges.channel() as channel:
        stream = MatcherStub(channel).IdentifyStream(metadata=METADATA)
        await stream.write(probes("a", message_id="slow"))
        await stream.write(probes("b", message_id="quick"))
        assert (await stream.read()).message_id == "quick"
        flat.gates["slow"].set()
        assert (await stream.read()).message_id == "slow"


async def test_half_close_answers_everything_that_was_taken_in() -> None:
    flat = FlatService()
    flat.gate.clear()
    async with served(flat) as edges, edges.channel() as channel:
        stream = MatcherStub(channel).IdentifyStream(metadata=METADATA)
        for name in ("a", "b", "c"):
            await stream.write(probes(name))
        await stream.done_writing()
        await until(lambda: flat.waiting == 3)
        flat.gate.set()
        answered = {one.probe_id async for reply in stream for one in reply.decisions}
        assert answered == {"a", "b", "c"}
        assert await stream.code() is grpc.StatusCode.OK


async def test_law_3_a_stream_is_not_read_further_while_its_window_is_full() -> None:
    flat = FlatService()
    flat.gate.clear()
    async with served(flat, limits={"stream_messages_in_flight_max": 2}) as edges, edges.channel() as channel:
        stream = MatcherStub(channel).IdentifyStream(metadata=METADATA)
        for number in range(9):
            await stream.write(probes(f"p{number}"))
        await stream.done_writing()
        await until(lambda: flat.waiting == 2)
        await seen(channel)
        assert flat.waiting == 2
        flat.gate.set()
        answered = sorted([one.probe_id async for reply in stream for one in reply.decisions])
        assert answered == [f"p{number}" for number in range(9)]
        assert flat.waiting_max == 2


async def test_law_3_no_more_messages_are_in_hand_than_allowed_over_all_streams() -> None:
    flat = FlatService()
    flat.gate.clear()
    async with served(flat, limits={"messages_in_flight_max": 3}) as edges, edges.channel() as channel:
        streams = [MatcherStub(channel).IdentifyStream(metadata=METADATA) for _ in range(4)]
        for which, stream in enumerate(streams):
            for number in range(3):
                await stream.write(probes(f"{which}-{number}"))
            await stream.done_writing()
        await until(lambda: flat.waiting == 3)
        await seen(channel)
        assert flat.waiting == 3
        # One who leaves while his messages wait, or are worked on, makes room.
        streams[0].cancel()
        flat.gate.set()
        for which, stream in enumerate(streams[1:], start=1):
            answered = sorted([one.probe_id async for reply in stream for one in reply.decisions])
            assert answered == [f"{which}-{number}" for number in range(3)]
        assert flat.waiting_max == 3


async def test_law_3_a_refusal_waits_for_no_place() -> None:
    flat = FlatService()
    flat.gate.clear()
    async with served(flat, limits={"messages_in_flight_max": 1}) as edges, edges.channel() as channel:
        busy, refused = (MatcherStub(channel).IdentifyStream(metadata=METADATA) for _ in range(2))
        await busy.write(probes("a"))
        await until(lambda: flat.waiting == 1)
        flat.at_the_door = Overloaded("no permit", hint="again later", retry_after_ms=70)
        for name in ("b", "c"):
            await refused.write(probes(name))
            reply = await refused.read()
            assert outcomes(reply) == [(name, "REJECTED", "OVERLOADED")]
            assert reply.decisions[0].retry_after_ms == 70
        assert flat.waiting == 1
        flat.gate.set()
        assert outcomes(await busy.read()) == [("a", "NO_CANDIDATE", "")]


async def test_law_3_a_caller_who_leaves_gives_back_what_his_messages_hold_that_wait_for_a_place() -> None:
    flat = FlatService()
    flat.gate.clear()
    async with served(flat, limits={"messages_in_flight_max": 1}) as edges, edges.channel() as channel:
        busy, leaving = (MatcherStub(channel).IdentifyStream(metadata=METADATA) for _ in range(2))
        await busy.write(probes("a"))
        await until(lambda: flat.waiting == 1)
        await leaving.write(probes("b"))
        await until(lambda: flat.admitted == 2)
        leaving.cancel()
        await until(lambda: flat.let_go == 1)
        assert flat.waiting == 1
        flat.gate.set()
        assert outcomes(await busy.read()) == [("a", "NO_CANDIDATE", "")]
        assert flat.let_go == 2


async def test_law_3_callers_who_do_not_read_take_no_place_from_others() -> None:
    names = [f"{'p' * 120}{number:04d}" for number in range(1000)]
    message = probes(*names, templates=bytes(16_000), dtype=pb.FLOAT32, message_id="m")
    flat = FlatService()
    async with served(flat, limits={"messages_in_flight_max": 2}) as edges, edges.channel() as channel:
        deaf = MatcherStub(channel).IdentifyStream(metadata=METADATA)

        async def send() -> None:
            while True:
                await deaf.write(message)

        sending = asyncio.create_task(send())
        await full(flat, channel)
        async with edges.channel() as another:
            stream = MatcherStub(another).IdentifyStream(metadata=METADATA)
            await stream.write(probes("a"))
            await stream.done_writing()
            assert [one.probe_id async for reply in stream for one in reply.decisions] == ["a"]
        sending.cancel()
        await asyncio.wait((sending,))
        deaf.cancel()


async def test_law_3_every_probe_of_a_mixed_stream_gets_exactly_one_answer() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    sent: list[str] = []
    async with served() as edges, edges.channel() as channel:
        stream = MatcherStub(channel).IdentifyStream(metadata=METADATA)

        async def send() -> None:
            for number in range(200):
                names = [f"{number}-{row}" for row in range(rng.randint(1, 5))]
                sent.extend(names)
                broken = rng.choice(
                    [{}, {}, {"dtype": 0}, {"templates": b"123"}, {"rank_max": 10_000}, {"deployment_id": ""}]
                )
                await stream.write(probes(*names, **broken))
            await stream.done_writing()

        sending = asyncio.create_task(send())
        answered = [one.probe_id async for reply in stream for one in reply.decisions]
        await sending
        assert sorted(answered) == sorted(sent)


@pytest.mark.parametrize("how", ["cancel", "disconnect"])
async def test_a_caller_who_leaves_takes_his_work_with_him(how: str) -> None:
    flat = FlatService()
    flat.gate.clear()
    async with served(flat) as edges, edges.channel() as channel:
        stream = MatcherStub(channel).IdentifyStream(metadata=METADATA)
        await stream.write(probes("a"))
        await stream.write(probes("b"))
        await until(lambda: flat.waiting == 2)
        if how == "cancel":
            stream.cancel()
        else:
            await channel.close()
        await until(lambda: flat.cancelled == 2)
        await until(lambda: edges.service.metrics.registry.get_sample_value("matcher_streams_open") == 0)
        assert flat.answered == 0


async def test_a_unary_caller_who_leaves_or_whose_time_is_up_takes_his_work_with_him() -> None:
    flat = FlatService()
    flat.gate.clear()
    async with served(flat) as edges, edges.channel() as channel:
        stub = MatcherStub(channel)
        left = stub.Identify(probes("a"), metadata=METADATA)
        await until(lambda: flat.waiting == 1)
        left.cancel()
        await until(lambda: flat.cancelled == 1)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.Identify(probes("b"), metadata=METADATA, timeout=0.1)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: flat.cancelled == 2)


async def test_law_3_answers_that_nobody_reads_hold_back_the_reading_of_more() -> None:
    flat = FlatService()
    names = [f"{'p' * 120}{number:04d}" for number in range(1000)]
    message = probes(*names, templates=bytes(16_000), dtype=pb.FLOAT32, message_id="m")
    async with served(flat, limits={"stream_messages_in_flight_max": 2}) as edges, edges.channel() as channel:
        stream = MatcherStub(channel).IdentifyStream(metadata=METADATA)
        sent = 0

        async def send() -> None:
            nonlocal sent
            while True:
                await stream.write(message)
                sent += 1

        sending = asyncio.create_task(send())
        await full(flat, channel)
        assert flat.answered <= 200
        sending.cancel()
        await asyncio.wait((sending,))
        stream.cancel()
        await until(lambda: edges.service.metrics.registry.get_sample_value("matcher_streams_open") == 0)


async def test_an_http_caller_who_hangs_up_takes_his_work_with_him() -> None:
    flat = FlatService()
    flat.gate.clear()
    async with served(flat, http=True) as edges:
        reader, writer = await asyncio.open_connection("127.0.0.1", edges.http_port)
        body = probes("a").SerializeToString()
        head = "".join(f"{name}: {value}\r\n" for name, value in PROTOBUF.items())
        writer.write(f"POST /v1/identify HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode())
        writer.write(body)
        await until(lambda: flat.waiting == 1)
        writer.close()
        await until(lambda: flat.cancelled == 1)
        assert await reader.read() == b""


async def test_more_streams_than_the_limit_are_refused_with_a_time_to_return() -> None:
    async with served(limits={"streams_max": 2}) as edges, edges.channel() as channel:
        stub = MatcherStub(channel)
        held = [stub.IdentifyStream(metadata=METADATA), stub.Enrol(metadata=METADATA)]
        await held[0].write(probes("a"))
        await held[1].write(references("r"))
        for one in held:
            await one.read()
        extra = stub.IdentifyStream(metadata=METADATA)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await extra.read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ("grpc-retry-pushback-ms", "1000") in tuple(refused.value.trailing_metadata())
        await held[0].done_writing()
        assert await held[0].read() is grpc.aio.EOF
        freed = stub.IdentifyStream(metadata=METADATA)
        await freed.write(probes("b"))
        assert outcomes(await freed.read())


async def test_a_refusal_of_a_message_is_an_answer_of_its_probes_and_the_stream_goes_on() -> None:
    flat = FlatService()
    flat.refusal = Overloaded("no permit", hint="send slower", retry_after_ms=40)
    async with served(flat) as edges, edges.channel() as channel:
        stream = MatcherStub(channel).IdentifyStream(metadata=METADATA)
        await stream.write(probes("a", "b", message_id="m"))
        reply = await stream.read()
        assert outcomes(reply) == [("a", "REJECTED", "OVERLOADED"), ("b", "REJECTED", "OVERLOADED")]
        assert reply.message_id == "m"
        assert [one.retry_after_ms for one in reply.decisions] == [40, 40]
        assert reply.decisions[0].detail == "no permit; send slower"
        flat.refusal = None
        await stream.write(probes("c"))
        assert outcomes(await stream.read()) == [("c", "NO_CANDIDATE", "")]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"\xff\xff\xff", "MALFORMED"),
        (probes().SerializeToString(), "EMPTY"),
        (probes(*["x"] * 20_000, rows=np.zeros((0, 4))).SerializeToString(), "TOO_MANY"),
    ],
)
async def test_a_message_whose_probes_cannot_be_told_gets_one_answer_for_all_and_the_stream_goes_on(
    data: bytes, cause: str
) -> None:
    async with served() as edges, edges.channel() as channel:
        stream = raw_stream(channel, "IdentifyStream")
        await stream.write(data)
        assert outcomes(pb.IdentifyReply.FromString(await stream.read())) == [("", "REJECTED", cause)]
        await stream.write(probes("a").SerializeToString())
        assert outcomes(pb.IdentifyReply.FromString(await stream.read())) == [("a", "NO_CANDIDATE", "")]


async def test_one_bad_probe_spoils_no_other_of_its_message() -> None:
    async with served() as edges, edges.channel() as channel:
        stream = MatcherStub(channel).IdentifyStream(metadata=METADATA)
        await stream.write(probes("good", "bad", "fine", rows=[[1, 0, 0, 0], [np.nan] * 4, [0, 1, 0, 0]]))
        assert outcomes(await stream.read()) == [
            ("good", "NO_CANDIDATE", ""),
            ("bad", "REJECTED", "NOT_FINITE"),
            ("fine", "NO_CANDIDATE", ""),
        ]


async def test_each_message_of_references_is_answered_by_one_reply_even_if_refused() -> None:
    async with served() as edges, edges.channel() as channel:
        stream = raw_stream(channel, "Enrol")

        async def answer(data: bytes) -> pb.EnrolReply:
            await stream.write(data)
            return pb.EnrolReply.FromString(await stream.read())

        assert (await answer(b"\xff")).cause == "MALFORMED"
        wrong = await answer(references("r", templates=b"12", message_id="m").SerializeToString())
        assert (wrong.cause, wrong.field, wrong.message_id, list(wrong.receipts)) == (
            "WRONG_LENGTH",
            "templates",
            "m",
            [],
        )
        assert [one.outcome for one in (await answer(references("r").SerializeToString())).receipts] == [pb.ENROLLED]
        again = await answer(references("r", "s").SerializeToString())
        assert [one.outcome for one in again.receipts] == [pb.REFUSED, pb.ENROLLED]
        assert again.receipts[0].cause == "CONFLICT"
        assert again.sequence == again.receipts[1].sequence


async def test_the_deadline_is_the_lesser_of_the_messages_and_the_calls() -> None:
    flat = FlatService()
    async with served(flat) as edges, edges.channel() as channel:
        stub = MatcherStub(channel)

        async def allowed_s(deadline_ms: int, timeout_s: float | None) -> float:
            await stub.Identify(probes("a", deadline_ms=deadline_ms), metadata=METADATA, timeout=timeout_s)
            assert flat.last_message is not None
            return flat.last_message.deadline - flat.last_message.received_at

        assert await allowed_s(5_000, None) == pytest.approx(5.0)
        assert await allowed_s(0, None) == pytest.approx(2.0)
        assert await allowed_s(5_000, 30.0) == pytest.approx(5.0)
        assert 0 < await allowed_s(50_000, 30.0) < 31.0  # the transport rounds its timeouts up


# --- drain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_hand", [256, 1])
async def test_stopping_answers_what_was_read_and_ends_the_stream_as_unavailable(in_hand: int) -> None:
    """Also what was read and waits until there is room for it."""
    flat = FlatService()
    flat.gate.clear()
    async with served(flat, limits={"messages_in_flight_max": in_hand}) as edges, edges.channel() as channel:
        stub = MatcherStub(channel)
        busy, idle = stub.IdentifyStream(metadata=METADATA), stub.IdentifyStream(metadata=METADATA)
        await idle.write(probes("early", message_id="early"))
        await busy.write(probes("a"))
        await until(lambda: flat.waiting == min(2, in_hand))
        await seen(channel)
        stopping = asyncio.create_task(edges.grpc_server.stop(20.0))
        await until(lambda: not edges.grpc_server.taking_in)
        flat.gate.set()
        for stream, probe_id in ((busy, "a"), (idle, "early")):
            assert outcomes(await stream.read()) == [(probe_id, "NO_CANDIDATE", "")]
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await stream.read()
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
            assert error_info(ended.value)["reason"] == "SHUTTING_DOWN"
        await stopping


async def test_a_watcher_sees_alerts_from_its_subscription_on_until_the_service_stops() -> None:
    flat = FlatService()
    async with served(flat) as edges, edges.channel() as channel:
        watch = MatcherStub(channel).WatchAlerts(pb.WatchAlertsRequest(deployment_ids=["op"]), metadata=METADATA)
        await watch.initial_metadata()
        raised = Alert("a1", "p", "op", "", 7, 5, (), {"wanted": 0.5}, 3, "1", True)
        flat.feed.publish([dataclasses.replace(raised, deployment_id="other"), raised])
        assert (await watch.read()) == pb.Alert(
            alert_id="a1",
            probe_id="p",
            deployment_id="op",
            raised_at_ms=7,
            captured_at_ms=5,
            thresholds=[pb.GalleryThreshold(gallery_id="wanted", threshold=0.5)],
            sequence=3,
            policy_version="1",
            complete=True,
        )
        stopping = asyncio.create_task(edges.grpc_server.stop(20.0))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await watch.read()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        await stopping


# --- credentials -----------------------------------------------------------------------------------------


async def test_no_method_answers_without_a_valid_token() -> None:
    wrong: tuple[Any, ...] = ((), (("authorization", "Bearer wrong"),), (("authorization", "Basic eDp5"),))
    async with served() as edges, edges.channel() as channel:
        for method, metadata in itertools.product(METHODS, wrong):
            await refused_as_unauthenticated(channel, method, metadata)


async def refused_as_unauthenticated(channel: grpc.aio.Channel, method: str, metadata: Any) -> None:
    # Not even a message is awaited: a stream is refused while the caller has sent nothing.
    call = raw_stream(channel, method, metadata)
    if method not in ("IdentifyStream", "Enrol"):
        await call.write(b"")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert error_info(refused.value)["field"] == "authorization"


async def test_health_and_reflection_are_open_and_say_what_is_served() -> None:
    flat = FlatService()
    async with served(flat) as edges, edges.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE_NAME):
            status = (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        flat.ready = (False, "replaying")
        status = (await health.Check(health_pb2.HealthCheckRequest())).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health.Check(health_pb2.HealthCheckRequest(service="none"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await listing.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = (await listing.read()).list_services_response.service
        assert SERVICE_NAME in {one.name for one in listed}


async def test_a_watcher_of_the_health_is_told_when_the_service_stops() -> None:
    async with served() as edges, edges.channel() as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(edges.grpc_server.stop(20.0))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        await stopping


async def test_http_guards_every_path_but_health_and_on_loopback_the_metrics_and_docs() -> None:
    async with served(http=True) as edges, httpx.AsyncClient(base_url=edges.url) as stranger:
        for path in ("/livez", "/readyz", "/metrics", "/docs", "/openapi.json"):
            assert (await stranger.get(path)).status_code == 200, path
        for path in ("/v1/galleries", "/v1/alerts", "/v1/none", "/metrics/"):
            refused = await stranger.get(path)
            assert (refused.status_code, refused.json()["cause"]) == (401, "UNAUTHENTICATED"), path
            assert refused.headers["www-authenticate"] == "Bearer"
        # Refused before anything of the body is read: this one never comes.
        reader, writer = await asyncio.open_connection("127.0.0.1", edges.http_port)
        writer.write(b"POST /v1/identify HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")
        writer.close()


# --- size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_message_over_the_limit_is_refused_even_if_compressed_and_the_server_goes_on(
    compression: grpc.Compression,
) -> None:
    async with served(limits={"message_bytes_max": 65_536}) as edges, edges.channel() as channel:
        stub = MatcherStub(channel)
        large = probes("a", templates=bytes(4_000_000))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Identify(large, metadata=METADATA, compression=compression)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert edges.flat.last_message is None
        await stub.Identify(probes("a"), metadata=METADATA, compression=compression)


async def test_an_http_body_over_the_limit_is_refused_declared_or_chunked_and_a_compressed_one_always() -> None:
    async with (
        served(http=True, limits={"message_bytes_max": 4096}) as edges,
        httpx.AsyncClient(base_url=edges.url, headers=PROTOBUF) as client,
    ):
        declared = await client.post("/v1/identify", content=bytes(5000))
        assert (declared.status_code, declared.json()["cause"]) == (413, "TOO_LARGE")
        assert declared.headers["content-type"] == "application/problem+json"
        # Sent by hand: a server that answers early closes while the client still writes.
        reader, writer = await asyncio.open_connection("127.0.0.1", edges.http_port)
        head = "".join(f"{name}: {value}\r\n" for name, value in PROTOBUF.items())
        writer.write(f"POST /v1/identify HTTP/1.1\r\nHost: x\r\n{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(5):
            writer.write(b"3e8\r\n" + bytes(1000) + b"\r\n")
        # The answer comes while the caller is still writing, and before the connection closes.
        assert (await reader.readline()).startswith(b"HTTP/1.1 413")
        writer.write(b"0\r\n\r\n")
        assert b"TOO_LARGE" in await reader.read()
        writer.close()
        bomb = gzip.compress(bytes(1_000_000))
        for encoding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
            packed = await client.post("/v1/identify", content=bomb, headers={"content-encoding": encoding})
            assert (packed.status_code, packed.json()["field"]) == (415, "Content-Encoding"), encoding
        good = await client.post("/v1/identify", content=probes("a").SerializeToString())
        assert good.status_code == 200


# --- defects and start -----------------------------------------------------------------------------------


async def test_law_6_a_defect_is_answered_as_internal_and_logged_without_its_text() -> None:
    flat = FlatService()
    flat.refusal = RuntimeError("0.123456 is a value of a probe")
    with capture_logs() as logged:
        async with served(flat, http=True) as edges, edges.channel() as channel:
            stub = MatcherStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Identify(probes("a"), metadata=METADATA)
            assert refused.value.code() is grpc.StatusCode.INTERNAL
            stream = stub.IdentifyStream(metadata=METADATA)
            await stream.write(probes("a"))
            assert outcomes(await stream.read()) == [("a", "REJECTED", "INTERNAL")]
            async with httpx.AsyncClient(base_url=edges.url, headers=PROTOBUF) as client:
                answer = await client.post("/v1/identify", content=probes("a").SerializeToString())
            assert (answer.status_code, answer.json()["cause"]) == (500, "INTERNAL")
            flat.refusal = None
            await stream.write(probes("b"))
            assert outcomes(await stream.read()) == [("b", "NO_CANDIDATE", "")]
    assert [one["kind"] for one in logged] == ["RuntimeError"] * 3
    assert "0.123456" not in f"{logged}{answer.text}{refused.value.details()}"


async def test_a_unary_call_all_of_whose_probes_are_rejected_for_one_cause_has_its_status() -> None:
    nan = probes("a", "b", rows=[[np.nan] * 4] * 2)
    async with served() as edges, edges.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await MatcherStub(channel).Identify(nan, metadata=METADATA)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        info = error_info(refused.value)
        assert (info["reason"], info["field"], info["hint"]) == ("NOT_FINITE", "templates", "send numbers")


async def test_requests_are_counted_by_transport_verb_and_result() -> None:
    flat = FlatService()
    async with served(flat, http=True) as edges, edges.channel() as channel:
        async with httpx.AsyncClient(base_url=edges.url, headers=HEADERS) as client:
            await client.get("/v1/galleries")
            await client.get("/v1/galleries/none")
            await client.get("/none")
        stub = MatcherStub(channel)
        await stub.Identify(probes("a"), metadata=METADATA)
        stream = stub.IdentifyStream(metadata=METADATA)
        await stream.write(probes("a", dtype=0))
        await stream.read()
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        sample = edges.service.metrics.registry.get_sample_value
        for transport, verb, result in (
            ("http", "list_galleries", "ok"),
            ("http", "describe_gallery", "UNKNOWN_GALLERY"),
            ("http", "none", "NOT_FOUND"),
            ("grpc", "identify", "ok"),
            ("grpc", "identify_stream", "UNKNOWN_DTYPE"),
        ):
            labels = {"transport": transport, "verb": verb, "result": result}
            assert sample("matcher_requests_total", labels) == 1, labels
        assert sample("matcher_rejections_total", {"cause": "UNKNOWN_DTYPE"}) == 1


async def test_grpc_speaks_tls_when_it_is_given_a_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(one.bytes() for one in certificate.cert_chain_pems))
    key.write_bytes(certificate.private_key_pem.bytes())
    server = {"tls_certificate_file": chain, "tls_key_file": key}
    async with served(server=server) as edges:
        roots = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        async with grpc.aio.secure_channel(f"localhost:{edges.grpc_port}", roots) as channel:
            assert await MatcherStub(channel).Identify(probes("a"), metadata=METADATA)
        async with edges.channel() as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await MatcherStub(channel).Identify(probes("a"), metadata=METADATA)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_port_that_is_taken_refuses_the_start() -> None:
    async with served() as edges:
        second = GrpcServer(FlatService().service(settings_of(server={"grpc_port": edges.grpc_port})))
        with pytest.raises(StartRefused) as refused:
            await second.start()
        assert refused.value.field == "server.grpc_port"


async def test_withdrawals_reach_the_flow_by_reference_and_by_subject() -> None:
    async with served() as edges, edges.channel() as channel:
        await enrolled(edges, channel, "r", "s", "t")
        stub = MatcherStub(channel)

        async def withdraw(**fields: Any) -> list[str]:
            reply = await stub.Withdraw(pb.WithdrawRequest(reason="ended", **fields), metadata=METADATA)
            return list(reply.withdrawn_reference_ids)

        named = pb.ReferenceIds(reference_ids=["r", "t"])
        assert await withdraw(gallery_id="wanted", references=named) == ["r", "t"]
        assert await withdraw(subject_id="s-s") == ["s"]
        for wrong, field in (({}, "what"), ({"references": named}, "gallery_id"), ({"subject_id": ""}, "subject_id")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await withdraw(**wrong)
            assert error_info(refused.value)["field"] == field


async def test_a_refusal_by_the_flow_keeps_its_cause_field_and_hint_on_both_edges() -> None:
    flat = FlatService()
    flat.refusal = NotFound("no such deployment", field="deployment_id", hint="create it", retry_after_ms=1500)
    async with served(flat, http=True) as edges, edges.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await MatcherStub(channel).Identify(probes("a"), metadata=METADATA)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert error_info(refused.value) == {"reason": "NOT_FOUND", "field": "deployment_id", "hint": "create it"}
        status = rpc_status.from_call(refused.value)
        kinds = [one.type_url.rsplit(".", 1)[-1] for one in status.details]
        assert kinds == ["ErrorInfo", "BadRequest", "RetryInfo", "RequestInfo"]
        async with httpx.AsyncClient(base_url=edges.url, headers=PROTOBUF) as client:
            answer = await client.post("/v1/identify", content=probes("a").SerializeToString())
        assert answer.headers["retry-after"] == "2"
        assert answer.json() == {
            "type": "urn:matcher:problem:not_found",
            "title": "Not Found",
            "status": 404,
            "detail": "no such deployment",
            "cause": "NOT_FOUND",
            "field": "deployment_id",
            "hint": "create it",
            "retryable": False,
            "retry_after_ms": 1500,
        }


async def enrolled(edges: Edges, channel: grpc.aio.Channel, *reference_ids: str) -> None:
    stream = MatcherStub(channel).Enrol(metadata=METADATA)
    await stream.write(references(*reference_ids))
    reply = await stream.read()
    assert {one.outcome for one in reply.receipts} == {pb.ENROLLED}
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF


def error_info(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """The ErrorInfo of a rich status: its reason and its metadata."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    detail: Message = status.details[0]
    assert detail.Unpack(info)  # type: ignore[attr-defined]
    return {"reason": info.reason, **info.metadata}
