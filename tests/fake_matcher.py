"""A small real Matcher on a real grpc.aio server, whose answers can be computed from the questions and
whose faults are scripted.

Faults: streams broken at chosen messages (counted over all streams), messages refused as overloaded before
they are answered, probes never answered, replies sent twice, in parts, and out of order.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np

from matcher_service.wire import matcher_pb2 as pb
from matcher_service.wire import matcher_pb2_grpc as pb_grpc

TOKEN = "a-token-for-the-tests"


def expected_outcome(template: np.ndarray) -> int:
    """What the fake answers: ALERT where the first value is positive."""
    return pb.ALERT if float(template[0]) > 0 else pb.NO_CANDIDATE


def subject_of(template: np.ndarray) -> str:
    """The subject the fake names: computable from the template alone."""
    return f"subject-{round(float(template[1]))}"


@dataclass
class Script:
    """What goes wrong, and what was seen."""

    seed: int = 0
    break_at: frozenset[int] = frozenset()
    overload_times: int = 0
    overload_cause: str = "OVERLOADED"
    retry_after_ms: int = 1
    mute: frozenset[str] = frozenset()
    silent_streams: int = 0
    repeat_replies: bool = False
    split_replies: bool = False
    reorder: bool = False
    end_with: tuple[grpc.StatusCode, str] | None = None
    refuse_rows: frozenset[str] = frozenset()

    messages: int = 0
    streams: int = 0
    unanswered: int = 0
    unanswered_most: int = 0
    overloaded: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    keys: dict[str, list[pb.Receipt]] = field(default_factory=dict)
    enrolled: dict[str, str] = field(default_factory=dict)
    alert_subscriptions: int = 0
    sequence: int = 0


class FakeMatcher(pb_grpc.MatcherServicer):
    def __init__(self, script: Script) -> None:
        self.script = script
        self.rng = random.Random(script.seed)

    async def _authorised(self, context: Any) -> None:
        if ("authorization", f"Bearer {TOKEN}") not in tuple(context.invocation_metadata()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such token")

    def _decisions(self, request: pb.IdentifyRequest) -> list[pb.Decision]:
        dtype = "<f2" if request.dtype == pb.FLOAT16 else "<f4"
        templates = np.frombuffer(request.templates, dtype).reshape(len(request.probe_ids), request.space.dimension)
        decisions = []
        for probe_id, template in zip(request.probe_ids, templates, strict=True):
            self.script.seen[probe_id] += 1
            if probe_id in self.script.mute:
                continue
            if self.script.overloaded[probe_id] < self.script.overload_times:
                self.script.overloaded[probe_id] += 1
                decisions.append(
                    pb.Decision(
                        probe_id=probe_id,
                        outcome=pb.REJECTED,
                        cause=self.script.overload_cause,
                        detail="no permit",
                        retry_after_ms=self.script.retry_after_ms,
                    )
                )
                continue
            decision = pb.Decision(probe_id=probe_id, outcome=expected_outcome(template))
            if decision.outcome == pb.ALERT:
                decision.candidates.add(subject_id=subject_of(template), reference_id="r", gallery_id="g", rank=1)
                decision.alert_id = f"alert-{probe_id}"
            decisions.append(decision)
        return decisions

    async def Identify(self, request: pb.IdentifyRequest, context: Any) -> pb.IdentifyReply:
        await self._authorised(context)
        self.script.messages += 1
        if self.script.messages in self.script.break_at:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")
        return self._reply(request, self._decisions(request))

    def _reply(self, request: pb.IdentifyRequest, decisions: list[pb.Decision]) -> pb.IdentifyReply:
        return pb.IdentifyReply(
            decisions=decisions,
            sequence=7,
            space=request.space,
            policy_version="p1",
            thresholds=[pb.GalleryThreshold(gallery_id="g", threshold=0.5)],
            message_id=request.message_id,
        )

    async def IdentifyStream(self, requests: AsyncIterator[pb.IdentifyRequest], context: Any) -> None:
        await self._authorised(context)
        script = self.script
        script.streams += 1
        script.unanswered = 0
        silent = script.streams <= script.silent_streams
        waiting: list[asyncio.Task[None]] = []
        # grpc.aio allows one write of a stream at a time.
        writing = asyncio.Lock()
        try:
            async for request in requests:
                script.messages += 1
                script.unanswered += 1
                script.unanswered_most = max(script.unanswered_most, script.unanswered)
                if script.end_with is not None:
                    await context.abort(*script.end_with)
                if script.messages in script.break_at:
                    # Not while a write is under way: grpc.aio's abort would wait for ever.
                    async with writing:
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")
                if not silent:
                    waiting.append(asyncio.create_task(self._answer(request, context, writing)))
            await asyncio.gather(*waiting)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _answer(self, request: pb.IdentifyRequest, context: Any, writing: asyncio.Lock) -> None:
        script = self.script
        if script.reorder:
            for _ in range(self.rng.randrange(20)):
                await asyncio.sleep(0)
        decisions = self._decisions(request)
        if not decisions:
            return
        parts = [decisions]
        if script.split_replies and len(decisions) > 1:
            parts = [decisions[::2], decisions[1::2]]
        script.unanswered -= 1
        for part in parts:
            for _ in range(2 if script.repeat_replies else 1):
                async with writing:
                    await context.write(self._reply(request, part))

    async def Enrol(self, requests: AsyncIterator[pb.EnrolRequest], context: Any) -> None:
        await self._authorised(context)
        script = self.script
        script.streams += 1
        async for request in requests:
            script.messages += 1
            cause = ""
            if script.overloaded[request.idempotency_key] < script.overload_times:
                script.overloaded[request.idempotency_key] += 1
                cause = script.overload_cause
            receipts = [] if cause else self._enrolled(request)
            # Broken after it was written, before it was acknowledged: the worst moment.
            if script.messages in script.break_at:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")
            await context.write(
                pb.EnrolReply(
                    message_id=request.message_id,
                    receipts=receipts,
                    sequence=script.sequence,
                    cause=cause,
                    retry_after_ms=script.retry_after_ms if cause else 0,
                )
            )

    def _enrolled(self, request: pb.EnrolRequest) -> list[pb.Receipt]:
        script = self.script
        if request.idempotency_key in script.keys:
            first = script.keys[request.idempotency_key]
            return [
                one
                if one.outcome == pb.REFUSED
                else pb.Receipt(reference_id=one.reference_id, outcome=pb.REPEATED, sequence=one.sequence)
                for one in first
            ]
        receipts = []
        for reference_id, subject_id in zip(request.reference_ids, request.subject_ids, strict=True):
            if reference_id in script.refuse_rows or reference_id in script.enrolled:
                receipts.append(pb.Receipt(reference_id=reference_id, outcome=pb.REFUSED, cause="CONFLICT"))
                continue
            script.sequence += 1
            script.enrolled[reference_id] = subject_id
            receipts.append(pb.Receipt(reference_id=reference_id, outcome=pb.ENROLLED, sequence=script.sequence))
        script.keys[request.idempotency_key] = receipts
        return receipts

    async def Withdraw(self, request: pb.WithdrawRequest, context: Any) -> pb.WithdrawReply:
        await self._authorised(context)
        self.script.messages += 1
        wanted = set(request.references.reference_ids) or {
            reference for reference, subject in self.script.enrolled.items() if subject == request.subject_id
        }
        if request.WhichOneof("what") == "references" and not wanted <= set(self.script.enrolled):
            await context.abort(grpc.StatusCode.NOT_FOUND, "not live")
        for reference_id in wanted:
            del self.script.enrolled[reference_id]
        if self.script.messages in self.script.break_at:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")
        return pb.WithdrawReply(withdrawn_reference_ids=sorted(wanted), sequence=9)

    async def WatchAlerts(self, request: pb.WatchAlertsRequest, context: Any) -> None:
        await self._authorised(context)
        self.script.alert_subscriptions += 1
        number = self.script.alert_subscriptions
        for row in range(2):
            await context.write(
                pb.Alert(alert_id=f"alert-{number}-{row}", deployment_id=",".join(request.deployment_ids))
            )
        await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")


@asynccontextmanager
async def fake_server(script: Script, port: int = 0) -> AsyncIterator[int]:
    """Serve the script on loopback; yields the port."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_MatcherServicer_to_server(FakeMatcher(script), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)
