"""What a threshold should be seen to do in a test: false alerts and missed mates. Pure."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom

from matcher_service.evaluation.comparisons import Comparisons
from matcher_service.evaluation.intervals import clustered_rates
from matcher_service.models.promise import Promise
from matcher_service.terms import GenuineTable

# Neighbouring points of a genuine table differ by at most this share of the rate, or of all comparisons.
_RATE_RATIO_MAX = 1.05
_STEP_MAX = 0.01
# Points whose counts per subject are held at a time.
_POINTS_AT_ONCE = 16


def false_alerts(promised: Promise, unmated_probes: int, confidence: float = 0.95) -> tuple[int, int]:
    """Between how many false alerts so many unmated probes should give, if the promise holds."""
    tail = (1.0 - confidence) / 2.0
    return (
        int(binom.ppf(tail, unmated_probes, promised.fpir_low)),
        int(binom.ppf(1.0 - tail, unmated_probes, promised.fpir_high)),
    )


def genuine_table(comparisons: Comparisons, confidence: float = 0.95) -> GenuineTable | None:
    """Which share of comparisons of people with themselves scores below a grid of scores; None without any.

    The grid has every one of the lowest scores, thins out upwards, and ends just above the highest. Limits are those of
    `clustered_rates`: comparisons of one subject are taken together.
    """
    ascending = np.sort(comparisons.genuine)
    count = len(ascending)
    if count == 0:
        return None
    points = np.unique(np.append(ascending[_ranks(count)], np.nextafter(ascending[-1], 2.0)))
    subjects, code = np.unique(comparisons.genuine_subject, return_inverse=True)
    trials = np.bincount(code, minlength=len(subjects))
    estimates, low, high = np.empty((3, len(points)))
    for start in range(0, len(points), _POINTS_AT_ONCE):
        some = slice(start, start + _POINTS_AT_ONCE)
        below = [np.bincount(code, comparisons.genuine < one, len(subjects)) for one in points[some]]
        curve = clustered_rates(np.stack(below, axis=1), trials, confidence)
        estimates[some], low[some], high[some] = curve.estimates, curve.low, curve.high
    # How comparisons cluster is estimated at each point anew, so limits may cross; the wider one stands.
    low = np.minimum.accumulate(low[::-1])[::-1]
    return GenuineTable(
        scores=tuple(points.tolist()),
        estimates=tuple(estimates.tolist()),
        low_rates=tuple(np.minimum(low, estimates).tolist()),
        high_rates=tuple(np.maximum(np.maximum.accumulate(high), estimates).tolist()),
        confidence=confidence,
        comparisons=count,
        subjects=len(subjects),
    )


def _ranks(count: int) -> list[int]:
    """Places from the lowest score (0) at which a table has points."""
    ranks, rank = [], 0
    while rank < count:
        ranks.append(rank)
        rank = max(rank + 1, int(min(rank * _RATE_RATIO_MAX, rank + _STEP_MAX * count)))
    return ranks
