"""Load that keeps a fixed number of messages in flight, for measuring what a service can do at most.

Messages are encoded beforehand and replies are kept as bytes, so that the client costs little beside the service.
For latency use open_loop.py: a sender that waits for answers slows down with the service and hides its delays.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import grpc.aio
import numpy as np
import orjson
from numpy.typing import NDArray

from benchmarks.served import DEPLOYMENT
from matcher_service.terms import SpaceId
from matcher_service.wire import matcher_pb2 as pb

STREAM_METHOD = "/matcher.v1.Matcher/IdentifyStream"
UNARY_METHOD = "/matcher.v1.Matcher/Identify"
PROTOBUF = "application/x-protobuf"
JSON = "application/json"
DEADLINE_MS = 30_000


class Driven(NamedTuple):
    """What came back in `seconds` after the warm-up: `replies` as bytes, `questions` the position of each one's
    message among those given (-1 on a stream: there its message_id tells), and the share of a core that the client
    took (near 1: the client was the limit)."""

    replies: list[bytes]
    questions: list[int]
    seconds: float
    client_busy: float


def probe_ids(count: int) -> list[str]:
    return [f"p{at}" for at in range(count)]


def protobuf_request(
    space: SpaceId,
    templates: NDArray[Any],
    *,
    gallery_ids: Sequence[str] = (),
    deadline_ms: int = DEADLINE_MS,
    message_id: str = "",
) -> bytes:
    """One message of probes captured now, templates float16 or float32 [n, d] as they are."""
    half = templates.dtype == np.float16
    return pb.IdentifyRequest(
        space=pb.TemplateSpace(name=space.name, version=space.version, dimension=space.dimension),
        dtype=pb.FLOAT16 if half else pb.FLOAT32,
        templates=np.ascontiguousarray(templates).tobytes(),
        probe_ids=probe_ids(len(templates)),
        captured_at_ms=[time.time_ns() // 1_000_000] * len(templates),
        deployment_id=DEPLOYMENT,
        gallery_ids=gallery_ids,
        rank_max=1,
        deadline_ms=deadline_ms,
        message_id=message_id,
    ).SerializeToString()


def json_request(
    space: SpaceId,
    templates: NDArray[np.float32],
    templates_as: Literal["base64", "numbers"],
    *,
    gallery_ids: Sequence[str] = (),
    deadline_ms: int = DEADLINE_MS,
) -> bytes:
    """The same message as JSON."""
    now = time.time_ns() // 1_000_000
    body: dict[str, Any] = {
        "space": {"name": space.name, "version": space.version, "dimension": space.dimension},
        "deployment_id": DEPLOYMENT,
        "gallery_ids": list(gallery_ids),
        "rank_max": 1,
        "deadline_ms": deadline_ms,
        "probes": [
            {
                "probe_id": probe_id,
                "template": base64.b64encode(row.tobytes()).decode() if templates_as == "base64" else row.tolist(),
                "captured_at_ms": now,
            }
            for probe_id, row in zip(probe_ids(len(templates)), templates, strict=True)
        ],
    }
    return orjson.dumps(body)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def clear_channel(address: str) -> grpc.aio.Channel:
    """A connection of its own, without proxies."""
    return grpc.aio.insecure_channel(
        address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    )


Outcomes = Callable[[bytes], list[pb.Outcome.ValueType]]


class _Counting:
    """Keeps the replies that come after the warm-up and says when it is over."""

    def __init__(self, warm_up_s: float, seconds: float) -> None:
        self._begins = time.monotonic() + warm_up_s
        self._ends = self._begins + seconds
        self._seconds = seconds
        self._cpu_at: list[float] = []
        self.replies: list[bytes] = []
        self.questions: list[int] = []

    def over(self) -> bool:
        return time.monotonic() >= self._ends

    def took(self, reply: bytes, question: int = -1) -> None:
        now = time.monotonic()
        if now >= self._begins:
            if not self._cpu_at:
                self._cpu_at.append(time.process_time())
            if now < self._ends:
                self.replies.append(reply)
                self.questions.append(question)
            elif len(self._cpu_at) == 1:
                self._cpu_at.append(time.process_time())

    def driven(self) -> Driven:
        busy = (self._cpu_at[-1] - self._cpu_at[0]) / self._seconds if self._cpu_at else 0.0
        return Driven(self.replies, self.questions, self._seconds, busy)


async def over_grpc_streams(
    address: str,
    token: str,
    bodies: Sequence[bytes],
    *,
    seconds: float,
    streams: int,
    window: int,
    warm_up_s: float,
    finish: Callable[[bytes], bytes] = bytes,
) -> Driven:
    """`streams` streams of one connection, each with at most `window` unanswered messages; `finish` makes each sending
    of a body."""
    counting = _Counting(warm_up_s, seconds)

    async def converse(method: Any, sent: Iterable[tuple[int, bytes]]) -> None:
        call = method(metadata=bearer(token))
        room = asyncio.Semaphore(window)

        async def write() -> None:
            for _, body in sent:
                await room.acquire()
                if counting.over():
                    break
                await call.write(finish(body))
            await call.done_writing()

        writing = asyncio.create_task(write())
        try:
            while (reply := await call.read()) is not grpc.aio.EOF:
                counting.took(reply)
                room.release()
            await writing
        finally:
            writing.cancel()

    async with clear_channel(address) as channel:
        method = channel.stream_stream(STREAM_METHOD)
        async with asyncio.TaskGroup() as conversations:
            for number in range(streams):
                conversations.create_task(converse(method, _from(bodies, number)))
    return counting.driven()


async def over_grpc_calls(
    address: str, token: str, bodies: Sequence[bytes], *, seconds: float, callers: int, warm_up_s: float
) -> Driven:
    """`callers` unary calls at a time on one connection."""
    counting = _Counting(warm_up_s, seconds)

    async def ask(method: Any, sent: Iterable[tuple[int, bytes]]) -> None:
        for question, body in sent:
            if counting.over():
                break
            counting.took(await method(body, metadata=bearer(token), timeout=DEADLINE_MS / 1000), question)

    async with clear_channel(address) as channel:
        method = channel.unary_unary(UNARY_METHOD)
        async with asyncio.TaskGroup() as asking:
            for number in range(callers):
                asking.create_task(ask(method, _from(bodies, number)))
    return counting.driven()


async def over_http(
    port: int,
    path: str,
    token: str,
    content_type: str,
    bodies: Sequence[bytes],
    *,
    seconds: float,
    connections: int,
    warm_up_s: float,
) -> Driven:
    """`connections` kept alive, one request at a time on each. Raises RuntimeError for any status but 200."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {token}\r\n"
        f"content-type: {content_type}\r\naccept: {content_type}\r\n"
    )
    requests = [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
    counting = _Counting(warm_up_s, seconds)

    async def ask(sent: Iterable[tuple[int, bytes]]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for question, request in sent:
                if counting.over():
                    break
                writer.write(request)
                await writer.drain()
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                body = await reader.readexactly(int(answer.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0]))
                if not answer.startswith(b"http/1.1 200"):
                    raise RuntimeError(f"{path} answered {answer[:12].decode()}: {body[:300].decode(errors='replace')}")
                counting.took(body, question)
        finally:
            writer.close()
            await writer.wait_closed()

    async with asyncio.TaskGroup() as asking:
        for number in range(connections):
            asking.create_task(ask(_from(requests, number)))
    return counting.driven()


def _from(bodies: Sequence[bytes], number: int) -> Iterable[tuple[int, bytes]]:
    """The bodies with their positions, round and round, each caller beginning elsewhere."""
    first = number % len(bodies)
    numbered = list(enumerate(bodies))
    return itertools.cycle([*numbered[first:], *numbered[:first]])


def protobuf_outcomes(reply: bytes) -> list[pb.Outcome.ValueType]:
    return [one.outcome for one in pb.IdentifyReply.FromString(reply).decisions]


def json_outcomes(reply: bytes) -> list[pb.Outcome.ValueType]:
    return [pb.Outcome.Value(one["outcome"]) for one in orjson.loads(reply)["decisions"]]


def answered_probes(replies: Sequence[bytes], outcomes: Outcomes) -> int:
    """How many probes were answered in full. Raises RuntimeError if one was refused or is incomplete."""
    whole = 0
    for reply in replies:
        for outcome in outcomes(reply):
            if outcome not in (pb.ALERT, pb.NO_CANDIDATE):
                raise RuntimeError(f"a probe was answered {pb.Outcome.Name(outcome)}: {reply[:300]!r}")
            whole += 1
    return whole
