"""Rates with their uncertainty, when trials share subjects.

Two probes of one person are not two independent trials. Rates are therefore given the Clopper-Pearson interval at an
effective number of trials (Korn and Graubard, Survey Methodology 24, 1998): the number of independent trials that
would be as uncertain as what was measured. Curves and differences are resampled by subject.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom, norm, t

from matcher_service.errors import InvalidInput
from matcher_service.terms import Float64, Int64

# With events in fewer subjects than this, how events cluster cannot be measured, and each subject counts once.
SUBJECTS_WITH_EVENTS_MIN = 10


class Rate(NamedTuple):
    """A share of trials with its two-sided interval. `effective_trials` independent trials would be as uncertain."""

    events: int
    trials: int
    subjects: int
    effective_trials: float
    estimate: float
    low: float
    high: float
    confidence: float

    @property
    def is_measured(self) -> bool:
        return self.trials > 0


class Ratio(NamedTuple):
    """A quotient of two rates with its two-sided interval; `high` is infinite where nothing bounds it."""

    estimate: float
    low: float
    high: float


def clopper_pearson(events: ArrayLike, trials: ArrayLike, confidence: float = 0.95) -> tuple[Float64, Float64]:
    """Exact two-sided limits (low, high) for events out of trials; both may be fractions (effective counts)."""
    hits, total = np.broadcast_arrays(np.asarray(events, np.float64), np.asarray(trials, np.float64))
    if (hits < 0).any() or (total < hits).any():
        raise InvalidInput("more events than trials", field="events", hint="count every trial")
    tail = (1.0 - check_confidence(confidence)) / 2.0
    with np.errstate(invalid="ignore", divide="ignore"):
        low = np.where(hits > 0, beta.ppf(tail, hits, total - hits + 1.0), 0.0)
        high = np.where(hits < total, beta.ppf(1.0 - tail, hits + 1.0, np.maximum(total - hits, 1e-300)), 1.0)
    return low, high


def check_confidence(confidence: float) -> float:
    if not 0.5 <= confidence < 1.0:
        raise InvalidInput(f"{confidence} is no confidence", field="confidence", hint="for example 0.95")
    return confidence


class RateCurve(NamedTuple):
    """Rates at points [m] over the same trials, each with its two-sided interval; `effective_trials` [m]."""

    events: Int64
    trials: int
    subjects: int
    effective_trials: Float64
    estimates: Float64
    low: Float64
    high: Float64
    confidence: float

    def at(self, point: int) -> Rate:
        return Rate(
            int(self.events[point]),
            self.trials,
            self.subjects,
            float(self.effective_trials[point]),
            float(self.estimates[point]),
            float(self.low[point]),
            float(self.high[point]),
            self.confidence,
        )


def clustered_rate(events: ArrayLike, trials: ArrayLike, confidence: float = 0.95) -> Rate:
    """The rate of events [s] out of trials [s], per subject; as `clustered_rates`."""
    return clustered_rates(np.asarray(events)[:, None], trials, confidence).at(0)


def clustered_rates(events: ArrayLike, trials: ArrayLike, confidence: float = 0.95) -> RateCurve:
    """The rates of events [s, m] out of trials [s], per subject.

    The variance is that between subjects; the limits are widened for the few degrees of freedom that subjects give.
    With events in fewer than ten subjects (or non-events), how they cluster cannot be told and each subject counts as
    one trial. No trials: limits 0 and 1.
    """
    check_confidence(confidence)
    hits, total = np.asarray(events, np.float64), np.asarray(trials, np.float64)
    hits, total = hits[total > 0], total[total > 0]
    count, subjects, points = float(total.sum()), len(total), hits.shape[1]
    if count == 0:
        nothing = np.zeros(points)
        return RateCurve(nothing.astype(np.int64), 0, 0, nothing, nothing + np.nan, nothing, nothing + 1.0, confidence)
    shares = hits.sum(axis=0) / count
    effective = np.full(points, count)
    if subjects < count:
        if subjects > 1:
            residuals = hits - shares * total[:, None]
            variance = subjects / (subjects - 1) * np.square(residuals).sum(axis=0) / count**2
            with np.errstate(divide="ignore", invalid="ignore"):
                found = shares * (1.0 - shares) / variance * few_clusters(subjects, confidence)
            effective = np.where(variance > 0, np.clip(found, 1.0, count), count)
        affected = np.minimum((hits > 0).sum(axis=0), (hits < total[:, None]).sum(axis=0))
        few = affected < SUBJECTS_WITH_EVENTS_MIN
        effective = np.where(few, np.minimum(effective, subjects), effective)
    low, high = clopper_pearson(shares * effective, effective, confidence)
    events_seen = np.rint(hits.sum(axis=0)).astype(np.int64)
    return RateCurve(events_seen, int(count), subjects, effective, shares, low, high, confidence)


def few_clusters(clusters: int, confidence: float) -> float:
    """By how much a variance estimated from so few clusters shrinks the effective number of trials."""
    level = 1.0 - (1.0 - confidence) / 2.0
    return float((norm.ppf(level) / t.ppf(level, max(clusters - 1, 1))) ** 2)


def subject_weights(subjects: int, replicates: int, rng: np.random.Generator) -> Float64:
    """How often each subject is drawn in each resample: float64 [replicates, subjects]."""
    return rng.multinomial(subjects, np.full(subjects, 1.0 / subjects), size=replicates).astype(np.float64)


def resampled_band(events: ArrayLike, trials: ArrayLike, weights: Float64, confidence: float = 0.95) -> Float64:
    """Percentile limits [2, m] of sum(events [s, m]) / sum(trials [s]) when subjects are resampled with `weights`
    [replicates, s]. For means of anything; where a rate of events is near 0, `clustered_rates` is the honest one."""
    hits, total = np.asarray(events, np.float64), np.asarray(trials, np.float64)
    resampled_total = weights @ total
    kept = resampled_total > 0
    curves = (weights[kept] @ hits) / resampled_total[kept, None]
    tail = (1.0 - check_confidence(confidence)) / 2.0
    return np.asarray(np.quantile(curves, [tail, 1.0 - tail], axis=0))


def dyadic_variance(residuals: Float64) -> Float64:
    """Variance of a sum over pairs whose members recur.

    `residuals` [..., g, g] symmetric: the summed residuals of all comparisons between cluster g and cluster h. Pairs
    of comparisons that share a cluster may be correlated in any way (Aronow, Samii and Assenova, Political Analysis
    23, 2015).
    """
    clusters = residuals.shape[-1]
    rows = np.square(residuals.sum(axis=-1)).sum(axis=-1)
    upper = np.triu(np.ones((clusters, clusters), dtype=bool), 1)
    twice = np.square(residuals[..., upper]).sum(axis=-1)
    return np.asarray(np.maximum(rows - twice, 0.0) * clusters / max(clusters - 1, 1))


def rate_ratio(first: Rate, second: Rate, confidence: float = 0.95) -> Ratio:
    """first / second with the interval that is exact for rare independent events, at the effective counts."""
    hits_1, trials_1 = first.estimate * first.effective_trials, first.effective_trials
    hits_2, trials_2 = second.estimate * second.effective_trials, second.effective_trials
    if min(trials_1, trials_2) <= 0 or not (hits_1 + hits_2) > 0:
        return Ratio(float("nan"), 0.0, float("inf"))
    low, high = (float(one) for one in clopper_pearson(hits_1, hits_1 + hits_2, confidence))
    scale = trials_2 / trials_1
    return Ratio(
        first.estimate / second.estimate if second.estimate > 0 else float("inf"),
        low / (1.0 - low) * scale if low < 1.0 else float("inf"),
        high / (1.0 - high) * scale if high < 1.0 else float("inf"),
    )


def power_of_ratio(ratio: float, base: float, trials_1: float, trials_2: float, confidence: float = 0.95) -> float:
    """Chance that `rate_ratio` excludes 1 when the first rate is truly `ratio` times the second, `base`."""
    mean_1, mean_2 = min(ratio * base, 1.0) * trials_1, base * trials_2
    if mean_1 + mean_2 == 0.0 or min(trials_1, trials_2) <= 0:
        return 0.0
    tail = (1.0 - check_confidence(confidence)) / 2.0
    counts_1, weight_1 = _likely_counts(mean_1, trials_1)
    counts_2, weight_2 = _likely_counts(mean_2, trials_2)
    share = trials_1 / (trials_1 + trials_2)
    first, together = counts_1[:, None], counts_1[:, None] + counts_2[None, :]
    # The exact test, by the counts from which it rejects: one quantile for each total, not one tail for each pair.
    totals, which = np.unique(together, return_inverse=True)
    high = binom.isf(tail, totals, share).astype(np.int64)[which].reshape(together.shape)
    low = binom.ppf(tail, totals, share).astype(np.int64)[which].reshape(together.shape)
    shown = (first > high) | (first < low)
    return float(weight_1 @ (shown & (together > 0)) @ weight_2)


def _likely_counts(mean: float, trials: float) -> tuple[Int64, Float64]:
    most = round(trials)
    spread = 6.0 * np.sqrt(mean + 1.0) + 6.0
    first, last = max(0, int(mean - spread)), min(most, int(mean + spread))
    step = max(1, (last - first) // 120)
    counts: NDArray[np.int64] = np.arange(first, last + 1, step, dtype=np.int64)
    weights = binom.pmf(counts, most, min(1.0, mean / max(most, 1)))
    return counts, weights / max(float(weights.sum()), 1e-300)


def detectable_ratio(
    base: float, trials_1: float, trials_2: float, *, power: float = 0.8, confidence: float = 0.95
) -> float:
    """The least ratio above 1 that such samples would show with the wanted power; infinite if none would."""
    most = 0.9 / base if base > 0 else 0.0
    if most <= 1.0 or power_of_ratio(most, base, trials_1, trials_2, confidence) < power:
        return float("inf")
    low, high = 0.0, float(np.log(most))
    for _ in range(10):
        middle = (low + high) / 2
        enough = power_of_ratio(float(np.exp(middle)), base, trials_1, trials_2, confidence) >= power
        low, high = (low, middle) if enough else (middle, high)
    return float(np.exp(high))
