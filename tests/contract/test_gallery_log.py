"""Every implementation of the GalleryLog seam keeps the same obligations."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from matcher_service import audit, records
from matcher_service.errors import (
    AuditUnavailable,
    Conflict,
    DataDamaged,
    Gone,
    InvalidInput,
    LogUnavailable,
    MatcherError,
    NotFound,
    TooLarge,
)
from matcher_service.gallery.log import open_sqlite_log
from matcher_service.partitions import partition_of
from matcher_service.seams import GalleryLog
from matcher_service.settings import StorageSettings
from matcher_service.terms import (
    Actor,
    Alert,
    AuditEvent,
    Candidate,
    Case,
    Cause,
    CreateCase,
    CreateDeployment,
    CreateGallery,
    DeleteGallery,
    Deployment,
    EndCase,
    EndDeployment,
    Enrol,
    EnrolRows,
    EntryKind,
    Gallery,
    GalleryKind,
    LogEntry,
    Receipt,
    RegisterSpace,
    ScoreTable,
    SpaceId,
    SpaceMap,
    TemplateSpace,
    Withdraw,
    WithdrawSubject,
    Write,
    WriteOutcome,
)
from tests.fake_clock import FakeClock

DIMENSION = 8
SPACE = SpaceId("face", 1, DIMENSION)
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
RETENTION_MS = 30 * DAY_MS
SETTINGS = StorageSettings(idempotency_window_h=24, erase_within_h=1, alert_retention_d=31)
CLERK = Actor("clerk")

Opener = Callable[[Path, FakeClock], Awaitable[GalleryLog]]


async def _sqlite(directory: Path, clock: FakeClock) -> GalleryLog:
    return await open_sqlite_log(directory, directory / "keys", SETTINGS, clock)


def _on_sqlite(request: pytest.FixtureRequest) -> Opener:
    return _sqlite


def _on_postgres(request: pytest.FixtureRequest) -> Opener:
    url = request.getfixturevalue("postgres_url")
    # Imported only where there is a server: the default tests run without its driver.
    from matcher_service.gallery.postgres import open_postgres_log

    async def opened(directory: Path, clock: FakeClock) -> GalleryLog:
        return await open_postgres_log(url, directory / "keys", SETTINGS, clock)

    return opened


OPENERS = [
    pytest.param(_on_sqlite, id="sqlite"),
    pytest.param(_on_postgres, id="postgres", marks=pytest.mark.cluster),
]


@dataclass
class World:
    """A log with its clock; `reopen` closes it and opens what it left."""

    log: GalleryLog
    clock: FakeClock
    directory: Path
    opener: Opener

    async def reopen(self) -> None:
        await self.log.close()
        self.log = await self.opener(self.directory, self.clock)

    async def do(self, *writes: Write, actor: Actor = CLERK) -> list[Receipt]:
        """Append what must be accepted."""
        answers = await self.log.append(writes, actor)
        assert len(answers) == len(writes)
        for answer in answers:
            assert isinstance(answer, Receipt), answer
        return [answer for answer in answers if isinstance(answer, Receipt)]

    async def refused(self, write: Write, kind: type[MatcherError], field: str, cause: Cause | None = None) -> None:
        """Append what must be refused, and see that it left nothing behind."""
        before = await self.log.head()
        (answer,) = await self.log.append([write], CLERK)
        assert type(answer) is kind, answer
        assert answer.field == field
        assert cause is None or answer.cause is cause
        assert await self.log.head() == before

    async def audited(self) -> list[dict[str, object]]:
        found = await self.log.audit(0, 100_000)
        audit.verify(found)
        return found


@pytest.fixture(params=OPENERS)
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    clock = FakeClock()
    opener = request.param(request)
    made = World(await opener(tmp_path / "data", clock), clock, tmp_path / "data", opener)
    try:
        yield made
    finally:
        await made.log.close()


@pytest.fixture
async def stocked(world: World) -> World:
    """With a space and the galleries `custody` and `immigration`."""
    await world.do(RegisterSpace(space()), CreateGallery(gallery("custody")), CreateGallery(gallery("immigration")))
    return world


def space(version: int = 1, **changes: object) -> TemplateSpace:
    made = TemplateSpace(SPACE._replace(version=version), np.arange(DIMENSION, dtype=np.float32) / 3)
    return replace(made, **changes)  # type: ignore[arg-type]


def gallery(gallery_id: str, **changes: object) -> Gallery:
    made = Gallery(gallery_id, GalleryKind.CUSTODY, "a force", "PACE 1984", "a test", RETENTION_MS, SPACE, 0.5)
    return replace(made, **changes)  # type: ignore[arg-type]


def template(number: int) -> bytes:
    return np.random.default_rng(number).standard_normal(DIMENSION).astype("<f2").tobytes()


def enrol(reference_id: str, number: int = 0, **changes: object) -> Enrol:
    made = Enrol("custody", reference_id, f"s-{reference_id}", template(number))
    return made._replace(**changes)  # type: ignore[arg-type]


def deployment(deployment_id: str = "op", galleries: Sequence[str] = ("custody",)) -> Deployment:
    return Deployment(deployment_id, tuple(galleries), 1000, 2000, 500, "Insp. Reed", "a test", "here", 5)


def case(case_reference: str = "case", galleries: Sequence[str] = ("custody",)) -> Case:
    return Case(case_reference, tuple(galleries), 1000, 2000, "DC Hall", "a test", 5)


def alert(number: int, deployment_id: str = "op", rate: float = 1e-6) -> Alert:
    found = Candidate("s-1", "r-1", "custody", 0.75, 1, rate)
    return Alert(
        alert_id=f"alert-{number}",
        probe_id=f"probe-{number}",
        deployment_id=deployment_id,
        case_reference="",
        raised_at_ms=1_800_000_000_000 + number,
        captured_at_ms=1_800_000_000_000,
        candidates=(found,),
        thresholds={"custody": 0.5},
        sequence=3,
        policy_version="1",
        complete=True,
    )


# --- the order ---------------------------------------------------------------------------------------


async def test_an_empty_log_has_head_zero_and_nothing_to_read(world: World) -> None:
    assert await world.log.head() == 0
    assert await world.log.read(0, 10) == []
    assert await world.log.audit(0, 10) == []
    assert await world.log.append([], CLERK) == []


async def test_law_1_entries_stand_in_one_sequence_in_the_order_of_their_commits(stocked: World) -> None:
    """Law 1: one sequence for everything, without gaps, in the order in which receipts were given."""
    receipts = await stocked.do(enrol("b"), enrol("a"), Withdraw("custody", "b", "released"))
    entries = await stocked.log.read(0, 100)
    assert [entry.sequence for entry in entries] == list(range(1, 7))
    assert [entry.kind for entry in entries] == [
        EntryKind.SPACE_REGISTERED,
        EntryKind.GALLERY_CREATED,
        EntryKind.GALLERY_CREATED,
        EntryKind.ENROL,
        EntryKind.ENROL,
        EntryKind.WITHDRAW,
    ]
    assert [receipt.sequence for receipt in receipts] == [4, 5, 6]
    assert await stocked.log.head() == 6


async def test_read_gives_what_lies_beyond_in_order_and_at_most_the_limit(stocked: World) -> None:
    await stocked.do(*(enrol(f"r{number}") for number in range(10)))
    assert [entry.sequence for entry in await stocked.log.read(4, 3)] == [5, 6, 7]
    assert [entry.sequence for entry in await stocked.log.read(12, 30)] == [13]
    assert await stocked.log.read(13, 30) == []


async def test_read_of_some_kinds_passes_over_the_others(stocked: World) -> None:
    await stocked.do(enrol("a"), enrol("b"), Withdraw("custody", "a", "x"), CreateDeployment(deployment()))
    catalogue = frozenset(EntryKind) - {EntryKind.ENROL, EntryKind.WITHDRAW}
    assert [entry.sequence for entry in await stocked.log.read(0, 10, catalogue)] == [1, 2, 3, 7]
    assert [entry.sequence for entry in await stocked.log.read(1, 1, catalogue)] == [2]
    assert [entry.sequence for entry in await stocked.log.read(0, 10, [EntryKind.WITHDRAW])] == [6]
    assert [entry.sequence for entry in await stocked.log.read(4, 10, [EntryKind.ENROL])] == [5]
    assert await stocked.log.read(0, 10, []) == []


async def test_an_enrolment_reads_back_as_it_was_written(stocked: World) -> None:
    wish = enrol("zoë/ß 1", 7, subject_id="人-1")
    (receipt,) = await stocked.do(wish)
    (entry,) = await stocked.log.read(3, 10)
    at_ms = stocked.clock.wall_ms()
    assert entry == (
        receipt.sequence,
        EntryKind.ENROL,
        at_ms,
        "custody",
        "zoë/ß 1",
        "人-1",
        at_ms + RETENTION_MS,
        wish.template,
        b"",
    )


async def test_all_of_it_survives_reopening(stocked: World) -> None:
    await stocked.do(enrol("a", 1, idempotency_key="k"), enrol("b", 2), Withdraw("custody", "b", "x"))
    await stocked.log.record([AuditEvent("clerk", "looked", "custody", {"why": "a test"})], [alert(1)])
    entries, chain = await stocked.log.read(0, 100), await stocked.audited()
    await stocked.reopen()
    assert await stocked.log.read(0, 100) == entries
    assert await stocked.audited() == chain
    assert await stocked.log.head() == 6
    assert [one.alert_id for one in await stocked.log.alerts("", "", 10)] == ["alert-1"]
    (receipt,) = await stocked.do(enrol("a", 1, idempotency_key="k"))
    assert receipt == Receipt(WriteOutcome.REPEATED, 4)


async def test_law_5_concurrent_callers_each_get_their_own_receipts(stocked: World) -> None:
    """Law 5: every acknowledged enrolment is in the log, under the sequence that its receipt says."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    written: dict[int, str] = {}

    async def caller(name: int) -> None:
        for turn in range(5):
            wishes = [enrol(f"{name}-{turn}-{number}") for number in range(dice.randrange(1, 8))]
            for wish, receipt in zip(wishes, await stocked.do(*wishes), strict=True):
                assert receipt.sequence not in written
                written[receipt.sequence] = wish.reference_id

    await asyncio.gather(*(caller(name) for name in range(20)))
    entries = await stocked.log.read(3, 10_000)
    assert {entry.sequence: entry.reference_id for entry in entries} == written
    assert [entry.sequence for entry in entries] == list(range(4, 4 + len(written)))
    await stocked.audited()


async def test_a_caller_who_leaves_spoils_nothing(stocked: World) -> None:
    leaving = [asyncio.create_task(stocked.log.append([enrol(f"gone-{number}")], CLERK)) for number in range(20)]
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await stocked.do(enrol("stays"))
    assert (await stocked.log.reference("custody", "stays")) is not None
    entries = await stocked.log.read(0, 100)
    assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))


async def test_too_many_writes_at_once_are_refused_whole(stocked: World) -> None:
    with pytest.raises(TooLarge):
        await stocked.log.append([enrol("a")] * 10_001, CLERK)
    assert await stocked.log.head() == 3


async def test_a_share_of_the_log_is_the_catalogue_and_the_references_of_its_partitions(stocked: World) -> None:
    """Whatever is asked for at once, and whatever the names are made of; each entry as `read` gives it."""
    names = [f"r{number}" for number in range(40)] + ["Zoë", "Ж/7", "a'b", "\u200b", "雪"]
    await stocked.do(*map(enrol, names))
    await stocked.do(Withdraw("custody", "r3", "released"))
    every = list(await stocked.log.read(0, 1000))
    upto = every[-2].sequence
    for partitions in (frozenset(range(100)), frozenset({partition_of("custody", "r3")}), frozenset()):
        expected = [
            one
            for one in every
            if one.sequence <= upto
            and (
                one.kind not in (EntryKind.ENROL, EntryKind.WITHDRAW)
                or partition_of(one.gallery_id, one.reference_id) in partitions
            )
        ]
        for limit in (1, 7, 1000):
            found: list[LogEntry] = []
            while some := await stocked.log.read_share(partitions, found[-1].sequence if found else 0, upto, limit):
                assert len(some) <= limit
                found += some
                if len(some) < limit:
                    break
            assert found == expected


# --- news ------------------------------------------------------------------------------------------------


async def test_wait_beyond_returns_at_once_for_what_is_past(stocked: World) -> None:
    async with asyncio.timeout(10):
        await stocked.log.wait_beyond(2)


async def test_wait_beyond_never_misses_a_commit(stocked: World) -> None:
    """A reader that only reads when told to sees every entry, however commits and waits interleave."""
    total = 3 + 300
    seen: list[int] = []

    async def tail() -> None:
        while len(seen) < total:
            after = seen[-1] if seen else 0
            await stocked.log.wait_beyond(after)
            seen.extend(entry.sequence for entry in await stocked.log.read(after, 7))

    async def write(name: int) -> None:
        for number in range(100):
            await stocked.do(enrol(f"{name}-{number}"))

    async with asyncio.timeout(60):
        await asyncio.gather(tail(), *(write(name) for name in range(3)))
    assert seen == list(range(1, total + 1))


async def test_waiting_is_given_up_when_the_log_closes(stocked: World) -> None:
    waiting = asyncio.create_task(stocked.log.wait_beyond(99))
    await asyncio.sleep(0)
    await stocked.log.close()
    async with asyncio.timeout(10):
        await waiting


async def test_a_cancelled_wait_leaves_nothing_behind(stocked: World) -> None:
    waiting = asyncio.create_task(stocked.log.wait_beyond(99))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await stocked.do(enrol("a"))


# --- enrolment ---------------------------------------------------------------------------------------------


async def test_each_refusal_of_an_enrolment_names_its_cause_and_field(stocked: World) -> None:
    now_ms = stocked.clock.wall_ms()
    await stocked.do(enrol("live"), CreateGallery(gallery("closed")), DeleteGallery("closed", "over"))
    unknown = Cause.UNKNOWN_GALLERY
    await stocked.refused(enrol("a", gallery_id="nowhere"), NotFound, "gallery_id", unknown)
    await stocked.refused(enrol("a", gallery_id="closed"), NotFound, "gallery_id", unknown)
    await stocked.refused(enrol("a", template=b"\0\0"), InvalidInput, "templates", Cause.WRONG_DIMENSION)
    await stocked.refused(enrol("a", template=b""), InvalidInput, "templates", Cause.WRONG_DIMENSION)
    await stocked.refused(enrol("a", expires_at_ms=now_ms), Gone, "expires_at_ms", Cause.EXPIRED)
    await stocked.refused(enrol("a", expires_at_ms=-1), Gone, "expires_at_ms", Cause.EXPIRED)
    await stocked.refused(enrol("live"), Conflict, "reference_ids", Cause.CONFLICT)
    for name in ("", "\ud800", "a\0b", "x" * 1025):
        await stocked.refused(enrol(name), InvalidInput, "reference_ids")
        await stocked.refused(enrol("a", subject_id=name), InvalidInput, "subject_ids")
        if name:
            await stocked.refused(enrol("a", idempotency_key=name), InvalidInput, "idempotency_key")


async def test_one_bad_write_spoils_no_other(stocked: World) -> None:
    answers = await stocked.log.append(
        [enrol("a"), enrol("a"), enrol("b", template=b"x"), Withdraw("custody", "zz", ""), enrol("c")], CLERK
    )
    assert [type(answer) for answer in answers] == [Receipt, Conflict, InvalidInput, NotFound, Receipt]
    assert [one.reference_id for one in await stocked.log.references("custody", "", 10)] == ["a", "c"]


async def test_expiry_is_the_retention_unless_it_is_sooner(stocked: World) -> None:
    now_ms = stocked.clock.wall_ms()
    soon, late = now_ms + 1, now_ms + RETENTION_MS + 1
    await stocked.do(enrol("a"), enrol("b", expires_at_ms=soon), enrol("c", expires_at_ms=late))
    held = await stocked.log.references("custody", "", 10)
    assert [one.expires_at_ms for one in held] == [now_ms + RETENTION_MS, soon, now_ms + RETENTION_MS]


async def test_replacing_keeps_one_live_reference_and_both_entries(stocked: World) -> None:
    await stocked.do(enrol("a", 1))
    (receipt,) = await stocked.do(enrol("a", 2, subject_id="other", replace=True))
    assert receipt == Receipt(WriteOutcome.REPLACED, 5)
    (held,) = await stocked.log.references("custody", "", 10)
    assert (held.sequence, held.subject_id) == (5, "other")
    assert await stocked.log.subject("s-a") == []
    (receipt,) = await stocked.do(enrol("b", 3, replace=True))
    assert receipt.outcome is WriteOutcome.ENROLLED


async def test_a_withdrawn_reference_can_be_enrolled_again_in_the_same_append(stocked: World) -> None:
    await stocked.do(enrol("a", 1), Withdraw("custody", "a", "x"), enrol("a", 2), WithdrawSubject("", "s-a", "x"))
    await stocked.do(enrol("a", 3), enrol("a", 4, replace=True))
    (held,) = await stocked.log.references("custody", "", 10)
    assert held.sequence == 9
    assert await stocked.log.erase(stocked.clock.wall_ms()) == 3
    templates = [entry.template for entry in await stocked.log.read(3, 10) if entry.kind is EntryKind.ENROL]
    assert templates == [None, None, None, template(4)]


# --- idempotency -----------------------------------------------------------------------------------------------


async def test_a_repeated_key_gives_the_first_receipt_and_changes_nothing(stocked: World) -> None:
    wish = enrol("a", 1, idempotency_key="k")
    first, again = await stocked.do(wish, wish)
    (later,) = await stocked.do(wish)
    assert first.outcome is WriteOutcome.ENROLLED
    assert again == later == Receipt(WriteOutcome.REPEATED, first.sequence)
    assert await stocked.log.head() == first.sequence


async def test_a_repeated_key_is_answered_even_after_the_reference_was_withdrawn(stocked: World) -> None:
    wish = enrol("a", 1, idempotency_key="k")
    (first,) = await stocked.do(wish)
    await stocked.do(Withdraw("custody", "a", "x"))
    assert (await stocked.do(wish))[0] == Receipt(WriteOutcome.REPEATED, first.sequence)
    await stocked.log.erase(stocked.clock.wall_ms())
    assert (await stocked.do(wish))[0] == Receipt(WriteOutcome.REPEATED, first.sequence)
    assert await stocked.log.references("custody", "", 10) == []


async def test_a_key_used_for_something_else_is_a_conflict(stocked: World) -> None:
    await stocked.do(enrol("a", 1, idempotency_key="k"))
    for other in (enrol("b", 1), enrol("a", 2), enrol("a", 1, subject_id="x")):
        await stocked.refused(other._replace(idempotency_key="k"), Conflict, "idempotency_key")
        await stocked.refused(other._replace(idempotency_key="k", replace=True), Conflict, "idempotency_key")


async def test_a_key_is_of_one_gallery(stocked: World) -> None:
    first, second = await stocked.do(
        enrol("a", 1, idempotency_key="k"), enrol("a", 1, idempotency_key="k", gallery_id="immigration")
    )
    assert first.sequence != second.sequence


async def test_a_refused_enrolment_uses_up_no_key(stocked: World) -> None:
    await stocked.refused(enrol("a", template=b"x", idempotency_key="k"), InvalidInput, "templates")
    assert (await stocked.do(enrol("a", 1, idempotency_key="k")))[0].outcome is WriteOutcome.ENROLLED


@pytest.mark.parametrize("swept", [False, True])
async def test_a_key_is_forgotten_after_the_window(stocked: World, swept: bool) -> None:
    await stocked.do(enrol("a", 1, idempotency_key="k"))
    stocked.clock.advance(24 * 3600 - 1)
    if swept:
        await stocked.log.erase(stocked.clock.wall_ms())
    assert (await stocked.do(enrol("a", 1, idempotency_key="k")))[0].outcome is WriteOutcome.REPEATED
    stocked.clock.advance(1)
    if swept:
        await stocked.log.erase(stocked.clock.wall_ms())
    fresh = enrol("b", 2, idempotency_key="k")
    assert (await stocked.do(fresh))[0].outcome is WriteOutcome.ENROLLED
    assert (await stocked.do(fresh))[0].outcome is WriteOutcome.REPEATED


# --- withdrawal ------------------------------------------------------------------------------------------------


async def test_withdrawing_a_reference_ends_it_once(stocked: World) -> None:
    await stocked.do(enrol("a"))
    (receipt,) = await stocked.do(Withdraw("custody", "a", "released"))
    assert receipt == Receipt(WriteOutcome.DONE, 5, (("custody", "a"),))
    assert await stocked.log.reference("custody", "a") is None
    await stocked.refused(Withdraw("custody", "a", "released"), NotFound, "reference_ids", Cause.NOT_FOUND)
    await stocked.refused(Withdraw("nowhere", "a", "released"), NotFound, "gallery_id", Cause.UNKNOWN_GALLERY)


async def test_withdrawing_a_subject_ends_every_live_reference_of_it(stocked: World) -> None:
    mine = [enrol(name, subject_id="s") for name in ("b", "a")]
    await stocked.do(*mine, enrol("c", subject_id="s", gallery_id="immigration"), enrol("d", subject_id="t"))
    before = await stocked.log.head()
    (receipt,) = await stocked.do(WithdrawSubject("", "s", "a court order"))
    assert receipt.reference_ids == (("custody", "a"), ("custody", "b"), ("immigration", "c"))
    entries = await stocked.log.read(before, 10)
    assert [(entry.kind, entry.gallery_id, entry.reference_id) for entry in entries] == [
        (EntryKind.WITHDRAW, *place) for place in receipt.reference_ids
    ]
    assert receipt.sequence == entries[-1].sequence == await stocked.log.head()
    assert [one.reference_id for one in await stocked.log.references("custody", "", 10)] == ["d"]


async def test_withdrawing_a_subject_from_one_gallery_leaves_the_others(stocked: World) -> None:
    await stocked.do(enrol("a", subject_id="s"), enrol("a", subject_id="s", gallery_id="immigration"))
    (receipt,) = await stocked.do(WithdrawSubject("immigration", "s", "x"))
    assert receipt.reference_ids == (("immigration", "a"),)
    assert [one.gallery_id for one in await stocked.log.subject("s")] == ["custody"]
    await stocked.refused(WithdrawSubject("nowhere", "s", "x"), NotFound, "gallery_id", Cause.UNKNOWN_GALLERY)


async def test_withdrawing_a_subject_who_is_live_nowhere_is_no_error(stocked: World) -> None:
    (receipt,) = await stocked.do(WithdrawSubject("", "nobody", "x"))
    assert receipt == Receipt(WriteOutcome.DONE, 3)


# --- the catalogue ---------------------------------------------------------------------------------------------


async def test_a_space_keeps_its_centre_and_may_gain_a_score_table(stocked: World) -> None:
    assert (await stocked.do(RegisterSpace(space())))[0] == Receipt(WriteOutcome.REPEATED, 1)
    await stocked.refused(RegisterSpace(space(centre=np.zeros(DIMENSION, np.float32))), Conflict, "space")
    other = SpaceId("old", 1, 3)
    richer = space(
        maps=(SpaceMap(other, np.arange(3 * DIMENSION, dtype=np.float32).reshape(DIMENSION, 3)),),
        score_table=ScoreTable((0.1, 0.2), (0.5, 0.25), "a test"),
    )
    (receipt,) = await stocked.do(RegisterSpace(richer))
    (entry,) = await stocked.log.read(receipt.sequence - 1, 1)
    stored = records.decode_space(entry.record)
    assert stored.score_table == richer.score_table
    np.testing.assert_array_equal(stored.centre, richer.centre)
    np.testing.assert_array_equal(stored.maps[0].matrix, richer.maps[0].matrix)
    await stocked.refused(
        RegisterSpace(space(2, centre=np.zeros(3, np.float32))), InvalidInput, "centre", Cause.WRONG_DIMENSION
    )
    nan = np.full(DIMENSION, np.nan, np.float32)
    await stocked.refused(RegisterSpace(space(2, centre=nan)), InvalidInput, "centre", Cause.NOT_FINITE)


async def test_a_gallery_id_is_never_used_twice(stocked: World) -> None:
    await stocked.refused(CreateGallery(gallery("custody")), Conflict, "gallery_id")
    await stocked.do(DeleteGallery("custody", "over"))
    await stocked.refused(CreateGallery(gallery("custody")), Conflict, "gallery_id")
    await stocked.refused(DeleteGallery("custody", "over"), NotFound, "gallery_id", Cause.UNKNOWN_GALLERY)
    await stocked.reopen()
    await stocked.refused(CreateGallery(gallery("custody")), Conflict, "gallery_id")


async def test_a_gallery_needs_a_registered_space_and_sensible_terms(stocked: World) -> None:
    await stocked.refused(CreateGallery(gallery("g", space=SPACE._replace(version=9))), NotFound, "space")
    await stocked.refused(CreateGallery(gallery("g", retention_ms=0)), InvalidInput, "retention_ms")
    await stocked.refused(CreateGallery(gallery("g", threshold=1.5)), InvalidInput, "threshold")
    await stocked.refused(CreateGallery(gallery("g", threshold=float("nan"))), InvalidInput, "threshold")
    await stocked.refused(CreateGallery(gallery("", threshold=0.5)), InvalidInput, "gallery_id")
    await stocked.refused(CreateGallery(gallery("g", purpose="\ud800")), InvalidInput, "gallery")


async def test_the_record_of_a_gallery_says_when_it_was_created(stocked: World) -> None:
    (entry,) = await stocked.log.read(1, 1)
    assert records.decode_gallery(entry.record) == gallery("custody", created_at_ms=stocked.clock.wall_ms())


async def test_law_10_deleting_a_gallery_ends_its_references_and_makes_its_templates_unreadable(
    stocked: World,
) -> None:
    """Law 10: deleting a gallery's key erases it everywhere."""
    await stocked.do(enrol("a", 1, subject_id="s"), enrol("a", 2, gallery_id="immigration"))
    (receipt,) = await stocked.do(DeleteGallery("custody", "over"))
    for _ in range(2):
        entries = await stocked.log.read(3, 10)
        assert [(entry.kind, entry.template) for entry in entries] == [
            (EntryKind.ENROL, None),
            (EntryKind.ENROL, template(2)),
            (EntryKind.GALLERY_DELETED, None),
        ]
        assert entries[-1].sequence == receipt.sequence
        assert entries[-1].gallery_id == "custody"
        assert records.decode_ended(entries[-1].record) == ("custody", stocked.clock.wall_ms())
        assert await stocked.log.references("custody", "", 10) == []
        assert await stocked.log.subject("s") == []
        await stocked.refused(enrol("b"), NotFound, "gallery_id", Cause.UNKNOWN_GALLERY)
        await stocked.reopen()
    assert await stocked.log.erase(stocked.clock.wall_ms()) == 1


@pytest.mark.parametrize("held", [0, 2, 3, 7])
async def test_a_large_gallery_is_deleted_in_parts(stocked: World, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr("matcher_service.gallery.transaction._ENDED_AT_ONCE", 3)
    await stocked.do(*(enrol(f"r{number}") for number in range(held)), enrol("kept", gallery_id="immigration"))
    await stocked.do(DeleteGallery("custody", "over"))
    assert await stocked.log.references("custody", "", 99) == []
    assert len(await stocked.log.references("immigration", "", 99)) == 1
    assert (await stocked.audited())[-1]["detail"] == {"reason": "over", "references": held}
    assert await stocked.log.erase(stocked.clock.wall_ms()) == held


async def test_a_gallery_created_used_and_deleted_in_one_append_is_gone(stocked: World) -> None:
    await stocked.do(
        CreateGallery(gallery("brief")),
        enrol("a", gallery_id="brief"),
        enrol("a", gallery_id="custody"),
        DeleteGallery("brief", "over"),
        enrol("a", 2, gallery_id="custody", replace=True),
    )
    assert [one.gallery_id for one in await stocked.log.subject("s-a")] == ["custody"]
    assert await stocked.log.erase(stocked.clock.wall_ms()) == 2


async def test_deployments_and_cases_are_created_once_and_ended_once(stocked: World) -> None:
    await stocked.do(CreateDeployment(deployment()), CreateCase(case()))
    await stocked.refused(CreateDeployment(deployment()), Conflict, "deployment_id")
    await stocked.refused(CreateCase(case()), Conflict, "case_reference")
    elsewhere = ["custody", "nowhere"]
    unknown = Cause.UNKNOWN_GALLERY
    await stocked.refused(CreateDeployment(deployment("2", elsewhere)), NotFound, "gallery_ids", unknown)
    await stocked.refused(CreateCase(case("2", elsewhere)), NotFound, "gallery_ids", unknown)
    backwards = replace(deployment("2"), closes_at_ms=1000)
    await stocked.refused(CreateDeployment(backwards), InvalidInput, "closes_at_ms")
    await stocked.do(EndDeployment("op"), EndCase("case"))
    await stocked.reopen()
    await stocked.refused(EndDeployment("op"), Gone, "deployment_id")
    await stocked.refused(EndCase("case"), Gone, "case_reference")
    await stocked.refused(EndDeployment("never"), NotFound, "deployment_id")
    await stocked.refused(EndCase("never"), NotFound, "case_reference")
    created, opened, ended, shut = await stocked.log.read(3, 10)
    assert records.decode_deployment(created.record) == deployment()
    assert records.decode_case(opened.record) == case()
    assert records.decode_ended(ended.record) == ("op", stocked.clock.wall_ms())
    assert records.decode_ended(shut.record) == ("case", stocked.clock.wall_ms())


# --- what is held ----------------------------------------------------------------------------------------------


async def test_references_come_in_pages_in_order_of_their_utf_8_bytes(stocked: World) -> None:
    names = ["b", "a", "Z", "é", "z", "\U0001f600", "\uffee", "10", "9"]
    await stocked.do(*(enrol(name) for name in names), enrol("elsewhere", gallery_id="immigration"))
    expected = sorted(names, key=str.encode)
    found: list[str] = []
    while page := await stocked.log.references("custody", found[-1] if found else "", 2):
        found += [one.reference_id for one in page]
    assert found == expected


async def test_law_9_an_expired_reference_is_held_no_longer_and_no_clock_revives_it(stocked: World) -> None:
    """Law 9: the later of the wall clock and the newest log time decides."""
    await stocked.do(enrol("a", expires_at_ms=stocked.clock.wall_ms() + 1000), enrol("b"))
    stocked.clock.advance(1)
    assert await stocked.log.reference("custody", "a") is None
    await stocked.refused(Withdraw("custody", "a", "x"), NotFound, "reference_ids")
    (receipt,) = await stocked.do(enrol("c"))
    stocked.clock.step_wall(-DAY_MS)
    assert [one.reference_id for one in await stocked.log.references("custody", "", 10)] == ["b", "c"]
    assert await stocked.log.subject("s-a") == []
    (entry,) = await stocked.log.read(receipt.sequence - 1, 1)
    (later,) = await stocked.do(enrol("d"))
    assert (await stocked.log.read(later.sequence - 1, 1))[0].at_ms == entry.at_ms
    await stocked.reopen()
    assert await stocked.log.reference("custody", "a") is None


async def test_an_expired_reference_can_be_enrolled_again_without_replace(stocked: World) -> None:
    await stocked.do(enrol("a", 1, expires_at_ms=stocked.clock.wall_ms() + 1000))
    stocked.clock.advance(1)
    assert (await stocked.do(enrol("a", 2)))[0].outcome is WriteOutcome.ENROLLED
    assert await stocked.log.erase(stocked.clock.wall_ms()) == 1
    assert await stocked.log.reference("custody", "a") is not None


# --- erasure ---------------------------------------------------------------------------------------------------


async def test_law_9_erasing_withdraws_what_has_expired_and_erases_it(stocked: World) -> None:
    """Law 9: expired and withdrawn templates are erased, and the audit says when."""
    soon = stocked.clock.wall_ms() + 1000
    await stocked.do(enrol("a", 1, expires_at_ms=soon), enrol("b", 2), enrol("c", 3), Withdraw("custody", "c", "x"))
    stocked.clock.advance(1)
    assert await stocked.log.erase(stocked.clock.wall_ms()) == 2
    assert await stocked.log.erase(stocked.clock.wall_ms()) == 0
    entries = await stocked.log.read(3, 10)
    assert [entry.template for entry in entries[:3]] == [None, template(2), None]
    assert (entries[-1].kind, entries[-1].reference_id) == (EntryKind.WITHDRAW, "a")
    expired, erased = (await stocked.audited())[-2:]
    assert (expired["action"], expired["facts"]) == ("reference.expired", {"count": 1, "sequences": [[8, 8]]})
    assert (erased["action"], erased["facts"]) == (
        "template.erased",
        {"count": 2, "sequences": [[4, 4], [6, 6]], "receipt": 1},
    )
    assert erased["at_ms"] == stocked.clock.wall_ms()


async def test_erasing_nothing_leaves_no_trace(stocked: World) -> None:
    await stocked.do(enrol("a"))
    chain = await stocked.audited()
    assert await stocked.log.erase(stocked.clock.wall_ms()) == 0
    assert await stocked.audited() == chain


async def test_much_is_erased_in_bounded_steps_until_none_is_left(stocked: World) -> None:
    await stocked.do(*(enrol(f"r{number}") for number in range(9000)))
    await stocked.do(*(enrol(f"t{number}") for number in range(3000)))
    await stocked.do(DeleteGallery("custody", "over"))
    steps = []
    while erased := await stocked.log.erase(stocked.clock.wall_ms()):
        steps.append(erased)
    assert sum(steps) == 12_000
    assert max(steps) <= 10_000


# --- audit and alerts ----------------------------------------------------------------------------------------------


async def test_law_7_every_write_is_in_the_audit_with_its_sequences(stocked: World) -> None:
    """Law 7: every write is in the audit chain; a batch stands as one record that names its sequences."""
    await stocked.do(enrol("a"), enrol("b"), enrol("c", gallery_id="immigration"), enrol("d"), actor=Actor("van 7"))
    await stocked.do(Withdraw("custody", "a", "released"), WithdrawSubject("", "s-b", "asked"))
    found = [
        (one["actor"], one["action"], one["subject"], one["facts"], one["detail"]) for one in await stocked.audited()
    ]
    assert found[:1] == [
        ("clerk", "space.registered", "face/1 (8-d)", {"count": 1, "sequences": [[1, 1]]}, None),
    ]
    # The chain says until when the personal detail stands beside it.
    until = {"detail_until_ms": stocked.clock.wall_ms() + 731 * DAY_MS}
    assert found[3:] == [
        ("van 7", "reference.enrolled", "custody", {"count": 3, "sequences": [[4, 5], [7, 7]]}, None),
        ("van 7", "reference.enrolled", "immigration", {"count": 1, "sequences": [[6, 6]]}, None),
        (
            "clerk",
            "reference.withdrawn",
            "custody",
            {"count": 1, "sequences": [[8, 8]], **until},
            {"reason": "released"},
        ),
        (
            "clerk",
            "subject.withdrawn",
            "",
            {"count": 1, "sequences": [[9, 9]], **until},
            {"reason": "asked", "subject_id": "s-b"},
        ),
    ]


async def test_a_refused_write_is_not_in_the_audit(stocked: World) -> None:
    before = await stocked.audited()
    await stocked.refused(enrol("a", template=b"x"), InvalidInput, "templates")
    assert await stocked.audited() == before


async def test_audit_comes_in_pages_that_verify_one_after_the_other(stocked: World) -> None:
    await stocked.log.record([AuditEvent("clerk", "looked", f"{number}", {"n": number}) for number in range(7)], [])
    index, last = 0, audit.CHAIN_START
    while page := await stocked.log.audit(index, 3):
        index, last = audit.verify(page, last, index)
    assert index == 10


async def test_events_read_back_with_their_detail_and_any_change_is_found(stocked: World) -> None:
    detail = {"2": [1, 2.5, None, True], "b": {"z": "ß", "a": 1e-7}, "1": 1e22}
    await stocked.log.record([AuditEvent("clerk", "case_search", "case-1", detail)], [])
    chain = await stocked.audited()
    assert chain[-1]["detail"] == detail
    for name, value in (("actor", "x"), ("at_ms", 1), ("facts", {"a": 1}), ("detail", {}), ("hash", "0")):
        forged = [*chain[:-1], {**chain[-1], name: value}]
        with pytest.raises(DataDamaged, match=f"audit record {len(chain)}"):
            audit.verify(forged)
    with pytest.raises(DataDamaged, match="audit record 2"):
        audit.verify([chain[0], *chain[2:]])


async def test_an_event_that_cannot_be_recorded_is_refused(stocked: World) -> None:
    with pytest.raises(AuditUnavailable):
        await stocked.log.record([AuditEvent("clerk", "x", "y", {"score": float("nan")})], [alert(1)])
    assert await stocked.log.alerts("", "", 10) == []


async def test_law_7_an_alert_is_recorded_with_its_audit_event(stocked: World) -> None:
    """Law 7: every alert is in the audit chain, in the same transaction."""
    await stocked.log.record([], [alert(1), alert(2, rate=float("nan"))])
    second, first = await stocked.log.alerts("", "", 10)
    assert first == alert(1)
    assert np.isnan(second.candidates[0].false_match_rate)
    chain = await stocked.audited()
    assert [(one["action"], one["subject"]) for one in chain[-2:]] == [
        ("alert.raised", "alert-1"),
        ("alert.raised", "alert-2"),
    ]
    assert "s-1" not in str({name: chain[-1][name] for name in audit.CHAINED})
    assert "s-1" in str(chain[-1]["detail"])


async def test_alerts_come_newest_first_in_pages_and_by_deployment(stocked: World) -> None:
    for number in range(5):
        await stocked.log.record([], [alert(number, f"op-{number % 2}")])
    assert [one.alert_id for one in await stocked.log.alerts("", "", 2)] == ["alert-4", "alert-3"]
    assert [one.alert_id for one in await stocked.log.alerts("", "alert-3", 9)] == ["alert-2", "alert-1", "alert-0"]
    assert [one.alert_id for one in await stocked.log.alerts("op-1", "", 9)] == ["alert-3", "alert-1"]
    assert [one.alert_id for one in await stocked.log.alerts("op-1", "alert-3", 9)] == ["alert-1"]
    with pytest.raises(NotFound):
        await stocked.log.alerts("", "alert-99", 9)


async def test_an_alert_is_erased_with_its_detail_after_its_retention_and_the_chain_still_verifies(
    stocked: World,
) -> None:
    await stocked.log.record([AuditEvent("clerk", "looked", "custody", {"why": "a test"})], [alert(1)])
    stocked.clock.advance(31 * 86_400 - 1)
    await stocked.log.erase(stocked.clock.wall_ms())
    assert len(await stocked.log.alerts("", "", 9)) == 1
    stocked.clock.advance(1)
    await stocked.log.erase(stocked.clock.wall_ms())
    assert await stocked.log.alerts("", "", 9) == []
    looked, raised, erased = (await stocked.audited())[-3:]
    assert looked["detail"] == {"why": "a test"}
    assert (raised["detail"], raised["salt"]) == (None, None)
    assert (erased["action"], erased["subject"]) == ("alert.erased", "alert-1")
    await stocked.log.record([], [alert(2)])
    assert [one.alert_id for one in await stocked.log.alerts("", "", 9)] == ["alert-2"]


# --- the end ---------------------------------------------------------------------------------------------------


async def test_a_closed_log_says_that_it_is_not_available(stocked: World) -> None:
    await stocked.log.close()
    await stocked.log.close()
    for refused in (stocked.log.append([enrol("a")], CLERK), stocked.log.read(0, 1), stocked.log.erase(0)):
        with pytest.raises(LogUnavailable) as caught:
            await refused
        assert caught.value.cause is Cause.SHUTTING_DOWN
    with pytest.raises(AuditUnavailable):
        await stocked.log.record([], [alert(1)])


async def test_closing_finishes_what_was_accepted(stocked: World) -> None:
    waiting = [asyncio.create_task(stocked.do(enrol(f"r{number}"))) for number in range(50)]
    await asyncio.sleep(0)
    await stocked.log.close()
    receipts = [receipt for answer in await asyncio.gather(*waiting) for receipt in answer]
    await stocked.reopen()
    assert sorted(receipt.sequence for receipt in receipts) == list(range(4, 54))
    assert len(await stocked.log.references("custody", "", 100)) == 50


# --- enrolments in columns ---------------------------------------------------------------------------------


def rows(*references: str, key: str = "", first: int = 0, **changes: object) -> EnrolRows:
    """The same wishes as `enrol` for each reference, numbered from `first`."""
    count = len(references)
    templates = np.frombuffer(b"".join(template(first + row) for row in range(count)), "<f2").reshape(count, DIMENSION)
    subjects = [f"s-{one}" for one in references]
    made = EnrolRows("custody", references, subjects, templates, np.zeros(count, np.int64), idempotency_key=key)
    return replace(made, **changes)  # type: ignore[arg-type]


def told(receipts: Sequence[Receipt | MatcherError]) -> list[object]:
    return [tuple(one[:2]) if isinstance(one, Receipt) else type(one) for one in receipts]


async def test_rows_are_enrolled_as_if_each_had_been_alone(stocked: World) -> None:
    """Same entries, templates, references and one audit record; read from memory or from the tables."""
    receipts = await stocked.log.enrol(rows("a", "zoë/ß 1", "人-1"), CLERK)
    assert told(receipts) == [(WriteOutcome.ENROLLED, 4), (WriteOutcome.ENROLLED, 5), (WriteOutcome.ENROLLED, 6)]
    in_columns = list(await stocked.log.read(3, 10))
    held = await stocked.log.references("custody", "", 10)
    (*_, noted) = await stocked.audited()
    assert (noted["action"], noted["facts"]) == ("reference.enrolled", {"count": 3, "sequences": [[4, 6]]})
    await stocked.reopen()
    assert list(await stocked.log.read(3, 10)) == in_columns
    await stocked.do(
        *(enrol(f"alone-{one}", number, subject_id=f"s-{one}") for number, one in enumerate(("a", "zoë/ß 1", "人-1")))
    )
    alone = list(await stocked.log.read(6, 10))
    assert [(one[1], *one[2:4], *one[5:]) for one in alone] == [(one[1], *one[2:4], *one[5:]) for one in in_columns]
    others = await stocked.log.references("custody", "alone", 3)
    assert [(one.subject_id, one.enrolled_at_ms, one.expires_at_ms) for one in held] == [
        (one.subject_id, one.enrolled_at_ms, one.expires_at_ms) for one in others
    ]


async def test_rows_that_are_not_plain_are_judged_one_by_one_and_spoil_no_other(stocked: World) -> None:
    await stocked.do(enrol("held"), enrol("gone"), Withdraw("custody", "gone", "x"))
    wish = rows(
        "new", "held", "gone", "zero\0", "late", "", expires_at_ms=np.array([0, 0, 0, 0, stocked.clock.wall_ms(), 0])
    )
    receipts = await stocked.log.enrol(wish, CLERK)
    assert told(receipts) == [
        (WriteOutcome.ENROLLED, 7),
        Conflict,
        (WriteOutcome.ENROLLED, 8),
        InvalidInput,
        Gone,
        InvalidInput,
    ]
    again = await stocked.log.enrol(replace(rows("held", "other", first=3), replace=True), CLERK)
    assert told(again) == [(WriteOutcome.REPLACED, 10), (WriteOutcome.ENROLLED, 9)]
    assert [one.reference_id for one in await stocked.log.references("custody", "", 9)] == [
        "gone",
        "held",
        "new",
        "other",
    ]
    assert await stocked.log.erase(stocked.clock.wall_ms()) == 2
    await stocked.audited()


async def test_a_reference_that_stands_twice_in_the_rows_is_judged_in_their_order(stocked: World) -> None:
    receipts = await stocked.log.enrol(rows("a", "b", "a"), CLERK)
    assert told(receipts) == [(WriteOutcome.ENROLLED, 4), (WriteOutcome.ENROLLED, 5), Conflict]


async def test_rows_for_what_is_no_gallery_or_of_another_dimension_are_refused(stocked: World) -> None:
    for wish, kind in (
        (rows("a", gallery_id="nowhere"), NotFound),
        (rows("a", templates=np.ones((1, DIMENSION + 1), np.float16)), InvalidInput),
    ):
        assert told(await stocked.log.enrol(wish, CLERK)) == [kind]
    assert await stocked.log.head() == 3
    assert list(await stocked.log.enrol(rows(), CLERK)) == []
    with pytest.raises(TooLarge):
        await stocked.log.enrol(rows(*map(str, range(10_001))), CLERK)


async def test_rows_repeated_with_their_key_change_nothing(stocked: World) -> None:
    """Also after a restart, in part, and beside a row that is new; another template under the key is a conflict."""
    first = await stocked.log.enrol(rows("a", "b", "c", key="k"), CLERK)
    await stocked.reopen()
    again = await stocked.log.enrol(rows("a", "b", "c", key="k"), CLERK)
    assert told(again) == [(WriteOutcome.REPEATED, one) for one in first.sequences.tolist()]
    assert await stocked.log.head() == 6
    some = await stocked.log.enrol(rows("c", "d", key="k", first=2), CLERK)
    assert told(some) == [(WriteOutcome.REPEATED, 6), (WriteOutcome.ENROLLED, 7)]
    assert told(await stocked.log.enrol(rows("a", key="k", first=1), CLERK)) == [Conflict]
    (alone,) = await stocked.do(enrol("b", 1, idempotency_key="k\nb"))
    assert alone == (WriteOutcome.REPEATED, 5, ())
    longer = await stocked.log.enrol(rows("b", "e", key="k\na", first=1), CLERK)
    assert told(longer) == [Conflict, (WriteOutcome.ENROLLED, 8)]
    assert told(await stocked.log.enrol(rows("a\nb", key="k", first=1), CLERK)) == [(WriteOutcome.ENROLLED, 9)]
    stocked.clock.step_wall(25 * HOUR_MS)
    await stocked.do(Withdraw("custody", "a", "x"))
    assert told(await stocked.log.enrol(rows("a", key="k", first=9), CLERK)) == [(WriteOutcome.ENROLLED, 11)]
    assert told(await stocked.log.enrol(rows("a", key="k", first=9), CLERK)) == [(WriteOutcome.REPEATED, 11)]


async def test_law_10_what_is_held_in_memory_for_replay_goes_with_what_is_erased(stocked: World) -> None:
    """Laws 9 and 10: an erased template, or one whose key was destroyed, is read from nowhere."""
    await stocked.log.enrol(rows("a", "b"), CLERK)
    await stocked.do(Withdraw("custody", "a", "x"))
    assert await stocked.log.erase(stocked.clock.wall_ms()) == 1
    assert [entry.template for entry in await stocked.log.read(3, 2)] == [None, template(1)]
    await stocked.log.enrol(rows("c", gallery_id="immigration"), CLERK)
    await stocked.do(DeleteGallery("immigration", "over"))
    assert [entry.template for entry in await stocked.log.read(6, 1)] == [None]


async def test_law_1_rows_are_read_in_any_pieces(stocked: World) -> None:
    """Law 1: wherever a reader stands, what follows is what the log holds next."""
    await stocked.log.enrol(rows("a", "b", "c"), CLERK)
    await stocked.do(Withdraw("custody", "b", "x"))
    await stocked.log.enrol(rows("d", "e", first=3), CLERK)
    for limit in (1, 2, 100):
        after, found = 3, list[str]()
        while entries := await stocked.log.read(after, limit):
            assert len(entries) <= limit
            found += [entry.reference_id for entry in entries]
            after = entries[-1].sequence
        assert found == ["a", "b", "c", "b", "d", "e"]


async def test_the_attributes_of_rows_are_kept_beside_their_entries(stocked: World) -> None:
    receipts = await stocked.log.enrol(rows("a", "b", attributes=(b'{"quality":1}', b"")), CLERK)
    assert [isinstance(one, Receipt) for one in receipts] == [True, True]


async def test_messages_of_rows_at_once_share_a_transaction_in_any_order(stocked: World) -> None:
    """None is lost, none is given a sequence twice, and a withdrawal among them ends what it found."""
    names = [[f"r{message}-{row}" for row in range(20)] for message in range(8)]
    answers = await asyncio.gather(
        *(stocked.log.enrol(rows(*some, first=20 * message), CLERK) for message, some in enumerate(names)),
        stocked.log.append([Withdraw("custody", "r0-3", "x")], CLERK),
        *(stocked.log.enrol(rows(*some[:5], first=20 * message), CLERK) for message, some in enumerate(names)),
    )
    sequences = [one.sequence for answer in answers for one in answer if isinstance(one, Receipt)]
    assert sorted(sequences) == list(range(4, 4 + len(sequences)))
    newest: dict[str, LogEntry] = {}
    after = 3
    while entries := await stocked.log.read(after, 1000):
        newest |= {entry.reference_id: entry for entry in entries}
        after = entries[-1].sequence
    assert after == await stocked.log.head()
    assert {one.reference_id: one.sequence for one in await stocked.log.references("custody", "", 1000)} == {
        name: entry.sequence for name, entry in newest.items() if entry.kind is EntryKind.ENROL
    }
    await stocked.audited()
