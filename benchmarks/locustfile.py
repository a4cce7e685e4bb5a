"""Load by simulated edge nodes and clerks, for Locust: `locust -f benchmarks/locustfile.py --headless`.

Edge nodes over HTTP JSON, HTTP protobuf, gRPC calls and gRPC streams search galleries of three sizes, some of their
probes with a mate; clerks enrol and withdraw meanwhile. Without --token-file it starts a service of its own and fills
it. `--shape` gives the course: steady, ramp, match-day (two crowds at the gates) or soak. In headless mode the exit
code is 1 if an objective was missed: p99 of every kind of search, or the share of failed requests. HTML and CSV are
Locust's own (`--html`, `--csv`).

Locust waits for each answer before it sends the next, so its latencies flatter a service that stalls: for latency
against load use open_loop.py.
"""

from __future__ import annotations

import itertools
import logging
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grpc.experimental.gevent as grpc_gevent

grpc_gevent.init_gevent()  # before any channel is made: a call then yields to the other users

import gevent  # noqa: E402
import gevent.event  # noqa: E402
import gevent.queue  # noqa: E402
import grpc  # noqa: E402
import httpx  # noqa: E402
import numpy as np  # noqa: E402
import orjson  # noqa: E402
from locust import FastHttpUser, LoadTestShape, User, constant_throughput, events, task  # noqa: E402

from benchmarks import served  # noqa: E402
from benchmarks.closed_loop import (  # noqa: E402
    JSON,
    PROTOBUF,
    STREAM_METHOD,
    UNARY_METHOD,
    bearer,
    json_request,
    protobuf_request,
)
from benchmarks.galleries import gallery, probes  # noqa: E402
from matcher_service.terms import SpaceId  # noqa: E402
from matcher_service.wire import matcher_pb2 as pb  # noqa: E402

THRESHOLD = 0.5
# Share of the searches that go to each gallery; the rest search all of them.
GALLERIES = {"custody": 0.2, "match-day": 0.5, "standing": 0.2}
RENEW_S = 600.0  # messages are encoded anew after this, so that their probes stay timely
MESSAGES = 32
ENROL_ROWS = 500
STREAM_WINDOW = 4
TIMEOUT_S = 30.0


class Place(NamedTuple):
    """Where the load goes."""

    http: str
    grpc: str
    token: str


class Node:
    """What all simulated edge nodes share: the place, and messages encoded beforehand."""

    def __init__(self, options: Any, place: Place) -> None:
        self.place = place
        self.space = SpaceId("bench", 1, options.dimension)
        self.slo_ms = options.slo_p99_ms
        self._message = options.message
        self._mated = options.mated
        self._sizes = sizes(options)
        self._stored = {name: gallery("isotropic", size, options.dimension, at) for at, (name, size) in
                        enumerate(self._sizes.items())}  # fmt: skip
        self._made: dict[str, tuple[float, list[bytes]]] = {}
        self.random = random.Random(options.seed)

    def fill(self, served_at: served.Service) -> None:
        """Space, galleries, deployment and references, over HTTP."""
        served.prepare(served_at, self.space, dict.fromkeys(self._stored, THRESHOLD))
        with httpx.Client(base_url=self.place.http, headers=self.headers(PROTOBUF), timeout=120) as api:
            for name, stored in self._stored.items():
                for begin in range(0, len(stored), ENROL_ROWS):
                    rows = stored[begin : begin + ENROL_ROWS]
                    ids = [f"r{at}" for at in range(begin, begin + len(rows))]
                    api.post(
                        f"/v1/galleries/{name}/references", content=self.enrolment(name, ids, rows)
                    ).raise_for_status()

    def enrolment(self, gallery_id: str, ids: list[str], rows: Any) -> bytes:
        return pb.EnrolRequest(
            gallery_id=gallery_id,
            space=pb.TemplateSpace(name=self.space.name, version=self.space.version, dimension=self.space.dimension),
            dtype=pb.FLOAT16,
            templates=np.ascontiguousarray(rows, np.float16).tobytes(),
            reference_ids=ids,
            subject_ids=ids,
        ).SerializeToString()

    def headers(self, kind: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.place.token}", "content-type": kind, "accept": kind}

    def message(self, wire: Literal["protobuf", "json"]) -> bytes:
        """A message of probes for one gallery, or for all."""
        made_at, bodies = self._made.get(wire, (0.0, []))
        if time.monotonic() - made_at > RENEW_S or not bodies:
            bodies = list(self._encoded(wire))
            self._made[wire] = (time.monotonic(), bodies)
        return self.random.choice(bodies)

    def _encoded(self, wire: Literal["protobuf", "json"]) -> Iterator[bytes]:
        names = [*GALLERIES, ""]
        weights = [*GALLERIES.values(), 1 - sum(GALLERIES.values())]
        for number, name in enumerate(self.random.choices(names, weights, k=MESSAGES)):
            stored = self._stored[name or "custody"]
            asked = probes(stored, "isotropic", self._message, THRESHOLD + 0.2, number, self._mated).vectors
            named = (name,) if name else ()
            if wire == "protobuf":
                yield protobuf_request(self.space, asked, gallery_ids=named)
            else:
                yield json_request(self.space, asked, "numbers", gallery_ids=named)


def sizes(options: Any) -> dict[str, int]:
    """References of each gallery."""
    return {"custody": options.references, "match-day": max(1, options.references // 10),
            "standing": max(1, options.references // 50)}  # fmt: skip


class Refused(Exception):
    """A probe came back without an answer; its text is the cause."""


def check(reply: pb.IdentifyReply) -> None:
    """Raises Refused for the first probe that was not answered in full."""
    for one in reply.decisions:
        if one.outcome not in (pb.ALERT, pb.NO_CANDIDATE):
            raise Refused(one.cause)


_held = ExitStack()
_node: list[Node] = []


def node() -> Node:
    return _node[0]


# --- options, start and end --------------------------------------------------------------------------


@events.init_command_line_parser.add_listener
def _(parser: Any) -> None:
    mine = parser.add_argument_group("matcher")
    mine.add_argument("--grpc-address", default="127.0.0.1:8081", help="host:port of gRPC")
    mine.add_argument("--token-file", default="", help="token of a running service at --host; none: start one")
    mine.add_argument("--fill", action="store_true", help="make space, galleries and references there first")
    mine.add_argument("--references", type=int, default=10_000, help="of the largest gallery")
    mine.add_argument("--dimension", type=int, default=512)
    mine.add_argument("--message", type=int, default=8, help="probes of a message")
    mine.add_argument("--mated", type=float, default=0.02, help="share of the probes with a mate: each is an alert")
    mine.add_argument("--seed", type=int, default=20_250_101)
    mine.add_argument("--shape", choices=list(SHAPES), default="steady")
    mine.add_argument("--users-most", type=int, default=24)
    mine.add_argument("--duration-s", type=float, default=60.0)
    mine.add_argument("--slo-p99-ms", type=float, default=250.0, help="of every kind of search")
    mine.add_argument("--slo-failures", type=float, default=0.001, help="share of the requests that may fail")


@events.init.add_listener
def _(environment: Any, **_: Any) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options = environment.parsed_options
    if options.token_file:
        place = Place(options.host or HttpNode.host, options.grpc_address, Path(options.token_file).read_text().strip())
        there = served.Service(0, int(place.http.rsplit(":", 1)[1]), int(place.grpc.rsplit(":", 1)[1]), place.token)
    else:
        folder = _held.enter_context(tempfile.TemporaryDirectory())
        there = _held.enter_context(served.service(Path(folder)))
        place = Place(there.http_address, there.grpc_address, there.token)
    _node[:] = [Node(options, place)]
    if options.fill or not options.token_file:
        node().fill(there)


@events.quitting.add_listener
def _(environment: Any, **_: Any) -> None:
    _held.close()
    missed = objectives_missed(environment.stats, environment.parsed_options)
    for line in missed:
        print(f"objective missed: {line}", flush=True)
    environment.process_exit_code = 1 if missed else 0


def objectives_missed(stats: Any, options: Any) -> list[str]:
    """What was not met, in words; [] if all was."""
    searches = [entry for entry in stats.entries.values() if entry.name.startswith("identify")]
    missed = []
    if not searches:
        missed.append("nothing was searched")
    for entry in searches:
        p99 = entry.get_response_time_percentile(0.99)
        if p99 > options.slo_p99_ms:
            missed.append(f"{entry.method} {entry.name}: p99 is {p99} ms, at most {options.slo_p99_ms:g} wanted")
    if stats.total.fail_ratio > options.slo_failures:
        missed.append(f"{stats.total.fail_ratio:.2%} of the requests failed, at most {options.slo_failures:.2%} wanted")
    return missed


# --- edge nodes --------------------------------------------------------------------------------------


class HttpNode(FastHttpUser):
    abstract = True
    host = "http://127.0.0.1:8080"
    wait_time = constant_throughput(4)
    connection_timeout = network_timeout = TIMEOUT_S

    def search(self, wire: Literal["protobuf", "json"], kind: str, read: Callable[[bytes], None]) -> None:
        url = f"{node().place.http}/v1/identify"
        with self.client.post(url, data=node().message(wire), headers=node().headers(kind), name=f"identify {wire}",
                              catch_response=True) as answer:  # fmt: skip
            if answer.status_code == 200:
                try:
                    read(answer.content)
                except Refused as refused:
                    answer.failure(str(refused))


class HttpJsonNode(HttpNode):
    weight = 2

    @task
    def identify(self) -> None:
        def read(body: bytes) -> None:
            for one in orjson.loads(body)["decisions"]:
                if one["outcome"] not in ("ALERT", "NO_CANDIDATE"):
                    raise Refused(one.get("cause", ""))

        self.search("json", JSON, read)


class HttpProtobufNode(HttpNode):
    weight = 2

    @task
    def identify(self) -> None:
        self.search("protobuf", PROTOBUF, lambda body: check(pb.IdentifyReply.FromString(body)))


class GrpcNode(User):
    abstract = True
    wait_time = constant_throughput(4)

    def on_start(self) -> None:
        self.channel = grpc.insecure_channel(
            node().place.grpc, [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        )

    def on_stop(self) -> None:
        self.channel.close()

    def report(self, name: str, began: float, size: int, error: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type="gRPC",
            name=name,
            response_time=(time.perf_counter() - began) * 1000,
            response_length=size,
            exception=error,
            context={},
        )


class GrpcCallNode(GrpcNode):
    weight = 2

    @task
    def identify(self) -> None:
        began, size, error = time.perf_counter(), 0, None
        try:
            call = self.channel.unary_unary(UNARY_METHOD)
            data = call(node().message("protobuf"), metadata=bearer(node().place.token), timeout=TIMEOUT_S)
            size = len(data)
            check(pb.IdentifyReply.FromString(data))
        except (grpc.RpcError, Refused) as failed:
            error = failed
        self.report("identify call", began, size, error)


class GrpcStreamNode(GrpcNode):
    """One stream, several messages unanswered at a time; a broken stream fails them all and is opened anew."""

    weight = 4

    def on_start(self) -> None:
        super().on_start()
        self._numbers = itertools.count()
        self._open()

    def on_stop(self) -> None:
        self._outbox.put(None)
        self._reader.join(TIMEOUT_S)
        super().on_stop()

    def _open(self) -> None:
        self._outbox: gevent.queue.Queue[bytes | None] = gevent.queue.Queue()
        self._unanswered: dict[str, tuple[float, gevent.event.Event]] = {}
        call = self.channel.stream_stream(STREAM_METHOD)
        self._answers = call(iter(self._outbox.get, None), metadata=bearer(node().place.token))
        self._reader = gevent.spawn(self._read, self._answers, self._unanswered)

    def _read(self, answers: Any, unanswered: dict[str, tuple[float, gevent.event.Event]]) -> None:
        error: Exception = Refused("the stream ended")
        try:
            for data in answers:
                reply = pb.IdentifyReply.FromString(data)
                began, done = unanswered.pop(reply.message_id)
                try:
                    check(reply)
                    self.report("identify stream", began, len(data), None)
                except Refused as refused:
                    self.report("identify stream", began, len(data), refused)
                done.set()
        except grpc.RpcError as broken:
            error = broken
        for began, done in unanswered.values():
            self.report("identify stream", began, 0, error)
            done.set()

    @task
    def identify(self) -> None:
        if self._reader.dead:
            self._open()
        waiting = []
        for _ in range(STREAM_WINDOW):
            name, done = str(next(self._numbers)), gevent.event.Event()
            self._unanswered[name] = (time.perf_counter(), done)
            waiting.append(done)
            # Repeating a field of protobuf replaces its value.
            self._outbox.put(node().message("protobuf") + pb.IdentifyRequest(message_id=name).SerializeToString())
        for done in waiting:
            done.wait(TIMEOUT_S)


class Clerk(FastHttpUser):
    """Enrols a person into a gallery and withdraws that person again."""

    fixed_count = 1
    host = "http://127.0.0.1:8080"
    wait_time = constant_throughput(1)
    connection_timeout = network_timeout = TIMEOUT_S

    @task
    def enrol_and_withdraw(self) -> None:
        here = node()
        name, who = here.random.choice([*GALLERIES]), f"c{uuid.uuid4().hex}"
        row = np.random.default_rng().standard_normal((1, here.space.dimension))
        url = f"{here.place.http}/v1/galleries/{name}/references"
        self.client.post(url, data=here.enrolment(name, [who], row), headers=here.headers(PROTOBUF), name="enrol")
        self.client.delete(f"{url}/{who}?reason=benchmark", headers=here.headers(JSON), name="withdraw")


# --- shapes ------------------------------------------------------------------------------------------

# How many of the users are at work, as a share, at each share of the time.
SHAPES: dict[str, Callable[[float], float]] = {
    "steady": lambda _: 1.0,
    "ramp": lambda at: at,
    # A quiet day, the crowd before kick-off, the match, the crowd on its way home.
    "match-day": lambda at: 1.0 if 0.3 <= at < 0.5 or 0.8 <= at < 0.95 else 0.2,
    "soak": lambda _: 0.5,
}


class Course(LoadTestShape):
    def tick(self) -> tuple[int, float] | None:
        options = self.runner.environment.parsed_options
        at = self.get_run_time() / options.duration_s
        if at >= 1:
            return None
        most = options.users_most
        return max(5, round(SHAPES[options.shape](at) * most)), float(most)
