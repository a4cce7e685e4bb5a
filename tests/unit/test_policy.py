"""Who may search what: every refusal names its field and says what to do."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from matcher_service import change_policy, policy, records
from matcher_service.catalogue import Catalogue
from matcher_service.errors import Forbidden, Gone, InvalidInput, MatcherError, NotFound, StaleProbe
from matcher_service.terms import (
    Actor,
    Case,
    Cause,
    CreateCase,
    CreateDeployment,
    CreateGallery,
    Deployment,
    EntryKind,
    Gallery,
    GalleryKind,
    LogEntry,
    ProbeMessage,
    RegisterSpace,
    SpaceId,
    SpaceMap,
    TemplateSpace,
    Write,
)

NOW = 1_800_000_000_000
SPACE = SpaceId("dlib", 1, 4)
OTHER = SpaceId("other", 1, 3)
STRANGE = SpaceId("strange", 1, 3)


def gallery(gallery_id: str, threshold: float = 0.5, space: SpaceId = SPACE) -> Gallery:
    return Gallery(gallery_id, GalleryKind.CUSTODY, "force", "PACE 64A", "identify", 86_400_000, space, threshold)


def deployment(**changes: Any) -> Deployment:
    plain = Deployment("op-1", ("a", "b"), NOW - 1000, NOW + 3_600_000, 10_000, "Insp. Reed", "wanted persons")
    return dataclasses.replace(plain, **changes)


def case(**changes: Any) -> Case:
    plain = Case("CASE/7".replace("/", "-"), ("a",), NOW - 1000, NOW + 3_600_000, "DC Hall", "burglary")
    return dataclasses.replace(plain, **changes)


def entry(sequence: int, kind: EntryKind, record: bytes, gallery_id: str = "") -> LogEntry:
    return LogEntry(sequence, kind, NOW, gallery_id, "", "", 0, None, record)


@pytest.fixture
def catalogue() -> Catalogue:
    built = Catalogue()
    spaces = [
        TemplateSpace(SPACE, np.zeros(4, np.float32), (SpaceMap(OTHER, np.ones((4, 3), np.float32)),)),
        TemplateSpace(OTHER, np.zeros(3, np.float32)),
        TemplateSpace(STRANGE, np.zeros(3, np.float32)),
    ]
    written = [(EntryKind.SPACE_REGISTERED, records.encode_space(space), "") for space in spaces]
    written += [
        (EntryKind.GALLERY_CREATED, records.encode_gallery(one), one.gallery_id)
        for one in (gallery("a", 0.5), gallery("b", 0.6), gallery("gone"), gallery("far", 0.5, STRANGE))
    ]
    written += [
        (EntryKind.GALLERY_DELETED, b"", "gone"),
        (EntryKind.DEPLOYMENT_CREATED, records.encode_deployment(deployment()), ""),
        (EntryKind.DEPLOYMENT_CREATED, records.encode_deployment(deployment(deployment_id="ended")), ""),
        (EntryKind.DEPLOYMENT_ENDED, records.encode_ended("deployment_id", "ended", NOW), ""),
        (
            EntryKind.DEPLOYMENT_CREATED,
            records.encode_deployment(deployment(deployment_id="wide", gallery_ids=("a", "far", "gone"))),
            "",
        ),
        (EntryKind.CASE_CREATED, records.encode_case(case()), ""),
    ]
    built.apply([entry(at, kind, record, name) for at, (kind, record, name) in enumerate(written, start=1)])
    return built


def message(**changes: Any) -> ProbeMessage:
    plain = ProbeMessage(
        actor=Actor("edge"),
        space=SPACE,
        probe_ids=["p"],
        templates=np.ones((1, 4), np.float32),
        captured_at_ms=np.array([NOW], np.int64),
        deployment_id="op-1",
        case_reference="",
        gallery_ids=(),
        threshold=None,
        rank_max=1,
        min_sequence=0,
        received_at=0.0,
        deadline=1.0,
    )
    return dataclasses.replace(plain, **changes)


def test_a_request_without_galleries_searches_all_that_its_authority_allows(catalogue: Catalogue) -> None:
    found = policy.plan(message(), catalogue, NOW)
    assert found.gallery_ids == ("a", "b")
    assert found.thresholds == (0.5, 0.6)
    assert found.probe_age_ms_max == 10_000


def test_law_11_a_request_may_raise_a_threshold(catalogue: Catalogue) -> None:
    assert policy.plan(message(threshold=0.7), catalogue, NOW).thresholds == (0.7, 0.7)


REFUSALS: list[tuple[str, dict[str, Any], int, type[MatcherError], Cause, str]] = [
    ("law 11: lower threshold", {"threshold": 0.55}, NOW, InvalidInput, Cause.THRESHOLD_BELOW_FLOOR, "threshold"),
    ("no authority", {"deployment_id": ""}, NOW, InvalidInput, Cause.INVALID, "deployment_id"),
    ("unknown deployment", {"deployment_id": "x"}, NOW, NotFound, Cause.NOT_FOUND, "deployment_id"),
    ("unknown case", {"deployment_id": "", "case_reference": "x"}, NOW, NotFound, Cause.NOT_FOUND, "case_reference"),
    ("ended deployment", {"deployment_id": "ended"}, NOW, Gone, Cause.GONE, "deployment_id"),
    ("closed window", {}, NOW + 3_600_000, Gone, Cause.GONE, "deployment_id"),
    ("window not open", {}, NOW - 2000, Forbidden, Cause.FORBIDDEN, "deployment_id"),
    ("gallery not allowed", {"gallery_ids": ("far",)}, NOW, Forbidden, Cause.UNKNOWN_GALLERY, "gallery_ids"),
    ("gallery nowhere", {"gallery_ids": ("zz",)}, NOW, Forbidden, Cause.UNKNOWN_GALLERY, "gallery_ids"),
    (
        "deleted gallery",
        {"deployment_id": "wide", "gallery_ids": ("gone",)},
        NOW,
        Gone,
        Cause.UNKNOWN_GALLERY,
        "gallery_ids",
    ),
    ("two spaces", {"deployment_id": "wide"}, NOW, InvalidInput, Cause.WRONG_SPACE, "gallery_ids"),
    ("no map", {"space": STRANGE}, NOW, InvalidInput, Cause.WRONG_SPACE, "space"),
    ("dimension", {"space": SpaceId("dlib", 1, 5)}, NOW, InvalidInput, Cause.WRONG_DIMENSION, "space.dimension"),
    ("rank_max", {"rank_max": 11}, NOW, Forbidden, Cause.RANK_MAX, "rank_max"),
]


@pytest.mark.parametrize(
    ("changes", "now", "kind", "cause", "field"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
def test_a_refusal_names_cause_field_and_remedy(
    catalogue: Catalogue, changes: dict[str, Any], now: int, kind: type[MatcherError], cause: Cause, field: str
) -> None:
    with pytest.raises(kind) as refused:
        policy.plan(message(**changes), catalogue, now)
    assert refused.value.cause is cause
    assert refused.value.field == field
    assert refused.value.hint


def test_a_gallery_outside_the_authority_is_refused_alike_whether_it_exists_or_not(catalogue: Catalogue) -> None:
    answers = []
    for name in ("far", "zz"):
        with pytest.raises(Forbidden) as refused:
            policy.plan(message(gallery_ids=(name,)), catalogue, NOW)
        answers.append(str(refused.value).replace(name, "*"))
    assert answers[0] == answers[1]


def test_a_registered_map_makes_another_space_comparable(catalogue: Catalogue) -> None:
    found = policy.plan(message(space=OTHER), catalogue, NOW)
    assert (found.source, found.target) == (OTHER, SPACE)


def test_each_bad_template_is_refused_alone() -> None:
    templates = np.ones((5, 4), np.float32)
    templates[1, 2], templates[2, 0], templates[3] = np.nan, np.inf, 0
    judged = policy.judge_templates(templates)
    assert judged.usable.tolist() == [True, False, False, False, True]
    assert {row: refusal.cause for row, refusal in judged.refusals.items()} == {
        1: Cause.NOT_FINITE,
        2: Cause.NOT_FINITE,
        3: Cause.ZERO_TEMPLATE,
    }
    assert judged.count == 2


def test_a_probe_older_than_its_deployment_allows_is_never_searched(catalogue: Catalogue) -> None:
    times = np.array([NOW, NOW - 10_000, NOW - 10_001, NOW + 5_000, NOW + 5_001], np.int64)
    sent = message(probe_ids=list("abcde"), templates=np.ones((5, 4), np.float32), captured_at_ms=times)
    judged = policy.judge_probes(sent, policy.plan(sent, catalogue, NOW), NOW)
    assert judged.usable.tolist() == [True, True, False, True, False]
    assert isinstance(judged.refusals[2], StaleProbe)
    assert judged.refusals[4].field == "captured_at_ms[4]"


def test_a_case_search_may_use_old_probes(catalogue: Catalogue) -> None:
    sent = message(deployment_id="", case_reference="CASE-7", captured_at_ms=np.zeros(1, np.int64))
    found = policy.plan(sent, catalogue, NOW)
    assert policy.judge_probes(sent, found, NOW).usable.all()


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.45, 0.5, -0.3])
def test_a_floor_is_the_least_float32_not_below_the_threshold(catalogue: Catalogue, threshold: float) -> None:
    planned = dataclasses.replace(policy.plan(message(), catalogue, NOW), thresholds=(threshold,))
    floor = policy.floors(planned, 3)[2, 0]
    assert float(floor) >= threshold
    assert float(np.nextafter(floor, np.float32(-1))) < threshold


WRITES: list[tuple[str, Write, str]] = [
    ("no controller", CreateGallery(dataclasses.replace(gallery("n"), controller=" ")), "controller"),
    ("no lawful basis", CreateGallery(dataclasses.replace(gallery("n"), lawful_basis="")), "lawful_basis"),
    ("no purpose", CreateGallery(dataclasses.replace(gallery("n"), purpose="")), "purpose"),
    ("no retention", CreateGallery(dataclasses.replace(gallery("n"), retention_ms=0)), "retention_ms"),
    ("endless retention", CreateGallery(dataclasses.replace(gallery("n"), retention_ms=10**15)), "retention_ms"),
    ("threshold", CreateGallery(gallery("n", threshold=1.5)), "threshold"),
    ("threshold NaN", CreateGallery(gallery("n", threshold=float("nan"))), "threshold"),
    ("space", CreateGallery(gallery("n", space=SpaceId("x", 1, 9))), "space"),
    ("id", CreateGallery(gallery("a/b")), "gallery_id"),
    ("deployment exists", CreateDeployment(deployment()), "deployment_id"),
    ("deployment without galleries", CreateDeployment(deployment(deployment_id="n", gallery_ids=())), "gallery_ids"),
    ("deployment over deleted", CreateDeployment(deployment(deployment_id="n", gallery_ids=("gone",))), "gallery_ids"),
    ("deployment unauthorised", CreateDeployment(deployment(deployment_id="n", authorised_by="")), "authorised_by"),
    ("deployment without reason", CreateDeployment(deployment(deployment_id="n", reason="")), "reason"),
    ("deployment for ever", CreateDeployment(deployment(deployment_id="n", closes_at_ms=10**15)), "closes_at_ms"),
    ("deployment over", CreateDeployment(deployment(deployment_id="n", closes_at_ms=NOW - 1)), "closes_at_ms"),
    ("probe age", CreateDeployment(deployment(deployment_id="n", probe_age_ms_max=0)), "probe_age_ms_max"),
    ("case without purpose", CreateCase(case(case_reference="n", purpose="")), "purpose"),
    ("case without requester", CreateCase(case(case_reference="n", requested_by="")), "requested_by"),
    ("centre", RegisterSpace(TemplateSpace(SpaceId("s", 1, 4), np.zeros(3, np.float32))), "centre"),
    ("centre NaN", RegisterSpace(TemplateSpace(SpaceId("s", 1, 2), np.full(2, np.nan, np.float32))), "centre"),
    ("dimension", RegisterSpace(TemplateSpace(SpaceId("s", 1, 99999), np.zeros(99999, np.float32))), "dimension"),
]


@pytest.mark.parametrize(("write", "field"), [row[1:] for row in WRITES], ids=[row[0] for row in WRITES])
def test_a_gallery_deployment_or_case_cannot_exist_without_its_lawful_parts(
    catalogue: Catalogue, write: Write, field: str
) -> None:
    with pytest.raises(MatcherError) as refused:
        change_policy.judge_change(write, Actor("clerk", galleries=None), catalogue, 128, 4096, NOW)
    assert refused.value.field == field
    assert refused.value.hint
