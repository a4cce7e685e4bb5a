"""The answers of a labelled test, in columns, and the error rates that follow from them. Pure.

A mated search is of somebody who is enrolled; it is missed when that person is not among the candidates at or above
the threshold (and within a rank), or when the probe could not be processed. An unmated search is of somebody who is
not; any candidate at or above the threshold is a false alert. Because answers are exact, the answer to an enrolled
person's probe with their own record set aside is what the service would have said had they not been enrolled, so each
such probe also counts as an unmated search (ISO/IEC 19795-1 calls for people outside the gallery; both counts are
reported).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from matcher_service.evaluation.intervals import (
    SUBJECTS_WITH_EVENTS_MIN,
    Rate,
    RateCurve,
    clustered_rate,
    clustered_rates,
    resampled_band,
    subject_weights,
)
from matcher_service.evaluation.labelled import LabelledSet
from matcher_service.terms import Decision, Float64, Int64, Outcome

CURVE_POINTS = 161
SIZE_POINTS = 25


@dataclass(frozen=True, slots=True)
class Searches:
    """One row per probe: `subjects`, `groups` str [n], `is_mated`, `is_failed` bool [n] (not processed or not answered
    in full), `mate_score` float64 [n] (-inf: not among the candidates), `mate_rank` int64 [n] (0: likewise).

    The candidates that are other people stand, best first, at offsets[i]:offsets[i+1] of `other_scores` float64 [m],
    `other_synthetic` bool [m]. `floor`: nothing below it was answered; at most `rank_max` candidates were.
    `enrolled` subjects, of which `enrolled_synthetic` are made up, have `references` references.
    """

    subjects: NDArray[np.str_]
    groups: NDArray[np.str_]
    is_mated: NDArray[np.bool_]
    is_failed: NDArray[np.bool_]
    mate_score: Float64
    mate_rank: Int64
    offsets: Int64
    other_scores: Float64
    other_synthetic: NDArray[np.bool_]
    floor: float
    rank_max: int
    enrolled: int
    enrolled_synthetic: int
    references: int

    def __len__(self) -> int:
        return len(self.subjects)

    def among_real(self) -> Searches:
        """The same answers with synthetic references set aside. Exact unless a list was cut at rank_max."""
        keep = ~self.other_synthetic
        counts = np.add.reduceat(np.r_[keep, False].astype(np.int64), self.offsets[:-1])
        counts[np.diff(self.offsets) == 0] = 0
        mate_rank = self.mate_rank.copy()
        for row in np.flatnonzero(self.mate_rank):
            ahead = slice(int(self.offsets[row]), int(self.offsets[row]) + int(self.mate_rank[row]) - 1)
            mate_rank[row] -= int(self.other_synthetic[ahead].sum())
        return Searches(
            self.subjects,
            self.groups,
            self.is_mated,
            self.is_failed,
            self.mate_score,
            mate_rank,
            np.r_[0, np.cumsum(counts)],
            self.other_scores[keep],
            self.other_synthetic[keep],
            self.floor,
            self.rank_max,
            self.enrolled - self.enrolled_synthetic,
            0,
            self.references,
        )

    @property
    def best_other(self) -> Float64:
        """The highest score of somebody else, per probe; -inf if nobody else was a candidate."""
        found = np.full(len(self), -np.inf)
        has = np.diff(self.offsets) > 0
        found[has] = self.other_scores[self.offsets[:-1][has]]
        return found


def searches_of(
    decisions: Mapping[str, Decision],
    probe_ids: list[str],
    probes: LabelledSet,
    *,
    enrolled: Set[str],
    synthetic: Set[str],
    references: int,
    floor: float,
    rank_max: int,
) -> Searches:
    """`decisions` by probe_id; a probe without one has failed. `enrolled`, `synthetic`: subject ids."""
    mate_score, mate_rank = np.full(len(probes), -np.inf), np.zeros(len(probes), dtype=np.int64)
    failed = np.zeros(len(probes), dtype=bool)
    others: list[float] = []
    made_up: list[bool] = []
    offsets = [0]
    for row, (probe_id, subject) in enumerate(zip(probe_ids, probes.subjects.tolist(), strict=True)):
        decision = decisions.get(probe_id)
        if decision is None or decision.outcome in (Outcome.REJECTED, Outcome.INCOMPLETE):
            failed[row] = True
        else:
            for candidate in decision.candidates:
                if candidate.subject_id == subject:
                    mate_score[row], mate_rank[row] = candidate.score, candidate.rank
                else:
                    others.append(candidate.score)
                    made_up.append(candidate.subject_id in synthetic)
        offsets.append(len(others))
    return Searches(
        subjects=probes.subjects,
        groups=probes.groups,
        is_mated=np.isin(probes.subjects, sorted(enrolled)),
        is_failed=failed,
        mate_score=mate_score,
        mate_rank=mate_rank,
        offsets=np.asarray(offsets, dtype=np.int64),
        other_scores=np.asarray(others, dtype=np.float64),
        other_synthetic=np.asarray(made_up, dtype=bool),
        floor=floor,
        rank_max=rank_max,
        enrolled=len(enrolled),
        enrolled_synthetic=len(enrolled & synthetic),
        references=references,
    )


class BySubject(NamedTuple):
    """Trials [s] of the subjects concerned, and which row belongs to which: `code` int64 [rows]."""

    rows: Int64
    code: Int64
    trials: Int64

    def events(self, happened: NDArray[np.bool_]) -> Int64:
        """Events [s, points] from events [rows, points]."""
        if not len(self.trials):
            return np.zeros((0, happened.shape[1]), dtype=np.int64)
        order = np.argsort(self.code, kind="stable")
        starts = np.searchsorted(self.code[order], np.arange(len(self.trials)))
        return np.asarray(np.add.reduceat(happened[order].astype(np.int64), starts, axis=0))


def by_subject(searches: Searches, chosen: NDArray[np.bool_]) -> BySubject:
    rows = np.flatnonzero(chosen)
    _, code = np.unique(searches.subjects[rows], return_inverse=True)
    return BySubject(rows, code, np.bincount(code) if len(rows) else np.zeros(0, dtype=np.int64))


def unmated(searches: Searches, *, set_aside: bool = True) -> NDArray[np.bool_]:
    """Which probes are unmated searches; with `set_aside`, those of enrolled people too, their own record set aside
    (only where a list could hold another candidate besides)."""
    if set_aside and searches.rank_max >= 2:
        return ~searches.is_failed
    return ~searches.is_failed & ~searches.is_mated


def thresholds(searches: Searches, *also: float) -> Float64:
    """Scores [points], ascending, over all that was answered; with each of `also` exactly."""
    finite = np.concatenate([searches.mate_score, searches.best_other])
    finite = finite[np.isfinite(finite)]
    low = max(searches.floor, float(finite.min()) - 0.01) if len(finite) else searches.floor
    high = min(1.0, float(finite.max()) + 0.01) if len(finite) else 1.0
    wanted = [one for one in also if one >= searches.floor]
    return np.unique(np.r_[np.linspace(low, max(high, low), CURVE_POINTS), wanted])


def fpir_curve(searches: Searches, scores: Float64, confidence: float, *, set_aside: bool = True) -> RateCurve:
    """The share of unmated searches with a candidate at or above each score."""
    group = by_subject(searches, unmated(searches, set_aside=set_aside))
    happened = searches.best_other[group.rows, None] >= scores
    return clustered_rates(group.events(happened), group.trials, confidence)


def fnir_curve(searches: Searches, scores: Float64, confidence: float, rank: int | None = None) -> RateCurve:
    """The share of mated searches whose mate is below each score, or beyond `rank`."""
    group = by_subject(searches, searches.is_mated)
    rows = group.rows
    within = (searches.mate_rank[rows] > 0) & (searches.mate_rank[rows] <= (rank or searches.rank_max))
    found = within[:, None] & (searches.mate_score[rows, None] >= scores)
    return clustered_rates(group.events(~found), group.trials, confidence)


def cmc(searches: Searches, confidence: float) -> tuple[Int64, RateCurve]:
    """Ranks [r] and the share of mated searches whose mate stands at that rank or better, at any score answered."""
    group = by_subject(searches, searches.is_mated)
    ranks = np.arange(1, min(searches.rank_max, max(searches.enrolled, 1)) + 1)
    standing = np.where(searches.mate_rank[group.rows] > 0, searches.mate_rank[group.rows], np.iinfo(np.int64).max)
    return ranks, clustered_rates(group.events(standing[:, None] <= ranks), group.trials, confidence)


def failure_to_process(searches: Searches, confidence: float) -> Rate:
    group = by_subject(searches, np.ones(len(searches), dtype=bool))
    return clustered_rate(group.events(searches.is_failed[:, None])[:, 0], group.trials, confidence)


class SizeCurve(NamedTuple):
    """FPIR at `sizes` int64 [p] enrolled subjects: estimates and limits; `cut_short` probes had more candidates than
    were answered, so that theirs is a lower bound."""

    sizes: Int64
    estimates: Float64
    low: Float64
    high: Float64
    cut_short: int


def fpir_by_size(
    searches: Searches, threshold: float, confidence: float, rng: np.random.Generator, *, replicates: int = 1000
) -> SizeCurve:
    """FPIR over random parts of the gallery. With k of N subjects at or above the threshold, n of them drawn at random
    hold none with probability C(N-k, n) / C(N, n): no search needs to be repeated. Limits resample subjects; where
    fewer than ten alerted, too few to resample, they are the exact limits for the whole gallery, spread over it."""
    group = by_subject(searches, unmated(searches))
    total = searches.enrolled
    sizes = np.unique(np.rint(np.geomspace(1, max(total, 1), SIZE_POINTS)).astype(np.int64))
    above = np.add.reduceat(np.r_[searches.other_scores >= threshold, False].astype(np.int64), searches.offsets[:-1])
    above[np.diff(searches.offsets) == 0] = 0
    above = np.minimum(above[group.rows], total)
    none = np.exp(_log_choose(total - above[:, None], sizes) - _log_choose(np.asarray(total), sizes))
    alerting = 1.0 - none
    sums = np.zeros((len(group.trials), len(sizes)))
    np.add.at(sums, group.code, alerting)
    whole = fpir_curve(searches, np.asarray([threshold]), confidence).at(0)
    estimates = sums.sum(axis=0) / max(int(group.trials.sum()), 1)
    if int((sums[:, -1] > 0).sum()) < SUBJECTS_WITH_EVENTS_MIN:
        part = sizes / max(total, 1)
        low, high = (-np.expm1(part * np.log1p(-min(one, 1.0 - 1e-12))) for one in (whole.low, whole.high))
    else:
        weights = subject_weights(len(group.trials), replicates, rng)
        low, high = resampled_band(sums, group.trials, weights, confidence)
    shown = np.diff(searches.offsets)[group.rows]
    cut = (shown >= searches.rank_max - 1) & (above == shown) & (above > 0) & (total > searches.rank_max)
    return SizeCurve(sizes, estimates, low, high, int(cut.sum()))


def _log_choose(count: Int64, drawn: Int64) -> Float64:
    possible = drawn <= count
    safe = np.where(possible, count - drawn, 0)
    logs = gammaln(count + 1.0) - gammaln(drawn + 1.0) - gammaln(safe + 1.0)
    return np.asarray(np.where(possible, logs, -np.inf))
