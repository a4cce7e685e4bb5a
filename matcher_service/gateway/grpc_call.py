"""One gRPC call: whose it is, and the status with which a refusal ends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import unquote

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from matcher_service import errors, logs
from matcher_service.access.authentication import ClientCertificate, Presented
from matcher_service.errors import MatcherError
from matcher_service.gateway import encode
from matcher_service.settings import is_loopback

ERROR_DOMAIN = "matcher.v1"

# Longest text of one part of a status: peers commonly refuse headers over 8 KiB in all, and would then see
# neither the cause nor what to do.
STATUS_TEXT_MAX = 250

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


# --- whose it is ---------------------------------------------------------------------------------------


def presented(context: CallContext) -> Presented:
    """What the caller shows of themselves."""
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


# --- how it ends ---------------------------------------------------------------------------------------


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


async def end_with(refusal: MatcherError, context: CallContext) -> None:
    """Ends the call with the refusal's status; never returns normally."""
    trailing: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", rich_status(refusal).SerializeToString())]
    if refusal.retry_after_ms is not None:
        trailing.append(("grpc-retry-pushback-ms", str(refusal.retry_after_ms)))
    await context.abort(status_of(refusal), _clipped(str(refusal)), tuple(trailing))
