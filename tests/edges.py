"""Both edges over a small flat service in memory, whose answers a test can hold back and count."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import prometheus_client
import uvicorn

from matcher_service import decision
from matcher_service.access.authentication import Authentication
from matcher_service.alerts import AlertFeed
from matcher_service.catalogue import Catalogue
from matcher_service.clock import LawfulTime, SystemClock
from matcher_service.errors import Conflict, InvalidInput, MatcherError
from matcher_service.gateway.credentials import BearerToken
from matcher_service.gateway.grpc_server import GrpcServer
from matcher_service.gateway.http import build_http_app
from matcher_service.gateway.service import Service
from matcher_service.metrics import Metrics
from matcher_service.settings import Settings, load
from matcher_service.terms import (
    Actor,
    Alert,
    AuditEvent,
    Candidate,
    Cause,
    Decision,
    EnrolMessage,
    Gallery,
    GalleryKind,
    IdentifyReply,
    Outcome,
    ProbeMessage,
    Receipt,
    Reference,
    SpaceId,
    Write,
    WriteOutcome,
)
from matcher_service.wire import matcher_pb2 as pb

TOKEN = "t" * 40
SPACE = SpaceId("test", 1, 4)
METADATA = (("authorization", f"Bearer {TOKEN}"),)
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


class FlatLog:
    """The reads of a gallery log, over a dictionary."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], Reference] = {}
        self.raised: list[Alert] = []
        self.recorded: list[AuditEvent] = []

    async def references(self, gallery_id: str, after: str, limit: int) -> list[Reference]:
        found = sorted(one for key, one in self.held.items() if key[0] == gallery_id and key[1] > after)
        return found[:limit]

    async def reference(self, gallery_id: str, reference_id: str) -> Reference | None:
        return self.held.get((gallery_id, reference_id))

    async def subject(self, subject_id: str) -> list[Reference]:
        return [one for one in self.held.values() if one.subject_id == subject_id]

    async def alerts(self, deployment_id: str, before: str, limit: int) -> list[Alert]:
        newest_first = sorted(self.raised, key=lambda one: one.alert_id, reverse=True)
        return [one for one in newest_first if not before or one.alert_id < before][:limit]

    async def record(self, events: Sequence[AuditEvent], alerts: Sequence[Alert]) -> None:
        self.recorded += events

    async def audit(self, after: int, limit: int) -> list[dict[str, object]]:
        return [{"index": index} for index in range(after + 1, min(after + limit, 5) + 1)]


@dataclass
class FlatAdmitted:
    flat: FlatService
    message: ProbeMessage
    held: bool = True

    async def answer(self) -> IdentifyReply:
        try:
            return await self.flat.identify(self.message)
        finally:
            self.release()

    def release(self) -> None:
        self.flat.let_go += self.held
        self.held = False


@dataclass
class FlatService:
    """Scans its references for every message. While `gate` is closed every answer is held back; a message_id
    in `gates` has one of its own."""

    catalogue: Catalogue = field(default_factory=Catalogue)
    log: FlatLog = field(default_factory=FlatLog)
    feed: AlertFeed = field(default_factory=AlertFeed)
    templates: dict[tuple[str, str], Any] = field(default_factory=dict)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    refusal: Exception | None = None
    at_the_door: Exception | None = None
    admitted: int = 0
    let_go: int = 0
    ready: tuple[bool, str] = (True, "")
    writes: list[Write] = field(default_factory=list)
    waiting: int = 0
    waiting_max: int = 0
    answered: int = 0
    cancelled: int = 0
    sequence: int = 0
    last_message: ProbeMessage | EnrolMessage | None = None

    def __post_init__(self) -> None:
        self.gate.set()
        gallery = Gallery("wanted", GalleryKind.WATCHLIST, "a force", "a law", "a test", 86_400_000, SPACE, 0.5)
        self.catalogue.galleries = {"wanted": gallery}

    async def _pass_gate(self, message_id: str) -> None:
        self.waiting += 1
        self.waiting_max = max(self.waiting_max, self.waiting)
        try:
            await self.gates.get(message_id, self.gate).wait()
            if self.refusal is not None:
                raise self.refusal
            self.answered += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1

    def admit(self, message: ProbeMessage) -> FlatAdmitted:
        if self.at_the_door is not None:
            raise self.at_the_door
        self.admitted += 1
        return FlatAdmitted(self, message)

    async def identify(self, message: ProbeMessage) -> IdentifyReply:
        self.last_message = message
        await self._pass_gate(message.message_id)
        decisions = [
            self._decide(probe_id, row) for probe_id, row in zip(message.probe_ids, message.templates, strict=True)
        ]
        return IdentifyReply(decisions, self.sequence, SPACE, "1", {"wanted": 0.5}, (), message.message_id)

    def _decide(self, probe_id: str, row: Any) -> Decision:
        if not np.isfinite(row).all():
            return decision.rejection(
                probe_id, InvalidInput("not finite", field="templates", cause=Cause.NOT_FINITE, hint="send numbers")
            )
        unit = row / np.linalg.norm(row)
        scores = [(float(one @ unit), key) for key, one in self.templates.items()]
        found = sorted((one for one in scores if one[0] >= 0.5), reverse=True)
        if not found:
            return Decision(probe_id, Outcome.NO_CANDIDATE)
        candidates = tuple(
            Candidate(self.log.held[key].subject_id, key[1], key[0], score, rank, 1e-4)
            for rank, (score, key) in enumerate(found, 1)
        )
        return Decision(probe_id, Outcome.ALERT, candidates, alert_id="a1")

    async def enrol(self, message: EnrolMessage) -> list[Receipt | MatcherError]:
        self.last_message = message
        await self._pass_gate(message.message_id)
        answers: list[Receipt | MatcherError] = []
        for row, reference_id in enumerate(message.reference_ids):
            key = (message.gallery_id, reference_id)
            if key in self.log.held and not message.replace:
                answers.append(Conflict("it is live", field=f"reference_ids[{row}]", hint="set replace"))
                continue
            self.sequence += 1
            self.log.held[key] = Reference(*key, message.subject_ids[row], self.sequence, 1, 2)
            self.templates[key] = message.templates[row] / np.linalg.norm(message.templates[row])
            answers.append(Receipt(WriteOutcome.ENROLLED, self.sequence))
        return answers

    async def withdraw(self, gallery_id: str, reference_ids: Sequence[str], reason: str, actor: Actor) -> Receipt:
        ended = tuple((gallery_id, one) for one in reference_ids if self.log.held.pop((gallery_id, one), None))
        return Receipt(WriteOutcome.DONE, self.sequence, ended)

    async def withdraw_subject(self, gallery_id: str, subject_id: str, reason: str, actor: Actor) -> Receipt:
        held = [key for key, one in self.log.held.items() if one.subject_id == subject_id]
        for key in held:
            del self.log.held[key]
        return Receipt(WriteOutcome.DONE, self.sequence, tuple(held))

    async def change(self, write: Write, actor: Actor) -> Receipt:
        self.writes.append(write)
        return Receipt(WriteOutcome.DONE, len(self.writes))

    def service(self, settings: Settings, **other: Any) -> Service:
        parts: dict[str, Any] = {
            "admit": self.admit,
            "enrol": self.enrol,
            "withdraw": self.withdraw,
            "withdraw_subject": self.withdraw_subject,
            "change": self.change,
            "catalogue": self.catalogue,
            "log": self.log,
            "alert_feed": self.feed,
            "ready": lambda: self.ready,
            "settings": settings,
            "metrics": Metrics(prometheus_client.CollectorRegistry()),
            "clock": SystemClock(),
            "credentials": Authentication(self.catalogue, LawfulTime(SystemClock()), BearerToken(TOKEN)),
        }
        return Service(**(parts | other))


def settings_of(**sections: dict[str, Any]) -> Settings:
    server = {"http_port": 0, "grpc_port": 0, **sections.pop("server", {})}
    storage = {"data_dir": Path("unused"), **sections.pop("storage", {})}
    every: dict[str, Any] = {"server": server, "storage": storage, **sections}
    return load(None, **every)


@dataclass
class Edges:
    flat: FlatService
    service: Service
    grpc_server: GrpcServer
    grpc_port: int
    http_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @contextlib.asynccontextmanager
    async def channel(self, **options: Any) -> AsyncIterator[grpc.aio.Channel]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc_port}", **options) as channel:
            yield channel


@contextlib.asynccontextmanager
async def served(
    flat: FlatService | None = None, *, http: bool = False, **sections: dict[str, Any]
) -> AsyncIterator[Edges]:
    """The gRPC edge on a free port of loopback, and the HTTP edge too if asked for."""
    flat = flat or FlatService()
    service = flat.service(settings_of(**sections))
    grpc_server = GrpcServer(service)
    grpc_port = await grpc_server.start()
    try:
        async with _http_port(service) if http else contextlib.nullcontext(0) as http_port:
            yield Edges(flat, service, grpc_server, grpc_port, http_port)
    finally:
        for gate in (flat.gate, *flat.gates.values()):
            gate.set()
        await grpc_server.stop(1.0)


@contextlib.asynccontextmanager
async def _http_port(service: Service) -> AsyncIterator[int]:
    # The protocol is named so that asyncio turns delayed sending off on every connection.
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # from here on a connection waits instead of being refused
    server = _Http(
        uvicorn.Config(
            build_http_app(service), loop="none", log_config=None, lifespan="off", timeout_graceful_shutdown=1
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what is bound to come; the test's own time limit ends a wait in vain."""
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


class _Http(uvicorn.Server):
    """Without signal handlers, which belong to the test runner."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def probes(*probe_ids: str, rows: Any = None, **more: Any) -> pb.IdentifyRequest:
    """A good message of one template per probe id; `more` overrides its fields."""
    templates = np.eye(len(probe_ids), 4, dtype="<f4") if rows is None else np.asarray(rows, "<f4")
    fields: dict[str, Any] = {
        "space": pb.TemplateSpace(**SPACE._asdict()),
        "dtype": pb.FLOAT32,
        "templates": templates.tobytes(),
        "probe_ids": probe_ids,
        "captured_at_ms": [1_000] * len(probe_ids),
        "deployment_id": "op",
    }
    return pb.IdentifyRequest(**{key: value for key, value in (fields | more).items() if value is not None})


def references(*reference_ids: str, rows: Any = None, **more: Any) -> pb.EnrolRequest:
    templates = np.eye(len(reference_ids), 4, dtype="<f4") if rows is None else np.asarray(rows, "<f4")
    fields: dict[str, Any] = {
        "gallery_id": "wanted",
        "space": pb.TemplateSpace(**SPACE._asdict()),
        "dtype": pb.FLOAT32,
        "templates": templates.tobytes(),
        "reference_ids": reference_ids,
        "subject_ids": [f"s-{one}" for one in reference_ids],
    }
    return pb.EnrolRequest(**(fields | more))
