"""Alerts are judged by people, and what they said adds up to one of four words, none of which is identified."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.adjudication import persons_needed, state_of
from matcher_service.terms import (
    Adjudication,
    Alert,
    AlertState,
    Candidate,
    Gallery,
    GalleryKind,
    Outcome,
    SpaceId,
    Verdict,
)

SAID = st.builds(
    Adjudication, st.sampled_from(Verdict), st.sampled_from(["A", "B", "C"]), st.integers(0, 9), st.just("looked")
)


def said(*pairs: tuple[str, Verdict]) -> list[Adjudication]:
    return [Adjudication(verdict, by, at, "looked") for at, (by, verdict) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("adjudications", "persons", "state"),
    [
        ([], 1, AlertState.OPEN),
        (said(("A", Verdict.CONFIRMED)), 1, AlertState.CONFIRMED),
        (said(("A", Verdict.CONFIRMED)), 2, AlertState.OPEN),
        (said(("A", Verdict.CONFIRMED), ("A", Verdict.CONFIRMED)), 2, AlertState.OPEN),
        (said(("A", Verdict.CONFIRMED), (" a ", Verdict.CONFIRMED)), 2, AlertState.OPEN),
        (said(("A", Verdict.CONFIRMED), ("B", Verdict.CONFIRMED)), 2, AlertState.CONFIRMED),
        (said(("A", Verdict.CONFIRMED), ("B", Verdict.REJECTED)), 2, AlertState.INCONCLUSIVE),
        (said(("A", Verdict.CONFIRMED), ("B", Verdict.REJECTED), ("A", Verdict.REJECTED)), 2, AlertState.REJECTED),
        (said(("A", Verdict.INCONCLUSIVE), ("B", Verdict.INCONCLUSIVE)), 2, AlertState.INCONCLUSIVE),
    ],
)
def test_what_people_said_adds_up(adjudications: list[Adjudication], persons: int, state: AlertState) -> None:
    assert state_of(adjudications, persons) is state


@given(st.lists(SAID), st.integers(1, 2))
def test_nothing_is_settled_before_enough_different_people_agree(said: list[Adjudication], persons: int) -> None:
    state = state_of(said, persons)
    people = {one.by for one in said}
    assert (state is AlertState.OPEN) == (len(people) < persons)
    if state in (AlertState.CONFIRMED, AlertState.REJECTED):
        last = {one.by: one.verdict for one in said}
        assert {one.value for one in last.values()} == {state.value}


def test_the_strictest_gallery_says_how_many_people_judge() -> None:
    one = Gallery("one", GalleryKind.CUSTODY, "c", "l", "p", 9, SpaceId("s", 1, 2), 0.5)
    galleries = {"one": one, "two": replace(one, gallery_id="two", adjudicators=2)}
    candidate = Candidate("s", "r", "one", 0.9, 1, 0.1)
    alert = Alert("a", "p", "op", "", 0, 0, (candidate,), {}, 1, "1", True)
    assert persons_needed(alert, galleries) == 1
    both = replace(alert, candidates=(candidate, candidate._replace(gallery_id="two")))
    assert persons_needed(both, galleries) == 2
    # A gallery that has been deleted meanwhile asks for nobody more.
    assert persons_needed(both, {}) == 1


def test_no_word_for_an_outcome_says_that_somebody_was_identified() -> None:
    words = {one.value.lower() for kind in (AlertState, Verdict, Outcome) for one in kind}
    assert not {one for one in words if "identif" in one or "match" in one}
