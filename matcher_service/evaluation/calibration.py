"""From adapted templates with labels to everything a calibration says. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from matcher_service.drift import Drift, drift
from matcher_service.errors import InvalidInput
from matcher_service.evaluation.comparisons import Comparisons, at_or_above, compare_all, edges
from matcher_service.evaluation.impostor_tail import ImpostorTail, effective_comparisons, fit_tail, score_table
from matcher_service.evaluation.intervals import clopper_pearson, dyadic_variance, few_clusters
from matcher_service.evaluation.labelled import LabelledSet
from matcher_service.evaluation.thresholds import genuine_table
from matcher_service.models.promise import Promise, promise, threshold_for
from matcher_service.terms import Float32, Int64, ScoreTable

# Groups are compared at the score that this share of all pairs of different people reaches.
GROUPS_AT_RATE = 1e-3
COARSE_BINS = 200
_QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999)


class GroupRate(NamedTuple):
    """How often two different people of one group score at least `at_score`, with limits; `over_all`: any two."""

    group: str
    at_score: float
    estimate: float
    low: float
    high: float
    comparisons: int
    over_all: float


class Choice(NamedTuple):
    """The threshold for a size, and what is promised of it; or why there is none."""

    references: int
    promised: Promise | None
    refusal: str


@dataclass(frozen=True, slots=True)
class Calibration:
    comparisons: Comparisons
    tail: ImpostorTail
    table: ScoreTable
    fpir_wanted: float
    choices: tuple[Choice, ...]
    groups: tuple[GroupRate, ...]

    @property
    def references_max(self) -> int:
        """Up to how many references the table can promise `fpir_wanted`, at any threshold."""
        return promise(self.table, self.table.scores[-1], self.fpir_wanted, 1).references_max

    def document(self) -> dict[str, Any]:
        """Every number, for JSON."""
        tail, table, genuine = self.tail, self.table, self.comparisons.genuine
        law = tail.fit
        return {
            "method": table.method,
            "templates": self.comparisons.templates,
            "subjects": tail.subjects,
            "impostor_comparisons": tail.comparisons,
            "effective_comparisons": tail.effective_comparisons,
            "effective_comparisons_at_median": effective_comparisons(
                self.comparisons, tail.comparisons, _quantile(self.comparisons, 0.5), tail.confidence
            ),
            "highest_impostor_score": tail.highest,
            "supported_score": tail.supported_score,
            "supported_rate": tail.supported_rate,
            "tail": None
            if law is None
            else {
                "threshold": law.threshold,
                "excesses": law.excesses,
                "shape": law.law.shape,
                "scale": law.law.scale,
                "anderson_darling_p": law.p_value,
                "design_effect": law.design_effect,
            },
            "rejected_tails": [{"threshold": one.threshold, "p": one.p_value} for one in tail.rejected],
            "impostor_quantiles": {str(one): _quantile(self.comparisons, one) for one in _QUANTILES},
            "genuine_quantiles": {str(one): float(np.quantile(genuine, one)) for one in (0.001, 0.01, 0.05, 0.5)}
            if len(genuine)
            else {},
            "genuine_comparisons": len(genuine),
            "impostor_histogram": coarse(self.comparisons.histogram).tolist(),
            "table": {name: value for name, value in asdict(table).items() if name != "method"},
            "fpir_wanted": self.fpir_wanted,
            "references_max": self.references_max,
            "thresholds": [_choice(one) for one in self.choices],
            "groups": [one._asdict() for one in self.groups],
        }


def calibrate(
    units: Float32,
    labels: LabelledSet,
    *,
    source: str,
    fpir_wanted: float,
    sizes: Sequence[int],
    confidence: float,
    seed: int,
    advance: Callable[[int], None] = lambda comparisons: None,
) -> Calibration:
    """Of adapted unit rows [n, d] with their labels. Raises InvalidInput where they calibrate nothing."""
    groups = labels.groups if labels.has_groups else None
    rng = np.random.default_rng(seed)
    comparisons = compare_all(units, labels.subjects, groups, rng=rng, advance=advance)
    tail = fit_tail(comparisons, confidence)
    table = replace(score_table(tail, source), genuine=genuine_table(comparisons, confidence))
    choices = tuple(_chosen(table, fpir_wanted, size) for size in sizes)
    return Calibration(comparisons, tail, table, fpir_wanted, choices, _by_group(comparisons, confidence))


def coarse(histogram: Int64) -> Int64:
    """Counts in COARSE_BINS equal bins over [-1, 1]."""
    return np.asarray(histogram.reshape(COARSE_BINS, -1).sum(axis=1))


def drift_from(earlier: dict[str, Any], later: dict[str, Any]) -> Drift:
    """Whether the impostor scores of two calibrations, as documents, are those of one population and model.

    Comparisons count for what those of the earlier set were worth in the middle of the distribution, in proportion to
    the subjects: that is what they are worth if nothing has changed. Raises InvalidInput if `earlier` is none.
    """
    try:
        before = np.asarray(earlier["impostor_histogram"], dtype=np.float64)
        worth = float(earlier["effective_comparisons_at_median"])
        subjects = float(earlier["subjects"])
        before *= worth / before.sum()
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"no calibration: {error!r}", field="against", hint="give a file that `matcher calibrate --out` wrote"
        ) from error
    now = np.asarray(later["impostor_histogram"], dtype=np.float64)
    return drift(before, now, scores_per_independent=max(1.0, now.sum() * subjects / (worth * later["subjects"])))


def _chosen(table: ScoreTable, fpir_wanted: float, size: int) -> Choice:
    try:
        return Choice(size, threshold_for(table, fpir_wanted, size), "")
    except InvalidInput as refusal:
        return Choice(size, None, refusal.detail)


def _by_group(comparisons: Comparisons, confidence: float) -> tuple[GroupRate, ...]:
    label = np.asarray(comparisons.cluster_label)
    names = [one for one in np.unique(label).tolist() if one]
    if len(names) < 2:
        return ()
    total = comparisons.impostors
    reached = at_or_above(comparisons.histogram)
    at = int(np.flatnonzero(reached >= GROUPS_AT_RATE * total)[-1])
    found = []
    for name in names:
        mine = np.flatnonzero(label == name)
        cells = comparisons.counts[np.ix_(mine, mine)].astype(np.float64)
        high, pairs = cells[..., at:].sum(axis=-1), cells.sum(axis=-1)
        upper = np.triu(np.ones_like(pairs, dtype=bool))
        count = float(pairs[upper].sum())
        if count == 0:
            continue
        share = float(high[upper].sum()) / count
        variance = float(dyadic_variance(high - share * pairs)) / count**2
        effective = count
        if variance > 0:
            effective = min(count, share * (1 - share) / variance * few_clusters(len(mine), confidence))
        low, limit = clopper_pearson(share * effective, effective, confidence)
        found.append(
            GroupRate(name, float(edges()[at]), share, float(low), float(limit), int(count), float(reached[at]) / total)
        )
    return tuple(found)


def _quantile(comparisons: Comparisons, level: float) -> float:
    total = comparisons.impostors
    rank = int((1.0 - level) * total)
    if 0 <= rank < len(comparisons.tail.scores):
        return float(comparisons.tail.scores[rank])
    reached = at_or_above(comparisons.histogram).astype(np.float64)
    return float(np.interp(-(1.0 - level) * total, -reached, edges()))


def _choice(one: Choice) -> dict[str, Any]:
    promised = one.promised
    return {
        "references": one.references,
        "threshold": promised.threshold if promised else None,
        "fpir_estimate": promised.fpir_estimate if promised else None,
        "fpir_low": promised.fpir_low if promised else None,
        "fpir_high": promised.fpir_high if promised else None,
        "references_max": promised.references_max if promised else None,
        "false_non_match_rate": promised.fnir._asdict() if promised and promised.fnir else None,
        "refusal": one.refusal,
    }
