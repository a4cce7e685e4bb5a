"""What may be searched and by whose authority: a view of the log's catalogue entries.

Reached only by replay, like a shard. Readers see plain mappings; every change replaces a mapping whole, so a
reader that took one keeps a consistent picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from matcher_service import records
from matcher_service.terms import (
    Case,
    Deployment,
    EdgeCredential,
    EntryKind,
    Gallery,
    LogEntry,
    Proposal,
    SpaceId,
    TemplateSpace,
)

CATALOGUE_KINDS = frozenset(EntryKind) - {EntryKind.ENROL, EntryKind.WITHDRAW}


class Catalogue:
    """`calibrations` says of each space which entry of the log brought its present score table, or the lack of one."""

    def __init__(self) -> None:
        self.galleries: Mapping[str, Gallery] = {}
        self.deleted_galleries: frozenset[str] = frozenset()
        self.spaces: Mapping[SpaceId, TemplateSpace] = {}
        self.calibrations: Mapping[SpaceId, int] = {}
        self.deployments: Mapping[str, Deployment] = {}
        self.cases: Mapping[str, Case] = {}
        self.credentials: Mapping[str, EdgeCredential] = {}
        self.proposals: Mapping[str, Proposal] = {}

    def apply(self, entries: Sequence[LogEntry]) -> None:
        """Apply committed entries in order; those of other kinds are passed over."""
        for entry in entries:
            if entry.kind in CATALOGUE_KINDS:
                self._apply(entry)

    def _apply(self, entry: LogEntry) -> None:
        match entry.kind:
            case EntryKind.SPACE_REGISTERED:
                space = records.decode_space(entry.record)
                known = self.spaces.get(space.id)
                if known is None or known.score_table != space.score_table:
                    self.calibrations = {**self.calibrations, space.id: entry.sequence}
                self.spaces = {**self.spaces, space.id: space}
            case EntryKind.GALLERY_CREATED:
                gallery = records.decode_gallery(entry.record)
                self.galleries = {**self.galleries, gallery.gallery_id: gallery}
            case EntryKind.GALLERY_DELETED:
                self.galleries = {key: kept for key, kept in self.galleries.items() if key != entry.gallery_id}
                self.deleted_galleries |= {entry.gallery_id}
            case EntryKind.THRESHOLD_CHANGED:
                gallery_id, threshold, evidence = records.decode_threshold_change(entry.record)
                changed = records.with_threshold(self.galleries[gallery_id], threshold, evidence)
                self.galleries = {**self.galleries, gallery_id: changed}
            case EntryKind.WATCHLIST_APPROVED:
                gallery_id, approved_by = records.decode_approval(entry.record)
                approved = records.approved(self.galleries[gallery_id], approved_by)
                self.galleries = {**self.galleries, gallery_id: approved}
            case EntryKind.DEPLOYMENT_CREATED:
                deployment = records.decode_deployment(entry.record)
                self.deployments = {**self.deployments, deployment.deployment_id: deployment}
            case EntryKind.DEPLOYMENT_ENDED:
                deployment_id, _ = records.decode_ended(entry.record)
                ended = dataclasses.replace(self.deployments[deployment_id], ended_at_ms=entry.at_ms)
                self.deployments = {**self.deployments, deployment_id: ended}
            case EntryKind.CASE_CREATED:
                authority = records.decode_case(entry.record)
                self.cases = {**self.cases, authority.case_reference: authority}
            case EntryKind.CASE_ENDED:
                reference, _ = records.decode_ended(entry.record)
                closed = dataclasses.replace(self.cases[reference], ended_at_ms=entry.at_ms)
                self.cases = {**self.cases, reference: closed}
            case EntryKind.CREDENTIAL_ISSUED:
                credential = records.decode_credential(entry.record)
                self.credentials = {**self.credentials, credential.credential_id: credential}
            case EntryKind.CREDENTIAL_REVOKED:
                credential_id, revoked_at_ms = records.decode_revocation(entry.record)
                revoked = dataclasses.replace(self.credentials[credential_id], revoked_at_ms=revoked_at_ms)
                self.credentials = {**self.credentials, credential_id: revoked}
            case EntryKind.PROPOSAL_MADE:
                proposal = records.decode_proposal(entry.record)
                self.proposals = {**self.proposals, proposal.proposal_id: proposal}
            case EntryKind.PROPOSAL_CLOSED:
                proposal_id, closed_as, closed_by = records.decode_closure(entry.record)
                decided = dataclasses.replace(self.proposals[proposal_id], closed_as=closed_as, closed_by=closed_by)
                self.proposals = {**self.proposals, proposal_id: decided}
            case EntryKind.ENROL | EntryKind.WITHDRAW:
                pass
