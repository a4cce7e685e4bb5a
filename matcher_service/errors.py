"""Every error the service raises, one tree by cause.

MatcherError
├── CallerFault                 the request is at fault; repeating it unchanged cannot help
│   ├── InvalidInput            a field is malformed or out of range
│   ├── TooLarge                over a stated limit of size or count
│   ├── Unauthenticated         no credential, or not a valid one
│   ├── Forbidden               the authority does not reach that far
│   ├── NotFound                no such gallery, reference, deployment, case or space
│   ├── Conflict                the present state refuses it
│   ├── Gone                    it existed and has ended, expired or been deleted
│   ├── StaleProbe              captured longer ago than the deployment allows
│   └── DeadlineExceeded        the answer would come too late to be of use
├── ServiceFault                the service is at fault; repeating later can help
│   ├── Overloaded              no permit: refused before any work was done
│   ├── ShuttingDown            draining; another node or a later moment will do
│   ├── LogUnavailable          the gallery log cannot be read or written
│   ├── AuditUnavailable        the audit cannot be written, so nothing may be disclosed
│   ├── ShardUnavailable        a part of the galleries did not answer
│   ├── ModelsUnavailable       the models did not answer
│   ├── ReplayBehind            the sequence asked for is not yet applied
│   └── MemoryRefused           the memory budget does not hold what was asked
├── DataDamaged                 stored bytes fail their authentication or make no sense
└── StartRefused                the process may not start like this
"""

from __future__ import annotations

from typing import ClassVar

from matcher_service.terms import Cause


class MatcherError(Exception):
    """Base of all: what happened (`detail`), where (`field`), what to do (`hint`).

    `cause` is the token that crosses the wire, `retryable` says whether the same request can succeed
    later, `retry_after_ms` when (None: unknown).
    """

    default_cause: ClassVar[Cause] = Cause.INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        detail: str,
        *,
        hint: str = "",
        field: str = "",
        cause: Cause | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint
        self.field = field
        self.cause = cause or self.default_cause
        self.retry_after_ms = retry_after_ms

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        what_to_do = f" ({self.hint})" if self.hint else ""
        return f"{where}{self.detail}{what_to_do}"


class CallerFault(MatcherError):
    """The request is at fault; repeating it unchanged cannot help."""


class InvalidInput(CallerFault):
    default_cause = Cause.INVALID


class TooLarge(CallerFault):
    default_cause = Cause.TOO_LARGE


class Unauthenticated(CallerFault):
    default_cause = Cause.UNAUTHENTICATED


class Forbidden(CallerFault):
    default_cause = Cause.FORBIDDEN


class NotFound(CallerFault):
    default_cause = Cause.NOT_FOUND


class Conflict(CallerFault):
    default_cause = Cause.CONFLICT


class Gone(CallerFault):
    default_cause = Cause.GONE


class StaleProbe(CallerFault):
    default_cause = Cause.STALE_PROBE


class DeadlineExceeded(CallerFault):
    default_cause = Cause.DEADLINE


class ServiceFault(MatcherError):
    """The service is at fault; repeating later can help."""

    retryable = True


class Overloaded(ServiceFault):
    default_cause = Cause.OVERLOADED


class ShuttingDown(ServiceFault):
    default_cause = Cause.SHUTTING_DOWN


class LogUnavailable(ServiceFault):
    default_cause = Cause.LOG_UNAVAILABLE


class AuditUnavailable(ServiceFault):
    default_cause = Cause.AUDIT_UNAVAILABLE


class ShardUnavailable(ServiceFault):
    default_cause = Cause.SHARD_UNAVAILABLE


class ModelsUnavailable(ServiceFault):
    default_cause = Cause.MODELS_UNAVAILABLE


class ReplayBehind(ServiceFault):
    default_cause = Cause.REPLAY_BEHIND


class MemoryRefused(ServiceFault):
    default_cause = Cause.MEMORY_REFUSED


class DataDamaged(MatcherError):
    """Stored bytes fail their authentication or make no sense; `detail` names the file or the row."""

    default_cause = Cause.INTERNAL


class StartRefused(MatcherError):
    """The process may not start like this; `hint` says what to change."""
