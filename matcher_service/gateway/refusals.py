"""Refusals as both edges see them: when a unary call as a whole is refused, and what to say of the unexpected."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from matcher_service import errors, logs
from matcher_service.errors import MatcherError
from matcher_service.terms import Cause, Decision, Outcome, Receipt

_log = structlog.get_logger(__name__)


def error_classes(root: type[MatcherError] = MatcherError) -> list[type[MatcherError]]:
    """The whole tree, root first."""
    return [root, *(found for child in root.__subclasses__() for found in error_classes(child))]


_CLASS_OF_CAUSE: dict[str, type[MatcherError]] = {
    **{kind.default_cause: kind for kind in reversed(error_classes())},
    Cause.TOO_MANY: errors.TooLarge,
    Cause.UNKNOWN_GALLERY: errors.NotFound,
    Cause.EXPIRED: errors.Gone,
    Cause.REPLAYED: errors.Conflict,
    Cause.COOLING_DOWN: errors.Overloaded,
    Cause.IDENTITY_UNAVAILABLE: errors.ServiceFault,
}


def of_cause(cause: str) -> type[MatcherError]:
    """The class whose status stands for a cause token that a row was refused with."""
    return _CLASS_OF_CAUSE.get(cause, errors.InvalidInput)


def of_all_probes(decisions: Sequence[Decision]) -> MatcherError | None:
    """The refusal of a unary call all of whose probes were REJECTED for one cause, else None.

    Callers of a unary call look at its status first; a 200 that answers nothing would mislead them.
    """
    causes = {one.cause if one.outcome is Outcome.REJECTED else None for one in decisions}
    if len(causes) != 1 or None in causes:
        return None
    first = decisions[0]
    # A decision has one text field, in which the hint follows the first semicolon.
    detail, _, hint = first.detail.partition("; ")
    return of_cause(first.cause)(
        detail,
        hint=hint,
        field=first.field,
        cause=Cause(first.cause),
        retry_after_ms=first.retry_after_ms or None,
    )


def of_all_references(receipts: Sequence[Receipt | MatcherError]) -> MatcherError | None:
    """The same for references: the refusal of a unary call none of whose references was enrolled."""
    refusals = [one for one in receipts if isinstance(one, MatcherError)]
    if len(refusals) == len(receipts) and len({one.cause for one in refusals}) == 1:
        return refusals[0]
    return None


def of(error: Exception) -> MatcherError:
    """What a caller is told of an error: a refusal as it is, anything else as a defect of the service."""
    return error if isinstance(error, MatcherError) else unexpected(error)


def unexpected(error: BaseException) -> MatcherError:
    """A defect of the service as a refusal. It is logged by kind and place only, whoever writes the lines: the text of
    an exception may hold values of a probe, which must not outlive its response (law 6)."""
    _log.error("unexpected", kind=type(error).__name__, at=logs.places(error.__traceback__))
    return internal()


def internal() -> MatcherError:
    """What a caller is told of a defect."""
    return MatcherError(
        "the service failed on this request", hint="it is in the service's log under the request's id; report it"
    )
