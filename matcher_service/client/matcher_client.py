"""The client itself: one message or a stream of them, over connections that may break."""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import random
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import grpc.aio

from matcher_service import errors
from matcher_service.client.dialogues import RETRYABLE_PROBE_CAUSES, EnrolDialogue, IdentifyDialogue, stub_on
from matcher_service.client.from_wire import alert_value, identify_reply
from matcher_service.client.refusals import Unreachable, error_for, error_of
from matcher_service.client.values import (
    ProbeAnswer,
    Probes,
    ReferenceReceipt,
    References,
    Tls,
    WatchGap,
    Withdrawal,
)
from matcher_service.errors import InvalidInput, MatcherError, NotFound, Overloaded
from matcher_service.terms import Alert, IdentifyReply
from matcher_service.windowed_stream import Backoff, StreamCounts, WindowedStream
from matcher_service.wire import matcher_pb2 as pb

Got = TypeVar("Got")

MESSAGE_BYTES_MAX = 8 * 1024 * 1024


class MatcherClient:
    """An async client; use as an async context manager within one event loop.

    `address` is host:port. Without `tls` it talks in clear and refuses any address but loopback, because
    the token would be read on the way. `token` "": the client certificate of `tls` is the credential.
    `deadline_s` holds for a message of probes, `enrol_deadline_s` for one of references. `rng` is for the jitter.
    """

    def __init__(
        self,
        address: str,
        token: str,
        *,
        tls: Tls | None = None,
        in_flight_messages_max: int = 16,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        deadline_s: float = 2.0,
        enrol_deadline_s: float = 60.0,
        backoff: Backoff | None = None,
        rng: random.Random | None = None,
    ) -> None:
        if tls is None and not _is_loopback(address):
            raise InvalidInput(
                f"{address} is not loopback and no TLS is set: the token would travel in clear",
                field="tls",
                hint="give the certificate of the service's authority",
            )
        if in_flight_messages_max < 1:
            raise InvalidInput("must be at least 1", field="in_flight_messages_max", hint="16 suits most edges")
        self.address = address
        self.counts = StreamCounts()
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        # Every sending has a number under one nonce, whatever becomes of the connections: none is accepted twice,
        # and what is sent again after a break is known for the same probe.
        self._nonce = secrets.token_bytes(16)
        self._sendings = itertools.count(1)
        self._tls = tls
        self._in_flight_messages_max = in_flight_messages_max
        self._message_bytes_max = message_bytes_max
        self._deadline_s = deadline_s
        self._enrol_deadline_s = enrol_deadline_s
        self._backoff = backoff or Backoff()
        self._rng = rng or random.Random()
        self._channel: grpc.aio.Channel | None = None
        self._streams: set[WindowedStream[Any, Any]] = set()

    def __repr__(self) -> str:
        return f"MatcherClient({self.address!r}, tls={self._tls is not None})"

    async def __aenter__(self) -> MatcherClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every stream of this client and its connections. Streams still open raise ShuttingDown."""
        await asyncio.gather(*(stream.stop() for stream in self._streams))
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    # --- identify --------------------------------------------------------------------------------------

    async def identify(self, probes: Probes) -> IdentifyReply:
        """One message of probes, one reply; sent again within its deadline while the cause is retryable.

        Raises the error of the refusal (errors.py, by cause), DeadlineExceeded, or Unreachable.
        """
        dialogue = self._identifying()
        rows = range(len(probes.probe_ids))

        async def once(stub: Any, remaining_s: float) -> IdentifyReply:
            request = dialogue.encode(probes, rows, probes.message_id, remaining_s)
            reply = identify_reply(await stub.Identify(request, metadata=self._metadata, timeout=remaining_s))
            refused = [one for one in reply.decisions if one.cause in RETRYABLE_PROBE_CAUSES]
            if reply.decisions and len(refused) == len(reply.decisions):
                first = refused[0]
                raise error_for(first.cause, first.detail, first.field, first.retry_after_ms or None)
            return reply

        return await self._unary(once, dialogue.deadline_s(probes))

    def identify_stream(self, messages: AsyncIterable[Probes]) -> AsyncGenerator[ProbeAnswer, None]:
        """Answers as they come, exactly one per probe of the messages taken, in no set order.

        A message is taken from `messages` only when the window has room. A probe's refusal is an answer
        (REJECTED with its cause); OVERLOADED and SHUTTING_DOWN are tried again within the deadline. Raises
        what `messages` raised, or the error that ended the stream for good (Unauthenticated, Forbidden …),
        each after the answers of all probes taken.
        """
        return self._stream(self._identifying(), messages)

    def _identifying(self) -> IdentifyDialogue:
        return IdentifyDialogue(self._metadata, self._deadline_s, self._nonce, self._sendings)

    # --- enrol and withdraw ----------------------------------------------------------------------------

    def enrol_stream(self, messages: AsyncIterable[References]) -> AsyncGenerator[ReferenceReceipt, None]:
        """Receipts as they come, exactly one per reference taken; messages in flight at once have no order
        between them, so a reference and its replacement do not belong in neighbouring messages.

        Raises as identify_stream does.
        """
        return self._stream(EnrolDialogue(self._metadata, self._enrol_deadline_s), _with_keys(messages))

    def enrol_messages(self, messages: AsyncIterable[References]) -> AsyncGenerator[Sequence[ReferenceReceipt], None]:
        """As `enrol_stream`, with the receipts in groups, each of one message: `Receipts` where all of a message came
        at once. For many references."""
        return self._groups(EnrolDialogue(self._metadata, self._enrol_deadline_s), _with_keys(messages))

    async def enrol(self, references: References) -> list[ReferenceReceipt]:
        """One message of references: its receipts in the order of its rows. Raises as enrol_stream does."""

        async def one() -> AsyncIterator[References]:
            yield references

        async with aclosing(self.enrol_stream(one())) as receipts:
            return sorted([receipt async for receipt in receipts], key=lambda receipt: receipt.row)

    async def withdraw(
        self,
        gallery_id: str,
        *,
        reference_ids: Sequence[str] = (),
        subject_id: str = "",
        reason: str,
        deadline_s: float = 30.0,
    ) -> Withdrawal:
        """Withdraw references, or every reference of a subject (`gallery_id` "": in every gallery).

        On return no search that starts later can find them. Raises NotFound for a reference that is not
        live; after a broken connection that may be because the first try succeeded.
        """
        if bool(reference_ids) == bool(subject_id):
            raise InvalidInput(
                "exactly one of reference_ids and subject_id must be given",
                field="reference_ids",
                hint="withdraw by reference or by subject",
            )
        request = pb.WithdrawRequest(gallery_id=gallery_id, reason=reason)
        if subject_id:
            request.subject_id = subject_id
        else:
            request.references.reference_ids.extend(reference_ids)
        tries = 0

        async def once(stub: Any, remaining_s: float) -> Withdrawal:
            nonlocal tries
            tries += 1
            reply = await stub.Withdraw(request, metadata=self._metadata, timeout=remaining_s)
            return Withdrawal(tuple(reply.withdrawn_reference_ids), reply.sequence)

        try:
            return await self._unary(once, deadline_s)
        except NotFound as missing:
            if tries > 1:
                missing.hint = "an earlier try of this call, whose answer was lost, may have withdrawn it"
            raise

    # --- alerts ----------------------------------------------------------------------------------------

    async def watch_alerts(
        self, deployment_ids: Sequence[str] = (), *, on_gap: Callable[[WatchGap], None] | None = None
    ) -> AsyncGenerator[Alert, None]:
        """Alerts as they are raised, from the subscription on; empty `deployment_ids`: all one may see.

        A broken watch loses the alerts of the meantime. With `on_gap` the client reconnects and tells it
        from when to when; without, it raises Unreachable (nothing partial is silent).
        """
        loop = asyncio.get_running_loop()
        request = pb.WatchAlertsRequest(deployment_ids=deployment_ids)
        failures = 0
        lost_at_ms: int | None = None
        lost_by: MatcherError | None = None
        while True:
            channel = self._open_channel()
            try:
                call = stub_on(channel).WatchAlerts(request, metadata=self._metadata)
                try:
                    await call.initial_metadata()
                    if lost_at_ms is not None and lost_by is not None and on_gap is not None:
                        on_gap(WatchGap(lost_at_ms, _wall_ms(), lost_by))
                        lost_at_ms = None
                    opened_at = loop.time()
                    while (alert := await call.read()) is not grpc.aio.EOF:
                        yield alert_value(alert)
                    error: MatcherError = Unreachable("the service ended the watch", hint="watch again")
                    failures = 0 if loop.time() - opened_at > self._backoff.most_s else failures + 1
                except grpc.aio.AioRpcError as broken:
                    error = error_of(broken)
                    failures += 1
                finally:
                    call.cancel()
            finally:
                await channel.close()
            if on_gap is None or not error.retryable:
                raise error
            if lost_at_ms is None:
                lost_at_ms, lost_by = _wall_ms(), error
            await asyncio.sleep(self._backoff.delay_s(failures, self._rng))

    # --- how -------------------------------------------------------------------------------------------

    async def _stream(self, dialogue: Any, messages: AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
        async with aclosing(self._groups(dialogue, messages)) as groups:
            async for answers in groups:
                for answer in answers:
                    yield answer

    async def _groups(self, dialogue: Any, messages: AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
        stream: WindowedStream[Any, Any] = WindowedStream(
            dialogue,
            self._open_channel,
            in_flight_messages_max=self._in_flight_messages_max,
            message_bytes_max=self._message_bytes_max,
            backoff=self._backoff,
            rng=self._rng,
            counts=self.counts,
        )
        self._streams.add(stream)
        try:
            async with aclosing(stream.groups(messages)) as groups:
                async for answers in groups:
                    yield answers
        finally:
            self._streams.discard(stream)

    async def _unary(self, once: Callable[[Any, float], Awaitable[Got]], deadline_s: float) -> Got:
        loop = asyncio.get_running_loop()
        deadline_at = loop.time() + deadline_s
        failures = 0
        while True:
            if self._channel is None:
                self._channel = self._open_channel()
            try:
                return await once(stub_on(self._channel), max(0.001, deadline_at - loop.time()))
            except grpc.aio.AioRpcError as broken:
                error = error_of(broken)
            except (Overloaded, errors.ShuttingDown) as refused:
                error = refused
            if not isinstance(error, (Overloaded, errors.ShuttingDown, Unreachable)):
                raise error
            delay_s = (error.retry_after_ms or 0) / 1000 + self._backoff.delay_s(failures, self._rng)
            if loop.time() + delay_s >= deadline_at:
                raise error
            failures += 1
            await asyncio.sleep(delay_s)

    def _open_channel(self) -> grpc.aio.Channel:
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", self._message_bytes_max),
            ("grpc.max_receive_message_length", 64 * 1024 * 1024),
            # Channels of one client must not share a socket: see windowed_stream.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 1000),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.enable_http_proxy", 0),
            # Finds a peer that vanished without a word while a stream is open.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        ]
        tls = self._tls
        if tls is None:
            return grpc.aio.insecure_channel(self.address, options=options)
        if tls.server_name:
            options.append(("grpc.ssl_target_name_override", tls.server_name))
        credentials = grpc.ssl_channel_credentials(tls.root_certificates, tls.key, tls.certificate)
        return grpc.aio.secure_channel(self.address, credentials, options=options)


async def _with_keys(messages: AsyncIterable[References]) -> AsyncIterator[tuple[References, str]]:
    async for message in messages:
        yield message, message.idempotency_key or uuid.uuid4().hex


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


def _is_loopback(address: str) -> bool:
    host = address.rsplit(":", 1)[0].strip("[]")
    if host == "localhost" or address.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
