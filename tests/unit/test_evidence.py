"""What is known of a threshold is told, kept, and said in words; what is not known as well."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from matcher_service import deployment_report, evidence, records
from matcher_service.catalogue import Catalogue
from matcher_service.errors import InvalidInput
from matcher_service.evidence_in_words import in_words
from matcher_service.models.promise import promise, threshold_limits
from matcher_service.models.score_calibrator import check_table
from matcher_service.terms import (
    ChangeThreshold,
    CreateGallery,
    Deployment,
    EntryKind,
    Gallery,
    GalleryKind,
    GenuineTable,
    Limits,
    LogEntry,
    MakeProposal,
    Proposal,
    ProposalAction,
    ScoreTable,
    SpaceId,
    TemplateSpace,
    Write,
)

SPACE = SpaceId("made-up", 1, 4)
GENUINE = GenuineTable((0.2, 0.4, 0.7), (0.0, 0.1, 1.0), (0.0, 0.05, 0.9), (0.02, 0.2, 1.0), 0.95, 500, 100)
TABLE = ScoreTable(
    (0.1, 0.3, 0.5, 0.6),
    (1.0, 1e-2, 1e-4, 1e-5),
    "made up",
    (0.5, 5e-3, 5e-5, 5e-6),
    (0.4, 2e-3, 1e-5, 1e-6),
    0.95,
    GENUINE,
)
OLD_TABLE = ScoreTable(TABLE.scores, TABLE.rates, "of the first release")


def catalogue(*tables: ScoreTable | None, galleries: tuple[Gallery, ...] = ()) -> Catalogue:
    """A space registered with these tables one after another, from sequence 1, and then the galleries."""
    centre = np.zeros(4, np.float32)
    entries = [
        (EntryKind.SPACE_REGISTERED, records.encode_space(TemplateSpace(SPACE, centre, score_table=one)), "")
        for one in tables
    ] + [(EntryKind.GALLERY_CREATED, records.encode_gallery(one), one.gallery_id) for one in galleries]
    found = Catalogue()
    found.apply([entry(sequence, kind, place, record) for sequence, (kind, record, place) in enumerate(entries, 1)])
    return found


def entry(sequence: int, kind: EntryKind, gallery_id: str, record: bytes) -> LogEntry:
    return LogEntry(sequence, kind, 0, gallery_id, "", "", 0, None, record)


def gallery(threshold: float = 0.5, size_max: int = 100, **other: Any) -> Gallery:
    named: dict[str, Any] = {"gallery_id": "g", "kind": GalleryKind.CUSTODY, "space": SPACE, **other}
    return Gallery(
        controller="c", lawful_basis="b", purpose="p", retention_ms=10, threshold=threshold, size_max=size_max, **named
    )


def created(write: CreateGallery, known: Catalogue) -> Gallery:
    settled = evidence.settled(write, known)
    assert isinstance(settled, CreateGallery)
    return settled.gallery


def words(held: Gallery) -> str:
    return " ".join(in_words(records.evidence_dict(held.evidence)))


def test_a_target_gives_the_threshold_with_its_limits_and_both_error_rates_and_all_of_it_is_kept() -> None:
    held = created(CreateGallery(gallery(float("nan")), 20), catalogue(TABLE))
    known = held.evidence
    assert known is not None
    assert known.needed == threshold_limits(TABLE, 1 / 20, 100)
    assert held.threshold == known.threshold == known.needed.high
    assert (known.one_false_alert_in, known.references, known.calibration_sequence) == (20, 100, 1)
    promised = promise(TABLE, held.threshold, 1 / 20, 100)
    assert known.fpir == Limits(promised.fpir_estimate, promised.fpir_low, promised.fpir_high)
    assert known.fpir.low < known.fpir.estimate < known.fpir.high <= 0.05 * (1 + 1e-6)
    assert known.fnir is not None
    assert known.fnir.low < known.fnir.estimate < known.fnir.high
    assert known.not_supported == ""
    assert records.decode_gallery(records.encode_gallery(held)) == held
    assert "one false alert in 20, with 100 references" in words(held)
    assert f"{known.fnir.estimate:.2%} are missed" in words(held)
    assert "NOT SUPPORTED" not in words(held)


def test_a_threshold_that_was_given_is_checked_against_the_calibration_and_not_refused() -> None:
    held = created(CreateGallery(gallery(0.5)), catalogue(TABLE))
    assert held.threshold == 0.5
    known = held.evidence
    assert known is not None
    assert known.needed is None
    assert known.fpir is not None
    assert known.fpir.high == pytest.approx(1 - (1 - 1e-4) ** 100)
    assert known.fnir == Limits(pytest.approx(0.4), 0.05, 1.0)  # type: ignore[arg-type]
    assert known.not_supported == ""
    assert "without a target" in words(held)


@pytest.mark.parametrize(
    ("threshold", "size_max", "tables", "said"),
    [
        (0.5, 0, (TABLE,), "No size was stated"),
        (0.61, 100, (TABLE,), "ends at a score of 0.6000"),
        (0.5, 100, (None,), "not calibrated"),
    ],
)
def test_what_the_calibration_does_not_bear_out_is_said(
    threshold: float, size_max: int, tables: tuple[ScoreTable | None, ...], said: str
) -> None:
    held = created(CreateGallery(gallery(threshold, size_max)), catalogue(*tables))
    assert held.evidence is not None
    assert said in held.evidence.not_supported
    assert f"NOT SUPPORTED BY EVIDENCE: {held.evidence.not_supported}" in words(held)
    assert records.decode_gallery(records.encode_gallery(held)) == held


def test_beyond_the_end_the_upper_limit_holds_and_nothing_lower_is_claimed() -> None:
    held = created(CreateGallery(gallery(0.9)), catalogue(TABLE))
    assert held.evidence is not None
    assert held.evidence.fpir is not None
    assert held.evidence.fpir.low == 0.0
    assert held.evidence.fpir.high == pytest.approx(1 - (1 - 1e-5) ** 100)
    assert held.evidence.fnir == Limits(1.0, 0.9, 1.0)


@pytest.mark.parametrize(
    ("one", "target", "tables", "field"),
    [
        (gallery(float("nan")), 10**9, (TABLE,), "rate"),
        (gallery(float("nan"), 0), 20, (TABLE,), "size_max"),
        (gallery(float("nan")), 1, (TABLE,), "one_false_alert_in"),
        (gallery(float("nan")), 20, (None,), "one_false_alert_in"),
        (gallery(float("nan"), space=SpaceId("other", 1, 4)), 20, (TABLE,), "one_false_alert_in"),
    ],
)
def test_a_target_that_the_calibration_does_not_reach_is_refused(
    one: Gallery, target: int, tables: tuple[ScoreTable | None, ...], field: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        evidence.settled(CreateGallery(one, target), catalogue(*tables))
    assert refused.value.field == field
    assert refused.value.hint


def test_senseless_writes_and_others_are_left_to_those_who_judge_them() -> None:
    known = catalogue(TABLE)
    for write in (
        CreateGallery(gallery(float("nan"))),
        CreateGallery(gallery(7.0)),
        CreateGallery(gallery(0.5, -1)),
        ChangeThreshold("g", float("nan"), "r", "a", "b", ()),
    ):
        assert evidence.settled(write, known) is write
    elsewhere = evidence.settled(ChangeThreshold("elsewhere", 0.5, "r", "a", "b", ()), known)
    assert isinstance(elsewhere, ChangeThreshold)
    assert elsewhere.evidence is None


def test_an_old_table_still_gives_a_threshold_and_says_that_it_knows_nothing_of_people_missed() -> None:
    record = json.loads(records.encode_space(TemplateSpace(SPACE, np.zeros(4, np.float32), (), OLD_TABLE)))
    for name in ("estimates", "low_rates", "confidence", "genuine"):
        del record["score_table"][name]
    table = records.decode_space(json.dumps(record).encode()).score_table
    assert table == OLD_TABLE
    held = created(CreateGallery(gallery(float("nan")), 20), catalogue(table))
    assert held.evidence is not None
    assert held.evidence.fnir is None
    assert held.evidence.fpir is not None
    assert held.evidence.fpir.low == 0.0
    assert "not known: the calibration does not say" in words(held)


def test_a_gallery_of_an_earlier_release_is_read_and_says_that_nothing_is_on_record() -> None:
    record = json.loads(records.encode_gallery(gallery()))
    del record["evidence"]
    held = records.decode_gallery(json.dumps(record).encode())
    assert held.evidence is None
    assert "Nothing is on record" in words(held)


def test_what_was_asked_of_a_gallery_stays_asked_when_its_threshold_changes() -> None:
    held = created(CreateGallery(gallery(float("nan")), 20), catalogue(TABLE))
    known = catalogue(TABLE, galleries=(held,))
    assert known.galleries["g"] == held
    lower = ChangeThreshold("g", 0.3, "more was asked for", "a", "b", ())
    raised = lower._replace(threshold=0.55)
    proposed = Proposal("p", ProposalAction.THRESHOLD, "g", "r", "a", 0, 1, threshold=0.3)
    changes: list[Write] = [lower, MakeProposal(proposed)]
    for write in changes:
        settled = evidence.settled(write, known)
        found = settled.evidence if isinstance(settled, ChangeThreshold) else settled.proposal.evidence  # type: ignore[union-attr]
        assert found is not None
        assert (found.one_false_alert_in, found.threshold) == (20, 0.3)
        assert "At most one false alert in 20 was asked for; the upper limit is 63%." in found.not_supported
    settled = evidence.settled(raised, known)
    assert isinstance(settled, ChangeThreshold)
    assert settled.evidence is not None
    assert settled.evidence.not_supported == ""
    record = records.encode_threshold_change(settled, held.threshold)
    assert records.decode_threshold_change(record) == ("g", 0.55, settled.evidence)
    known.apply([entry(9, EntryKind.THRESHOLD_CHANGED, "g", record)])
    assert known.galleries["g"].evidence == settled.evidence
    stored = settled_proposal(known, proposed)
    assert records.decode_proposal(records.encode_proposal(stored)) == stored


def settled_proposal(known: Catalogue, proposed: Proposal) -> Proposal:
    settled = evidence.settled(MakeProposal(proposed), known)
    assert isinstance(settled, MakeProposal)
    return settled.proposal


def test_another_calibration_is_told_beside_the_one_that_the_threshold_rests_on() -> None:
    held = created(CreateGallery(gallery(float("nan")), 20), catalogue(TABLE))
    assert evidence.superseded(held, catalogue(TABLE)) is None
    assert evidence.superseded(held, catalogue(TABLE, TABLE)) is None, "a space registered again with the same table"
    worse = dataclasses.replace(TABLE, rates=(1.0, 5e-2, 5e-3, 1e-5))
    now = evidence.superseded(held, catalogue(TABLE, worse))
    assert now is not None
    assert now.calibration_sequence == 2
    assert now.threshold == held.threshold
    assert now.needed is not None
    assert now.needed.high > held.threshold
    assert "the upper limit is" in now.not_supported
    assert evidence.superseded(gallery(), catalogue(TABLE)) is not None
    assert evidence.superseded(gallery(), catalogue(None)) is None


def test_what_is_published_of_a_deployment_says_what_each_threshold_rested_on() -> None:
    held = created(CreateGallery(gallery(float("nan")), 20), catalogue(TABLE))
    change = evidence.settled(ChangeThreshold("g", 0.3, "r", "a", "b", ()), catalogue(TABLE, galleries=(held,)))
    assert isinstance(change, ChangeThreshold)
    entries = [
        entry(2, EntryKind.GALLERY_CREATED, "g", records.encode_gallery(held)),
        entry(3, EntryKind.THRESHOLD_CHANGED, "g", records.encode_threshold_change(change, held.threshold)),
    ]
    report = deployment_report.build(Deployment("d", ("g",), 0, 1, 1, "a", "r"), entries, {}, 0, {})
    thresholds = report["galleries"][0]["thresholds"]
    assert [one["evidence"] for one in thresholds] == [
        records.evidence_dict(held.evidence),
        records.evidence_dict(change.evidence),
    ]
    page = deployment_report.page(report)
    assert page.count("at most one false alert in 20, with 100 references") == 2
    assert page.count("NOT SUPPORTED BY EVIDENCE: At most one false alert in 20 was asked for") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"scores": (0.2, 0.2, 0.7)},
        {"estimates": (0.0, 0.3, 1.0)},
        {"estimates": (0.0, 0.1)},
        {"low_rates": (0.0, 0.09, 0.05)},
        {"high_rates": (0.02, 0.2, 1.1)},
        {"scores": (0.2, 0.4, float("nan"))},
        {"scores": (), "estimates": (), "low_rates": (), "high_rates": ()},
    ],
)
def test_a_genuine_table_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    check_table(TABLE)
    with pytest.raises(InvalidInput) as refused:
        check_table(dataclasses.replace(TABLE, genuine=dataclasses.replace(GENUINE, **wrong)))
    assert refused.value.field == "score_table.genuine"
