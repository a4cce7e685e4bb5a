"""The figures of a run, from decisions whose truth is known."""

from __future__ import annotations

from matcher_service.demo.tally import Tally, latency, tally
from matcher_service.terms import Candidate, Decision, Outcome


def decision(probe_id: str, outcome: Outcome, *subject_ids: str) -> Decision:
    found = tuple(Candidate(one, f"{one}-r", "g", 0.9, rank, 1e-4) for rank, one in enumerate(subject_ids, 1))
    return Decision(probe_id, outcome, found)


MATES = {"p1": "a", "p2": "b", "p3": "c", "p4": "d", "p5": "e", "p6": None, "p7": None, "p8": "f", "p9": "g"}


def test_every_probe_is_counted_once_under_what_became_of_it() -> None:
    """Right at rank 1, right at a lower rank, wrong person only, silence, unmated alert, and no answer at all."""
    answers = [
        decision("p1", Outcome.ALERT, "a"),
        decision("p2", Outcome.ALERT, "x", "b"),
        decision("p3", Outcome.ALERT, "x"),
        decision("p4", Outcome.NO_CANDIDATE),
        decision("p5", Outcome.ALERT, "e", "x"),
        decision("p6", Outcome.ALERT, "a"),
        decision("p7", Outcome.NO_CANDIDATE),
        decision("p8", Outcome.REJECTED),
    ]
    assert tally({one.probe_id: one for one in answers}, MATES) == Tally(
        probes=9,
        mated=7,
        unmated=2,
        alerts=5,
        rank_1_right=2,
        missed_mates=2,
        false_alerts_unmated=1,
        false_alerts_wrong=2,
        not_answered=2,
    )


def test_an_incomplete_probe_is_neither_a_miss_nor_a_quiet_one() -> None:
    """INCOMPLETE says nothing of the galleries, so it only counts as not answered."""
    counted = tally({"p1": decision("p1", Outcome.INCOMPLETE)}, {"p1": "a"})
    assert (counted.not_answered, counted.missed_mates, counted.alerts) == (1, 0, 0)


def test_latencies_are_times_that_were_seen() -> None:
    """A quantile is one of the measured times, in milliseconds, never one between two of them."""
    assert round(latency([0.001 * one for one in range(1, 101)]).p50_ms, 6) in (50, 51)
    one = latency([0.25])
    assert (one.p50_ms, one.p95_ms, one.p99_ms, one.most_ms) == (250.0, 250.0, 250.0, 250.0)
