"""The gRPC edge: decode, call, encode.

Handlers take raw bytes, so that a caller is authenticated before anything of his is parsed, and malformed bytes
get an answer of ours. On a stream, messages are answered as soon as they are ready, in any order; reading stops
while `limits.stream_messages_in_flight_max` of them are unanswered, which is the flow control. A refusal on a
stream is an answer; status codes are for unary calls and for the end of a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from matcher_service import errors, logs, policy
from matcher_service.access import bands, verbs
from matcher_service.access.authentication import ClientCertificate, Presented
from matcher_service.errors import MatcherError, Overloaded, ShuttingDown, StartRefused
from matcher_service.gateway import decode, encode, refusals
from matcher_service.gateway.grpc_health import HEALTH_SERVICE, Health
from matcher_service.gateway.service import Service
from matcher_service.settings import is_loopback
from matcher_service.terms import Actor, IdentifyReply
from matcher_service.wire import matcher_pb2 as pb

Reply = TypeVar("Reply", bound=Message)

SERVICE_NAME = "matcher.v1.Matcher"
ERROR_DOMAIN = "matcher.v1"

# Longest text of one part of a status: peers commonly refuse headers over 8 KiB in all, and would then see
# neither the cause nor what to do.
STATUS_TEXT_MAX = 250

# Unary calls at once, beside the streams; what they ask for is bounded by admission.
UNARY_CALLS_MAX = 128
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
PING_INTERVAL_MS_MIN = 5_000
# What of a stream may lie in the transport unread. gRPC would let it grow to megabytes: seconds of messages under load,
# whose deadlines begin only when they are read, while their sender believes that they are being searched.
STREAM_WINDOW_BYTES = 256 << 10

STATUS_BY_CLASS: dict[type[MatcherError], grpc.StatusCode] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    # Not RESOURCE_EXHAUSTED: clients retry that, and this message will never fit.
    errors.TooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Conflict: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Gone: grpc.StatusCode.NOT_FOUND,
    errors.StaleProbe: grpc.StatusCode.FAILED_PRECONDITION,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CallerFault: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.MemoryRefused: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ShuttingDown: grpc.StatusCode.UNAVAILABLE,
    errors.LogUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.AuditUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.ShardUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.ModelsUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.ReplayBehind: grpc.StatusCode.UNAVAILABLE,
    errors.ServiceFault: grpc.StatusCode.UNAVAILABLE,
    errors.DataDamaged: grpc.StatusCode.INTERNAL,
    errors.StartRefused: grpc.StatusCode.INTERNAL,
    MatcherError: grpc.StatusCode.INTERNAL,
}


# How often an open stream's credential is looked at. Law 11 allows a second.
OVERSEEN_EVERY_S = 0.25


class CallContext(Protocol):
    """What is used of grpc.aio.ServicerContext."""

    def invocation_metadata(self) -> Any: ...

    def peer(self) -> str: ...

    def auth_context(self) -> Any: ...

    def time_remaining(self) -> float | None: ...

    async def send_initial_metadata(self, initial_metadata: Any) -> None: ...

    async def read(self) -> Any: ...

    async def write(self, message: Message) -> None: ...

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None: ...


def status_of(refusal: MatcherError) -> grpc.StatusCode:
    """The status of the nearest class of the tree that has one."""
    return next(STATUS_BY_CLASS[kind] for kind in type(refusal).__mro__ if kind in STATUS_BY_CLASS)


def rich_status(refusal: MatcherError) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo (the cause and the hint), BadRequest (the field), RetryInfo and RequestInfo."""
    field, hint = _clipped(refusal.field), _clipped(refusal.hint)
    info = error_details_pb2.ErrorInfo(
        reason=refusal.cause, domain=ERROR_DOMAIN, metadata={"field": field, "hint": hint}
    )
    details: list[Message] = [info]
    if refusal.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field, description=_clipped(encode.in_words(refusal)), reason=refusal.cause
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if refusal.retry_after_ms is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(refusal.retry_after_ms)
        details.append(retry)
    if request_id := logs.request_id():
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    packed = []
    for detail in details:
        one = any_pb2.Any()
        one.Pack(detail)
        packed.append(one)
    return status_pb2.Status(code=status_of(refusal).value[0], message=_clipped(str(refusal)), details=packed)


def _clipped(text: str) -> str:
    return text if len(text) <= STATUS_TEXT_MAX else text[: STATUS_TEXT_MAX - 1] + "…"


async def _end_with(refusal: MatcherError, context: CallContext) -> None:
    """Ends the call with the refusal's status; never returns normally."""
    trailing: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", rich_status(refusal).SerializeToString())]
    if refusal.retry_after_ms is not None:
        trailing.append(("grpc-retry-pushback-ms", str(refusal.retry_after_ms)))
    await context.abort(status_of(refusal), _clipped(str(refusal)), tuple(trailing))


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


class MatcherEdge:
    """The methods of matcher.v1.Matcher over raw bytes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limits = service.settings.limits
        self._decode_seconds = service.metrics.station_seconds.labels("decode")
        self._encode_seconds = service.metrics.station_seconds.labels("encode")
        self._streams: set[_OpenStream] = set()
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
            reply = await self._identified(request, actor, context.time_remaining())
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
        except MatcherError as refused:
            refusal = refused
        except Exception as error:
            refusal = refusals.unexpected(error)
        else:
            self._count(verb, "ok", began)
            return reply
        self._count(verb, refusal.cause, began)
        await _end_with(refusal, context)
        return None

    # --- streams -------------------------------------------------------------------------------------

    async def identify_stream(self, _requests: object, context: CallContext) -> None:
        await self._converse("identify_stream", self._identify_or_refuse, context)

    async def enrol(self, _requests: object, context: CallContext) -> None:
        await self._converse("enrol", self._enrol_or_refuse, context)

    async def _identified(self, request: pb.IdentifyRequest, actor: Actor, remaining_s: float | None) -> IdentifyReply:
        began = self._now()
        message = decode.probe_message(request, self._limits, actor, began, remaining_s)
        self._decode_seconds.observe(self._now() - began)
        return await self._service.identify(message)

    async def _identify_or_refuse(
        self, data: bytes, actor: Actor, remaining_s: float | None
    ) -> tuple[pb.IdentifyReply, str]:
        """The reply of one message and, for the metrics, how it went."""
        request = None
        try:
            request = decode.parse(pb.IdentifyRequest, data)
            answered = await self._identified(request, actor, remaining_s)
            began = self._now()
            encoded = encode.identify_reply(bands.reply_for(actor, answered))
            self._encode_seconds.observe(self._now() - began)
            return encoded, "ok"
        except MatcherError as refused:
            refusal = refused
        except Exception as error:
            refusal = refusals.unexpected(error)
        reply = encode.refused_identify(request, refusal)
        self._service.metrics.decisions.labels("REJECTED").inc(len(reply.decisions))
        self._service.metrics.rejections.labels(refusal.cause).inc(len(reply.decisions))
        return reply, refusal.cause

    async def _enrol_or_refuse(self, data: bytes, actor: Actor, remaining_s: float | None) -> tuple[pb.EnrolReply, str]:
        request = None
        try:
            request = decode.parse(pb.EnrolRequest, data)
            message = decode.enrol_message(request, self._limits, actor, self._now(), remaining_s)
            receipts = await self._service.enrol(message)
            return encode.enrol_reply(
                message.reference_ids, receipts, message.message_id, in_columns=request.receipts_in_columns
            ), "ok"
        except MatcherError as refused:
            refusal = refused
        except Exception as error:
            refusal = refusals.unexpected(error)
        return encode.refused_enrol(request, refusal), refusal.cause

    async def _converse(
        self,
        verb: str,
        answer: Callable[[bytes, Actor, float | None], Awaitable[tuple[Message, str]]],
        context: CallContext,
    ) -> None:
        """Answer every message of a stream; returns when the caller has closed its side and all are answered."""
        room = asyncio.Semaphore(self._limits.stream_messages_in_flight_max)
        writing = asyncio.Lock()

        async def respond(data: bytes) -> None:
            began = self._now()
            logs.message_begins()
            try:
                reply, result = await answer(data, stream.actor, context.time_remaining())
                async with writing:
                    if stream.ending is None:
                        await context.write(reply)
                self._count(verb, result, began)
            except grpc.aio.BaseError:
                intake.cancel()  # the caller has gone: nobody reads, so nothing more is taken
            finally:
                room.release()

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
                responding = answers.create_task(respond(data))
                stream.answers.add(responding)
                responding.add_done_callback(stream.answers.discard)
                # A cancelled task and the frames that it was cancelled in refer to each other. The probes of a caller
                # who left must not stay in there until the collector looks (law 6).
                del data, responding

        logs.request_begins()
        try:
            actor = await self.authenticate(verb, context)
        except MatcherError as refusal:
            self._count(verb, refusal.cause)
            await _end_with(refusal, context)
            return
        with self._stream(actor) as stream:
            if stream.ending is not None:
                self._count(verb, stream.ending.cause)
                await _end_with(stream.ending, context)
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
            await _end_with(refusal, context)
            return
        with self._stream(actor) as stream:
            if stream.ending is not None:
                self._count(verb, stream.ending.cause)
                await _end_with(stream.ending, context)
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
            await _end_with(ending, context)

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
        actor = await self._service.credentials.authenticate(_presented(context))
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


def _presented(context: CallContext) -> Presented:
    authorization = None
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            authorization = value if isinstance(value, str) else None
            break
    return Presented(authorization, _from_loopback(context.peer()), _certificate(context.auth_context()))


def _from_loopback(peer: str) -> bool:
    """By gRPC's name of a peer: ipv4:127.0.0.1:5000, ipv6:%5B::1%5D:5000, unix:…"""
    kind, _, address = unquote(peer).partition(":")
    return kind == "unix" or (kind in ("ipv4", "ipv6") and is_loopback(address.rpartition(":")[0].strip("[]")))


def _certificate(told: Mapping[str, Sequence[bytes]] | None) -> ClientCertificate | None:
    """The client certificate that the transport has verified, if there is one."""
    pem = (told or {}).get("x509_pem_cert")
    if not told or not pem:
        return None
    found = x509.load_pem_x509_certificate(pem[0])
    names = told.get("x509_subject_alternative_name", ())
    return ClientCertificate(
        found.fingerprint(hashes.SHA256()).hex(), tuple(one.decode(errors="replace") for one in names)
    )


class _ReflectionGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Beyond loopback, what the service can do is told to who has a credential."""

    def __init__(self, edge: MatcherEdge) -> None:
        self._edge = edge

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith("/grpc.reflection."):
            return handler

        async def guarded(requests: Any, context: Any) -> AsyncIterator[Any]:
            try:
                await self._edge.authenticate("reflection", context)
            except MatcherError as refusal:
                await _end_with(refusal, context)
            async for reply in handler.stream_stream(requests, context):
                yield reply

        return grpc.stream_stream_rpc_method_handler(guarded, handler.request_deserializer, handler.response_serializer)


def _handlers(edge: MatcherEdge) -> grpc.GenericRpcHandler:
    """The methods over raw request bytes: no deserialiser, so that we authenticate first and parse ourselves."""

    def encoded(reply: Message) -> bytes:
        return reply.SerializeToString()

    return grpc.method_handlers_generic_handler(
        SERVICE_NAME,
        {
            "Identify": grpc.unary_unary_rpc_method_handler(edge.identify, response_serializer=encoded),
            "IdentifyStream": grpc.stream_stream_rpc_method_handler(edge.identify_stream, response_serializer=encoded),
            "Enrol": grpc.stream_stream_rpc_method_handler(edge.enrol, response_serializer=encoded),
            "Withdraw": grpc.unary_unary_rpc_method_handler(edge.withdraw, response_serializer=encoded),
            "WatchAlerts": grpc.unary_stream_rpc_method_handler(edge.watch_alerts, response_serializer=encoded),
        },
    )


class GrpcServer:
    """Owns the listening server; `start` once, `stop` once, in one event loop."""

    def __init__(self, service: Service) -> None:
        self._settings = service.settings
        self._edge = MatcherEdge(service)
        self._health = Health(service.ready, SERVICE_NAME)
        self._server: grpc.aio.Server | None = None
        self._overseeing: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """The port bound, on all of which calls are answered. Raises StartRefused if it cannot be bound or the
        TLS files cannot be used."""
        limits, listen = self._settings.limits, self._settings.server
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limits.message_bytes_max),
                ("grpc.max_send_message_length", -1),
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
                ("grpc.max_concurrent_streams", limits.streams_max + UNARY_CALLS_MAX),
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_INTERVAL_MS_MIN),
                # Unless it is wanted, a second process on the same port must fail rather than share its callers.
                ("grpc.so_reuseport", int(listen.share_ports)),
            ],
            maximum_concurrent_rpcs=limits.streams_max + UNARY_CALLS_MAX,
            interceptors=() if is_loopback(listen.host) else (_ReflectionGuard(self._edge),),
        )
        server.add_generic_rpc_handlers((_handlers(self._edge),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE_NAME, HEALTH_SERVICE, reflection.SERVICE_NAME), server)
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        address = f"{host}:{listen.grpc_port}"
        try:
            if listen.tls_certificate_file and listen.tls_key_file:
                authority = listen.tls_client_ca_file
                credentials = grpc.ssl_server_credentials(
                    [(_bytes_of(listen.tls_key_file), _bytes_of(listen.tls_certificate_file))],
                    root_certificates=None if authority is None else _bytes_of(authority),
                    require_client_auth=authority is not None,
                )
                port = server.add_secure_port(address, credentials)
            else:
                port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise StartRefused(
                f"cannot listen for gRPC on {address}",
                field="server.grpc_port",
                hint="another process may hold the port; choose another, or 0 for a free one",
            ) from error
        await server.start()
        self._server = server
        self._overseeing = asyncio.create_task(self._edge.oversee(), name="oversee-streams")
        return int(port)

    @property
    def taking_in(self) -> bool:
        """False from the moment that streams are no longer read."""
        return self._edge.taking_in

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, answer what was read, end every stream; cut what is left after `grace_s`."""
        self._edge.drain()
        self._health.close()
        if self._server is not None:
            await self._server.stop(grace_s)
        if self._overseeing is not None:
            self._overseeing.cancel()
            await asyncio.gather(self._overseeing, return_exceptions=True)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartRefused(
            f"cannot read {path}: {error.strerror}", field="server", hint="check the TLS files"
        ) from error


def build_grpc_server(service: Service) -> GrpcServer:
    return GrpcServer(service)
