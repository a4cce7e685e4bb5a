"""Decisions: Law 4, nothing partial is silent; Law 7, nothing is disclosed without its audit."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from matcher_service import decision
from matcher_service.batching import Found
from matcher_service.decisions import NOBODY, Decisions
from matcher_service.errors import Overloaded
from matcher_service.gateway import encode
from matcher_service.terms import Actor, Cause, Decision, IdentifyReply, Outcome, ProbeMessage, SearchResult, SpaceId

GALLERIES = ("custody", "immigration")


def found(counts: list[int], missing: tuple[str, ...] = ()) -> Found:
    total = sum(counts)
    result = SearchResult(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        gallery=np.arange(total, dtype=np.int64) % 2,
        scores=np.linspace(0.9, 0.5, total, dtype=np.float32),
        reference_ids=[f"r{at}" for at in range(total)],
        subject_ids=[f"s{at}" for at in range(total)],
        sequence=9,
        missing=missing,
    )
    return Found(result, np.full(total, 1e-4), np.ones(len(counts), bool))


def decide(counts: list[int], missing: bool = False) -> Decisions:
    ids = [f"p{at}" for at in range(len(counts))]
    numbers = itertools.count()
    return decision.decide(ids, found(counts), GALLERIES, missing, lambda: f"alert-{next(numbers)}")


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.booleans())
def test_law_4_a_candidate_is_an_alert_and_only_what_lacks_one_can_be_incomplete(
    counts: list[int], missing: bool
) -> None:
    decisions = decide(counts, missing)
    assert [one.probe_id for one in decisions] == [f"p{at}" for at in range(len(counts))]
    for count, one in zip(counts, decisions, strict=True):
        assert len(one.candidates) == count
        if count:
            assert one.outcome is Outcome.ALERT
        else:
            assert one.outcome is (Outcome.INCOMPLETE if missing else Outcome.NO_CANDIDATE)
            assert one.cause == (Cause.SHARD_UNAVAILABLE if missing else "")


@given(
    st.lists(st.sampled_from(["nobody", "alert", "missing", "refused"]), min_size=1, max_size=12),
    st.sampled_from([NOBODY, Decision("", Outcome.INCOMPLETE, cause="SHARD_UNAVAILABLE")]),
)
def test_decisions_kept_by_what_is_usual_are_those_of_the_rows(kinds: list[str], usual: Decision) -> None:
    made = {
        "nobody": Decision("", Outcome.NO_CANDIDATE),
        "alert": Decision("", Outcome.ALERT, alert_id="a"),
        "missing": Decision("", Outcome.INCOMPLETE, cause="SHARD_UNAVAILABLE"),
        "refused": decision.rejection("", Overloaded("full", hint="later")),
    }
    rows = [made[kind]._replace(probe_id=f"p{at}") for at, kind in enumerate(kinds)]
    others = {row: one for row, one in enumerate(rows) if one[1:] != usual[1:]}
    for columns in (Decisions.of(rows), Decisions([one.probe_id for one in rows], usual, others)):
        assert Decisions.of(columns) is columns
        assert list(columns) == rows
        assert [columns[at] for at in range(len(columns))] == rows
        assert (columns[-1], list(columns[1:3])) == (rows[-1], rows[1:3])
        assert columns.outcomes() == Counter(one.outcome for one in rows)
        encoded = encode.identify_reply(IdentifyReply(columns, 1, SpaceId("s", 1, 2), "1", {}))
        assert encoded == encode.identify_reply(IdentifyReply(rows, 1, SpaceId("s", 1, 2), "1", {}))
        assert [one.probe_id for one in encoded.decisions] == [one.probe_id for one in rows]


def test_candidates_keep_their_order_and_their_own_values() -> None:
    second = decide([1, 3])[1]
    assert [(one.reference_id, one.subject_id, one.gallery_id, one.rank) for one in second.candidates] == [
        ("r1", "s1", "immigration", 1),
        ("r2", "s2", "custody", 2),
        ("r3", "s3", "immigration", 3),
    ]
    assert second.candidates[0].false_match_rate == 1e-4


def test_each_alert_has_an_id_of_its_own_and_nothing_else_has_one() -> None:
    ids = [one.alert_id for one in decide([1, 0, 2])]
    assert ids == ["alert-0", "", "alert-1"]


def test_law_6_only_alerts_are_recorded_and_never_with_a_template() -> None:
    message = ProbeMessage(
        actor=Actor("van"),
        space=SpaceId("s", 1, 2),
        probe_ids=["p0", "p1"],
        templates=np.ones((2, 2), np.float32),
        captured_at_ms=np.array([5, 6], np.int64),
        deployment_id="op",
        case_reference="",
        gallery_ids=(),
        threshold=None,
        rank_max=1,
        min_sequence=0,
        received_at=0.0,
        deadline=1.0,
    )
    records = decision.alert_records(message, decide([0, 1]), {"custody": 0.5}, 9, "1", False, 77)
    assert [(one.probe_id, one.captured_at_ms, one.raised_at_ms, one.complete) for one in records] == [
        ("p1", 6, 77, False)
    ]
    assert not any(isinstance(value, np.ndarray | bytes) for one in records for value in vars_of(one))


def vars_of(value: object) -> list[object]:
    return [getattr(value, name) for name in value.__slots__]  # type: ignore[attr-defined]


def test_law_7_without_an_audit_nothing_is_disclosed() -> None:
    hidden = decision.withheld(decide([2]), Cause.AUDIT_UNAVAILABLE)[0]
    assert (hidden.outcome, hidden.cause, hidden.candidates, hidden.alert_id) == (
        Outcome.INCOMPLETE,
        "AUDIT_UNAVAILABLE",
        (),
        "",
    )
    refused = decision.rejection("p", Overloaded("full", hint="later", retry_after_ms=5))
    kept = Decisions(["p"], NOBODY, {0: refused})
    assert list(decision.withheld(kept, Cause.AUDIT_UNAVAILABLE)) == [refused]


def test_a_rejection_says_what_to_do_and_when() -> None:
    refused = decision.rejection("p", Overloaded("full", hint="later", retry_after_ms=5))
    assert (refused.outcome, refused.cause, refused.detail, refused.retry_after_ms) == (
        Outcome.REJECTED,
        "OVERLOADED",
        "full; later",
        5,
    )
