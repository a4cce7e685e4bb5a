"""The gRPC edge: decode, call, encode.

Handlers take raw bytes, so that a caller is authenticated before anything of his is parsed, and malformed bytes
get an answer of ours. On a stream, messages are answered as soon as they are ready, in any order; reading stops
while `limits.stream_messages_in_flight_max` of them are unanswered, or `limits.messages_in_flight_max` of all streams
are worked on, which is the flow control. A message of probes is judged as soon as it is read: a refusal waits for no
place. A refusal on a stream is an answer; status codes are for unary calls and for the end of a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from matcher_service import logs, policy
from matcher_service.access import bands, verbs
from matcher_service.errors import MatcherError, Overloaded, ShuttingDown
from matcher_service.gateway import decode, encode, refusals
from matcher_service.gateway.grpc_call import CallContext, end_with, presented
from matcher_service.gateway.service import Admitted, Service
from matcher_service.terms import Actor, ProbeMessage
from matcher_service.wire import matcher_pb2 as pb

Reply = TypeVar("Reply", bound=Message)

# The reply of one message of a stream and, for the metrics, how it went.
Answer = tuple[Message, str]

# How often an open stream's credential is looked at. Law 11 allows a second.
OVERSEEN_EVERY_S = 0.25


@dataclass(eq=False)
class _OpenStream:
    """One open stream: whose it is, the one task that takes in more, the answers under way, and why it ends, if it
    does not end by itself."""

    actor: Actor
    intake: asyncio.Task[None] | None = None
    answers: set[asyncio.Task[None]] = field(default_factory=set)
    ending: MatcherError | None = None

    def cut(self, refusal: MatcherError) -> None:
        """End it now; what is under way is not disclosed any more."""
        self.ending = refusal
        if self.intake is not None:
            self.intake.cancel()
        for answer in self.answers:
            answer.cancel()


def _nothing() -> None: ...


@dataclass(eq=False, slots=True)
class _Begun:
    """A message that was read and not refused. What it holds is given back when it is answered, or with `release`."""

    answer: Callable[[], Awaitable[Answer]]
    release: Callable[[], None] = _nothing

    def let_go(self, _task: object = None) -> None:
        self.release()


class _Place:
    """A place among the messages in hand, taken with `acquire` before; given back once."""

    def __init__(self, among: asyncio.Semaphore) -> None:
        self._among: asyncio.Semaphore | None = among

    def leave(self, _task: object = None) -> None:
        among, self._among = self._among, None
        if among is not None:
            among.release()


class MatcherEdge:
    """The methods of matcher.v1.Matcher over raw bytes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limits = service.settings.limits
        self._decode_seconds = service.metrics.station_seconds.labels("decode")
        self._encode_seconds = service.metrics.station_seconds.labels("encode")
        self._streams: set[_OpenStream] = set()
        # Of all streams. Beyond what is searched in a fraction of a second, messages would only stand in line in this
        # process: their deadlines run, and each turn of the loop, and with it every search and reply, takes longer.
        self._in_hand = asyncio.Semaphore(self._limits.messages_in_flight_max)
        self._enrolling = asyncio.Semaphore(self._limits.messages_in_flight_max)
        self._draining = False

    def drain(self) -> None:
        """Take nothing more from any stream; what was read is still answered, then the stream ends."""
        self._draining = True
        for stream in self._streams:
            if stream.intake is not None:
                stream.intake.cancel()

    async def oversee(self) -> None:
        """Cut the streams, idle ones too, whose credential or deployment has ended; until cancelled (law 11)."""
        while True:
            for stream in list(self._streams):
                try:
                    self._service.credentials.require_standing(stream.actor)
                except MatcherError as refusal:
                    stream.cut(refusal)
            await asyncio.sleep(OVERSEEN_EVERY_S)

    @property
    def taking_in(self) -> bool:
        return not self._draining

    # --- unary ---------------------------------------------------------------------------------------

    async def identify(self, data: bytes, context: CallContext) -> pb.IdentifyReply | None:
        async def work(actor: Actor) -> pb.IdentifyReply:
            request = decode.parse(pb.IdentifyRequest, data)
            message = self._decoded(request, actor, self._now(), context.time_remaining())
            reply = await self._service.identify(message)
            if refusal := refusals.of_all_probes(reply.decisions):
                raise refusal
            self._service.credentials.require_standing(actor)
            return encode.identify_reply(bands.reply_for(actor, reply))

        return await self._unary("identify", work, context)

    async def withdraw(self, data: bytes, context: CallContext) -> pb.WithdrawReply | None:
        async def work(actor: Actor) -> pb.WithdrawReply:
            gallery_id, reference_ids, subject_id, reason = decode.withdrawal(
                decode.parse(pb.WithdrawRequest, data), self._limits
            )
            if subject_id:
                receipt = await self._service.withdraw_subject(gallery_id, subject_id, reason, actor)
            else:
                receipt = await self._service.withdraw(gallery_id, reference_ids, reason, actor)
            return encode.withdraw_reply(receipt)

        return await self._unary("withdraw", work, context)

    async def _unary(self, verb: str, work: Callable[[Actor], Awaitable[Reply]], context: CallContext) -> Reply | None:
        began = self._now()
        logs.request_begins()
        try:
            reply = await work(await self.authenticate(verb, context))
        except Exception as error:
            refusal = refusals.of(error)
        else:
            self._count(verb, "ok", began)
            return reply
        self._count(verb, refusal.cause, began)
        await end_with(refusal, context)
        return None

    # --- streams -------------------------------------------------------------------------------------

    async def identify_stream(self, _requests: object, context: CallContext) -> None:
        await self._converse("identify_stream", self._begin_identify, self._in_hand, context)

    async def enrol(self, _requests: object, context: CallContext) -> None:
        await self._converse("enrol", self._begin_enrol, self._enrolling, context)

    def _decoded(
        self, request: pb.IdentifyRequest, actor: Actor, received: float, remaining_s: float | None
    ) -> ProbeMessage:
        began = self._now()
        message = decode.probe_message(request, self._limits, actor, received, remaining_s)
        self._decode_seconds.observe(self._now() - began)
        return message

    def _begin_identify(self, data: bytes, actor: Actor, received: float, remaining_s: float | None) -> _Begun | Answer:
        """Of one message, read at `received`; its answer, if it is refused."""
        request = None
        try:
            request = decode.parse(pb.IdentifyRequest, data)
            admitted = self._service.admit(self._decoded(request, actor, received, remaining_s))
        except Exception as error:
            return self._refused_identify(request, refusals.of(error))
        return _Begun(partial(self._identify_or_refuse, request, actor, admitted), release=admitted.release)

    async def _identify_or_refuse(self, request: pb.IdentifyRequest, actor: Actor, admitted: Admitted) -> Answer:
        try:
            answered = await admitted.answer()
            began = self._now()
            encoded = encode.identify_reply(bands.reply_for(actor, answered))
            self._encode_seconds.observe(self._now() - began)
            return encoded, "ok"
        except Exception as error:
            return self._refused_identify(request, refusals.of(error))

    def _refused_identify(self, request: pb.IdentifyRequest | None, refusal: MatcherError) -> Answer:
        reply = encode.refused_identify(request, refusal)
        self._service.metrics.decisions.labels("REJECTED").inc(len(reply.decisions))
        self._service.metrics.rejections.labels(refusal.cause).inc(len(reply.decisions))
        return reply, refusal.cause

    def _begin_enrol(self, data: bytes, actor: Actor, received: float, remaining_s: float | None) -> _Begun:
        return _Begun(partial(self._enrol_or_refuse, data, actor, received, remaining_s))

    async def _enrol_or_refuse(self, data: bytes, actor: Actor, received: float, remaining_s: float | None) -> Answer:
        request = None
        try:
            request = decode.parse(pb.EnrolRequest, data)
            message = decode.enrol_message(request, self._limits, actor, received, remaining_s)
            receipts = await self._service.enrol(message)
            return encode.enrol_reply(
                message.reference_ids, receipts, message.message_id, in_columns=request.receipts_in_columns
            ), "ok"
        except Exception as error:
            refusal = refusals.of(error)
        return encode.refused_enrol(request, refusal), refusal.cause

    async def _converse(
        self,
        verb: str,
        begin: Callable[[bytes, Actor, float, float | None], _Begun | Answer],
        in_hand: asyncio.Semaphore,
        context: CallContext,
    ) -> None:
        """Answer every message of a stream; returns when the caller has closed its side and all are answered."""
        room = asyncio.Semaphore(self._limits.stream_messages_in_flight_max)
        writing = asyncio.Lock()

        def begin_one(data: bytes, received: float) -> _Begun | Answer:
            logs.message_begins()
            return begin(data, stream.actor, received, context.time_remaining())

        async def respond(begun: _Begun | Answer, received: float, place: _Place | None) -> None:
            try:
                reply, result = await begun.answer() if isinstance(begun, _Begun) else begun
                # Not when it is written: a caller who does not read must not take the place of others.
                if place is not None:
                    place.leave()
                async with writing:
                    if stream.ending is None:
                        await context.write(reply)
                self._count(verb, result, received)
            except grpc.aio.BaseError:
                intake.cancel()  # the caller has gone: nobody reads, so nothing more is taken
            finally:
                room.release()

        def go_on(begun: _Begun | Answer, within: Context, received: float, place: _Place | None) -> None:
            responding = answers.create_task(respond(begun, received, place), context=within)
            stream.answers.add(responding)
            responding.add_done_callback(stream.answers.discard)
            # A task that is cancelled before it begins never comes to its own end.
            if isinstance(begun, _Begun):
                responding.add_done_callback(begun.let_go, context=within)
            if place is not None:
                responding.add_done_callback(place.leave)

        async def take_in() -> None:
            while True:
                # The permit comes before the message: what cannot be worked on stays in the transport.
                await room.acquire()
                data = await context.read()
                if data is grpc.aio.EOF:
                    return
                try:
                    self._service.credentials.require_standing(stream.actor)
                except MatcherError as refused:
                    stream.cut(refused)
                    return
                received, within = self._now(), copy_context()
                begun = within.run(begin_one, data, received)
                del data
                place = None
                try:
                    if isinstance(begun, _Begun):
                        await in_hand.acquire()
                        place = _Place(in_hand)
                except asyncio.CancelledError:
                    if self._draining:
                        go_on(begun, within, received, None)  # what was read is answered
                    elif isinstance(begun, _Begun):
                        within.run(begun.let_go)
                    # A cancelled task and the frames that it was cancelled in refer to each other. The probes of a
                    # caller who left must not stay in there until the collector looks (law 6).
                    del begun, within
                    raise
                go_on(begun, within, received, place)
                del begun, within

        logs.request_begins()
        try:
            actor = await self.authenticate(verb, context)
        except MatcherError as refusal:
            self._count(verb, refusal.cause)
            await end_with(refusal, context)
            return
        with self._stream(actor) as stream:
            if stream.ending is not None:
                self._count(verb, stream.ending.cause)
                await end_with(stream.ending, context)
                return
            async with asyncio.TaskGroup() as answers:
                intake = stream.intake = answers.create_task(take_in())
            await self._end(stream, context)

    async def watch_alerts(self, data: bytes, context: CallContext) -> None:
        verb = "watch_alerts"
        logs.request_begins()

        async def pass_on(deployment_ids: list[str]) -> None:
            feed = self._service.alert_feed.subscribe(deployment_ids)
            coming = asyncio.ensure_future(anext(feed))
            try:
                # By now subscribed: the headers tell the watcher that from here on it misses nothing.
                await asyncio.sleep(0)
                await context.send_initial_metadata(())
                while True:
                    alert = await coming
                    self._service.credentials.require_standing(stream.actor)
                    if policy.may_see_alert(stream.actor, alert):
                        await context.write(encode.alert(bands.alert_for(stream.actor, alert)))
                    coming = asyncio.ensure_future(anext(feed))
            except StopAsyncIteration:
                return
            except MatcherError as refused:
                stream.ending = refused
            except grpc.aio.BaseError:
                return  # the watcher has gone
            finally:
                coming.cancel()
                await asyncio.wait((coming,))
                if isinstance(feed, AsyncGenerator):
                    await feed.aclose()

        try:
            actor = await self.authenticate(verb, context)
            deployment_ids = list(decode.parse(pb.WatchAlertsRequest, data).deployment_ids)
        except MatcherError as refusal:
            self._count(verb, refusal.cause)
            await end_with(refusal, context)
            return
        with self._stream(actor) as stream:
            if stream.ending is not None:
                self._count(verb, stream.ending.cause)
                await end_with(stream.ending, context)
                return
            self._count(verb, "ok")
            async with asyncio.TaskGroup() as owner:
                stream.intake = owner.create_task(pass_on(deployment_ids))
            await self._end(stream, context)

    async def _end(self, stream: _OpenStream, context: CallContext) -> None:
        ending = stream.ending
        if ending is None and stream.intake is not None and stream.intake.cancelled() and self._draining:
            ending = ShuttingDown(
                "the service is stopping; what it had read was answered", hint="connect to another node, or again later"
            )
        if ending is not None:
            await end_with(ending, context)

    @contextlib.contextmanager
    def _stream(self, actor: Actor) -> Iterator[_OpenStream]:
        """Counts an open stream; its `ending` is set at once if it may not stay open."""
        stream = _OpenStream(actor)
        if self._draining:
            stream.ending = ShuttingDown("the service is stopping", hint="connect to another node, or again later")
        elif len(self._streams) >= self._limits.streams_max:
            stream.ending = Overloaded(
                f"{len(self._streams)} streams are open, which is the most",
                hint="put more probes into fewer streams, or connect to another node",
                retry_after_ms=1000,
            )
        if stream.ending is not None:
            yield stream
            return
        self._streams.add(stream)
        self._service.metrics.streams_open.inc()
        try:
            yield stream
        finally:
            self._streams.discard(stream)
            self._service.metrics.streams_open.dec()

    # --- common --------------------------------------------------------------------------------------

    async def authenticate(self, verb: str, context: CallContext) -> Actor:
        """Who calls; raises Unauthenticated, Gone, or Forbidden if no scope of theirs opens the verb."""
        actor = await self._service.credentials.authenticate(presented(context))
        verbs.require(actor, verb, verbs.GRPC_VERBS)
        return actor

    def _now(self) -> float:
        return self._service.clock.monotonic()

    def _count(self, verb: str, result: str, began: float | None = None) -> None:
        """`began`: when the request came, where the answer has a duration."""
        metrics = self._service.metrics
        metrics.requests.labels("grpc", verb, result).inc()
        if began is not None:
            metrics.request_seconds.labels("grpc", verb).observe(self._now() - began)
