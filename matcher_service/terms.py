"""The values that flow through the service. Words follow ISO/IEC 2382-37 and ISO/IEC 19795.

Values are immutable. Times of day are `*_at_ms`: milliseconds since 1970-01-01T00:00:00Z by the wall
clock. Durations and deadlines are measured on the monotonic clock, in seconds. Scores are cosines in
[-1, 1]; higher is more alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


CANARY_PREFIX = "canary-"
"""Probe ids that begin so are of known mates and strangers who watch over the service: no sightings."""


class Outcome(StrEnum):
    """The four ways in which a probe is answered; every probe gets exactly one."""

    ALERT = "ALERT"
    NO_CANDIDATE = "NO_CANDIDATE"
    INCOMPLETE = "INCOMPLETE"
    REJECTED = "REJECTED"


class Cause(StrEnum):
    """Why something was refused or is incomplete. These tokens are part of the wire contract."""

    INVALID = "INVALID"
    WRONG_DIMENSION = "WRONG_DIMENSION"
    WRONG_LENGTH = "WRONG_LENGTH"
    NOT_FINITE = "NOT_FINITE"
    ZERO_TEMPLATE = "ZERO_TEMPLATE"
    UNKNOWN_DTYPE = "UNKNOWN_DTYPE"
    WRONG_SPACE = "WRONG_SPACE"
    EMPTY = "EMPTY"
    TOO_MANY = "TOO_MANY"
    TOO_LARGE = "TOO_LARGE"
    RANK_MAX = "RANK_MAX"
    DUPLICATE_PROBE_ID = "DUPLICATE_PROBE_ID"
    THRESHOLD_BELOW_FLOOR = "THRESHOLD_BELOW_FLOOR"
    UNKNOWN_FIELD = "UNKNOWN_FIELD"
    MALFORMED = "MALFORMED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    FORBIDDEN = "FORBIDDEN"
    NOT_FOUND = "NOT_FOUND"
    UNKNOWN_GALLERY = "UNKNOWN_GALLERY"
    CONFLICT = "CONFLICT"
    GONE = "GONE"
    EXPIRED = "EXPIRED"
    LOW_QUALITY = "LOW_QUALITY"
    RESEMBLES_OTHERS = "RESEMBLES_OTHERS"
    GALLERY_FULL = "GALLERY_FULL"
    NOT_APPROVED = "NOT_APPROVED"
    STALE_PROBE = "STALE_PROBE"
    REPLAYED = "REPLAYED"
    COOLING_DOWN = "COOLING_DOWN"
    DEADLINE = "DEADLINE"
    OVERLOADED = "OVERLOADED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    LOG_UNAVAILABLE = "LOG_UNAVAILABLE"
    AUDIT_UNAVAILABLE = "AUDIT_UNAVAILABLE"
    SHARD_UNAVAILABLE = "SHARD_UNAVAILABLE"
    MODELS_UNAVAILABLE = "MODELS_UNAVAILABLE"
    REPLAY_BEHIND = "REPLAY_BEHIND"
    IDENTITY_UNAVAILABLE = "IDENTITY_UNAVAILABLE"
    MEMORY_REFUSED = "MEMORY_REFUSED"
    UNREACHABLE = "UNREACHABLE"
    INTERNAL = "INTERNAL"


class GalleryKind(StrEnum):
    CUSTODY = "custody"
    IMMIGRATION = "immigration"
    WATCHLIST = "watchlist"


class Dtype(StrEnum):
    """Element types of templates on the wire; always little-endian."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


class SpaceId(NamedTuple):
    """Names a template space. Templates of different spaces are not comparable without a map."""

    name: str
    version: int
    dimension: int

    def __str__(self) -> str:
        return f"{self.name}/{self.version} ({self.dimension}-d)"


class Limits(NamedTuple):
    """A best estimate between its two-sided limits."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class GenuineTable:
    """Score to false non-match rate, as measured: which share of `comparisons` of `subjects` people with themselves
    scores below each of `scores`, ascending. `estimates`, `low_rates` and `high_rates` never fall, in [0, 1];
    `confidence` is that of the interval from low to high."""

    scores: tuple[float, ...]
    estimates: tuple[float, ...]
    low_rates: tuple[float, ...]
    high_rates: tuple[float, ...]
    confidence: float
    comparisons: int
    subjects: int


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Score to false-match rate, as measured: `scores` ascending, `rates` non-increasing in (0, 1].

    `method` says in words where it comes from, and the last entry is as far as the data reach. The rates are upper
    limits. Where they are known, `estimates` and `low_rates` are the best estimates and the lower limits at the same
    scores, and `confidence` is that of the interval; else they are empty and 0. `genuine` is what the same set says of
    people compared with themselves; None: not known.
    """

    scores: tuple[float, ...]
    rates: tuple[float, ...]
    method: str
    estimates: tuple[float, ...] = ()
    low_rates: tuple[float, ...] = ()
    confidence: float = 0.0
    genuine: GenuineTable | None = None


@dataclass(frozen=True, slots=True)
class SpaceMap:
    """Linear map from another space: `matrix` float32 [dimension, source.dimension].

    Applied to the source template after its own centre was subtracted and it was normalised.
    """

    source: SpaceId
    matrix: Float32


@dataclass(frozen=True, slots=True)
class TemplateSpace:
    """A template space: its centre (float32 [dimension]), maps into it, and its score table.

    The centre belongs to the version: another centre is another version.
    """

    id: SpaceId
    centre: Float32
    maps: tuple[SpaceMap, ...] = ()
    score_table: ScoreTable | None = None


class Category(StrEnum):
    """Why a person stands on a watchlist. A closed list: there is none for people who are merely of interest."""

    WANTED_ON_WARRANT = "wanted_on_warrant"
    UNLAWFULLY_AT_LARGE = "unlawfully_at_large"
    SUSPECTED_OF_OFFENCE = "suspected_of_offence"
    UNDER_COURT_ORDER = "under_court_order"
    MISSING_OR_AT_RISK = "missing_or_at_risk"


class GroundEnd(StrEnum):
    """Why the lawful ground of somebody's references has ended."""

    NO_FURTHER_ACTION = "no_further_action"
    ACQUITTED = "acquitted"
    CONVICTION_QUASHED = "conviction_quashed"
    DELETION_GRANTED = "deletion_granted"
    ENROLLED_IN_ERROR = "enrolled_in_error"


@dataclass(frozen=True, slots=True)
class Watchlist:
    """What makes a gallery the watchlist of one deployment. Nothing is searched in it until somebody other than its
    author has approved it; while it is approved nothing is added to it."""

    deployment_id: str
    categories: tuple[Category, ...]
    author: str
    approved_by: str = ""


@dataclass(frozen=True, slots=True)
class ThresholdEvidence:
    """What the calibration of the template space said of a gallery's threshold when that was set.

    `one_false_alert_in` is what was asked: at most one of so many unmated probes alerts (0: nothing was) while
    `references` are held (0: no size was stated). `needed` is the threshold that this takes, `high` the one that the
    service chooses: there the upper limit of the false alerts is what was asked. `fpir` and `fnir` are the error rates
    at `threshold`, the latter for people with one reference; None: not known. `calibration_sequence` is where the log
    holds the calibration (0: there was none), `method` its own words, `confidence` that of the limits. `not_supported`
    says what the calibration does not bear out; "": nothing.
    """

    threshold: float
    one_false_alert_in: int
    references: int
    calibration_sequence: int
    method: str = ""
    confidence: float = 0.0
    needed: Limits | None = None
    fpir: Limits | None = None
    fnir: Limits | None = None
    not_supported: str = ""


@dataclass(frozen=True, slots=True)
class Gallery:
    """A named set of references under one lawful basis, in one template space.

    A reference lives at most `retention_ms` from its enrolment, and no longer than until its review, which is due
    `review_interval_ms` after it (0: with the end of the retention) unless a nearer date is given. `retention_rule`
    says in words where both come from. `source` is what its references come from, where they do not say themselves.
    `threshold` is the least score that is a candidate; a request may raise it, never lower it.

    A reference enters with a quality of at least `quality_min` (0: none is asked for), and, where `resembles_max` is
    not 0, if no more than that many other subjects resemble it at the threshold. `size_max` is how many references
    the threshold was calibrated for, 0: unlimited. `adjudicators` is how many people judge an alert. `evidence` is what
    was known of the threshold when it was set; None: set by an earlier release, or past the flow that asks.
    """

    gallery_id: str
    kind: GalleryKind
    controller: str
    lawful_basis: str
    purpose: str
    retention_ms: int
    space: SpaceId
    threshold: float
    created_at_ms: int = 0
    retention_rule: str = ""
    review_interval_ms: int = 0
    source: str = ""
    quality_min: float = 0.0
    resembles_max: int = 0
    size_max: int = 0
    adjudicators: int = 1
    watchlist: Watchlist | None = None
    evidence: ThresholdEvidence | None = None

    def __post_init__(self) -> None:
        if self.review_interval_ms == 0:
            object.__setattr__(self, "review_interval_ms", self.retention_ms)

    @property
    def life_ms(self) -> int:
        """How long a reference that names no dates of its own can be searched from its enrolment."""
        return min(self.retention_ms, self.review_interval_ms)


@dataclass(frozen=True, slots=True)
class Deployment:
    """An authorised live operation: which galleries, where, from when to when, on whose authority, and why.

    `cameras` empty: any; otherwise each message names one of them. `threshold` raises those of the galleries.
    `alert_retention_ms` is how long its alerts live, 0: as long as the settings say.
    """

    deployment_id: str
    gallery_ids: tuple[str, ...]
    opens_at_ms: int
    closes_at_ms: int
    probe_age_ms_max: int
    authorised_by: str
    reason: str
    place: str = ""
    rank_max: int = 10
    ended_at_ms: int | None = None
    cameras: tuple[str, ...] = ()
    legal_authority: str = ""
    necessity: str = ""
    threshold: float | None = None
    alert_retention_ms: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """The authority of a retrospective search: every search under it is audited.

    `immigration_authority` is what an immigration gallery is searched on, beside the case's own authority.
    """

    case_reference: str
    gallery_ids: tuple[str, ...]
    opens_at_ms: int
    closes_at_ms: int
    requested_by: str
    purpose: str
    rank_max: int = 50
    ended_at_ms: int | None = None
    immigration_authority: str = ""


class Scope(StrEnum):
    """What a credential may do: seven roles, and two rights beside them. The verbs of each: `access.verbs`."""

    EDGE = "edge"
    OPERATOR = "operator"
    ADJUDICATOR = "adjudicator"
    GALLERY_MANAGER = "gallery_manager"
    AUTHORISING_OFFICER = "authorising_officer"
    AUDITOR = "auditor"
    SRE = "sre"
    RAW_SCORES = "raw_scores"
    TOKEN_EXCHANGE = "token_exchange"


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks: a credential, never a person's face. `name` goes into the audit.

    `scopes` decides which verbs the edges let through. `person` is the authenticated person, "" for a machine and
    for the loopback token. `galleries` are those it has rights over, None: all. An edge credential (`credential_id`)
    acts within `deployment_id` alone, on `cameras` if any are named, at `probes_per_s` (0: unlimited).
    `ends_at_ms` is when what was presented ends.
    """

    name: str
    scopes: frozenset[Scope] = frozenset()
    person: str = ""
    galleries: frozenset[str] | None = None
    deployment_id: str = ""
    credential_id: str = ""
    cameras: tuple[str, ...] = ()
    probes_per_s: int = 0
    ends_at_ms: int | None = None

    def has_rights_over(self, gallery_id: str) -> bool:
        return self.galleries is None or gallery_id in self.galleries


@dataclass(frozen=True, slots=True)
class EdgeCredential:
    """The right of one edge node to search under one deployment.

    `secret_sha256` (hex) stands for a secret that is exchanged for short-lived tokens, `certificate` for a client
    certificate: "sha256:" and the hex fingerprint of its DER form, or "san:" and a subject alternative name. At least
    one is set; neither secret nor key is held. `cameras` empty: those of the deployment. `replaces` is the credential
    before it.
    """

    credential_id: str
    deployment_id: str
    issued_by: str
    issued_at_ms: int
    expires_at_ms: int
    secret_sha256: str = ""
    certificate: str = ""
    cameras: tuple[str, ...] = ()
    probes_per_s: int = 500
    replaces: str = ""
    revoked_at_ms: int | None = None


class ProposalAction(StrEnum):
    """What one authenticated person proposes and another approves."""

    THRESHOLD = "threshold"
    GALLERY_DELETION = "gallery_deletion"
    WITHDRAWAL = "withdrawal"


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change that two persons must stand for. `threshold`, `rates` and `evidence` serve THRESHOLD, `reference_ids`
    WITHDRAWAL. `closed_as` is "" while it waits, else approved or rejected."""

    proposal_id: str
    action: ProposalAction
    gallery_id: str
    reason: str
    proposed_by: str
    proposed_at_ms: int
    expires_at_ms: int
    threshold: float | None = None
    rates: tuple[RateChange, ...] = ()
    reference_ids: tuple[str, ...] = ()
    closed_as: str = ""
    closed_by: str = ""
    evidence: ThresholdEvidence | None = None


# --- the gallery log -------------------------------------------------------------------------------


class EntryKind(IntEnum):
    """Kinds of log entries. The numbers are stored; never reuse one."""

    ENROL = 1
    WITHDRAW = 2
    GALLERY_CREATED = 3
    GALLERY_DELETED = 4
    SPACE_REGISTERED = 5
    DEPLOYMENT_CREATED = 6
    DEPLOYMENT_ENDED = 7
    CASE_CREATED = 8
    CASE_ENDED = 9
    THRESHOLD_CHANGED = 10
    WATCHLIST_APPROVED = 11
    CREDENTIAL_ISSUED = 40
    CREDENTIAL_REVOKED = 41
    PROPOSAL_MADE = 42
    PROPOSAL_CLOSED = 43


class LogEntry(NamedTuple):
    """One committed change. `template` is the adapted template, float16 little-endian bytes, for an ENROL
    whose template has not been erased, else None. An ENROL of a (gallery_id, reference_id) that is live
    replaces it. `expires_at_ms` is set for ENROL. `record` holds the JSON of the kinds that change the
    catalogue, else b"".
    """

    sequence: int
    kind: EntryKind
    at_ms: int
    gallery_id: str
    reference_id: str
    subject_id: str
    expires_at_ms: int
    template: bytes | None
    record: bytes


class Enrol(NamedTuple):
    """Wish: put one reference into a gallery. `template` as in LogEntry. `expires_at_ms` 0: retention. `attributes`
    is what the log keeps beside the reference (`grounds.encode`), b"" for none."""

    gallery_id: str
    reference_id: str
    subject_id: str
    template: bytes
    expires_at_ms: int = 0
    replace: bool = False
    idempotency_key: str = ""
    attributes: bytes = b""


@dataclass(frozen=True, slots=True, eq=False)
class EnrolRows:
    """Wish: put many references into a gallery; parallel columns of n rows. `templates` float16 [n, d], C order, each
    row as the template of a LogEntry; `expires_at_ms` int64 [n] and `attributes` (empty: none) as in Enrol.
    `idempotency_key` stands for them all and is remembered for each reference.
    """

    gallery_id: str
    reference_ids: Sequence[str]
    subject_ids: Sequence[str]
    templates: NDArray[np.float16]
    expires_at_ms: Int64
    replace: bool = False
    idempotency_key: str = ""
    attributes: Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(self.reference_ids)

    def row(self, row: int) -> Enrol:
        """The wish of one row alone."""
        reference_id = self.reference_ids[row]
        return Enrol(
            gallery_id=self.gallery_id,
            reference_id=reference_id,
            subject_id=self.subject_ids[row],
            template=self.templates[row].tobytes(),
            expires_at_ms=int(self.expires_at_ms[row]),
            replace=self.replace,
            idempotency_key=f"{self.idempotency_key}\n{reference_id}" if self.idempotency_key else "",
            attributes=self.attributes[row] if self.attributes else b"",
        )


@dataclass(frozen=True, slots=True, eq=False)
class EnrolRun(Sequence[LogEntry]):
    """Committed ENROL entries of one gallery that follow on one another from `sequence`, in parallel columns as in
    EnrolRows. The references are all different, and none of them was live before."""

    sequence: int
    at_ms: int
    gallery_id: str
    reference_ids: Sequence[str]
    subject_ids: Sequence[str]
    templates: NDArray[np.float16]
    expires_at_ms: Int64

    def __len__(self) -> int:
        return len(self.reference_ids)

    @property
    def last_sequence(self) -> int:
        return self.sequence + len(self) - 1

    @overload
    def __getitem__(self, row: int) -> LogEntry: ...
    @overload
    def __getitem__(self, row: slice) -> EnrolRun: ...
    def __getitem__(self, row: int | slice) -> LogEntry | EnrolRun:
        if isinstance(row, slice):
            start, stop, step = row.indices(len(self))
            if step != 1:
                raise ValueError("entries that follow on one another are cut, not picked")
            return EnrolRun(
                self.sequence + start,
                self.at_ms,
                self.gallery_id,
                self.reference_ids[start:stop],
                self.subject_ids[start:stop],
                self.templates[start:stop],
                self.expires_at_ms[start:stop],
            )
        place = range(len(self))[row]
        return LogEntry(
            self.sequence + place,
            EntryKind.ENROL,
            self.at_ms,
            self.gallery_id,
            self.reference_ids[place],
            self.subject_ids[place],
            int(self.expires_at_ms[place]),
            self.templates[place].tobytes(),
            b"",
        )


class Withdraw(NamedTuple):
    """Wish: end the searchability of one reference now and erase its template within the stated time."""

    gallery_id: str
    reference_id: str
    reason: str


class WithdrawSubject(NamedTuple):
    """Wish: the same for every live reference of a subject; gallery_id "" means in every gallery."""

    gallery_id: str
    subject_id: str
    reason: str


class CreateGallery(NamedTuple):
    """Wish: a gallery; with `one_false_alert_in`, at the threshold for which the calibration of its space promises that
    at most one of so many unmated probes alerts while `size_max` references are held."""

    gallery: Gallery
    one_false_alert_in: int = 0


class DeleteGallery(NamedTuple):
    """Wish: withdraw every reference, and destroy the gallery's key. The two persons who stand for it, if they are
    known."""

    gallery_id: str
    reason: str
    proposed_by: str = ""
    approved_by: str = ""


class RateChange(NamedTuple):
    """What a change of threshold does to one error rate: upper limits before and after. `measure` is "FPIR" or "FNIR",
    `group` the group of people it was measured on ("": all)."""

    measure: str
    group: str
    before: float
    after: float


class ChangeThreshold(NamedTuple):
    """Wish: give a gallery another threshold, for a reason, knowing what it does to whom. Two persons stand for it."""

    gallery_id: str
    threshold: float
    reason: str
    proposed_by: str
    approved_by: str
    rates: tuple[RateChange, ...]
    evidence: ThresholdEvidence | None = None


class RegisterSpace(NamedTuple):
    space: TemplateSpace


class ApproveWatchlist(NamedTuple):
    """Wish: let a watchlist be searched, on the word of somebody other than its author; with `approved` False, stop
    it being searched, so that it can be changed."""

    gallery_id: str
    approved_by: str
    reason: str
    approved: bool = True


class EndGround(NamedTuple):
    """Wish: end the searchability of a subject's references, whose lawful ground has ended; in one gallery, or in
    every gallery of kind custody ("")."""

    gallery_id: str
    subject_id: str
    ground: GroundEnd
    reason: str


class ReviewReference(NamedTuple):
    """Wish: keep a reference until another review, because a person looked at it and its ground still stands. Its
    template enters the log again, under a new sequence."""

    gallery_id: str
    reference_id: str
    review_by_ms: int
    reviewed_by: str
    reason: str


class CreateDeployment(NamedTuple):
    deployment: Deployment


class EndDeployment(NamedTuple):
    deployment_id: str


class CreateCase(NamedTuple):
    case: Case


class EndCase(NamedTuple):
    case_reference: str


class IssueCredential(NamedTuple):
    credential: EdgeCredential


class RevokeCredential(NamedTuple):
    """Wish: end an edge credential, now or (a rotation) at `at_ms`."""

    credential_id: str
    reason: str
    at_ms: int = 0


class MakeProposal(NamedTuple):
    proposal: Proposal


class CloseProposal(NamedTuple):
    """Wish: the proposal waits no longer; `closed_as` is approved or rejected."""

    proposal_id: str
    closed_as: str
    closed_by: str
    reason: str


Write = (
    Enrol
    | Withdraw
    | WithdrawSubject
    | CreateGallery
    | DeleteGallery
    | ChangeThreshold
    | ApproveWatchlist
    | EndGround
    | ReviewReference
    | RegisterSpace
    | CreateDeployment
    | EndDeployment
    | CreateCase
    | EndCase
    | IssueCredential
    | RevokeCredential
    | MakeProposal
    | CloseProposal
)


class WriteOutcome(StrEnum):
    ENROLLED = "ENROLLED"
    REPLACED = "REPLACED"
    REPEATED = "REPEATED"
    DONE = "DONE"


class Receipt(NamedTuple):
    """What a durable write did. `sequence` is its place in the log; `reference_ids` is what a withdrawal
    ended (empty: it was live nowhere, which is not an error for a subject)."""

    outcome: WriteOutcome
    sequence: int
    reference_ids: tuple[tuple[str, str], ...] = ()


class Reference(NamedTuple):
    """What is held of a live reference, without its template. `attributes` is JSON of what it rests on, b"" if
    nothing was said (`grounds.encode`)."""

    gallery_id: str
    reference_id: str
    subject_id: str
    sequence: int
    enrolled_at_ms: int
    expires_at_ms: int
    attributes: bytes = b""


# --- search ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """A batch of adapted probes against galleries of one space.

    `probes` float32 [n, d], unit rows, C order. `floors` float32 [n, len(gallery_ids)]: a reference is a
    candidate if its score >= its gallery's floor (-inf: any score). `rank_max` int64 [n], each >= 1:
    most subjects wanted. References that expire at or before `at_ms` are not returned. Of several
    replicas only those count that have applied `min_sequence`.
    """

    gallery_ids: tuple[str, ...]
    probes: Float32
    floors: Float32
    rank_max: Int64
    at_ms: int
    min_sequence: int = 0


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The candidates of a batch, in columns: those of probe i stand at offsets[i]:offsets[i+1], ordered by
    score descending, then (gallery_id, reference_id) as UTF-8 bytes ascending; one per subject of a
    gallery (its best reference), at most rank_max of them over all galleries.

    `gallery` int64 [m] indexes the request's gallery_ids, `scores` float32 [m]. `sequence` is applied.
    `missing` names parts that did not answer. `certified` and `scanned` count (probe, segment) pairs
    answered through the filter's certificate and by a full scan.
    """

    offsets: Int64
    gallery: Int64
    scores: Float32
    reference_ids: Sequence[str]
    subject_ids: Sequence[str]
    sequence: int
    missing: tuple[str, ...] = ()
    certified: int = 0
    scanned: int = 0


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """`sequence` applied so far; live and dead rows per gallery; bytes held in memory; of each GPU by its name, what is
    wrong with it, empty if it works, and of its memory the bytes that hold codes and those that may."""

    sequence: int
    live: Mapping[str, int]
    dead: Mapping[str, int]
    bytes_in_memory: int
    segments: int
    devices: Mapping[str, str] = field(default_factory=dict)
    device_bytes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


# --- identify --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProbeMessage:
    """One message of probes as an edge decoded it. Nothing in it has been judged yet except its form.

    `templates` float32 [n, d] (finite or not), `captured_at_ms` int64 [n]; exactly one of
    `deployment_id` and `case_reference` is set. `gallery_ids` empty: all that the authority allows.
    `received_at` and `deadline` are monotonic seconds. `stream_nonce` (b"": none) and `stream_sequence` number each
    sending of a stream, whatever becomes of its connection.
    """

    actor: Actor
    space: SpaceId
    probe_ids: Sequence[str]
    templates: Float32
    captured_at_ms: Int64
    deployment_id: str
    case_reference: str
    gallery_ids: tuple[str, ...]
    threshold: float | None
    rank_max: int
    min_sequence: int
    received_at: float
    deadline: float
    message_id: str = ""
    traceparent: str = ""
    camera_id: str = ""
    stream_nonce: bytes = b""
    stream_sequence: int = 0


class Candidate(NamedTuple):
    """`score_step` 0: the score is exact. Otherwise it is the lower edge of a band of that width, and the rate is
    rounded up to a power of ten."""

    subject_id: str
    reference_id: str
    gallery_id: str
    score: float
    rank: int
    false_match_rate: float
    score_step: float = 0.0


class Decision(NamedTuple):
    """The one answer of a probe. `cause`, `detail`, `field`, `retry_after_ms` serve REJECTED and
    INCOMPLETE; `alert_id` serves ALERT."""

    probe_id: str
    outcome: Outcome
    candidates: tuple[Candidate, ...] = ()
    cause: str = ""
    detail: str = ""
    field: str = ""
    retry_after_ms: int = 0
    alert_id: str = ""


@dataclass(frozen=True, slots=True)
class IdentifyReply:
    """The decisions of one message, with what is common to them. `missing` empty: all are complete."""

    decisions: Sequence[Decision]
    sequence: int
    space: SpaceId
    policy_version: str
    thresholds: Mapping[str, float]
    missing: tuple[str, ...] = ()
    message_id: str = ""

    @property
    def complete(self) -> bool:
        return not self.missing


class Verdict(StrEnum):
    """What a trained person says of an alert. Never that somebody was identified: that is not a machine's to record."""

    CONFIRMED = "confirmed"
    REJECTED = "rejected"
    INCONCLUSIVE = "inconclusive"


class AlertState(StrEnum):
    """What the adjudications of an alert add up to."""

    OPEN = "open"
    CONFIRMED = "confirmed"
    REJECTED = "rejected"
    INCONCLUSIVE = "inconclusive"


class Adjudication(NamedTuple):
    """`evidence_reference` is where the force's own evidence system keeps what was looked at; opaque here."""

    verdict: Verdict
    by: str
    at_ms: int
    reason: str
    evidence_reference: str = ""


@dataclass(frozen=True, slots=True)
class Alert:
    """A decision at or above the threshold, as it is recorded. No template, no image."""

    alert_id: str
    probe_id: str
    deployment_id: str
    case_reference: str
    raised_at_ms: int
    captured_at_ms: int
    candidates: tuple[Candidate, ...]
    thresholds: Mapping[str, float]
    sequence: int
    policy_version: str
    complete: bool
    state: AlertState = AlertState.OPEN
    adjudications: tuple[Adjudication, ...] = ()


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """Something to be written into the audit chain. `detail` may name persons and can later be erased; the
    chain itself carries only its salted digest. Never a template nor a digest of one."""

    actor: str
    action: str
    subject: str
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LegalHold:
    """Pauses the erasure of what is held of a subject, in one gallery or ("") in all; it is not searched for that. A
    person looks at it again by `review_by_ms`."""

    hold_id: str
    gallery_id: str
    subject_id: str
    requested_by: str
    authorised_by: str
    reason: str
    review_by_ms: int
    released_at_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Signed word on the audit: its first `size` records have this Merkle root. `root`, `key` (the public part of the
    key it is signed under) and `signature` are hexadecimal."""

    size: int
    root: str
    at_ms: int
    key: str
    signature: str


class DataKey(NamedTuple):
    """A generation of a gallery's key, counted from 1, and its 32 bytes."""

    generation: int
    key: bytes


@dataclass(frozen=True, slots=True)
class GalleryKey:
    """How far the last rotation of a gallery's key has come. `resealed` templates were sealed anew under `generation`,
    and `share` of the log has been gone through, until `resealed_at_ms`. `waits_for` are the indexes that may still
    hold a file under an older generation. Those are destroyed at `retired_at_ms`, and not before `retire_at_ms`."""

    gallery_id: str
    generation: int
    rotated_at_ms: int
    resealed: int
    share: float
    resealed_at_ms: int | None
    waits_for: tuple[str, ...]
    retire_at_ms: int
    retired_at_ms: int | None


class ErasedKind(StrEnum):
    TEMPLATES = "templates"
    ALERTS = "alerts"
    AUDIT_DETAIL = "audit_detail"


class StoreErasure(NamedTuple):
    """One store and its part in an erasure: since when it holds nothing of what was erased (None: it still may), and
    how that is known. `until_at_ms` is the time by which a store without a report of its own is destroyed."""

    store: str
    at_ms: int | None
    how: str
    until_at_ms: int | None = None


@dataclass(frozen=True, slots=True)
class ErasureReceipt:
    """What one erasure took out of which stores, and when. `sequences` are closed ranges of the log's entries whose
    templates it erased. `complete_at_ms` is None until every store that reports has reported."""

    receipt_id: int
    kind: ErasedKind
    gallery_id: str
    erased: int
    sequences: tuple[tuple[int, int], ...]
    erased_at_ms: int
    stores: tuple[StoreErasure, ...]
    complete_at_ms: int | None


class ErasureWaiting(NamedTuple):
    """Templates that are not searched any more and wait to be erased, how many of these a legal hold keeps, and by
    when the others are erased (None: there are none)."""

    templates: int
    held: int
    due_at_ms: int | None


class ErasureReports(NamedTuple):
    """What reports of the stores came to: how many receipts they completed, and when the oldest erasure was made that
    some store has not reported for (None: there is none)."""

    completed: int
    oldest_open_ms: int | None


@dataclass(frozen=True, slots=True)
class Grounds:
    """What the references of a message rest on. Columns are empty or parallel to the references, and what a column
    leaves empty (or 0) is the message's; what that leaves empty is the gallery's. `qualities` float32 [n], NaN:
    unknown. `category` and `reason` are asked for on a watchlist."""

    source: str = ""
    lawful_basis: str = ""
    review_by_ms: int = 0
    category: str = ""
    reason: str = ""
    sources: Sequence[str] = ()
    lawful_bases: Sequence[str] = ()
    reviews_by_ms: Sequence[int] = ()
    categories: Sequence[str] = ()
    reasons: Sequence[str] = ()
    qualities: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class EnrolMessage:
    """One message of references as an edge decoded it; parallel columns of n rows.

    `templates` float32 [n, d] raw (not yet adapted); `expires_at_ms` int64 [n], 0: the gallery's
    retention. `received_at` and `deadline` are monotonic seconds.
    """

    actor: Actor
    gallery_id: str
    space: SpaceId
    reference_ids: Sequence[str]
    subject_ids: Sequence[str]
    templates: Float32
    expires_at_ms: Int64
    idempotency_key: str
    replace: bool
    received_at: float
    deadline: float
    message_id: str = ""
    grounds: Grounds = Grounds()
