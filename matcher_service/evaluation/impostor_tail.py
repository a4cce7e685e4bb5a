"""How often two different people score at least x: counted where there are counts, extended a little beyond, then no
further.

Below a high threshold the share of comparisons is counted. Above it the generalised Pareto law is fitted to the
excesses (peaks over threshold), if the Anderson-Darling test does not reject it, and gives rates down to a tenth of
one in the effective number of comparisons. Limits are profile-likelihood limits, widened by how much subjects recurring
in many pairs inflate the variance (the adjusted composite likelihood of Varin, Reid and Firth, Statistica Sinica 21,
2011). Beyond the support nothing is claimed: rates stay at the last limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import lambertw
from scipy.stats import t

from matcher_service.errors import InvalidInput
from matcher_service.evaluation import generalised_pareto as gp
from matcher_service.evaluation.comparisons import Comparisons, at_or_above, edges
from matcher_service.evaluation.generalised_pareto import Pareto
from matcher_service.evaluation.intervals import check_confidence, clopper_pearson, dyadic_variance, few_clusters
from matcher_service.terms import Float64, Int64, ScoreTable

# The lowest threshold whose excesses the law fits is taken; the counts are of excesses, highest threshold last.
EXCESSES = (4000, 2000, 1000, 500, 250, 125)
EXCESSES_SHARE_MAX = 0.01
REJECTED_BELOW = 0.1
# As far as the support goes: this part of one in the effective comparisons, and no wider than this factor.
BEYOND_THE_DATA = 0.1
LIMIT_TO_ESTIMATE_MAX = 10.0
# Without a fitted law the counted part ends where fewer comparisons than this remain.
COUNTED_MIN = 10
_COUNTED_RATIO = 1.05
_TAIL_POINTS = 200


@dataclass(frozen=True, slots=True)
class TailFit:
    """The law of excesses over `threshold`; `p_value` of its goodness of fit; `design_effect`: by how much recurring
    subjects inflate the variance of a rate in the tail, at least 1."""

    threshold: float
    excesses: int
    law: Pareto
    p_value: float
    design_effect: float


@dataclass(frozen=True, slots=True)
class ImpostorTail:
    """False-match rates at `scores` [m], ascending: estimates with two-sided limits. `fit` None: no law was accepted,
    and all is counted. `supported_score` is the last score, `supported_rate` the upper limit there."""

    scores: Float64
    estimates: Float64
    low: Float64
    high: Float64
    confidence: float
    comparisons: int
    effective_comparisons: float
    subjects: int
    fit: TailFit | None
    rejected: tuple[TailFit, ...]
    highest: float

    @property
    def supported_score(self) -> float:
        return float(self.scores[-1])

    @property
    def supported_rate(self) -> float:
        """No false-match rate below this is claimed, at any score."""
        return float(self.high[-1])


def fit_tail(comparisons: Comparisons, confidence: float = 0.95) -> ImpostorTail:
    """Raises InvalidInput with fewer than 20 impostor comparisons or 3 subjects."""
    check_confidence(confidence)
    total = comparisons.impostors
    if total < 20 or comparisons.subjects < 3:
        raise InvalidInput(
            f"{total} comparisons of {comparisons.subjects} subjects calibrate nothing",
            field="subjects",
            hint="give templates of at least 3 people, and of hundreds for a false-match rate of use",
        )
    accepted, rejected = _choose(comparisons, total, confidence)
    counted = _counted(comparisons, total, confidence, accepted.threshold if accepted else None)
    if accepted is None:
        scores, estimates, low, high = counted
        effective = effective_comparisons(comparisons, total, float(scores[-1]), confidence)
    else:
        effective = total / accepted.design_effect * few_clusters(len(comparisons.cluster_label), confidence)
        observed = comparisons.tail.scores[: accepted.excesses] - accepted.threshold
        beyond = _extended(accepted, observed, total, effective, len(comparisons.cluster_label), confidence)
        scores, estimates, low, high = (np.concatenate(pair) for pair in zip(counted, beyond, strict=True))
    high = np.maximum.accumulate(high[::-1])[::-1]
    low = np.minimum.accumulate(low)
    return ImpostorTail(
        scores=scores,
        estimates=estimates,
        low=np.minimum(low, estimates),
        high=np.minimum(np.maximum(high, estimates), 1.0),
        confidence=confidence,
        comparisons=total,
        effective_comparisons=effective,
        subjects=comparisons.subjects,
        fit=accepted,
        rejected=rejected,
        highest=float(comparisons.tail.scores[0]),
    )


def score_table(tail: ImpostorTail, source: str) -> ScoreTable:
    """The table that score_calibrator loads; its rates are the upper limits, nowhere below them between points.

    `source` says whose comparisons they are, in words.
    """
    # Between two points the rate runs straight in logarithms. Giving each point the limit of the one before keeps the
    # table at or above the limits.
    rates = np.minimum.accumulate(np.concatenate(([1.0], tail.high[:-1])))
    law = tail.fit
    how = (
        "counted throughout; no law was fitted to the tail"
        if law is None
        else f"counted up to {law.threshold:.4f}, then a generalised Pareto tail (shape {law.law.shape:+.3f}, "
        f"{law.excesses:,} excesses, Anderson-Darling p = {law.p_value:.2g})"
    )
    method = (
        f"{source}: {tail.comparisons:,} impostor comparisons of {tail.subjects:,} subjects, worth "
        f"{tail.effective_comparisons:,.0f} independent ones; {how}; each rate is the upper end of a "
        f"{tail.confidence:.0%} interval; supported up to a score of {tail.supported_score:.4f}; "
        f"no rate below {rates[-1]:.1e} is claimed"
    )
    as_tuple = tuple[float, ...]
    return ScoreTable(
        scores=as_tuple(tail.scores.tolist()),
        rates=as_tuple(rates.tolist()),
        method=method,
        estimates=as_tuple(tail.estimates.tolist()),
        low_rates=as_tuple(tail.low.tolist()),
        confidence=tail.confidence,
    )


def _choose(comparisons: Comparisons, total: int, confidence: float) -> tuple[TailFit | None, tuple[TailFit, ...]]:
    rejected: list[TailFit] = []
    scores = comparisons.tail.scores
    for wanted in EXCESSES:
        if wanted > EXCESSES_SHARE_MAX * total or wanted >= len(scores):
            continue
        threshold = float(scores[wanted])
        count = int(np.searchsorted(-scores, -threshold, side="left"))
        if count < wanted * 0.8:  # too many equal scores: duplicates in the set, not a tail
            continue
        excesses = scores[:count] - threshold
        shape, scale = gp.fit(excesses)
        law = Pareto(float(shape), float(scale))
        found = TailFit(threshold, count, law, gp.goodness_of_fit(excesses, law), 1.0)
        if found.p_value < REJECTED_BELOW:
            rejected.append(found)
            continue
        effect = _design_effect(comparisons, total, found)
        return TailFit(threshold, count, law, found.p_value, effect), tuple(rejected)
    return None, tuple(rejected)


def _counted(
    comparisons: Comparisons, total: int, confidence: float, below: float | None
) -> tuple[Float64, Float64, Float64, Float64]:
    """Rates at edges of the histogram, thinned to steps of a few per cent, below a score or while counts remain."""
    reached = at_or_above(comparisons.histogram)
    least = COUNTED_MIN if below is None else 1
    usable = np.flatnonzero((reached >= least) & ((edges() < below) if below is not None else True))
    kept: list[int] = []
    for at in usable.tolist():
        if not kept or reached[at] * _COUNTED_RATIO <= reached[kept[-1]]:
            kept.append(at)
    if kept[-1] != usable[-1]:
        kept.append(int(usable[-1]))
    points = np.asarray(kept, dtype=np.int64)
    cells = _reached_by_pair(comparisons.counts, points)
    pairs = comparisons.counts.sum(axis=-1).astype(np.float64)
    shares = reached[points] / total
    variance = dyadic_variance(cells - shares[:, None, None] * pairs) / float(total) ** 2
    effective = _effective(shares, variance, total, len(pairs), confidence)
    low, high = clopper_pearson(shares * effective, effective, confidence)
    return edges()[points], shares, low, high


def _effective(shares: Float64, variance: Float64, total: int, clusters: int, confidence: float) -> Float64:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = shares * (1.0 - shares) / variance * few_clusters(clusters, confidence)
    return np.asarray(np.clip(np.nan_to_num(found, nan=float(total), posinf=float(total)), 1.0, float(total)))


def effective_comparisons(comparisons: Comparisons, total: int, score: float, confidence: float) -> float:
    """How many independent comparisons would leave the rate at `score` as uncertain as these `total` do."""
    at = np.searchsorted(edges(), [score - 1e-9])
    cells = _reached_by_pair(comparisons.counts, at)
    pairs = comparisons.counts.sum(axis=-1).astype(np.float64)
    share = at_or_above(comparisons.histogram)[at] / total
    variance = dyadic_variance(cells - share[:, None, None] * pairs) / float(total) ** 2
    return float(_effective(share, variance, total, len(pairs), confidence)[0])


def _reached_by_pair(counts: Int64, points: Int64) -> Float64:
    """Comparisons [points, g, g] at or above the edges `points`, ascending, of the histogram."""
    between = np.add.reduceat(counts, points, axis=-1)
    return np.cumsum(between[..., ::-1], axis=-1)[..., ::-1].transpose(2, 0, 1).astype(np.float64)


def _design_effect(comparisons: Comparisons, total: int, fit: TailFit) -> float:
    """The largest ratio, over the tail, of the variance of the log rate with recurring subjects to that without."""
    clusters, count, law = len(comparisons.cluster_label), fit.excesses, fit.law
    tail = comparisons.tail
    excesses = tail.scores[:count] - fit.threshold
    gradients = gp.scores(excesses, law)
    sums = np.stack(
        [
            _by_pair(tail.first[:count], tail.second[:count], values, clusters)
            for values in (np.ones(count), gradients[:, 0], gradients[:, 1])
        ]
    )
    pairs = comparisons.counts.sum(axis=-1).astype(np.float64)
    surprise = sums[0] - count / total * pairs
    reach = float(np.log(count * 10.0))
    ahead = _excess_at(law, np.linspace(0.0, reach, 12))
    directions = gp.log_survival_gradient(ahead, law) @ np.linalg.inv(gp.information(law))
    influence = surprise + np.einsum("xp,pgh->xgh", directions, sums[1:])
    clustered = dyadic_variance(influence)
    alone = count * (1.0 - count / total) + count * np.einsum(
        "xp,pq,xq->x", directions, gp.information(law), directions
    )
    return float(max(1.0, (clustered / alone).max()))


def _by_pair(first: Int64, second: Int64, values: Float64, clusters: int) -> Float64:
    sums = np.zeros((clusters, clusters))
    np.add.at(sums, (first, second), values)
    np.add.at(sums, (second, first), np.where(first != second, values, 0.0))
    return sums


def _excess_at(law: Pareto, minus_log_survival: Float64) -> Float64:
    if abs(law.shape) < 1e-7:
        return np.asarray(law.scale * minus_log_survival)
    return np.asarray(law.scale * np.expm1(law.shape * minus_log_survival) / law.shape)


def _extended(
    fit: TailFit, observed: Float64, total: int, effective: float, clusters: int, confidence: float
) -> tuple[Float64, Float64, Float64, Float64]:
    """Rates from the fitted law's threshold to the end of the support."""
    law, share = fit.law, fit.excesses / total
    depth = np.log(share * effective / BEYOND_THE_DATA)
    excess = _excess_at(law, np.linspace(0.0, max(float(depth), 0.1), _TAIL_POINTS))
    estimates = share * np.exp(gp.log_survival(excess, law.shape, law.scale))
    low, high = _limits(fit, observed, excess, share, clusters, confidence)
    wide = np.flatnonzero(high > LIMIT_TO_ESTIMATE_MAX * estimates)
    stop = int(wide[0]) if len(wide) else len(excess)
    kept = slice(0, max(stop, 2))
    return fit.threshold + excess[kept], estimates[kept], low[kept], high[kept]


def _limits(
    fit: TailFit, observed: Float64, excess: Float64, share: float, clusters: int, confidence: float
) -> tuple[Float64, Float64]:
    """Profile-likelihood limits of share * S(excess): the extremes over all parameters that the data do not reject."""
    count, law = fit.excesses, fit.law
    quantile = float(t.ppf(1.0 - (1.0 - confidence) / 2.0, max(clusters - 1, 1)))
    allowed = 0.5 * quantile**2 * fit.design_effect
    root = np.linalg.cholesky(np.linalg.inv(gp.information(law)) / count * fit.design_effect)
    angles = np.linspace(0.0, 2.0 * np.pi, 64, endpoint=False)
    radii = np.r_[0.0, np.linspace(0.1, 3.0 * quantile, 44)]
    circle = np.stack([np.cos(angles), np.sin(angles)])
    offsets = (root @ circle)[:, None, :] * radii[None, :, None]
    shapes = (law.shape + offsets[0]).ravel()
    scales = (law.scale + offsets[1]).ravel()
    possible = (scales > 0) & (shapes > -1.0)
    shapes, scales = shapes[possible], scales[possible]
    at_most = gp.log_likelihood(observed, shapes, scales)
    budget = allowed - (at_most.max() - at_most)
    shapes, scales, budget = shapes[budget >= 0], scales[budget >= 0], budget[budget >= 0]
    # Poisson deviance of the count: rho - 1 - log(rho) = budget / count has one root on either side of 1.
    least = -np.real(lambertw(-np.exp(-1.0 - budget / count), 0))
    most = -np.real(lambertw(-np.exp(-1.0 - budget / count), -1))
    survival = np.exp(gp.log_survival(excess[None, :], shapes[:, None], scales[:, None]))
    high = share * (most[:, None] * survival).max(axis=0)
    low = share * (least[:, None] * survival).min(axis=0)
    return low, np.minimum(high, 1.0)
