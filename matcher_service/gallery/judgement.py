"""Which writes are accepted, and why not: each by the state of the log at its place in the order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from sqlalchemy import select

from matcher_service import audit, records
from matcher_service.errors import Conflict, Gone, InvalidInput, LogUnavailable, MatcherError, NotFound
from matcher_service.gallery import lawful, seal
from matcher_service.gallery.held import require_unheld
from matcher_service.gallery.names import check_name
from matcher_service.gallery.persons import same_person
from matcher_service.gallery.schema import live
from matcher_service.gallery.transaction import FirstUse, Held, Note, Place, WriteTransaction
from matcher_service.terms import (
    Actor,
    ApproveWatchlist,
    Cause,
    ChangeThreshold,
    CloseProposal,
    CreateCase,
    CreateDeployment,
    CreateGallery,
    DeleteGallery,
    EndCase,
    EndDeployment,
    EndGround,
    Enrol,
    EntryKind,
    IssueCredential,
    MakeProposal,
    Receipt,
    RegisterSpace,
    ReviewReference,
    RevokeCredential,
    Withdraw,
    WithdrawSubject,
    Write,
    WriteOutcome,
)

_RETENTION_MS_MAX = 200 * 366 * 86_400_000


def append(transaction: WriteTransaction, writes: Sequence[Write], actor: Actor) -> list[Receipt | MatcherError]:
    """Judge the writes in order and hand the accepted ones to the transaction, with one audit record for each kind
    of change to each thing changed. The refusals are those of `seams.GalleryLog.append`."""
    answers = judge(transaction, writes)
    transaction.write_notes(actor)
    return answers


def judge(transaction: WriteTransaction, writes: Sequence[Write]) -> list[Receipt | MatcherError]:
    """The same, with the notes of what changed left in the transaction."""
    transaction.look_up(writes)
    judge_one = _Judge(transaction, seal.nonces(len(writes)))
    answers: list[Receipt | MatcherError] = []
    for write in writes:
        try:
            answers.append(judge_one(write))
        except MatcherError as refusal:
            # A traceback would keep this transaction's rows alive for as long as the caller keeps the answer.
            answers.append(refusal.with_traceback(None))
    return answers


class _Judge:
    def __init__(self, transaction: WriteTransaction, draw_nonce: Callable[[], bytes]) -> None:
        self._transaction = transaction
        self._state = transaction.state
        self._at_ms = transaction.at_ms
        self._draw_nonce = draw_nonce
        # One for each gallery and outcome, not for each reference.
        self._enrolments: dict[tuple[str, str], Note] = {}
        # References live in galleries that hold a limited number of them.
        self._live: dict[str, int] = {}

    def __call__(self, write: Write) -> Receipt:
        match write:
            case Enrol():
                return self._enrol(write)
            case Withdraw():
                return self._withdraw(write)
            case WithdrawSubject():
                return self._withdraw_subject(write)
            case RegisterSpace():
                return self._register_space(write)
            case CreateGallery():
                return self._create_gallery(write)
            case DeleteGallery():
                return self._delete_gallery(write)
            case ChangeThreshold():
                return self._change_threshold(write)
            case CreateDeployment():
                return self._create_deployment(write)
            case EndDeployment():
                return self._end_deployment(write)
            case CreateCase():
                return self._create_case(write)
            case EndCase():
                return self._end_case(write)
            case IssueCredential():
                return self._issue_credential(write)
            case RevokeCredential():
                return self._revoke_credential(write)
            case ApproveWatchlist():
                self._require_gallery(write.gallery_id)
                return lawful.approve_watchlist(self._transaction, write)
            case EndGround():
                if write.gallery_id:
                    self._require_gallery(write.gallery_id)
                return lawful.end_ground(self._transaction, write)
            case ReviewReference():
                self._require_gallery(write.gallery_id)
                return lawful.review_reference(self._transaction, write, self._draw_nonce())
            case MakeProposal():
                return self._make_proposal(write)
            case CloseProposal():
                return self._close_proposal(write)

    def _enrol(self, write: Enrol) -> Receipt:
        gallery_id, reference_id = write.gallery_id, write.reference_id
        gallery = self._state.galleries.get(gallery_id)
        if gallery is None:
            raise self._unknown_gallery(gallery_id)
        check_name(reference_id, "reference_ids")
        check_name(write.subject_id, "subject_ids")
        dimension = gallery.space.dimension
        if len(write.template) != 2 * dimension:
            raise InvalidInput(
                f"a template of {len(write.template)} bytes; {gallery.space} has {2 * dimension} (float16)",
                field="templates",
                cause=Cause.WRONG_DIMENSION,
                hint=f"send templates of {gallery.space}",
            )
        if write.idempotency_key:
            check_name(write.idempotency_key, "idempotency_key")
            first = self._transaction.first_use((gallery_id, write.idempotency_key))
            if first is not None:
                return self._repeated(write, first)
        lawful.require_open(gallery)
        at_ms = self._at_ms
        expires_at_ms = at_ms + gallery.life_ms
        if write.expires_at_ms:
            expires_at_ms = min(write.expires_at_ms, expires_at_ms)
        if expires_at_ms <= at_ms:
            raise Gone(
                f"reference {reference_id} would expire at once",
                field="expires_at_ms",
                cause=Cause.EXPIRED,
                hint="give a time in the future, or 0 for the gallery's retention",
            )
        lives = self._lives((gallery_id, reference_id)) is not None
        if lives and not write.replace:
            raise Conflict(
                f"reference {reference_id} is live in gallery {gallery_id}",
                field="reference_ids",
                hint="set replace to enrol another template under it, or choose another reference_id",
            )
        if gallery.size_max and not lives:
            if gallery_id not in self._live:
                self._live[gallery_id] = lawful.count_live(self._transaction, gallery_id)
            lawful.require_room(gallery, self._live[gallery_id])
            self._live[gallery_id] += 1
        sequence = self._transaction.enrol(write, expires_at_ms, self._draw_nonce())
        action = "reference.replaced" if lives else "reference.enrolled"
        note = self._enrolments.get((action, gallery_id))
        if note is None:
            note = self._enrolments[(action, gallery_id)] = Note(action, gallery_id)
        self._transaction.note(note, sequence)
        return Receipt(WriteOutcome.REPLACED if lives else WriteOutcome.ENROLLED, sequence)

    def _repeated(self, write: Enrol, first: FirstUse) -> Receipt:
        same = (first.reference_id, first.subject_id) == (write.reference_id, write.subject_id)
        template = first.template
        if same and first.sealed is not None:
            template = self._transaction.unsealed(first.sealed, write.gallery_id, first.reference_id, first.sequence)
        if not same or template not in (None, write.template):
            raise Conflict(
                f"the key was used for another enrolment, of sequence {first.sequence}",
                field="idempotency_key",
                hint="a key stands for one enrolment: repeat it unchanged, or make a new key",
            )
        return Receipt(WriteOutcome.REPEATED, first.sequence)

    def _lives(self, place: Place) -> Held | None:
        held = self._transaction.held(place)
        return held if held is not None and held.expires_at_ms > self._at_ms else None

    def _withdraw(self, write: Withdraw) -> Receipt:
        if write.gallery_id not in self._state.galleries:
            raise self._unknown_gallery(write.gallery_id)
        place = (write.gallery_id, write.reference_id)
        held = self._lives(place)
        if held is None:
            raise NotFound(
                f"reference {write.reference_id} is not live in gallery {write.gallery_id}",
                field="reference_ids",
                hint="it was never enrolled, or was withdrawn or has expired",
            )
        note = Note("reference.withdrawn", write.gallery_id, _detail({"reason": write.reason}))
        sequence = self._transaction.withdraw(place, held)
        self._transaction.note(note, sequence)
        return Receipt(WriteOutcome.DONE, sequence, (place,))

    def _withdraw_subject(self, write: WithdrawSubject) -> Receipt:
        if write.gallery_id and write.gallery_id not in self._state.galleries:
            raise self._unknown_gallery(write.gallery_id)
        check_name(write.subject_id, "subject_id")
        detail = _detail({"reason": write.reason, "subject_id": write.subject_id})
        note = Note("subject.withdrawn", write.gallery_id, detail)
        transaction = self._transaction
        # Also when nothing is held: that somebody asked is itself worth a record.
        transaction.note(note)
        transaction.flush()
        held = select(live).where(live.c.subject_id == write.subject_id, live.c.expires_at_ms > self._at_ms)
        if write.gallery_id:
            held = held.where(live.c.gallery_id == write.gallery_id)
        ended: list[Place] = []
        in_order = held.order_by(live.c.gallery_id, live.c.reference_id)
        for gallery_id, reference_id, *rest in transaction.connection.execute(in_order).all():
            place, one = (gallery_id, reference_id), Held(*rest)
            transaction.add_held(place, one)
            transaction.note(note, transaction.withdraw(place, one))
            ended.append(place)
        return Receipt(WriteOutcome.DONE, transaction.sequence, tuple(ended))

    def _register_space(self, write: RegisterSpace) -> Receipt:
        space = write.space
        check_name(space.id.name, "space.name")
        if space.id.dimension < 1 or space.centre.shape != (space.id.dimension,):
            raise InvalidInput(
                f"the centre has shape {space.centre.shape}; {space.id} needs ({space.id.dimension},)",
                field="centre",
                cause=Cause.WRONG_DIMENSION,
            )
        if not np.isfinite(space.centre).all():
            raise InvalidInput("the centre is not finite", field="centre", cause=Cause.NOT_FINITE)
        record = _encoded("space", lambda: records.encode_space(space))
        known = self._state.spaces.get(space.id)
        if known is not None:
            if not np.array_equal(known[0].centre, space.centre):
                raise Conflict(
                    f"{space.id} is registered with another centre",
                    field="space",
                    hint="another centre is another version: raise space.version",
                )
            if records.encode_space(known[0]) == record:
                return Receipt(WriteOutcome.REPEATED, known[1])
        return self._catalogue("space.registered", str(space.id), EntryKind.SPACE_REGISTERED, "", record)

    def _create_gallery(self, write: CreateGallery) -> Receipt:
        gallery = write.gallery
        gallery_id = gallery.gallery_id
        check_name(gallery_id, "gallery_id")
        if gallery_id in self._state.galleries or gallery_id in self._state.deleted:
            raise Conflict(
                f"gallery {gallery_id} exists, or existed", field="gallery_id", hint="an id is never used twice"
            )
        if gallery.space not in self._state.spaces:
            raise NotFound(
                f"template space {gallery.space} is not registered", field="space", hint="register the space first"
            )
        if gallery.retention_ms < 1 or gallery.retention_ms > _RETENTION_MS_MAX:
            raise InvalidInput(f"retention_ms is {gallery.retention_ms}", field="retention_ms", hint="at least 1")
        if not math.isfinite(gallery.threshold) or abs(gallery.threshold) > 1:
            raise InvalidInput(f"threshold is {gallery.threshold}", field="threshold", hint="a cosine: from -1 to 1")
        lawful.require_lawful_gallery(gallery, self._state.deployments)
        stamped = gallery if gallery.created_at_ms else replace(gallery, created_at_ms=self._at_ms)
        record = _encoded("gallery", lambda: records.encode_gallery(stamped))
        # Before the commit: a gallery without a durable key could seal nothing. A key left over from a
        # transaction that failed is taken up again.
        try:
            self._transaction.keyring.create(gallery_id)
        except OSError as broken:
            raise LogUnavailable(
                f"the key of gallery {gallery_id} cannot be written: {broken.strerror}", hint="check the keys directory"
            ) from None
        known: dict[str, object] = {}
        if gallery.evidence is not None:
            known["evidence"] = records.evidence_dict(gallery.evidence)
        return self._catalogue(
            "gallery.created", gallery_id, EntryKind.GALLERY_CREATED, gallery_id, record, _detail(known)
        )

    def _change_threshold(self, write: ChangeThreshold) -> Receipt:
        gallery = self._state.galleries.get(write.gallery_id)
        if gallery is None:
            raise self._unknown_gallery(write.gallery_id)
        if not math.isfinite(write.threshold) or abs(write.threshold) > 1:
            raise InvalidInput(f"threshold is {write.threshold}", field="threshold", hint="a cosine: from -1 to 1")
        if same_person(write.proposed_by, write.approved_by):
            raise InvalidInput(
                "the person who proposed the change also approved it",
                field="approved_by",
                hint="a second person approves a change of threshold",
            )
        record = _encoded("rates", lambda: records.encode_threshold_change(write, gallery.threshold))
        detail = _detail(
            {
                "threshold_before": gallery.threshold,
                "threshold": write.threshold,
                "reason": write.reason,
                "proposed_by": write.proposed_by,
                "approved_by": write.approved_by,
                "rates": [one._asdict() for one in write.rates],
                "evidence": records.evidence_dict(write.evidence),
            }
        )
        return self._catalogue(
            "threshold.changed", write.gallery_id, EntryKind.THRESHOLD_CHANGED, write.gallery_id, record, detail
        )

    def _delete_gallery(self, write: DeleteGallery) -> Receipt:
        gallery_id = write.gallery_id
        if gallery_id not in self._state.galleries:
            raise self._unknown_gallery(gallery_id)
        require_unheld(self._transaction, gallery_id)
        lawful.count_watchlist(self._transaction, self._state.galleries[gallery_id])
        ended = self._transaction.withdraw_gallery(gallery_id)
        record = records.encode_ended("gallery_id", gallery_id, self._at_ms)
        return self._catalogue(
            "gallery.deleted",
            gallery_id,
            EntryKind.GALLERY_DELETED,
            gallery_id,
            record,
            _detail(
                {"reason": write.reason, "references": ended}
                | ({"proposed_by": write.proposed_by, "approved_by": write.approved_by} if write.approved_by else {})
            ),
        )

    def _create_deployment(self, write: CreateDeployment) -> Receipt:
        deployment = write.deployment
        check_name(deployment.deployment_id, "deployment_id")
        if deployment.deployment_id in self._state.deployments:
            raise Conflict(
                f"deployment {deployment.deployment_id} exists, or existed",
                field="deployment_id",
                hint="an id is never used twice",
            )
        self._check_window(deployment.gallery_ids, deployment.opens_at_ms, deployment.closes_at_ms)
        lawful.require_own_watchlists(self._state.galleries, deployment.gallery_ids, deployment.deployment_id)
        return self._catalogue(
            "deployment.created",
            deployment.deployment_id,
            EntryKind.DEPLOYMENT_CREATED,
            "",
            _encoded("deployment", lambda: records.encode_deployment(deployment)),
        )

    def _end_deployment(self, write: EndDeployment) -> Receipt:
        _check_open(self._state.deployments, "deployment", "deployment_id", write.deployment_id)
        for gallery_id in lawful.ended_with(self._transaction, write.deployment_id):
            # One under a legal hold stays until that is released; it is searched under this deployment alone.
            with suppress(Conflict):
                self._delete_gallery(DeleteGallery(gallery_id, f"deployment {write.deployment_id} ended"))
        record = records.encode_ended("deployment_id", write.deployment_id, self._at_ms)
        return self._catalogue("deployment.ended", write.deployment_id, EntryKind.DEPLOYMENT_ENDED, "", record)

    def _create_case(self, write: CreateCase) -> Receipt:
        case = write.case
        check_name(case.case_reference, "case_reference")
        if case.case_reference in self._state.cases:
            raise Conflict(
                f"case {case.case_reference} exists, or existed",
                field="case_reference",
                hint="a reference is never used twice",
            )
        self._check_window(case.gallery_ids, case.opens_at_ms, case.closes_at_ms)
        lawful.require_own_watchlists(self._state.galleries, case.gallery_ids, "")
        record = _encoded("case", lambda: records.encode_case(case))
        return self._catalogue("case.created", case.case_reference, EntryKind.CASE_CREATED, "", record)

    def _end_case(self, write: EndCase) -> Receipt:
        _check_open(self._state.cases, "case", "case_reference", write.case_reference)
        record = records.encode_ended("case_reference", write.case_reference, self._at_ms)
        return self._catalogue("case.ended", write.case_reference, EntryKind.CASE_ENDED, "", record)

    def _issue_credential(self, write: IssueCredential) -> Receipt:
        credential = write.credential
        check_name(credential.credential_id, "credential_id")
        if credential.credential_id in self._state.credentials:
            raise Conflict(
                f"credential {credential.credential_id} exists, or existed",
                field="credential_id",
                hint="an id is never used twice",
            )
        _check_open(self._state.deployments, "deployment", "deployment_id", credential.deployment_id)
        if not credential.secret_sha256 and not credential.certificate:
            raise InvalidInput("it has neither a secret nor a certificate", field="certificate", hint="give one")
        stamped = replace(credential, issued_at_ms=self._at_ms)
        record = _encoded("credential", lambda: records.encode_credential(stamped))
        detail = _detail({"deployment_id": credential.deployment_id, "replaces": credential.replaces})
        return self._catalogue(
            "credential.issued", credential.credential_id, EntryKind.CREDENTIAL_ISSUED, "", record, detail
        )

    def _revoke_credential(self, write: RevokeCredential) -> Receipt:
        if write.credential_id not in self._state.credentials:
            raise NotFound(f"no credential {write.credential_id!r}", field="credential_id", hint="list the credentials")
        at_ms = max(write.at_ms, self._at_ms)
        ends_at_ms = self._state.credentials[write.credential_id]
        if ends_at_ms is not None and ends_at_ms <= at_ms:
            raise Gone(f"credential {write.credential_id} is revoked already", field="credential_id")
        return self._catalogue(
            "credential.revoked",
            write.credential_id,
            EntryKind.CREDENTIAL_REVOKED,
            "",
            records.encode_revocation(write.credential_id, at_ms),
            _detail({"reason": write.reason, "revoked_at_ms": at_ms}),
        )

    def _make_proposal(self, write: MakeProposal) -> Receipt:
        proposal = write.proposal
        check_name(proposal.proposal_id, "proposal_id")
        if proposal.proposal_id in self._state.proposals:
            raise Conflict(f"proposal {proposal.proposal_id} exists", field="proposal_id", hint="propose anew")
        if proposal.gallery_id not in self._state.galleries:
            raise self._unknown_gallery(proposal.gallery_id)
        record = _encoded("proposal", lambda: records.encode_proposal(proposal))
        detail = _detail({"action": proposal.action.value, "reason": proposal.reason, "gallery": proposal.gallery_id})
        return self._catalogue("proposal.made", proposal.proposal_id, EntryKind.PROPOSAL_MADE, "", record, detail)

    def _close_proposal(self, write: CloseProposal) -> Receipt:
        proposal = self._state.proposals.get(write.proposal_id)
        if proposal is None:
            raise NotFound(f"no proposal {write.proposal_id!r}", field="proposal_id", hint="list the proposals")
        if proposal.closed_as:
            raise Gone(f"proposal {write.proposal_id} was {proposal.closed_as} already", field="proposal_id")
        if write.closed_as == "approved" and same_person(proposal.proposed_by, write.closed_by):
            raise InvalidInput(
                "the person who proposed the change also approved it",
                field="approved_by",
                hint="a second person approves it",
            )
        return self._catalogue(
            f"proposal.{write.closed_as}",
            write.proposal_id,
            EntryKind.PROPOSAL_CLOSED,
            "",
            records.encode_closure(write.proposal_id, write.closed_as, write.closed_by),
            _detail({"reason": write.reason, "by": write.closed_by, "proposed_by": proposal.proposed_by}),
        )

    def _check_window(self, gallery_ids: Sequence[str], opens_at_ms: int, closes_at_ms: int) -> None:
        for gallery_id in gallery_ids:
            if gallery_id not in self._state.galleries:
                unknown = self._unknown_gallery(gallery_id)
                unknown.field = "gallery_ids"
                raise unknown
        if closes_at_ms <= opens_at_ms:
            raise InvalidInput("it closes before it opens", field="closes_at_ms", hint="later than opens_at_ms")

    def _catalogue(
        self, action: str, subject: str, kind: EntryKind, gallery_id: str, record: bytes, detail: bytes = b""
    ) -> Receipt:
        sequence = self._transaction.change_catalogue(kind, gallery_id, record, Note(action, subject, detail))
        return Receipt(WriteOutcome.DONE, sequence)

    def _require_gallery(self, gallery_id: str) -> None:
        if gallery_id not in self._state.galleries:
            raise self._unknown_gallery(gallery_id)

    def _unknown_gallery(self, gallery_id: str) -> NotFound:
        state = "was deleted" if gallery_id in self._state.deleted else "does not exist"
        return NotFound(
            f"gallery {gallery_id} {state}",
            field="gallery_id",
            cause=Cause.UNKNOWN_GALLERY,
            hint="list the galleries to see which there are",
        )


def _check_open(known: dict[str, bool], what: str, field: str, name: str) -> None:
    ended = known.get(name)
    if ended is None:
        raise NotFound(f"{what} {name} does not exist", field=field, hint=f"list the {what}s to see which there are")
    if ended:
        raise Gone(f"{what} {name} has ended already", field=field)


def _detail(detail: dict[str, object]) -> bytes:
    return _encoded("reason", lambda: audit.canonical_detail(detail))


def _encoded(field: str, encode: Callable[[], bytes]) -> bytes:
    try:
        return encode()
    except (TypeError, ValueError) as unfit:
        raise InvalidInput(f"it cannot be stored: {unfit}", field=field, hint="send valid text") from None
