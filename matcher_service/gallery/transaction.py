"""One write transaction: judge writes in order, give out sequences, seal, chain the audit, store.

Sequences are given out while the write lock is held, and in one thread: their order is the order of commits.
Nothing here commits; whoever opened the connection does.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import BindParameter, Connection, bindparam, delete, func, insert, literal, select, tuple_, update

from matcher_service import audit
from matcher_service.errors import Conflict, Gone, InvalidInput, LogUnavailable, MatcherError, NotFound
from matcher_service.gallery import records, seal
from matcher_service.gallery.keys import Keyring
from matcher_service.gallery.schema import alert, audit_record, enrolment_key, entry, erasure, live
from matcher_service.gallery.sqlite import insert_many
from matcher_service.gallery.state import CatalogueState
from matcher_service.terms import (
    Actor,
    Alert,
    AuditEvent,
    Cause,
    CreateCase,
    CreateDeployment,
    CreateGallery,
    DeleteGallery,
    EndCase,
    EndDeployment,
    Enrol,
    EntryKind,
    Receipt,
    RegisterSpace,
    Withdraw,
    WithdrawSubject,
    Write,
    WriteOutcome,
)

SERVICE = Actor("matcher-service")
"""Who acts when nobody asked: expiry, erasure, alerts."""

ID_BYTES_MAX = 1024
_LOOK_UP = 4096
_DAY_MS = 86_400_000


class Terms(NamedTuple):
    """The stated times, in milliseconds."""

    idempotency_window_ms: int
    erase_within_ms: int
    alert_retention_ms: int


class _Live(NamedTuple):
    subject_id: str
    sequence: int
    enrolled_at_ms: int
    expires_at_ms: int


class _First(NamedTuple):
    """The enrolment that used an idempotency key first; `template` None: erased since."""

    sequence: int
    reference_id: str
    subject_id: str
    template: bytes | None


class _Note(NamedTuple):
    """What one audit record will be about; the sequences of equal notes are gathered into one record."""

    action: str
    subject: str
    detail: bytes = b""


class WriteTransaction:
    """Holds what one transaction has judged and not yet stored. Used by one thread, within one transaction.

    `at_ms` is the log time of everything in it: the wall clock, never before the newest entry. `sequence` is the
    newest given out. `destroyed` names galleries whose keys are to be destroyed once this is committed.
    """

    def __init__(
        self, connection: Connection, keyring: Keyring, state: CatalogueState, terms: Terms, wall_ms: int
    ) -> None:
        self._connection = connection
        self._keyring = keyring
        self._state = state
        self._terms = terms
        tail = connection.execute(_TAIL).first()
        self.sequence: int = tail.sequence if tail else 0
        self.at_ms: int = max(wall_ms, tail.at_ms if tail else 0)
        chain = connection.execute(_AUDIT_TAIL).first()
        self._audit_position: int = chain.position if chain else 0
        self._audit_hash: str = chain.hash if chain else audit.CHAIN_START
        state.catch_up(connection)
        self.destroyed: list[str] = []
        self._live: dict[tuple[str, str], _Live | None] = {}
        self._stored: set[tuple[str, str]] = set()
        self._changed: dict[tuple[str, str], None] = {}
        self._keys: dict[tuple[str, str], _First] = {}
        self._keys_out: dict[tuple[str, str], tuple[int, bool]] = {}
        self._keys_stale: set[tuple[str, str]] = set()
        self._entries_out: list[tuple[object, ...]] = []
        self._erasures_out: list[tuple[object, ...]] = []
        self._audit_out: list[tuple[object, ...]] = []
        self._alerts_out: list[tuple[object, ...]] = []
        self._notes: dict[_Note, list[int]] = {}
        self._ciphers: dict[str, AESGCM] = {}

    # --- callers' writes ---------------------------------------------------------------------------

    def append(self, writes: Sequence[Write], actor: Actor) -> list[Receipt | MatcherError]:
        """Judge the writes in order. What is accepted is stored by `flush`, with one audit record for each kind of
        change and each thing changed."""
        self._look_up(writes)
        self._draw_nonce = seal.nonces(len(writes))
        answers: list[Receipt | MatcherError] = []
        for write in writes:
            try:
                answers.append(self._judge(write))
            except MatcherError as refusal:
                # A traceback would keep this transaction's rows alive for as long as the caller keeps the answer.
                answers.append(refusal.with_traceback(None))
        self._write_notes(actor)
        return answers

    def _judge(self, write: Write) -> Receipt:
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
            case CreateDeployment():
                return self._create_deployment(write)
            case EndDeployment():
                return self._end_deployment(write)
            case CreateCase():
                return self._create_case(write)
            case EndCase():
                return self._end_case(write)

    def _enrol(self, write: Enrol) -> Receipt:
        gallery_id, reference_id = write.gallery_id, write.reference_id
        gallery = self._state.galleries.get(gallery_id)
        if gallery is None:
            raise self._unknown_gallery(gallery_id)
        _check_name(reference_id, "reference_ids")
        _check_name(write.subject_id, "subject_ids")
        template = write.template
        if len(template) != 2 * gallery.space.dimension:
            raise InvalidInput(
                f"a template of {len(template)} bytes; {gallery.space} has {2 * gallery.space.dimension} (float16)",
                field="templates",
                cause=Cause.WRONG_DIMENSION,
                hint=f"send templates of {gallery.space}",
            )
        key = (gallery_id, write.idempotency_key)
        if write.idempotency_key:
            first = self._keys.get(key)
            if first is not None:
                return self._repeated(write, first)
            _check_name(write.idempotency_key, "idempotency_key")
        at_ms = self.at_ms
        expires_at_ms = at_ms + gallery.retention_ms
        if write.expires_at_ms:
            expires_at_ms = min(write.expires_at_ms, expires_at_ms)
        if expires_at_ms <= at_ms:
            raise Gone(
                f"reference {reference_id} would expire at once",
                field="expires_at_ms",
                cause=Cause.EXPIRED,
                hint="give a time in the future, or 0 for the gallery's retention",
            )
        place = (gallery_id, reference_id)
        old = self._live.get(place)
        lives = old is not None and old.expires_at_ms > at_ms
        if lives and not write.replace:
            raise Conflict(
                f"reference {reference_id} is live in gallery {gallery_id}",
                field="reference_ids",
                hint="set replace to enrol another template under it, or choose another reference_id",
            )
        cipher = self._ciphers.get(gallery_id) or self._cipher(gallery_id)
        self.sequence = sequence = self.sequence + 1
        sealed = seal.seal(
            cipher, self._draw_nonce(), template, seal.template_names(gallery_id, reference_id, sequence)
        )
        self._entries_out.append(
            (sequence, 1, at_ms, gallery_id, reference_id, write.subject_id, expires_at_ms, sealed, None, None)
        )
        if old is not None:
            self._erasures_out.append((old.sequence, at_ms + self._terms.erase_within_ms, None))
        self._live[place] = _Live(write.subject_id, sequence, at_ms, expires_at_ms)
        self._changed[place] = None
        if write.idempotency_key:
            self._keys[key] = _First(sequence, reference_id, write.subject_id, template)
            self._keys_out[key] = (sequence, key in self._keys_stale)
        self._note(_Note("reference.replaced" if lives else "reference.enrolled", gallery_id), sequence)
        return Receipt(WriteOutcome.REPLACED if lives else WriteOutcome.ENROLLED, sequence)

    def _repeated(self, write: Enrol, first: _First) -> Receipt:
        same = (first.reference_id, first.subject_id) == (write.reference_id, write.subject_id)
        if not same or first.template not in (None, write.template):
            raise Conflict(
                f"the key was used for another enrolment, of sequence {first.sequence}",
                field="idempotency_key",
                hint="a key stands for one enrolment: repeat it unchanged, or make a new key",
            )
        return Receipt(WriteOutcome.REPEATED, first.sequence)

    def _withdraw(self, write: Withdraw) -> Receipt:
        if write.gallery_id not in self._state.galleries:
            raise self._unknown_gallery(write.gallery_id)
        place = (write.gallery_id, write.reference_id)
        old = self._live.get(place)
        if old is None or old.expires_at_ms <= self.at_ms:
            raise NotFound(
                f"reference {write.reference_id} is not live in gallery {write.gallery_id}",
                field="reference_ids",
                hint="it was never enrolled, or was withdrawn or has expired",
            )
        sequence = self._end(place, old)
        detail = _detail({"reason": write.reason})
        self._note(_Note("reference.withdrawn", write.gallery_id, detail), sequence)
        return Receipt(WriteOutcome.DONE, sequence, (place,))

    def _withdraw_subject(self, write: WithdrawSubject) -> Receipt:
        if write.gallery_id and write.gallery_id not in self._state.galleries:
            raise self._unknown_gallery(write.gallery_id)
        _check_name(write.subject_id, "subject_id")
        detail = _detail({"reason": write.reason, "subject_id": write.subject_id})
        note = _Note("subject.withdrawn", write.gallery_id, detail)
        self._notes.setdefault(note, [])
        self.flush()
        held = select(live).where(live.c.subject_id == write.subject_id, live.c.expires_at_ms > self.at_ms)
        if write.gallery_id:
            held = held.where(live.c.gallery_id == write.gallery_id)
        ended: list[tuple[str, str]] = []
        held = held.order_by(live.c.gallery_id, live.c.reference_id)
        for gallery_id, reference_id, *rest in self._connection.execute(held).all():
            place = (gallery_id, reference_id)
            self._stored.add(place)
            self._note(note, self._end(place, _Live(*rest)))
            ended.append(place)
        return Receipt(WriteOutcome.DONE, self.sequence, tuple(ended))

    def _end(self, place: tuple[str, str], old: _Live, attributes: bytes | None = None) -> int:
        self.sequence += 1
        self._entries_out.append(
            (self.sequence, int(EntryKind.WITHDRAW), self.at_ms, *place, old.subject_id, 0, None, None, attributes)
        )
        self._erasures_out.append((old.sequence, self.at_ms + self._terms.erase_within_ms, None))
        self._live[place] = None
        self._changed[place] = None
        return self.sequence

    # --- the catalogue -----------------------------------------------------------------------------

    def _register_space(self, write: RegisterSpace) -> Receipt:
        space = write.space
        _check_name(space.id.name, "space.name")
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
        _check_name(gallery_id, "gallery_id")
        if gallery_id in self._state.galleries or gallery_id in self._state.deleted:
            raise Conflict(
                f"gallery {gallery_id} exists, or existed", field="gallery_id", hint="an id is never used twice"
            )
        if gallery.space not in self._state.spaces:
            raise NotFound(
                f"template space {gallery.space} is not registered", field="space", hint="register the space first"
            )
        if gallery.retention_ms < 1 or gallery.retention_ms > 200 * 366 * _DAY_MS:
            raise InvalidInput(f"retention_ms is {gallery.retention_ms}", field="retention_ms", hint="at least 1")
        if not math.isfinite(gallery.threshold) or abs(gallery.threshold) > 1:
            raise InvalidInput(f"threshold is {gallery.threshold}", field="threshold", hint="a cosine: from -1 to 1")
        stamped = gallery if gallery.created_at_ms else replace(gallery, created_at_ms=self.at_ms)
        record = _encoded("gallery", lambda: records.encode_gallery(stamped))
        # Before the commit: a gallery without a durable key could seal nothing. A key left over from a
        # transaction that failed is taken up again.
        self._keyring.create(gallery_id)
        return self._catalogue("gallery.created", gallery_id, EntryKind.GALLERY_CREATED, gallery_id, record)

    def _delete_gallery(self, write: DeleteGallery) -> Receipt:
        gallery_id = write.gallery_id
        if gallery_id not in self._state.galleries:
            raise self._unknown_gallery(gallery_id)
        self.flush()
        mine = live.c.gallery_id == gallery_id
        due = literal(self.at_ms + self._terms.erase_within_ms)
        self._connection.execute(
            insert(erasure).from_select(["sequence", "due_at_ms"], select(live.c.sequence, due).where(mine))
        )
        ended = self._connection.execute(delete(live).where(mine)).rowcount
        for place in self._live:
            if place[0] == gallery_id:
                self._live[place] = None
                self._stored.discard(place)
        self.destroyed.append(gallery_id)
        record = records.encode_ended("gallery_id", gallery_id, self.at_ms)
        return self._catalogue(
            "gallery.deleted",
            gallery_id,
            EntryKind.GALLERY_DELETED,
            gallery_id,
            record,
            _detail({"reason": write.reason, "references": ended}),
        )

    def _create_deployment(self, write: CreateDeployment) -> Receipt:
        deployment = write.deployment
        _check_name(deployment.deployment_id, "deployment_id")
        if deployment.deployment_id in self._state.deployments:
            raise Conflict(
                f"deployment {deployment.deployment_id} exists, or existed",
                field="deployment_id",
                hint="an id is never used twice",
            )
        self._check_window(deployment.gallery_ids, deployment.opens_at_ms, deployment.closes_at_ms)
        return self._catalogue(
            "deployment.created",
            deployment.deployment_id,
            EntryKind.DEPLOYMENT_CREATED,
            "",
            _encoded("deployment", lambda: records.encode_deployment(deployment)),
        )

    def _end_deployment(self, write: EndDeployment) -> Receipt:
        _check_open(self._state.deployments, "deployment", "deployment_id", write.deployment_id)
        record = records.encode_ended("deployment_id", write.deployment_id, self.at_ms)
        return self._catalogue("deployment.ended", write.deployment_id, EntryKind.DEPLOYMENT_ENDED, "", record)

    def _create_case(self, write: CreateCase) -> Receipt:
        case = write.case
        _check_name(case.case_reference, "case_reference")
        if case.case_reference in self._state.cases:
            raise Conflict(
                f"case {case.case_reference} exists, or existed",
                field="case_reference",
                hint="a reference is never used twice",
            )
        self._check_window(case.gallery_ids, case.opens_at_ms, case.closes_at_ms)
        record = _encoded("case", lambda: records.encode_case(case))
        return self._catalogue("case.created", case.case_reference, EntryKind.CASE_CREATED, "", record)

    def _end_case(self, write: EndCase) -> Receipt:
        _check_open(self._state.cases, "case", "case_reference", write.case_reference)
        record = records.encode_ended("case_reference", write.case_reference, self.at_ms)
        return self._catalogue("case.ended", write.case_reference, EntryKind.CASE_ENDED, "", record)

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
        self.sequence += 1
        self._entries_out.append((self.sequence, int(kind), self.at_ms, gallery_id, "", "", 0, None, record, None))
        self._state.apply(self.sequence, kind, record)
        self._note(_Note(action, subject, detail), self.sequence)
        return Receipt(WriteOutcome.DONE, self.sequence)

    def _unknown_gallery(self, gallery_id: str) -> NotFound:
        state = "was deleted" if gallery_id in self._state.deleted else "does not exist"
        return NotFound(
            f"gallery {gallery_id} {state}",
            field="gallery_id",
            cause=Cause.UNKNOWN_GALLERY,
            hint="list the galleries to see which there are",
        )

    def _cipher(self, gallery_id: str) -> AESGCM:
        cipher = self._keyring.cipher(gallery_id)
        if cipher is None:
            raise LogUnavailable(
                f"the key of gallery {gallery_id} is gone: nothing can be sealed",
                hint="restore the keys directory; if the key was destroyed on purpose, restart to delete the gallery",
            )
        self._ciphers[gallery_id] = cipher
        return cipher

    # --- audit and alerts --------------------------------------------------------------------------

    def record(self, events: Sequence[AuditEvent], details: Sequence[bytes], alerts: Sequence[Alert]) -> None:
        """Chain the events, then each alert with a record of its own, whose detail goes with the alert."""
        for event, detail in zip(events, details, strict=True):
            self._chain(event.actor, event.action, event.subject, {}, detail)
        if not alerts:
            return
        position = self._connection.execute(_ALERT_TAIL).scalar() or 0
        erase_at_ms = self.at_ms + self._terms.alert_retention_ms
        for place, one in enumerate(alerts, len(self._alerts_out) + position + 1):
            content = records.encode_alert(one)
            sealed = self._seal_record("alert", one.alert_id, content)
            self._alerts_out.append(
                (place, one.alert_id, one.deployment_id, one.raised_at_ms, erase_at_ms, sealed, None)
            )
            facts = {
                "deployment_id": one.deployment_id,
                "case_reference": one.case_reference,
                "candidates": len(one.candidates),
                "complete": one.complete,
                "sequence": one.sequence,
                "policy_version": one.policy_version,
            }
            self._chain(SERVICE.name, "alert.raised", one.alert_id, facts, content, erase_at_ms)

    def _note(self, note: _Note, sequence: int) -> None:
        gathered = self._notes.get(note)
        if gathered is None:
            self._notes[note] = [sequence]
        else:
            gathered.append(sequence)

    def _write_notes(self, actor: Actor) -> None:
        for note, sequences in self._notes.items():
            facts = {"count": len(sequences), "sequences": ranges(sequences)}
            self._chain(actor.name, note.action, note.subject, facts, note.detail)
        self._notes.clear()

    def _chain(
        self,
        actor: str,
        action: str,
        subject: str,
        facts: dict[str, object],
        detail: bytes,
        erase_at_ms: int | None = None,
    ) -> None:
        self._audit_position += 1
        salt = os.urandom(32) if detail else b""
        record = audit.chained(
            index=self._audit_position,
            at_ms=self.at_ms,
            actor=actor,
            action=action,
            subject=subject,
            facts=facts,
            digest=audit.detail_digest(salt, detail),
            previous=self._audit_hash,
        )
        self._audit_hash = str(record["hash"])
        sealed = self._seal_record("audit", str(self._audit_position), salt + detail) if detail else None
        self._audit_out.append((self._audit_position, audit.canonical(record), self._audit_hash, sealed, erase_at_ms))

    def _seal_record(self, what: str, name: str, content: bytes) -> bytes:
        nonce = os.urandom(seal.NONCE_BYTES)
        return seal.seal(self._keyring.system, nonce, content, seal.record_names(what, name))

    # --- expiry and erasure ------------------------------------------------------------------------

    def erase(self, now_ms: int, most: int) -> int:
        """Withdraw what has expired and erase what is due, at most `most` of each. Returns the templates erased.

        The stated time is when it must be done at the latest; nothing is gained by waiting for it.
        """
        now_ms = max(now_ms, self.at_ms)
        expired = (
            select(live).where(live.c.expires_at_ms <= now_ms).order_by(live.c.expires_at_ms, live.c.sequence)
        ).limit(most)
        reason = _detail({"reason": "expired"})
        for gallery_id, reference_id, *rest in self._connection.execute(expired).all():
            place = (gallery_id, reference_id)
            self._stored.add(place)
            sequence = self._end(place, _Live(*rest), reason)
            self._note(_Note("reference.expired", gallery_id), sequence)
        self.flush()
        due = select(erasure.c.sequence).where(erasure.c.held.is_(None)).order_by(erasure.c.sequence).limit(most)
        sequences = list(self._connection.execute(due).scalars())
        if sequences:
            chosen = select(due.subquery().c.sequence)
            self._connection.execute(update(entry).where(entry.c.sequence.in_(chosen)).values(sealed=None))
            self._connection.execute(delete(erasure).where(erasure.c.sequence.in_(chosen)))
            for sequence in sequences:
                self._note(_Note("template.erased", ""), sequence)
        self._drop_old_keys(most)
        self._erase_alerts(now_ms, most)
        self._write_notes(SERVICE)
        self.flush()
        return len(sequences)

    def _drop_old_keys(self, most: int) -> None:
        columns = (enrolment_key.c.gallery_id, enrolment_key.c.idempotency_key)
        old = select(*columns).where(enrolment_key.c.at_ms <= self.at_ms - self._terms.idempotency_window_ms)
        self._connection.execute(delete(enrolment_key).where(tuple_(*columns).in_(old.limit(most))))

    def _erase_alerts(self, now_ms: int, most: int) -> None:
        ended = select(alert.c.position, alert.c.alert_id).where(alert.c.erase_at_ms <= now_ms).limit(most)
        for position, alert_id in self._connection.execute(ended).all():
            self._connection.execute(delete(alert).where(alert.c.position == position))
            self._chain(SERVICE.name, "alert.erased", alert_id, {}, b"")
        told = select(audit_record.c.position).where(audit_record.c.erase_at_ms <= now_ms).limit(most)
        self._connection.execute(
            update(audit_record)
            .where(audit_record.c.position.in_(select(told.subquery().c.position)))
            .values(sealed=None, erase_at_ms=None)
        )

    # --- to and from the tables --------------------------------------------------------------------

    def _look_up(self, writes: Sequence[Write]) -> None:
        """Fetch what the enrolments and withdrawals will be judged by, in few queries for all of them."""
        references: dict[str, dict[str, None]] = {}
        keys: dict[str, dict[str, None]] = {}
        for write in writes:
            if isinstance(write, Enrol | Withdraw) and write.gallery_id in self._state.galleries:
                if (write.gallery_id, write.reference_id) not in self._live and _storable(write.reference_id):
                    references.setdefault(write.gallery_id, {})[write.reference_id] = None
                if isinstance(write, Enrol) and write.idempotency_key and _storable(write.idempotency_key):
                    keys.setdefault(write.gallery_id, {})[write.idempotency_key] = None
        for gallery_id, wanted in references.items():
            for some in _slices(list(wanted)):
                found = self._connection.execute(_LIVE, {"gallery": gallery_id, "wanted": some}).all()
                for reference_id, *rest in found:
                    place = (gallery_id, reference_id)
                    self._live[place] = _Live(*rest)
                    self._stored.add(place)
        for gallery_id, wanted in keys.items():
            for some in _slices([key for key in wanted if (gallery_id, key) not in self._keys]):
                self._look_up_keys(gallery_id, some)

    def _look_up_keys(self, gallery_id: str, keys: list[str]) -> None:
        oldest_ms = self.at_ms - self._terms.idempotency_window_ms
        found = self._connection.execute(_KEYS, {"gallery": gallery_id, "wanted": keys}).all()
        for key, used_at_ms, sequence, reference_id, subject_id, sealed in found:
            if used_at_ms <= oldest_ms:
                self._keys_stale.add((gallery_id, key))
                continue
            cipher = self._keyring.cipher(gallery_id)
            template = None
            if sealed is not None and cipher is not None:
                template = seal.unseal_template(cipher, sealed, gallery_id, reference_id, sequence)
            self._keys[(gallery_id, key)] = _First(sequence, reference_id, subject_id, template)

    def flush(self) -> None:
        """Store what has been judged so far."""
        connection = self._connection
        insert_many(connection, entry, self._entries_out)
        self._entries_out = []
        gone = [place for place in self._changed if place in self._stored]
        if gone:
            connection.execute(_UNLIVE, [{"gallery": one, "reference": other} for one, other in gone])
        rows: list[tuple[object, ...]] = [
            (*place, *now) for place in self._changed if (now := self._live[place]) is not None
        ]
        insert_many(connection, live, rows)
        self._stored.difference_update(gone)
        self._stored.update(place for place in self._changed if self._live[place] is not None)
        self._changed = {}
        insert_many(connection, erasure, self._erasures_out)
        self._erasures_out = []
        stale = [place for place, (_, replaces) in self._keys_out.items() if replaces]
        if stale:
            connection.execute(_UNKEY, [{"gallery": one, "key": other} for one, other in stale])
        insert_many(
            connection, enrolment_key, [(*place, one, self.at_ms) for place, (one, _) in self._keys_out.items()]
        )
        self._keys_out = {}
        insert_many(connection, audit_record, self._audit_out)
        self._audit_out = []
        insert_many(connection, alert, self._alerts_out)
        self._alerts_out = []


_TAIL = select(entry.c.sequence, entry.c.at_ms).order_by(entry.c.sequence.desc()).limit(1)
_AUDIT_TAIL = select(audit_record.c.position, audit_record.c.hash).order_by(audit_record.c.position.desc()).limit(1)
_ALERT_TAIL = select(func.max(alert.c.position))
_WANTED: BindParameter[list[str]] = bindparam("wanted", expanding=True)
_LIVE = select(
    live.c.reference_id, live.c.subject_id, live.c.sequence, live.c.enrolled_at_ms, live.c.expires_at_ms
).where(live.c.gallery_id == bindparam("gallery"), live.c.reference_id.in_(_WANTED))
_KEYS = (
    select(
        enrolment_key.c.idempotency_key,
        enrolment_key.c.at_ms,
        entry.c.sequence,
        entry.c.reference_id,
        entry.c.subject_id,
        entry.c.sealed,
    )
    .join(entry, entry.c.sequence == enrolment_key.c.sequence)
    .where(enrolment_key.c.gallery_id == bindparam("gallery"), enrolment_key.c.idempotency_key.in_(_WANTED))
)
_UNLIVE = delete(live).where(live.c.gallery_id == bindparam("gallery"), live.c.reference_id == bindparam("reference"))
_UNKEY = delete(enrolment_key).where(
    enrolment_key.c.gallery_id == bindparam("gallery"), enrolment_key.c.idempotency_key == bindparam("key")
)


def ranges(sequences: Iterable[int]) -> list[list[int]]:
    """Ascending integers as closed ranges: 3, 4, 5, 9 become [[3, 5], [9, 9]]."""
    closed: list[list[int]] = []
    for one in sequences:
        if closed and closed[-1][1] == one - 1:
            closed[-1][1] = one
        else:
            closed.append([one, one])
    return closed


def detail_bytes(detail: object) -> bytes:
    """Canonical form of a detail that will read back as the same bytes; b"" for an empty one.

    Raises ValueError for what JSON cannot carry.
    """
    # Twice: keys that are not strings become strings first, and are then put in order.
    return audit.canonical(json.loads(audit.canonical(detail))) if detail else b""


def _detail(detail: object) -> bytes:
    return _encoded("reason", lambda: detail_bytes(detail))


def _encoded(field: str, encode: Callable[[], bytes]) -> bytes:
    try:
        return encode()
    except (TypeError, ValueError) as unfit:
        raise InvalidInput(f"it cannot be stored: {unfit}", field=field, hint="send valid Unicode text") from unfit


def _storable(name: str) -> bool:
    try:
        return 0 < len(name.encode()) <= ID_BYTES_MAX
    except UnicodeEncodeError:
        return False


def _check_name(name: str, field: str) -> None:
    if not _storable(name):
        raise InvalidInput(
            "an identifier is empty, too long or not valid Unicode",
            field=field,
            hint=f"1 to {ID_BYTES_MAX} bytes of UTF-8",
        )


def _check_open(known: dict[str, bool], what: str, field: str, name: str) -> None:
    ended = known.get(name)
    if ended is None:
        raise NotFound(f"{what} {name} does not exist", field=field, hint=f"list the {what}s to see which there are")
    if ended:
        raise Gone(f"{what} {name} has ended already", field=field)


def _slices(names: list[str]) -> Iterable[list[str]]:
    return (names[start : start + _LOOK_UP] for start in range(0, len(names), _LOOK_UP))
