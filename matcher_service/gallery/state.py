"""What the catalogue entries of the log add up to, as far as writes are judged by it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sqlalchemy import Connection, select

from matcher_service import records
from matcher_service.gallery.schema import IS_CATALOGUE, entry
from matcher_service.terms import EntryKind, Gallery, Proposal, SpaceId, TemplateSpace


@dataclass(slots=True)
class CatalogueState:
    """`spaces` carries with each space the sequence that registered it; `deployments` and `cases` say of each id
    whether it has ended, `closes_at_ms` when the others of the deployments close, `alert_retention_ms` how long the
    alerts of those live that say so, `credentials` when it was revoked
    (None: it was not); `proposals` are those that wait or were closed. `sequence` is the newest catalogue entry
    applied."""

    sequence: int = 0
    spaces: dict[SpaceId, tuple[TemplateSpace, int]] = field(default_factory=dict)
    galleries: dict[str, Gallery] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    deployments: dict[str, bool] = field(default_factory=dict)
    closes_at_ms: dict[str, int] = field(default_factory=dict)
    alert_retention_ms: dict[str, int] = field(default_factory=dict)
    cases: dict[str, bool] = field(default_factory=dict)
    credentials: dict[str, int | None] = field(default_factory=dict)
    proposals: dict[str, Proposal] = field(default_factory=dict)

    def apply(self, sequence: int, kind: EntryKind, record: bytes) -> None:
        match kind:
            case EntryKind.SPACE_REGISTERED:
                space = records.decode_space(record)
                self.spaces[space.id] = (space, sequence)
            case EntryKind.GALLERY_CREATED:
                gallery = records.decode_gallery(record)
                self.galleries[gallery.gallery_id] = gallery
            case EntryKind.GALLERY_DELETED:
                gallery_id, _ = records.decode_ended(record)
                self.galleries.pop(gallery_id, None)
                self.deleted.add(gallery_id)
            case EntryKind.THRESHOLD_CHANGED:
                gallery_id, threshold, evidence = records.decode_threshold_change(record)
                changed = records.with_threshold(self.galleries[gallery_id], threshold, evidence)
                self.galleries[gallery_id] = changed
            case EntryKind.DEPLOYMENT_CREATED:
                deployment = records.decode_deployment(record)
                self.deployments[deployment.deployment_id] = deployment.ended_at_ms is not None
                self.closes_at_ms[deployment.deployment_id] = deployment.closes_at_ms
                if deployment.alert_retention_ms:
                    self.alert_retention_ms[deployment.deployment_id] = deployment.alert_retention_ms
            case EntryKind.DEPLOYMENT_ENDED:
                ended = records.decode_ended(record)[0]
                self.deployments[ended] = True
                self.closes_at_ms.pop(ended, None)
            case EntryKind.WATCHLIST_APPROVED:
                gallery_id, approved_by = records.decode_approval(record)
                self.galleries[gallery_id] = records.approved(self.galleries[gallery_id], approved_by)
            case EntryKind.CASE_CREATED:
                case = records.decode_case(record)
                self.cases[case.case_reference] = case.ended_at_ms is not None
            case EntryKind.CASE_ENDED:
                self.cases[records.decode_ended(record)[0]] = True
            case EntryKind.CREDENTIAL_ISSUED:
                credential = records.decode_credential(record)
                self.credentials[credential.credential_id] = credential.revoked_at_ms
            case EntryKind.CREDENTIAL_REVOKED:
                credential_id, revoked_at_ms = records.decode_revocation(record)
                self.credentials[credential_id] = revoked_at_ms
            case EntryKind.PROPOSAL_MADE:
                proposal = records.decode_proposal(record)
                self.proposals[proposal.proposal_id] = proposal
            case EntryKind.PROPOSAL_CLOSED:
                proposal_id, closed_as, closed_by = records.decode_closure(record)
                decided = replace(self.proposals[proposal_id], closed_as=closed_as, closed_by=closed_by)
                self.proposals[proposal_id] = decided
            case EntryKind.ENROL | EntryKind.WITHDRAW:
                return
        self.sequence = sequence

    def catch_up(self, connection: Connection) -> None:
        """Apply what was committed beyond `sequence`."""
        newer = (
            select(entry.c.sequence, entry.c.kind, entry.c.record)
            .where(IS_CATALOGUE, entry.c.sequence > self.sequence)
            .order_by(entry.c.sequence)
        )
        for sequence, kind, record in connection.execute(newer).all():
            self.apply(sequence, EntryKind(kind), record or b"")
