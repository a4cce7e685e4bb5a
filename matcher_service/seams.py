"""The protocols between the flows and their implementations. Methods work on batches only.

Docstrings here are obligations: each has a contract test that every implementation passes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, TypeAlias

from matcher_service.errors import MatcherError
from matcher_service.receipts import EnrolReceipts
from matcher_service.terms import (
    Actor,
    Alert,
    AuditEvent,
    Checkpoint,
    EnrolRows,
    EntryKind,
    ErasureReceipt,
    ErasureReports,
    ErasureWaiting,
    Float32,
    Float64,
    GalleryKey,
    LegalHold,
    LogEntry,
    Receipt,
    Reference,
    SearchRequest,
    SearchResult,
    ShardStatus,
    SpaceId,
    TemplateSpace,
    Verdict,
    Write,
)


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; for durations and deadlines."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds since 1970-01-01T00:00:00Z; may be stepped."""
        ...


class Models(Protocol):
    """The Triton-hosted computations."""

    async def register(self, space: TemplateSpace) -> None:
        """Make a space known. Registering the same space again changes nothing."""
        ...

    async def adapt(self, source: SpaceId, target: SpaceId, templates: Float32) -> Float32:
        """Raw finite templates [n, source.dimension] to unit rows [n, target.dimension], C order.

        A row that cannot be normalised (it equals the centre, or is zero) comes back as zeros.
        Raises InvalidInput (WRONG_SPACE) if there is no map from source to target.
        """
        ...

    async def false_match_rates(self, space: SpaceId, scores: Float32) -> Float64:
        """Calibrated false-match rate of each score [m]; never below what the space's table supports;
        NaN where the space has no table."""
        ...


class Shard(Protocol):
    """A view of the gallery log that can be searched."""

    async def search(self, request: SearchRequest) -> SearchResult:
        """Exactly what a flat scan of the live stored rows would give, per the laws.

        A gallery that this shard does not hold yields no candidates. Raises InvalidInput
        (WRONG_DIMENSION) if a gallery's dimension is not that of the probes.
        """
        ...

    async def status(self) -> ShardStatus: ...

    @property
    def uncoded_rows(self) -> int:
        """Rows that searches here go through in full until the background has made codes of them; 0 while nobody
        searches."""
        ...


class ReplayedShard(Shard, Protocol):
    """A shard in this process, fed by replay."""

    async def apply(self, entries: Sequence[LogEntry]) -> None:
        """Apply committed entries in order. A search that starts after this returns sees all of them.

        Entries at or below the shard's sequence are skipped, so replay may repeat itself. Raises
        MemoryRefused before anything of the block is applied if it would exceed the memory budget.
        """
        ...

    async def close(self) -> None: ...


class GalleryLog(Protocol):
    """The only truth: one sequence, whose order is commit order."""

    async def append(self, writes: Sequence[Write], actor: Actor) -> list[Receipt | MatcherError]:
        """Judge and commit the writes in order; one answer each, and one bad write spoils no other.

        On return every receipt is durable, and its audit record was in the same transaction. Raises
        LogUnavailable if nothing was committed. Refusals by cause:
        Enrol: NotFound (UNKNOWN_GALLERY), Gone (EXPIRED) if it would expire at once, InvalidInput
        (WRONG_DIMENSION), Conflict if live and not `replace`, or if the idempotency key was used for
        something else. A key seen within the stated window gives the first receipt as REPEATED.
        Withdraw: NotFound if not live. CreateGallery: Conflict if the id was ever used, NotFound if the
        space is not registered. ChangeThreshold: NotFound (UNKNOWN_GALLERY), InvalidInput if one person alone
        stands for it. RegisterSpace: Conflict if the id stands for another centre.
        """
        ...

    async def enrol(self, rows: EnrolRows, actor: Actor) -> EnrolReceipts:
        """Judge and commit many enrolments as `append` does with an Enrol for each row. The key of a row is that of the
        message and its reference. Their order in the log need not be that of the rows."""
        ...

    async def read(self, after: int, limit: int, kinds: Collection[EntryKind] | None = None) -> Sequence[LogEntry]:
        """Committed entries with sequence > after, in order, at most `limit`; empty if there are none. With
        `kinds` only those kinds, and without visiting the others one by one. May be an EnrolRun, and may then end
        before `limit` though there are more."""
        ...

    async def read_share(self, partitions: Collection[int], after: int, upto: int, limit: int) -> Sequence[LogEntry]:
        """Committed entries with after < sequence <= upto, in order: the catalogue's, and those of references in these
        partitions. Fewer than `limit` are all there are. Only they leave the database."""
        ...

    async def head(self) -> int:
        """Sequence of the newest committed entry; 0 for an empty log."""
        ...

    async def wait_beyond(self, sequence: int) -> None:
        """Return when the log's head is, or may be, beyond `sequence`. Never misses a commit."""
        ...

    async def references(self, gallery_id: str, after: str, limit: int) -> list[Reference]:
        """Live references of a gallery in order of reference_id, from beyond `after`."""
        ...

    async def reference(self, gallery_id: str, reference_id: str) -> Reference | None: ...

    async def subject(self, subject_id: str) -> list[Reference]:
        """Live references of a subject over all galleries."""
        ...

    async def record(self, events: Sequence[AuditEvent], alerts: Sequence[Alert]) -> None:
        """Write audit events, and alerts each with its audit event, in one transaction; durable on return.
        Raises AuditUnavailable if that could not be done."""
        ...

    async def alerts(self, deployment_id: str, before: str, limit: int) -> list[Alert]:
        """Recorded alerts that are within their lifetime, newest first; deployment_id "": of all."""
        ...

    async def audit(self, after: int, limit: int) -> list[dict[str, object]]:
        """Audit records with index > after, in order, each with its hash and that of the one before."""
        ...

    async def erase(self, now_ms: int) -> int:
        """Withdraw what has expired, and physically erase every template that is due. Returns how many
        templates were erased; each is in the audit. Called again until it returns 0 when there is much."""
        ...

    async def waiting_for_erasure(self) -> int:
        """Templates that are to be erased and are still there, those under a legal hold included."""
        ...

    async def close(self) -> None: ...


Counts: TypeAlias = Mapping[tuple[str, str], int]
"""By (authority, name of the counter): "deployment:ID" or "case:REFERENCE", and for example "faces_searched"."""


class AlertRecords(Protocol):
    """What becomes of alerts after they were raised, and the counters of those who raised them."""

    async def alert(self, alert_id: str) -> Alert:
        """Raises NotFound if it never was, has outlived its time, or has been erased."""
        ...

    async def adjudicate(
        self, alert_id: str, verdict: Verdict, by: str, reason: str, evidence_reference: str, actor: Actor
    ) -> Alert:
        """Record what a person made of an alert; the alert as it stands then. Durable and audited on return."""
        ...

    async def add_counts(self, counts: Counts) -> None:
        """Add to the counters. Raises LogUnavailable if nothing was added."""
        ...

    async def counts(self, authority: str) -> dict[str, int]:
        """All counters of an authority. `alerts` counts those raised; `alerts_open`, `alerts_confirmed`,
        `alerts_rejected` and `alerts_inconclusive` add up to it, also after alerts have been erased."""
        ...


class CaseUse(Protocol):
    """What cases and persons have used of what they are allowed, in the log: the same for every gateway, and after a
    restart. Numbers alone."""

    async def take(self, names: Sequence[str], count: int, per_h: int) -> int:
        """Count so many probes against each of these names, which are allowed `per_h` in any hour; 0. Or count nothing,
        and return the milliseconds after which there is room for them again. Raises LogUnavailable."""
        ...

    async def note_custody(self, case_reference: str) -> None:
        """A custody gallery was searched under the case, and answered in full."""
        ...

    async def searched_custody(self, case_reference: str) -> bool: ...


class LegalHolds(Protocol):
    async def place(self, hold: LegalHold, actor: Actor) -> LegalHold:
        """Raises Conflict for an id that was used, NotFound (gallery_id). Audited; durable on return."""
        ...

    async def release(self, hold_id: str, reason: str, by: str, actor: Actor) -> None:
        """Let what is due be erased. Raises NotFound if no such hold stands."""
        ...

    async def holds(self) -> list[LegalHold]:
        """All there were, by id."""
        ...

    async def kept(self, subject_id: str) -> tuple[list[Reference], list[Alert]]:
        """What is still stored of a subject and is out of use: references that were withdrawn or have expired, and
        alerts that outlived their time under a hold. For who answers to the person or to a court."""
        ...


class KeyRotations(Protocol):
    """The keys of galleries, and what wraps them."""

    async def rotate(self, gallery_id: str, reason: str, backups_too: bool, actor: Actor) -> GalleryKey:
        """Seal under a new generation of a gallery's key from now on; audited. The older ones are destroyed when
        nothing is sealed under them, backups included unless `backups_too`: those cannot be restored any more. Raises
        NotFound, Conflict while the last rotation goes on, LogUnavailable if the new key cannot be wrapped."""
        ...

    async def keys(self) -> list[GalleryKey]:
        """Of each gallery whose key was ever rotated."""
        ...

    async def reseal_some(self) -> bool:
        """One bounded step of sealing anew; False if there is nothing to do."""
        ...

    async def retire(self, indexes: Mapping[str, Mapping[str, int] | None], now_ms: int) -> Sequence[str]:
        """Destroy the generations that nothing is sealed under any more; the galleries whose. `indexes`: of each index
        and gallery the oldest generation that a file is sealed under, None of one that cannot be asked."""
        ...

    async def rewrap(self, actor: Actor) -> tuple[int, str, int]:
        """Wrap every key anew; how many, by what, and how many are left as they were. Audited. Raises LogUnavailable or
        DataDamaged; then every key is still readable, and it may be repeated."""
        ...


class ErasureReceipts(Protocol):
    async def receipts(self, gallery_id: str, subject_id: str, after: int, limit: int) -> list[ErasureReceipt]:
        """Those with a receipt_id beyond `after`, in order: of a gallery ("": of all), and if a subject is named, those
        of erasures that took a template of theirs."""
        ...

    async def receipt(self, receipt_id: int) -> ErasureReceipt:
        """Raises NotFound."""
        ...

    async def waiting(self, gallery_id: str, subject_id: str) -> ErasureWaiting:
        """What is not searched any more, but not erased yet; "" stands for all."""
        ...

    async def report(self, indexes: Mapping[str, int]) -> ErasureReports:
        """Each index there is, by name, with the sequence through which nothing that had ended is left in its memory
        and files. Completes, with an audit record each, the receipts that all stores have reported for."""
        ...


class AuditProofs(Protocol):
    """What can be proved of the audit chain. Proofs are hexadecimal hashes, checked by `merkle`; the leaf of record
    `index` is its hash, at place index - 1."""

    async def checkpoint(self) -> Checkpoint:
        """A signed checkpoint of every record committed before the call: the newest one if it covers them, else a
        new one. Raises DataDamaged if records that a checkpoint covers are gone, LogUnavailable."""
        ...

    async def checkpoints(self, limit: int) -> list[Checkpoint]:
        """The newest, newest first."""
        ...

    async def inclusion(self, index: int) -> tuple[Checkpoint, list[str]]:
        """That record `index` (from 1) is covered by the checkpoint. Raises NotFound."""
        ...

    async def consistency(self, older: int) -> tuple[Checkpoint, list[str]]:
        """That the first `older` records are an earlier state of what the checkpoint covers. Raises NotFound."""
        ...

    async def rotate_key(self, reason: str, actor: Actor) -> str:
        """Sign with a new key from now on, which the old one vouches for in the audit; its public part."""
        ...
