"""What a caller hands to the client and gets from it: arrays in, plain values out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from matcher_service.client.refusals import error_for
from matcher_service.errors import InvalidInput, MatcherError
from matcher_service.terms import Cause, Decision, Grounds, Outcome, SpaceId


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
