"""One write transaction: give out sequences, seal, chain the audit, store. What is accepted is judged elsewhere.

Sequences are given out while the write lock is held, and in one thread: their order is the order of commits.
Nothing here commits; whoever opened the connection does.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    BindParameter,
    Connection,
    Select,
    bindparam,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    update,
)

from matcher_service import audit, records
from matcher_service.errors import LogUnavailable
from matcher_service.gallery import seal
from matcher_service.gallery.keys import Keyring
from matcher_service.gallery.ledger import Ended
from matcher_service.gallery.names import storable
from matcher_service.gallery.schema import (
    alert,
    audit_record,
    data_key,
    enrolment_key,
    entry,
    erasure,
    insert_many,
    live,
    tally,
)
from matcher_service.gallery.state import CatalogueState
from matcher_service.terms import Actor, Alert, AuditEvent, Enrol, EnrolRun, EntryKind, Withdraw, Write

SERVICE = Actor("matcher-service")
"""Who acts when nobody asked: expiry, erasure, alerts."""

Place = tuple[str, str]
"""(gallery_id, reference_id), or (gallery_id, idempotency_key)."""

_LOOK_UP = 4096
_ENDED_AT_ONCE = 50_000
ENROL = int(EntryKind.ENROL)
_WITHDRAW = int(EntryKind.WITHDRAW)


class Terms(NamedTuple):
    """The stated times, in milliseconds."""

    idempotency_window_ms: int
    erase_within_ms: int
    alert_retention_ms: int
    audit_detail_retention_ms: int
    backups_destroyed_within_ms: int


class Held(NamedTuple):
    """A row of `live`: what is held of a reference, expired or not."""

    subject_id: str
    sequence: int
    enrolled_at_ms: int
    expires_at_ms: int


class FirstUse(NamedTuple):
    """The enrolment that used an idempotency key first. Of `sealed` and `template` one is set: `sealed` if it was
    stored before this transaction; neither if it has been erased since."""

    sequence: int
    reference_id: str
    subject_id: str
    sealed: bytes | None
    template: bytes | None


class Note(NamedTuple):
    """What one audit record will be about; the sequences of equal notes are gathered into one record."""

    action: str
    subject: str
    detail: bytes = b""


class WriteTransaction:
    """Holds what one transaction has accepted and not yet stored. Used by one thread, within one transaction.

    `at_ms` is the log time of everything in it: the wall clock, never before the newest entry. `sequence` is the
    newest given out. `destroyed` names galleries whose keys are to be destroyed once this is committed; `runs` are the
    enrolments that were stored in columns.
    """

    def __init__(
        self, connection: Connection, keyring: Keyring, state: CatalogueState, terms: Terms, wall_ms: int
    ) -> None:
        self.connection = connection
        self.keyring = keyring
        self.state = state
        self.terms = terms
        tail = connection.execute(_TAIL).first()
        self.sequence: int = tail.sequence if tail else 0
        self._found: tuple[int, int] = (self.sequence, tail.at_ms if tail else 0)
        self._newest_entry: tuple[object, ...] = ()
        self.at_ms: int = max(wall_ms, self._found[1])
        chain = connection.execute(_AUDIT_TAIL).first()
        self._audit_position: int = chain.position if chain else 0
        self._audit_hash: str = chain.hash if chain else audit.CHAIN_START
        self._found_hash = self._audit_hash
        state.catch_up(connection)
        self.destroyed: list[str] = []
        self.ended: list[Ended] = []
        self.runs: list[EnrolRun] = []
        # What is known of `live`, including what is not yet stored (None: held nowhere); which of it has a row;
        # which of it has changed.
        self._held: dict[Place, Held | None] = {}
        self._stored: set[Place] = set()
        self._changed: dict[Place, None] = {}
        self._first_uses: dict[Place, FirstUse] = {}
        self._keys_out: dict[Place, int] = {}
        self._keys_outlived: set[Place] = set()
        self._entries_out: list[tuple[object, ...]] = []
        self._erasures_out: list[tuple[object, ...]] = []
        self._audit_out: list[tuple[object, ...]] = []
        self._alerts_out: list[tuple[object, ...]] = []
        self._counts_out: Counter[tuple[str, str]] = Counter()
        self._notes: dict[Note, list[list[int]]] = {}
        self._sealings: dict[str, seal.Sealing] = {}

    # --- references --------------------------------------------------------------------------------

    def look_up(self, writes: Sequence[Write]) -> None:
        """Fetch what the enrolments and withdrawals will be judged by, in few queries for all of them."""
        references: dict[str, dict[str, None]] = {}
        keys: dict[str, dict[str, None]] = {}
        for write in writes:
            if isinstance(write, Enrol | Withdraw) and write.gallery_id in self.state.galleries:
                if (write.gallery_id, write.reference_id) not in self._held and storable(write.reference_id):
                    references.setdefault(write.gallery_id, {})[write.reference_id] = None
                if isinstance(write, Enrol) and write.idempotency_key and storable(write.idempotency_key):
                    keys.setdefault(write.gallery_id, {})[write.idempotency_key] = None
        for gallery_id, wanted in references.items():
            for some in _slices(list(wanted)):
                for reference_id, *rest in self._execute(_HELD, _HELD_POSTGRES, gallery_id, some):
                    self.add_held((gallery_id, reference_id), Held(*rest))
        oldest_ms = self.at_ms - self.terms.idempotency_window_ms
        for gallery_id, wanted in keys.items():
            for some in _slices([key for key in wanted if (gallery_id, key) not in self._first_uses]):
                for key, used_at_ms, sequence, reference_id, subject_id, sealed in self._execute(
                    _FIRST_USES, _FIRST_USES_POSTGRES, gallery_id, some
                ):
                    if used_at_ms > oldest_ms:
                        self._first_uses[(gallery_id, key)] = FirstUse(sequence, reference_id, subject_id, sealed, None)
                    else:
                        self._keys_outlived.add((gallery_id, key))
            self._look_up_messages(gallery_id, [key for key in wanted if (gallery_id, key) not in self._first_uses])

    def _look_up_messages(self, gallery_id: str, keys: Sequence[str]) -> None:
        """Fetch the first uses of those keys that stand for many references at once: `rows` of `enrolment_key`."""
        references: dict[str, list[str]] = {}
        for key in keys:
            message_key, newline, reference_id = key.rpartition("\n")
            if newline:
                references.setdefault(message_key, []).append(reference_id)
        for message_key, wanted in references.items():
            of_message = {"gallery": gallery_id, "low": f"{message_key}\n", "high": f"{message_key}\v"}
            for some in _slices(wanted):
                for key, used_at_ms, sequence, reference_id, subject_id, sealed in self.connection.execute(
                    _MESSAGE_USES, {**of_message, "wanted": some}
                ):
                    if key.rpartition("\n")[0] != message_key:
                        continue  # of another message, whose key goes on after a line's end
                    first = FirstUse(sequence, reference_id, subject_id, sealed, None)
                    place = (gallery_id, f"{message_key}\n{reference_id}")
                    if used_at_ms > self.at_ms - self.terms.idempotency_window_ms:
                        self._first_uses[place] = first
                    elif key == place[1]:
                        self._keys_outlived.add(place)

    def _execute(self, query: Select[Any], on_postgres: str, gallery_id: str, wanted: list[str]) -> Iterable[Any]:
        if self.connection.dialect.name == "postgresql":
            return self.connection.exec_driver_sql(on_postgres, (wanted, gallery_id))
        return self.connection.execute(query, {"gallery": gallery_id, "wanted": wanted})

    def held(self, place: Place) -> Held | None:
        """What is held under a place that was looked up; it may have expired."""
        return self._held.get(place)

    def add_held(self, place: Place, held: Held) -> None:
        """Take note of a row that was read from `live`."""
        self._held[place] = held
        self._stored.add(place)

    def first_use(self, place: Place) -> FirstUse | None:
        """Who used an idempotency key within the window, after it was looked up."""
        return self._first_uses.get(place)

    def enrol(self, write: Enrol, expires_at_ms: int, nonce: bytes) -> int:
        """Put a reference into its gallery, in the place of what is held there. Returns its sequence.

        Raises LogUnavailable if the gallery's key is gone.
        """
        gallery_id, reference_id = place = (write.gallery_id, write.reference_id)
        under = self.sealing(gallery_id)
        self.sequence = sequence = self.sequence + 1
        names = seal.template_names(gallery_id, reference_id, sequence)
        sealed = seal.seal(under, nonce, write.template, names)
        attributes = write.attributes or None
        self._entries_out.append(
            (sequence, ENROL, self.at_ms, *place, write.subject_id, expires_at_ms, sealed, None, attributes)
        )
        old = self._held.get(place)
        if old is not None:
            self._erase_later(old.sequence)
        self._held[place] = Held(write.subject_id, sequence, self.at_ms, expires_at_ms)
        self._changed[place] = None
        if write.idempotency_key:
            key = (gallery_id, write.idempotency_key)
            self._first_uses[key] = FirstUse(sequence, reference_id, write.subject_id, None, write.template)
            self._keys_out[key] = sequence
        return sequence

    def withdraw(self, place: Place, old: Held, attributes: bytes | None = None) -> int:
        """End the reference `old` that is held at `place`. Returns the sequence of its end."""
        self.sequence += 1
        self._entries_out.append(
            (self.sequence, _WITHDRAW, self.at_ms, *place, old.subject_id, 0, None, None, attributes)
        )
        self._erase_later(old.sequence)
        if old.expires_at_ms > self.at_ms:
            self.ended.append(Ended(*place, old.sequence, old.enrolled_at_ms))
        self._held[place] = None
        self._changed[place] = None
        return self.sequence

    def withdraw_gallery(self, gallery_id: str) -> int:
        """End all that a gallery holds, without an entry for each. Returns how many references that were."""
        self.flush()
        mine = live.c.gallery_id == gallery_id
        due = literal(self.at_ms + self.terms.erase_within_ms)
        in_order = select(live.c.reference_id).where(mine).order_by(live.c.reference_id)
        ended, more = 0, True
        # In parts: a server that is silent for as long as a large gallery takes would be given up.
        while more:
            last = self.connection.execute(in_order.offset(_ENDED_AT_ONCE - 1).limit(1)).scalar()
            more = last is not None
            part = mine & (live.c.reference_id <= last) if more else mine
            self.connection.execute(
                insert(erasure).from_select(["sequence", "due_at_ms"], select(live.c.sequence, due).where(part))
            )
            ended += self.connection.execute(delete(live).where(part)).rowcount
        for place in [place for place in self._held if place[0] == gallery_id]:
            self._held[place] = None
            self._stored.discard(place)
        self.destroyed.append(gallery_id)
        return ended

    def _erase_later(self, sequence: int) -> None:
        self._erasures_out.append((sequence, self.at_ms + self.terms.erase_within_ms, None))

    def stored_run(self, run: EnrolRun, last_sealed: bytes) -> None:
        """Take note of enrolments that were put straight into the tables, under the sequences next in turn; all that
        was accepted before had been flushed."""
        self.sequence = run.last_sequence
        self.runs.append(run)
        last = run[-1]
        self._newest_entry = (last.sequence, ENROL, self.at_ms, "", "", "", 0, last_sealed, None, None)
        if self._held:
            for reference_id in run.reference_ids:
                self._held.pop((run.gallery_id, reference_id), None)

    def sealing(self, gallery_id: str) -> seal.Sealing:
        """The key that a gallery's templates are sealed under. Raises LogUnavailable if it is gone."""
        known = self._sealings.get(gallery_id)
        if known is not None:
            return known
        # Asked in the transaction: of all processes none seals under an older generation once a rotation is committed.
        found = self.connection.execute(_GENERATION, {"gallery": gallery_id}).scalar()
        generation = 1 if found is None else int(found)
        cipher = self.keyring.cipher(gallery_id, generation)
        if cipher is None:
            raise LogUnavailable(
                f"the key of gallery {gallery_id} is gone: nothing can be sealed",
                hint="restore the keys directory; if the key was destroyed on purpose, restart to delete the gallery",
            )
        known = self._sealings[gallery_id] = seal.Sealing(generation, cipher)
        return known

    def rotated(self, gallery_id: str) -> None:
        """From here on the gallery seals under what the tables say now."""
        self._sealings.pop(gallery_id, None)

    def unsealed(self, sealed: bytes, gallery_id: str, reference_id: str, sequence: int) -> bytes:
        """The template of an entry. Raises LogUnavailable if its key is gone, DataDamaged."""
        cipher = self.keyring.cipher(gallery_id, seal.generation_of(sealed) or 1)
        if cipher is None:
            raise LogUnavailable(f"the key of gallery {gallery_id} is gone", hint="restore the keys directory")
        return seal.unseal_template(cipher, sealed, gallery_id, reference_id, sequence)

    # --- the catalogue -----------------------------------------------------------------------------

    def change_catalogue(self, kind: EntryKind, gallery_id: str, record: bytes, note: Note) -> int:
        """Add a catalogue entry and apply it. Returns its sequence."""
        self.sequence += 1
        self._entries_out.append((self.sequence, int(kind), self.at_ms, gallery_id, "", "", 0, None, record, None))
        self.state.apply(self.sequence, kind, record)
        self.note(note, self.sequence)
        return self.sequence

    # --- audit and alerts --------------------------------------------------------------------------

    def note(self, note: Note, *sequences: int) -> None:
        """Gather sequences under a note, as closed ranges, until `write_notes`."""
        spans = self._notes.setdefault(note, [])
        for sequence in sequences:
            if spans and spans[-1][1] == sequence - 1:
                spans[-1][1] = sequence
            else:
                spans.append([sequence, sequence])

    def note_run(self, note: Note, first: int, last: int) -> None:
        """The same for all the sequences from `first` to `last`."""
        self.note(note, first)
        self._notes[note][-1][1] = last

    def write_notes(self, actor: Actor) -> None:
        """Chain one audit record for each note."""
        for note, spans in self._notes.items():
            facts = {"count": sum(last - first + 1 for first, last in spans), "sequences": spans}
            self.chain(actor.name, note.action, note.subject, facts, note.detail)
        self._notes.clear()

    def record(self, events: Sequence[AuditEvent], details: Sequence[bytes], alerts: Sequence[Alert]) -> None:
        """Chain the events, then each alert with a record of its own, whose detail is erased with the alert.

        An alert whose id is held already is passed over: a probe that was sent again raises it again.
        """
        for event, detail in zip(events, details, strict=True):
            self.chain(event.actor, event.action, event.subject, {}, detail)
        if not alerts:
            return
        ids = {one.alert_id for one in alerts}
        ids.difference_update(self.connection.execute(_KNOWN_ALERTS, {"wanted": list(ids)}).scalars())
        ids.difference_update(row[1] for row in self._alerts_out)
        alerts = [one for one in alerts if one.alert_id in ids]
        if not alerts:
            return
        position = (self.connection.execute(_ALERT_TAIL).scalar() or 0) + len(self._alerts_out)
        for place, one in enumerate(alerts, position + 1):
            lives_ms = self.state.alert_retention_ms.get(one.deployment_id, self.terms.alert_retention_ms)
            erase_at_ms = self.at_ms + lives_ms
            content = records.encode_alert(one)
            sealed = self._seal_record("alert", one.alert_id, content)
            self._alerts_out.append(
                (place, one.alert_id, one.deployment_id, one.raised_at_ms, erase_at_ms, sealed, None, None)
            )
            self.count(records.authority_name(one.deployment_id, one.case_reference), "alerts", 1)
            self.count(records.authority_name(one.deployment_id, one.case_reference), "alerts_open", 1)
            facts = {
                "deployment_id": one.deployment_id,
                "case_reference": one.case_reference,
                "candidates": len(one.candidates),
                "complete": one.complete,
                "sequence": one.sequence,
                "policy_version": one.policy_version,
            }
            self.chain(SERVICE.name, "alert.raised", one.alert_id, facts, audit.reread(content), erase_at_ms)

    def count(self, authority: str, name: str, by: int) -> None:
        """Add to a counter of a deployment or case."""
        self._counts_out[authority, name] += by

    def chain(
        self,
        actor: str,
        action: str,
        subject: str,
        facts: Mapping[str, object],
        detail: bytes = b"",
        erase_at_ms: int | None = None,
    ) -> None:
        """Add the next audit record. `detail` is canonical JSON that may name persons, b"" for none; it is erased at
        `erase_at_ms`, None: when details of the audit are. The chain says when, so that an earlier loss is found."""
        self._audit_position += 1
        salt = os.urandom(audit.SALT_BYTES) if detail else b""
        if detail:
            erase_at_ms = self.at_ms + self.terms.audit_detail_retention_ms if erase_at_ms is None else erase_at_ms
            facts = {**facts, "detail_until_ms": erase_at_ms}
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
        content = audit.canonical(record)
        self._audit_out.append((self._audit_position, content, self._audit_hash, sealed, erase_at_ms, None))

    def _seal_record(self, what: str, name: str, content: bytes) -> bytes:
        nonce = os.urandom(seal.NONCE_BYTES)
        return seal.seal(self.keyring.system, nonce, content, seal.record_names(what, name))

    # --- to the tables -----------------------------------------------------------------------------

    @property
    def wrote(self) -> bool:
        """Whether it has given out a sequence."""
        return self.sequence > self._found[0]

    @property
    def newest_at_ms(self) -> int:
        """Log time: that of the newest entry. A transaction without one must not move it, or references judged by
        log time would be read by another."""
        return self.at_ms if self.wrote else self._found[1]

    def is_stored(self, connection: Connection) -> bool | None:
        """Whether another transaction finds what this one wrote; None if it wrote nothing that can tell.

        The newest audit record tells by its hash, and the newest entry by the nonce in what is sealed: after the
        database has lost a commit, as on a standby that took over too early, another gateway may have written the
        same enrolment in the same millisecond.
        """
        if self._audit_hash == self._found_hash:
            return None
        known = select(audit_record.c.hash).where(audit_record.c.position == self._audit_position)
        if connection.execute(known).scalar() != self._audit_hash:
            return False
        if not self._newest_entry:
            return True
        sequence, *_, sealed, _, _ = self._newest_entry
        found = connection.execute(select(entry.c.sealed).where(entry.c.sequence == sequence)).first()
        if found is None:
            return False
        if isinstance(sealed, bytes) and found.sealed is not None:
            # It may have been sealed anew meanwhile, under a newer generation of its key.
            return found.sealed == sealed or seal.generation_of(found.sealed) > seal.generation_of(sealed)
        return bool(found.sealed == sealed)

    def flush(self) -> None:
        """Store what has been accepted so far."""
        connection = self.connection
        if self._entries_out:
            self._newest_entry = self._entries_out[-1]
        insert_many(connection, entry, self._entries_out)
        self._entries_out = []
        gone = [place for place in self._changed if place in self._stored]
        if gone:
            connection.execute(_DROP_HELD, [{"gallery": one, "reference": other} for one, other in gone])
            self._stored.difference_update(gone)
        rows: list[tuple[object, ...]] = []
        for place in self._changed:
            now = self._held[place]
            if now is not None:
                rows.append((*place, *now))
                self._stored.add(place)
        insert_many(connection, live, rows)
        self._changed = {}
        insert_many(connection, erasure, self._erasures_out)
        self._erasures_out = []
        outlived = [place for place in self._keys_out if place in self._keys_outlived]
        if outlived:
            connection.execute(_DROP_KEY, [{"gallery": one, "key": other} for one, other in outlived])
            self._keys_outlived.difference_update(outlived)
        keys: list[tuple[object, ...]] = [(*place, one, self.at_ms, None) for place, one in self._keys_out.items()]
        insert_many(connection, enrolment_key, keys)
        self._keys_out = {}
        insert_many(connection, audit_record, self._audit_out)
        self._audit_out = []
        insert_many(connection, alert, self._alerts_out)
        self._alerts_out = []
        for (authority, name), by in self._counts_out.items():
            if not connection.execute(_ADD_TO_TALLY, {"of": authority, "called": name, "by": by}).rowcount:
                connection.execute(insert(tally).values(authority=authority, name=name, count=by))
        self._counts_out.clear()


def _slices(names: list[str]) -> Iterable[list[str]]:
    return (names[start : start + _LOOK_UP] for start in range(0, len(names), _LOOK_UP))


_TAIL = select(entry.c.sequence, entry.c.at_ms).order_by(entry.c.sequence.desc()).limit(1)
_AUDIT_TAIL = select(audit_record.c.position, audit_record.c.hash).order_by(audit_record.c.position.desc()).limit(1)
_ALERT_TAIL = select(func.max(alert.c.position))
_KNOWN_ALERTS = select(alert.c.alert_id).where(alert.c.alert_id.in_(bindparam("wanted", expanding=True)))
_GALLERY: BindParameter[str] = bindparam("gallery")
_GENERATION = select(data_key.c.generation).where(data_key.c.gallery_id == _GALLERY)
_WANTED: BindParameter[list[str]] = bindparam("wanted", expanding=True)
_HELD = select(
    live.c.reference_id, live.c.subject_id, live.c.sequence, live.c.enrolled_at_ms, live.c.expires_at_ms
).where(live.c.gallery_id == _GALLERY, live.c.reference_id.in_(_WANTED))
_FIRST_USES = (
    select(
        enrolment_key.c.idempotency_key,
        enrolment_key.c.at_ms,
        entry.c.sequence,
        entry.c.reference_id,
        entry.c.subject_id,
        entry.c.sealed,
    )
    .join(entry, entry.c.sequence == enrolment_key.c.sequence)
    .where(enrolment_key.c.gallery_id == _GALLERY, enrolment_key.c.idempotency_key.in_(_WANTED))
)
_MESSAGE_USES = (
    select(
        enrolment_key.c.idempotency_key,
        enrolment_key.c.at_ms,
        entry.c.sequence,
        entry.c.reference_id,
        entry.c.subject_id,
        entry.c.sealed,
    )
    .select_from(enrolment_key)
    .join(
        entry,
        entry.c.sequence.between(
            enrolment_key.c.sequence, enrolment_key.c.sequence + enrolment_key.c.rows - literal_column("1")
        ),
    )
    .where(
        enrolment_key.c.gallery_id == _GALLERY,
        enrolment_key.c.idempotency_key >= bindparam("low"),
        enrolment_key.c.idempotency_key < bindparam("high"),
        enrolment_key.c.rows.is_not(None),
        entry.c.reference_id.in_(_WANTED),
    )
)
# One look through the index for each name, whatever the planner takes the tables to hold: with statistics from when
# they were empty it would read all of a gallery for a list of names.
_HELD_POSTGRES = (
    "SELECT found.* FROM unnest(%s::text[]) AS wanted CROSS JOIN LATERAL (SELECT reference_id, subject_id, sequence, "
    "enrolled_at_ms, expires_at_ms FROM live WHERE gallery_id = %s AND reference_id = wanted LIMIT 1) AS found"
)
_FIRST_USES_POSTGRES = (
    "SELECT found.* FROM unnest(%s::text[]) AS wanted CROSS JOIN LATERAL (SELECT used.idempotency_key, used.at_ms, "
    "entry.sequence, entry.reference_id, entry.subject_id, entry.sealed FROM enrolment_key AS used JOIN entry "
    "USING (sequence) WHERE used.gallery_id = %s AND used.idempotency_key = wanted LIMIT 1) AS found"
)
_DROP_HELD = delete(live).where(live.c.gallery_id == _GALLERY, live.c.reference_id == bindparam("reference"))
_ADD_TO_TALLY = (
    update(tally)
    .where(tally.c.authority == bindparam("of"), tally.c.name == bindparam("called"))
    .values(count=tally.c.count + bindparam("by"))
)
_DROP_KEY = delete(enrolment_key).where(
    enrolment_key.c.gallery_id == _GALLERY, enrolment_key.c.idempotency_key == bindparam("key")
)
