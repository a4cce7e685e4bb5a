"""The Python client that edge nodes use: arrays in, plain values out, over one gRPC address.

    async with MatcherClient("127.0.0.1:8081", token) as client:
        async for answer in client.identify_stream(messages):
            print(answer.decision.probe_id, answer.decision.outcome)

Streams reconnect by themselves, with exponential backoff and full jitter. At most
`in_flight_messages_max` messages are unanswered at a time; after a break they are sent again. Every probe
and every reference taken from the caller gets exactly one answer. A probe that is sent again after a break
may already have raised its alert: it is then found under the same alert id, and recorded once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import itertools
import random
import secrets
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar, overload

import grpc
import grpc.aio
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from numpy.typing import NDArray

from matcher_service import errors
from matcher_service.errors import InvalidInput, MatcherError, NotFound, Overloaded, ServiceFault
from matcher_service.terms import (
    Alert,
    Candidate,
    Cause,
    Decision,
    Grounds,
    IdentifyReply,
    Outcome,
    SpaceId,
)
from matcher_service.windowed_stream import Backoff, RowAnswer, StreamCounts, WindowedStream
from matcher_service.wire import matcher_pb2 as pb
from matcher_service.wire import matcher_pb2_grpc as pb_grpc

Got = TypeVar("Got")

RETRYABLE_PROBE_CAUSES = frozenset({Cause.OVERLOADED, Cause.SHUTTING_DOWN})
# Sending a reference again is safe whatever became of the first try: its key makes it the same wish.
RETRYABLE_REFERENCE_CAUSES = frozenset({Cause.OVERLOADED, Cause.SHUTTING_DOWN, Cause.LOG_UNAVAILABLE})
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
# The most that a service accepts by default; a longer deadline of the client's is tried again after it.
DEADLINE_MS_MAX = 60_000


class Unreachable(ServiceFault):
    """No connection to the service, or it broke before the answer came. The client's own word: it never crosses
    the wire."""

    default_cause = Cause.UNREACHABLE


class ReceiptOutcome(StrEnum):
    """What became of one reference."""

    ENROLLED = "ENROLLED"
    REPLACED = "REPLACED"
    REPEATED = "REPEATED"
    REFUSED = "REFUSED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """One message of probes.

    `templates` [n, space.dimension]: float16 goes out as float16, everything else as float32.
    `captured_at_ms`: milliseconds since 1970-01-01T00:00:00Z, one per probe. Exactly one of `deployment_id`
    and `case_reference`. `gallery_ids` empty: all that the authority allows. `threshold` may only raise
    the galleries'. `deadline_s` None: the client's default; it counts from when the message is taken.
    `message_id` is the caller's own and comes back with each answer. `camera_id` where the deployment names its
    cameras. Raises InvalidInput for lengths that
    do not agree, a repeated probe_id, or not exactly one authority.
    """

    space: SpaceId
    probe_ids: Sequence[str]
    templates: NDArray[Any]
    captured_at_ms: Sequence[int] | NDArray[np.int64]
    deployment_id: str = ""
    case_reference: str = ""
    gallery_ids: Sequence[str] = ()
    threshold: float | None = None
    rank_max: int = 1
    min_sequence: int = 0
    deadline_s: float | None = None
    message_id: str = ""
    traceparent: str = ""
    camera_id: str = ""

    def __post_init__(self) -> None:
        _check_rows(self.templates, self.space, len(self.probe_ids))
        if len(self.captured_at_ms) != len(self.probe_ids):
            raise InvalidInput(
                f"{len(self.captured_at_ms)} times for {len(self.probe_ids)} probes",
                field="captured_at_ms",
                cause=Cause.WRONG_LENGTH,
                hint="give one time per probe",
            )
        if len(set(self.probe_ids)) != len(self.probe_ids):
            raise InvalidInput(
                "a probe_id stands twice in one message",
                field="probe_ids",
                cause=Cause.DUPLICATE_PROBE_ID,
                hint="make them unique within a message: answers are told apart by them",
            )
        if bool(self.deployment_id) == bool(self.case_reference):
            raise InvalidInput(
                "exactly one of deployment_id and case_reference must be given",
                field="deployment_id",
                hint="a live operation names its deployment, a retrospective search its case",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """One message of references to enrol into one gallery.

    `templates` as in Probes. `expires_at_ms` empty, or one per reference (0: the gallery's retention).
    `idempotency_key` empty: the client makes one when it takes the message, so that a message sent again
    after a break changes nothing; give one's own to be safe beyond the life of the process. `grounds` is what the
    references rest on, where it is not what the gallery says.
    """

    gallery_id: str
    space: SpaceId
    reference_ids: Sequence[str]
    subject_ids: Sequence[str]
    templates: NDArray[Any]
    expires_at_ms: Sequence[int] | NDArray[np.int64] = ()
    replace: bool = False
    idempotency_key: str = ""
    message_id: str = ""
    deadline_s: float | None = None
    grounds: Grounds = field(default_factory=Grounds)

    def __post_init__(self) -> None:
        _check_rows(self.templates, self.space, len(self.reference_ids))
        if len(self.subject_ids) != len(self.reference_ids):
            raise InvalidInput(
                f"{len(self.subject_ids)} subjects for {len(self.reference_ids)} references",
                field="subject_ids",
                cause=Cause.WRONG_LENGTH,
                hint="give one subject per reference",
            )
        if len(self.expires_at_ms) not in (0, len(self.reference_ids)):
            raise InvalidInput(
                f"{len(self.expires_at_ms)} expiries for {len(self.reference_ids)} references",
                field="expires_at_ms",
                cause=Cause.WRONG_LENGTH,
                hint="give none, or one per reference",
            )


def _check_rows(templates: NDArray[Any], space: SpaceId, rows: int) -> None:
    if templates.ndim != 2 or templates.shape[1] != space.dimension:
        raise InvalidInput(
            f"templates have shape {templates.shape}, not [{rows}, {space.dimension}]",
            field="templates",
            cause=Cause.WRONG_DIMENSION,
            hint=f"the space {space} has {space.dimension} values in a template",
        )
    if len(templates) != rows:
        raise InvalidInput(
            f"{len(templates)} templates for {rows} ids",
            field="templates",
            cause=Cause.WRONG_LENGTH,
            hint="give one id per template",
        )


class ProbeAnswer(NamedTuple):
    """The one answer of a probe, with what its reply said of all decisions (law 7).

    A probe that the service did not answer in time is REJECTED here with cause DEADLINE, and one whose
    stream ended for good with the cause of that; `sequence` is then 0, `space` None and `answered` False.
    `elapsed_s` counts from when the message was taken from the caller.
    """

    decision: Decision
    message_id: str
    sequence: int
    space: SpaceId | None
    policy_version: str
    thresholds: Mapping[str, float]
    missing: tuple[str, ...]
    elapsed_s: float
    answered: bool = True

    @property
    def complete(self) -> bool:
        return self.answered and not self.missing

    @property
    def error(self) -> MatcherError | None:
        """Why the probe was not searched for in full, as an error to raise; None for a full answer."""
        if self.decision.outcome not in (Outcome.REJECTED, Outcome.INCOMPLETE):
            return None
        decision = self.decision
        # One text field holds both on the wire; the hint follows the first semicolon.
        detail, _, hint = decision.detail.partition("; ")
        return error_for(decision.cause, detail, decision.field, decision.retry_after_ms or None, hint)


class ReferenceReceipt(NamedTuple):
    """What became of one reference; durable unless REFUSED. With cause DEADLINE it is not known: sending
    the same message with the same `idempotency_key` tells, and changes nothing twice."""

    reference_id: str
    outcome: ReceiptOutcome
    sequence: int
    cause: str
    detail: str
    field: str
    row: int
    message_id: str
    idempotency_key: str
    elapsed_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Receipts(Sequence[ReferenceReceipt]):
    """The receipts of the rows of one message, in order; made into objects one by one, as they are asked for.

    `refusals` are by row.
    """

    references: References
    idempotency_key: str
    outcomes: Sequence[ReceiptOutcome]
    sequences: Sequence[int]
    refusals: Mapping[int, ReferenceReceipt]
    elapsed_s: float

    def __len__(self) -> int:
        return len(self.outcomes)

    @overload
    def __getitem__(self, row: int) -> ReferenceReceipt: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[ReferenceReceipt]: ...
    def __getitem__(self, row: int | slice) -> ReferenceReceipt | Sequence[ReferenceReceipt]:
        if isinstance(row, slice):
            return [self[one] for one in range(len(self))[row]]
        place = range(len(self))[row]
        return self.refusals.get(place) or ReferenceReceipt(
            self.references.reference_ids[place],
            self.outcomes[place],
            self.sequences[place],
            "",
            "",
            "",
            place,
            self.references.message_id,
            self.idempotency_key,
            self.elapsed_s,
        )


class Withdrawal(NamedTuple):
    """`reference_ids` are no longer searchable; `sequence` is that of the withdrawal."""

    reference_ids: tuple[str, ...]
    sequence: int


class WatchGap(NamedTuple):
    """Alerts raised between the two times (wall clock, ms) may not have been seen: read them over HTTP."""

    from_ms: int
    to_ms: int
    error: MatcherError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """TLS to the service. `root_certificates` PEM (None: the system's); `certificate` and `key` PEM for
    mutual TLS; `server_name` if the certificate names another host than the address."""

    root_certificates: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    server_name: str = ""


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

    def _identifying(self) -> _Identify:
        return _Identify(self._metadata, self._deadline_s, self._nonce, self._sendings)

    # --- enrol and withdraw ----------------------------------------------------------------------------

    def enrol_stream(self, messages: AsyncIterable[References]) -> AsyncGenerator[ReferenceReceipt, None]:
        """Receipts as they come, exactly one per reference taken; messages in flight at once have no order
        between them, so a reference and its replacement do not belong in neighbouring messages.

        Raises as identify_stream does.
        """
        return self._stream(_Enrol(self._metadata, self._enrol_deadline_s), _with_keys(messages))

    def enrol_messages(self, messages: AsyncIterable[References]) -> AsyncGenerator[Sequence[ReferenceReceipt], None]:
        """As `enrol_stream`, with the receipts in groups, each of one message: `Receipts` where all of a message came
        at once. For many references."""
        return self._groups(_Enrol(self._metadata, self._enrol_deadline_s), _with_keys(messages))

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
                call = _stub(channel).WatchAlerts(request, metadata=self._metadata)
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
                return await once(_stub(self._channel), max(0.001, deadline_at - loop.time()))
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


def _stub(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.MatcherStub(channel)  # type: ignore[no-untyped-call]


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


# --- the two dialogues -----------------------------------------------------------------------------------


def _wire_space(space: SpaceId) -> pb.TemplateSpace:
    return pb.TemplateSpace(name=space.name, version=space.version, dimension=space.dimension)


def _wire_templates(templates: NDArray[Any], rows: Sequence[int] | None) -> tuple[pb.Dtype.ValueType, bytes]:
    half = templates.dtype == np.float16
    wanted = templates if rows is None or len(rows) == len(templates) else templates[list(rows)]
    values = np.ascontiguousarray(wanted, dtype="<f2" if half else "<f4")
    return (pb.FLOAT16 if half else pb.FLOAT32), values.tobytes()


@dataclass(frozen=True, slots=True)
class _Identify:
    """IdentifyStream; asks again only for the rows that still need an answer."""

    metadata: tuple[tuple[str, str], ...]
    default_deadline_s: float
    nonce: bytes
    sendings: Iterator[int]

    def open(self, channel: grpc.aio.Channel) -> Any:
        return _stub(channel).IdentifyStream(metadata=self.metadata)

    def rows(self, question: Probes) -> int:
        return len(question.probe_ids)

    def deadline_s(self, question: Probes) -> float:
        return self.default_deadline_s if question.deadline_s is None else question.deadline_s

    def encode(self, question: Probes, rows: Sequence[int], wire_id: str, remaining_s: float) -> pb.IdentifyRequest:
        dtype, templates = _wire_templates(question.templates, rows)
        request = pb.IdentifyRequest(
            space=_wire_space(question.space),
            dtype=dtype,
            templates=templates,
            probe_ids=[question.probe_ids[row] for row in rows],
            captured_at_ms=[int(question.captured_at_ms[row]) for row in rows],
            gallery_ids=question.gallery_ids,
            threshold=question.threshold,
            rank_max=question.rank_max,
            min_sequence=question.min_sequence,
            deadline_ms=min(DEADLINE_MS_MAX, max(1, round(remaining_s * 1000))),
            message_id=wire_id,
            traceparent=question.traceparent,
            camera_id=question.camera_id,
            stream_nonce=self.nonce,
            stream_sequence=next(self.sendings),
        )
        if question.deployment_id:
            request.deployment_id = question.deployment_id
        else:
            request.case_reference = question.case_reference
        return request

    def wire_id(self, reply: pb.IdentifyReply) -> str:
        return reply.message_id

    def decode(self, question: Probes, reply: pb.IdentifyReply, elapsed_s: float) -> Iterable[RowAnswer]:
        row_of = {probe_id: row for row, probe_id in enumerate(question.probe_ids)}
        common = (
            question.message_id,
            reply.sequence,
            _space_value(reply.space),
            reply.policy_version,
            {one.gallery_id: one.threshold for one in reply.thresholds},
            tuple(reply.missing),
            elapsed_s,
        )
        for wire in reply.decisions:
            decision = decision_value(wire)
            again = decision.outcome is Outcome.REJECTED and decision.cause in RETRYABLE_PROBE_CAUSES
            retry_after_ms = decision.retry_after_ms if again else None
            if not decision.probe_id:
                # The refusal of a message as a whole, whose probes the service did not tell apart.
                for probe_id, row in row_of.items():
                    yield RowAnswer(row, ProbeAnswer(decision._replace(probe_id=probe_id), *common), retry_after_ms)
            else:
                row = row_of.get(decision.probe_id, -1)
                yield RowAnswer(row, ProbeAnswer(decision, *common), retry_after_ms)

    def whole(self, question: Probes, reply: pb.IdentifyReply, elapsed_s: float) -> None:
        return None

    def refusal(self, question: Probes, row: int, error: MatcherError, elapsed_s: float) -> ProbeAnswer:
        decision = Decision(
            question.probe_ids[row],
            Outcome.REJECTED,
            cause=error.cause.value,
            detail=error.detail,
            field=error.field,
            retry_after_ms=error.retry_after_ms or 0,
        )
        return ProbeAnswer(decision, question.message_id, 0, None, "", {}, (), elapsed_s, answered=False)

    def error_of(self, broken: grpc.aio.AioRpcError) -> MatcherError:
        return error_of(broken)


@dataclass(frozen=True, slots=True)
class _Enrol:
    """Enrol; always asks for the whole message again, since its key stands for the whole of it."""

    metadata: tuple[tuple[str, str], ...]
    default_deadline_s: float

    def open(self, channel: grpc.aio.Channel) -> Any:
        return _stub(channel).Enrol(metadata=self.metadata)

    def rows(self, question: tuple[References, str]) -> int:
        return len(question[0].reference_ids)

    def deadline_s(self, question: tuple[References, str]) -> float:
        given = question[0].deadline_s
        return self.default_deadline_s if given is None else given

    def encode(
        self, question: tuple[References, str], rows: Sequence[int], wire_id: str, remaining_s: float
    ) -> pb.EnrolRequest:
        references, key = question
        dtype, templates = _wire_templates(references.templates, None)
        return pb.EnrolRequest(
            gallery_id=references.gallery_id,
            space=_wire_space(references.space),
            dtype=dtype,
            templates=templates,
            reference_ids=references.reference_ids,
            subject_ids=references.subject_ids,
            expires_at_ms=[int(at_ms) for at_ms in references.expires_at_ms],
            idempotency_key=key,
            replace=references.replace,
            message_id=wire_id,
            receipts_in_columns=True,
            grounds=None if references.grounds == Grounds() else pb.Grounds(**dataclasses.asdict(references.grounds)),
        )

    def wire_id(self, reply: pb.EnrolReply) -> str:
        return reply.message_id

    def decode(self, question: tuple[References, str], reply: pb.EnrolReply, elapsed_s: float) -> Iterable[RowAnswer]:
        references, key = question
        if reply.cause:
            retry = reply.retry_after_ms if reply.cause in RETRYABLE_REFERENCE_CAUSES else None
            refused = (ReceiptOutcome.REFUSED, 0, reply.cause, reply.detail, reply.field)
            for row, reference_id in enumerate(references.reference_ids):
                yield RowAnswer(
                    row, ReferenceReceipt(reference_id, *refused, row, references.message_id, key, elapsed_s), retry
                )
            return
        if reply.outcomes:
            rows: Sequence[ReferenceReceipt] = _in_columns(references, key, reply, elapsed_s)
        else:
            # Receipts are parallel to the request. A reference_id that stands twice in a message has two.
            rows = [_receipt_value(references, key, row, wire, elapsed_s) for row, wire in enumerate(reply.receipts)]
        for row, receipt in enumerate(rows):
            yield RowAnswer(row, receipt, 0 if receipt.cause in RETRYABLE_REFERENCE_CAUSES else None)

    def whole(self, question: tuple[References, str], reply: pb.EnrolReply, elapsed_s: float) -> Receipts | None:
        if not reply.outcomes or any(wire.cause in RETRYABLE_REFERENCE_CAUSES for wire in reply.receipts):
            return None
        return _in_columns(*question, reply, elapsed_s)

    def refusal(
        self, question: tuple[References, str], row: int, error: MatcherError, elapsed_s: float
    ) -> ReferenceReceipt:
        references, key = question
        return ReferenceReceipt(
            references.reference_ids[row],
            ReceiptOutcome.REFUSED,
            0,
            error.cause.value,
            error.detail,
            error.field,
            row,
            references.message_id,
            key,
            elapsed_s,
        )

    def error_of(self, broken: grpc.aio.AioRpcError) -> MatcherError:
        return error_of(broken)


# --- from the wire to values -----------------------------------------------------------------------------


def _receipt_value(references: References, key: str, row: int, wire: pb.Receipt, elapsed_s: float) -> ReferenceReceipt:
    return ReferenceReceipt(
        wire.reference_id,
        _receipt_outcome(wire.outcome),
        wire.sequence,
        wire.cause,
        wire.detail,
        wire.field,
        row,
        references.message_id,
        key,
        elapsed_s,
    )


def _receipt_outcome(wire: int) -> ReceiptOutcome:
    return ReceiptOutcome(pb.EnrolOutcome.Name(wire))  # type: ignore[arg-type]


def _in_columns(references: References, key: str, reply: pb.EnrolReply, elapsed_s: float) -> Receipts:
    """Receipts of a reply in columns; those of the refused rows are in order."""
    told = list(reply.outcomes)
    by_number = {number: _receipt_outcome(number) for number in set(told)}
    refused = (row for row, number in enumerate(told) if number == pb.REFUSED) if reply.receipts else ()
    return Receipts(
        references,
        key,
        [by_number[number] for number in told],
        list(reply.sequences),
        {
            row: _receipt_value(references, key, row, wire, elapsed_s)
            for row, wire in zip(refused, reply.receipts, strict=True)
        },
        elapsed_s,
    )


def _space_value(space: pb.TemplateSpace) -> SpaceId:
    return SpaceId(space.name, space.version, space.dimension)


def candidate_value(wire: pb.Candidate) -> Candidate:
    return Candidate(
        wire.subject_id,
        wire.reference_id,
        wire.gallery_id,
        wire.score,
        wire.rank,
        wire.false_match_rate,
        wire.score_step,
    )


def decision_value(wire: pb.Decision) -> Decision:
    return Decision(
        wire.probe_id,
        _OUTCOMES[wire.outcome],
        tuple(candidate_value(one) for one in wire.candidates) if wire.candidates else (),
        wire.cause,
        wire.detail,
        wire.field,
        wire.retry_after_ms,
        wire.alert_id,
    )


# A newer service may answer with an outcome that this client does not know: never an alert missed in
# silence, so it counts as incomplete.
class _Outcomes(dict[int, Outcome]):
    def __missing__(self, number: int) -> Outcome:
        return Outcome.INCOMPLETE


_OUTCOMES = _Outcomes(
    {
        pb.ALERT: Outcome.ALERT,
        pb.NO_CANDIDATE: Outcome.NO_CANDIDATE,
        pb.INCOMPLETE: Outcome.INCOMPLETE,
        pb.REJECTED: Outcome.REJECTED,
    }
)


def identify_reply(wire: pb.IdentifyReply) -> IdentifyReply:
    return IdentifyReply(
        decisions=tuple(decision_value(one) for one in wire.decisions),
        sequence=wire.sequence,
        space=_space_value(wire.space),
        policy_version=wire.policy_version,
        thresholds={one.gallery_id: one.threshold for one in wire.thresholds},
        missing=tuple(wire.missing),
        message_id=wire.message_id,
    )


def alert_value(wire: pb.Alert) -> Alert:
    return Alert(
        alert_id=wire.alert_id,
        probe_id=wire.probe_id,
        deployment_id=wire.deployment_id,
        case_reference=wire.case_reference,
        raised_at_ms=wire.raised_at_ms,
        captured_at_ms=wire.captured_at_ms,
        candidates=tuple(candidate_value(one) for one in wire.candidates),
        thresholds={one.gallery_id: one.threshold for one in wire.thresholds},
        sequence=wire.sequence,
        policy_version=wire.policy_version,
        complete=wire.complete,
    )


# --- from refusals to errors -----------------------------------------------------------------------------

_ERROR_OF_CAUSE: dict[Cause, type[MatcherError]] = {
    **dict.fromkeys(Cause, errors.InvalidInput),
    Cause.TOO_LARGE: errors.TooLarge,
    Cause.TOO_MANY: errors.TooLarge,
    Cause.UNAUTHENTICATED: errors.Unauthenticated,
    Cause.FORBIDDEN: errors.Forbidden,
    Cause.NOT_FOUND: errors.NotFound,
    Cause.UNKNOWN_GALLERY: errors.NotFound,
    Cause.CONFLICT: errors.Conflict,
    Cause.GONE: errors.Gone,
    Cause.EXPIRED: errors.Gone,
    Cause.STALE_PROBE: errors.StaleProbe,
    Cause.REPLAYED: errors.Conflict,
    Cause.COOLING_DOWN: errors.Overloaded,
    Cause.DEADLINE: errors.DeadlineExceeded,
    Cause.OVERLOADED: errors.Overloaded,
    Cause.SHUTTING_DOWN: errors.ShuttingDown,
    Cause.LOG_UNAVAILABLE: errors.LogUnavailable,
    Cause.AUDIT_UNAVAILABLE: errors.AuditUnavailable,
    Cause.SHARD_UNAVAILABLE: errors.ShardUnavailable,
    Cause.MODELS_UNAVAILABLE: errors.ModelsUnavailable,
    Cause.REPLAY_BEHIND: errors.ReplayBehind,
    Cause.IDENTITY_UNAVAILABLE: errors.ServiceFault,
    Cause.MEMORY_REFUSED: errors.MemoryRefused,
    Cause.INTERNAL: errors.ServiceFault,
}

_CAUSE_OF_STATUS: dict[grpc.StatusCode, Cause] = {
    grpc.StatusCode.INVALID_ARGUMENT: Cause.INVALID,
    grpc.StatusCode.OUT_OF_RANGE: Cause.INVALID,
    grpc.StatusCode.UNIMPLEMENTED: Cause.INVALID,
    grpc.StatusCode.UNAUTHENTICATED: Cause.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: Cause.FORBIDDEN,
    grpc.StatusCode.NOT_FOUND: Cause.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: Cause.CONFLICT,
    grpc.StatusCode.FAILED_PRECONDITION: Cause.CONFLICT,
    grpc.StatusCode.DEADLINE_EXCEEDED: Cause.DEADLINE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Cause.OVERLOADED,
}


def error_for(
    cause: str, detail: str, field: str = "", retry_after_ms: int | None = None, hint: str = ""
) -> MatcherError:
    """The error of a cause as it crossed the wire; an unknown cause is a ServiceFault that quotes it."""
    try:
        known = Cause(cause)
    except ValueError:
        told = f"{cause or 'no cause given'}: {detail}"
        return ServiceFault(told, field=field, retry_after_ms=retry_after_ms, hint=hint)
    return _ERROR_OF_CAUSE[known](detail, field=field, cause=known, retry_after_ms=retry_after_ms, hint=hint)


def error_of(broken: grpc.aio.AioRpcError) -> MatcherError:
    """The error of a gRPC status: by the cause in its details, else by its code. A status that comes from
    the connection and not from the service is Unreachable."""
    code, detail = broken.code(), broken.details() or ""
    metadata = dict(broken.trailing_metadata() or ())
    packed = metadata.get("grpc-status-details-bin")
    if isinstance(packed, bytes):
        told = _error_in_details(packed, detail)
        if told is not None:
            return told
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in detail:
        return errors.TooLarge(detail, field="templates", hint="send fewer rows in a message")
    cause = _CAUSE_OF_STATUS.get(code)
    if cause is None:
        return Unreachable(f"{code.name.lower()}: {detail}", hint="check the address, and that the service is running")
    error = error_for(cause.value, detail)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        error.hint = "the address answers, but is not a matcher's gRPC port"
    return error


def _error_in_details(packed: bytes, detail: str) -> MatcherError | None:
    cause, field_name, hint = "", "", ""
    retry_after_ms: int | None = None
    for item in status_pb2.Status.FromString(packed).details:
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if item.Unpack(info):
            cause = info.reason
            field_name = info.metadata.get("field", field_name)
            hint = info.metadata.get("hint", hint)
        elif item.Unpack(bad) and bad.field_violations:
            field_name = field_name or bad.field_violations[0].field
        elif item.Unpack(retry):
            retry_after_ms = retry.retry_delay.ToMilliseconds()
    if not cause:
        return None
    # The status message is for readers of raw gRPC and repeats what the details say in parts.
    detail = detail.removeprefix(f"{field_name}: ").removesuffix(f" ({hint})")
    return error_for(cause, detail, field_name, retry_after_ms, hint)
