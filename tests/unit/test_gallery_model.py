"""The log against a plain model of it: any order of writes, times, erasures and restarts."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from matcher_service import audit
from matcher_service.errors import Conflict, Gone, MatcherError, NotFound
from matcher_service.gallery.log import open_sqlite_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import (
    Actor,
    CreateGallery,
    DeleteGallery,
    Enrol,
    EnrolRows,
    EntryKind,
    Gallery,
    GalleryKind,
    Receipt,
    RegisterSpace,
    SpaceId,
    TemplateSpace,
    Withdraw,
    WithdrawSubject,
    Write,
    WriteOutcome,
)
from tests.fake_clock import FakeClock

DIMENSION = 2
SPACE = SpaceId("face", 1, DIMENSION)
RETENTION_MS = 100_000
WINDOW_MS = 36_000
GALLERIES = ("g", "h", "never")
Place = tuple[str, str]


@dataclass
class Row:
    sequence: int
    subject_id: str
    enrolled_at_ms: int
    expires_at_ms: int


@dataclass
class Model:
    """What the log should hold. `erasing` waits for the next erasure."""

    newest_ms: int = 0
    galleries: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    rows: dict[Place, Row] = field(default_factory=dict)
    keys: dict[Place, tuple[Enrol, int, int]] = field(default_factory=dict)
    entries: list[tuple[EntryKind, str, str, str, bytes | None]] = field(default_factory=list)
    erasing: set[int] = field(default_factory=set)

    def add(self, *entry: Any) -> int:
        self.entries.append(entry)  # type: ignore[arg-type]
        return len(self.entries)

    def apply(self, write: Write, now_ms: int) -> Receipt | type[MatcherError]:
        match write:
            case Enrol():
                return self.enrol(write, now_ms)
            case Withdraw(gallery_id, reference_id):
                row = self.rows.get((gallery_id, reference_id))
                if gallery_id not in self.galleries or row is None or row.expires_at_ms <= now_ms:
                    return NotFound
                return Receipt(WriteOutcome.DONE, self.end((gallery_id, reference_id)), ((gallery_id, reference_id),))
            case WithdrawSubject(gallery_id, subject_id):
                if gallery_id and gallery_id not in self.galleries:
                    return NotFound
                ended = sorted(
                    place
                    for place, row in self.rows.items()
                    if row.subject_id == subject_id and row.expires_at_ms > now_ms and gallery_id in ("", place[0])
                )
                for place in ended:
                    self.end(place)
                return Receipt(WriteOutcome.DONE, len(self.entries), tuple(ended))
            case CreateGallery(gallery):
                if gallery.gallery_id in self.galleries | self.deleted:
                    return Conflict
                self.galleries.add(gallery.gallery_id)
                return Receipt(WriteOutcome.DONE, self.add(EntryKind.GALLERY_CREATED, gallery.gallery_id, "", "", None))
            case DeleteGallery(gallery_id):
                if gallery_id not in self.galleries:
                    return NotFound
                self.galleries.discard(gallery_id)
                self.deleted.add(gallery_id)
                for place in [place for place in self.rows if place[0] == gallery_id]:
                    self.erasing.add(self.rows.pop(place).sequence)
                # The key goes at once, and with it every template that it sealed.
                self.entries = [(*entry[:4], None) if entry[1] == gallery_id else entry for entry in self.entries]
                return Receipt(WriteOutcome.DONE, self.add(EntryKind.GALLERY_DELETED, gallery_id, "", "", None))
            case _:
                raise AssertionError(write)

    def enrol(self, write: Enrol, now_ms: int) -> Receipt | type[MatcherError]:
        if write.gallery_id not in self.galleries:
            return NotFound
        place, key = (write.gallery_id, write.reference_id), (write.gallery_id, write.idempotency_key)
        if write.idempotency_key and key in self.keys and self.keys[key][2] > now_ms - WINDOW_MS:
            first, sequence, _ = self.keys[key]
            erased = self.entries[sequence - 1][4] is None
            same = (first.reference_id, first.subject_id) == (write.reference_id, write.subject_id)
            if same and (erased or first.template == write.template):
                return Receipt(WriteOutcome.REPEATED, sequence)
            return Conflict
        expires_at_ms = min(write.expires_at_ms or now_ms + RETENTION_MS, now_ms + RETENTION_MS)
        if expires_at_ms <= now_ms:
            return Gone
        old = self.rows.get(place)
        lives = old is not None and old.expires_at_ms > now_ms
        if lives and not write.replace:
            return Conflict
        if old is not None:
            self.erasing.add(old.sequence)
        sequence = self.add(EntryKind.ENROL, *place, write.subject_id, write.template)
        self.rows[place] = Row(sequence, write.subject_id, now_ms, expires_at_ms)
        if write.idempotency_key:
            self.keys[key] = (write, sequence, now_ms)
        return Receipt(WriteOutcome.REPLACED if lives else WriteOutcome.ENROLLED, sequence)

    def end(self, place: Place) -> int:
        row = self.rows.pop(place)
        self.erasing.add(row.sequence)
        return self.add(EntryKind.WITHDRAW, *place, row.subject_id, None)

    def erase(self, now_ms: int) -> int:
        expired = [(row.expires_at_ms, *place) for place, row in self.rows.items() if row.expires_at_ms <= now_ms]
        for _, gallery_id, reference_id in sorted(expired):
            self.end((gallery_id, reference_id))
        erased = len(self.erasing)
        for sequence in self.erasing:
            self.entries[sequence - 1] = (*self.entries[sequence - 1][:4], None)
        self.erasing.clear()
        return erased


REFERENCES = st.sampled_from(["r1", "r2", "r3"])
SUBJECTS = st.sampled_from(["s1", "s2"])
EXPIRIES = st.sampled_from([0, 0, -5000, 5000, 50_000, 10**9])
TEMPLATES = st.sampled_from([b"\0\0\0\x3c", b"\0\x3c\0\0"])


class LogAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="gallery-model-"))
        self.clock = FakeClock()
        self.model = Model()
        self.runner = asyncio.Runner()
        self.open()

    def open(self) -> None:
        terms = StorageSettings(idempotency_window_h=WINDOW_MS / 3_600_000, erase_within_h=1, alert_retention_d=1)
        self.log = self.runner.run(open_sqlite_log(self.directory, self.directory / "keys", terms, self.clock))

    def teardown(self) -> None:
        self.runner.run(self.log.close())
        self.runner.close()
        shutil.rmtree(self.directory)

    @initialize()
    def register(self) -> None:
        space = TemplateSpace(SPACE, np.zeros(DIMENSION, np.float32))
        self.runner.run(self.log.append([RegisterSpace(space)], Actor("a")))
        self.model.add(EntryKind.SPACE_REGISTERED, "", "", "", None)
        self.model.newest_ms = self.clock.wall_ms()
        for gallery_id in ("g", "h"):
            self.append([self.created(gallery_id)])

    @staticmethod
    def created(gallery_id: str) -> CreateGallery:
        return CreateGallery(Gallery(gallery_id, GalleryKind.CUSTODY, "c", "l", "p", RETENTION_MS, SPACE, 0.5))

    def append(self, writes: list[Write]) -> None:
        now_ms = max(self.clock.wall_ms(), self.model.newest_ms)
        head = len(self.model.entries)
        expected = [self.model.apply(write, now_ms) for write in writes]
        if len(self.model.entries) > head:
            self.model.newest_ms = now_ms
        answers = self.runner.run(self.log.append(writes, Actor("a")))
        assert [one if isinstance(one, Receipt) else type(one) for one in answers] == expected, writes

    @rule(data=st.data(), count=st.integers(1, 6))
    def write(self, data: st.DataObject, count: int) -> None:
        expiries = EXPIRIES.map(lambda after: after and self.clock.wall_ms() + after)
        writes: st.SearchStrategy[Write] = st.one_of(
            st.builds(
                Enrol, st.sampled_from(GALLERIES), REFERENCES, SUBJECTS, TEMPLATES, expiries, st.booleans(),
                st.sampled_from(["", "", "k1", "k2"]),
            ),
            st.builds(Withdraw, st.sampled_from(GALLERIES), REFERENCES, st.just("x")),
            st.builds(WithdrawSubject, st.sampled_from(["", *GALLERIES]), SUBJECTS, st.just("x")),
        )  # fmt: skip
        self.append([data.draw(writes) for _ in range(count)])

    @rule(
        gallery_id=st.sampled_from(GALLERIES),
        wishes=st.lists(st.tuples(REFERENCES, SUBJECTS, TEMPLATES, EXPIRIES), min_size=1, max_size=5),
        replace=st.booleans(),
        key=st.sampled_from(["", "k1"]),
    )
    def enrol_rows(self, gallery_id: str, wishes: list[tuple[str, str, bytes, int]], replace: bool, key: str) -> None:
        references, subjects, templates, after = zip(*wishes, strict=True)
        rows = EnrolRows(
            gallery_id,
            references,
            subjects,
            np.frombuffer(b"".join(templates), "<f2").reshape(-1, DIMENSION),
            np.array([one and self.clock.wall_ms() + one for one in after], np.int64),
            replace,
            key,
        )
        head, now_ms = len(self.model.entries), max(self.clock.wall_ms(), self.model.newest_ms)
        answers = list(self.runner.run(self.log.enrol(rows, Actor("a"))))
        # In the order that the log gave them. A reference that stands there twice has them judged one by one.
        order = list(range(len(wishes)))
        if len(set(references)) == len(references):
            new = {row: one.sequence for row, one in enumerate(answers) if isinstance(one, Receipt)}
            order.sort(key=lambda row: new[row] if new.get(row, 0) > head else 10**9)
        for row in order:
            expected, answer = self.model.apply(rows.row(row), now_ms), answers[row]
            assert (answer if isinstance(answer, Receipt) else type(answer)) == expected, rows.row(row)
        if len(self.model.entries) > head:
            self.model.newest_ms = now_ms

    @rule(gallery_id=st.sampled_from(["g", "h"]), other=st.sampled_from(["i", "g"]))
    @precondition(lambda self: len(self.model.entries) > 12)
    def delete_and_create(self, gallery_id: str, other: str) -> None:
        self.append([DeleteGallery(gallery_id, "over"), self.created(other)])

    @rule(ms=st.sampled_from([1, 5000, 36_000, 100_000, -20_000]))
    def pass_time(self, ms: int) -> None:
        self.clock.step_wall(ms)

    @rule()
    def erase(self) -> None:
        now_ms = max(self.clock.wall_ms(), self.model.newest_ms)
        head = len(self.model.entries)
        expected = self.model.erase(now_ms)
        if len(self.model.entries) > head:
            self.model.newest_ms = now_ms
        assert self.runner.run(self.log.erase(self.clock.wall_ms())) == expected
        # Only now: a key past its window is dropped for good, so no clock stepped back revives it.
        self.model.keys = {place: first for place, first in self.model.keys.items() if first[2] > now_ms - WINDOW_MS}

    @rule()
    def reopen(self) -> None:
        self.runner.run(self.log.close())
        self.open()

    @invariant()
    def the_log_reads_as_the_model(self) -> None:
        entries = self.runner.run(self.log.read(0, 10_000))
        assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))
        assert [entry.at_ms for entry in entries] == sorted(entry.at_ms for entry in entries)
        assert [
            (one.kind, one.gallery_id, one.reference_id, one.subject_id, one.template) for one in entries
        ] == self.model.entries

    @invariant()
    def the_live_references_are_those_of_the_model(self) -> None:
        now_ms = max(self.clock.wall_ms(), self.model.newest_ms)
        for gallery_id in GALLERIES:
            held = self.runner.run(self.log.references(gallery_id, "", 100))
            assert [tuple(one)[:6] for one in held] == [
                (*place, row.subject_id, row.sequence, row.enrolled_at_ms, row.expires_at_ms)
                for place, row in sorted(self.model.rows.items())
                if place[0] == gallery_id and row.expires_at_ms > now_ms
            ]

    @invariant()
    def the_audit_names_every_sequence_once(self) -> None:
        chain = self.runner.run(self.log.audit(0, 10_000))
        audit.verify(chain)
        named: list[int] = []
        for record in chain:
            facts: Any = record["facts"]
            if record["action"] != "template.erased":
                named += [one for first, last in facts["sequences"] for one in range(first, last + 1)]
        assert sorted(named) == list(range(1, len(self.model.entries) + 1))


LogAgainstModel.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=25,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLogAgainstModel = LogAgainstModel.TestCase


def test_law_9_a_transaction_without_an_entry_does_not_move_the_log_time() -> None:
    """Else a reference enrolled after the clock was stepped back would be judged by one time and read by another."""
    machine = LogAgainstModel()
    try:
        machine.register()
        machine.pass_time(20_000)
        machine.append([WithdrawSubject("h", "s2", "x")])
        machine.pass_time(-20_000)
        machine.append([Enrol("g", "r1", "s2", b"\0\0\0\x3c", machine.clock.wall_ms() + 5000)])
        machine.the_live_references_are_those_of_the_model()
        assert ("g", "r1") in machine.model.rows
    finally:
        machine.teardown()
