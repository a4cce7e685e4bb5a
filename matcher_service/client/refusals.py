"""From refusals as they cross the wire to errors, by cause."""

from __future__ import annotations

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from matcher_service import errors
from matcher_service.errors import MatcherError, ServiceFault
from matcher_service.terms import Cause


class Unreachable(ServiceFault):
    """No connection to the service, or it broke before the answer came. The client's own word: it never crosses
    the wire."""

    default_cause = Cause.UNREACHABLE


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
