"""Canary probes: known mates and known strangers, sent for ever to see that the whole path still answers as it should.

A canary is no sighting. Its probe id begins with `canary-`, by which alerts it raises are told apart. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from matcher_service.terms import CANARY_PREFIX, Decision, Outcome

PREFIX = CANARY_PREFIX
# Answers are exact, so the same probe against the same reference scores the same but for a re-enrolment.
SCORE_CHANGE_MAX = 1e-3


class Seen(StrEnum):
    """What became of one canary."""

    FOUND = "found"
    QUIET = "quiet"
    MISSED = "missed"
    FALSE_ALERT = "false_alert"
    UNANSWERED = "unanswered"


WELL = frozenset({Seen.FOUND, Seen.QUIET})


class Round(NamedTuple):
    """`seen` of each canary; `scores` of the mates found, by probe id; `score_change`: the largest difference from the
    first round (0 in the first)."""

    seen: tuple[Seen, ...]
    scores: Mapping[str, float]
    score_change: float

    @property
    def is_well(self) -> bool:
        return all(one in WELL for one in self.seen) and self.score_change <= SCORE_CHANGE_MAX


def judge_round(
    decisions: Mapping[str, Decision],
    probe_ids: Sequence[str],
    mates: Sequence[str],
    first_scores: Mapping[str, float] | None = None,
) -> Round:
    """`mates`: the subject that must be found for each probe, "" for a stranger, of whom nobody may be."""
    seen, scores = [], {}
    for probe_id, mate in zip(probe_ids, mates, strict=True):
        decision = decisions.get(probe_id)
        if decision is None or decision.outcome in (Outcome.REJECTED, Outcome.INCOMPLETE):
            seen.append(Seen.UNANSWERED)
        elif not mate:
            seen.append(Seen.FALSE_ALERT if decision.candidates else Seen.QUIET)
        else:
            score = next((one.score for one in decision.candidates if one.subject_id == mate), None)
            seen.append(Seen.MISSED if score is None else Seen.FOUND)
            if score is not None:
                scores[probe_id] = score
    changes = [
        abs(score - first_scores[name]) for name, score in scores.items() if first_scores and name in first_scores
    ]
    return Round(tuple(seen), scores, max(changes, default=0.0))
