"""Scores to false-match rates and back.

A table is measured from impostor scores: comparisons of templates of different people, in the space and with the
model for which it will be used. Its rates are upper confidence limits, not plain fractions, and it ends where the
data end: a rate below its last is claimed by nobody. The rate of a score is the chance that one unmated comparison
scores at least that; over a whole gallery it grows with the number of references (`fpir`).
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

from matcher_service.errors import InvalidInput
from matcher_service.terms import Float64, GenuineTable, ScoreTable

# A table keeps every one of the highest scores and thins the rest, so that neighbours differ by at most this ratio.
_RATE_RATIO_MAX = 1.05


def false_match_rates(table: ScoreTable, scores: ArrayLike) -> Float64:
    """False-match rate float64 [m] of each score [m].

    Between points the logarithm of the rate runs straight. Below the first score the rate is 1; above the last it
    stays at the last rate, which is as far as the data reach.
    """
    wanted = np.asarray(scores, dtype=np.float64)
    points = np.asarray(table.scores)
    rates = np.asarray(table.rates)
    between = np.exp(np.interp(wanted, points, np.log(rates)))
    # The exponential of a logarithm may lie one unit off on either side.
    between = np.where(wanted >= points[-1], rates[-1], np.clip(between, rates[-1], 1.0))
    return np.where(wanted < points[0], 1.0, between)


def threshold_for_rate(table: ScoreTable, rate: float) -> float:
    """The least float32 score whose false-match rate is at most `rate`.

    Raises InvalidInput if `rate` is not in (0, 1] or is below what the table supports.
    """
    if not 0.0 < rate <= 1.0:
        raise InvalidInput(f"{rate} is not a rate", field="rate", hint="ask for a rate above 0 and at most 1")
    if rate < table.rates[-1]:
        raise InvalidInput(
            f"the table supports no rate below {table.rates[-1]:.2e}, {rate:.2e} was asked for",
            field="rate",
            hint="measure on more impostor comparisons, or accept the rate that they support",
        )
    low, high = np.float32(-1.0), np.float32(table.scores[-1])
    if high < table.scores[-1]:
        high = np.nextafter(high, np.float32(2))
    if _rate(table, low) <= rate:
        return float(low)
    while (middle := (low + high) * np.float32(0.5)) not in (low, high):
        low, high = (low, middle) if _rate(table, middle) <= rate else (middle, high)
    return float(high)


def fpir(false_match_rate: ArrayLike, gallery_size: int) -> Float64:
    """Chance that an unmated probe has a candidate among `gallery_size` references: 1 - (1 - FMR)^N.

    Holds if comparisons are independent; those with several references of one subject are not, which makes it an
    over-estimate. Computed without cancellation, so that 1e-15 over a gallery of one is 1e-15.
    """
    rates = np.asarray(false_match_rate, dtype=np.float64)
    if gallery_size == 0:
        return np.zeros_like(rates)
    with np.errstate(divide="ignore"):
        return np.asarray(-np.expm1(gallery_size * np.log1p(-rates)))


def false_match_rate_for_fpir(wanted_fpir: float, gallery_size: int) -> float:
    """The false-match rate at which `fpir` over `gallery_size` references is `wanted_fpir`; its inverse.

    Raises InvalidInput unless `wanted_fpir` is in (0, 1) and `gallery_size` at least 1.
    """
    if not 0.0 < wanted_fpir < 1.0:
        raise InvalidInput(f"{wanted_fpir} is not a rate between 0 and 1", field="fpir", hint="for example 0.003")
    if gallery_size < 1:
        raise InvalidInput("an empty gallery has no false positives", field="gallery_size", hint="give at least 1")
    return -math.expm1(math.log1p(-wanted_fpir) / gallery_size)


def measure_table(
    impostor_scores: ArrayLike, *, source: str, confidence: float = 0.95, independent: int | None = None
) -> ScoreTable:
    """The score table that these impostor scores [m] support; `source` says in words whose they are.

    Each rate is the one-sided Clopper-Pearson upper limit of the share of comparisons at or above the score, at
    `confidence`. The last point stands just above the highest score seen: there the limit for nought out of m (for
    95%, about 3/m) is all that can be said, and no tail is extrapolated beyond it. At every score, between points too,
    the table is at or above that limit. `independent`, if the scores share subjects, is how many independent
    comparisons they are to be counted as.

    Raises InvalidInput if there are no scores, or one is not a finite cosine.
    """
    scores = np.sort(np.asarray(impostor_scores, dtype=np.float32).ravel())
    if len(scores) == 0 or not (np.abs(scores) <= 1.0 + 1e-6).all():
        raise InvalidInput(
            "impostor scores must be finite cosines, and at least one",
            field="impostor_scores",
            hint="compare templates of different people after adapting them",
        )
    if not 0.5 <= confidence < 1.0:
        raise InvalidInput(f"{confidence} is no confidence", field="confidence", hint="for example 0.95")
    weight = 1.0 if independent is None else independent / len(scores)
    if not 0.0 < weight <= 1.0:
        raise InvalidInput(
            f"{independent} independent comparisons out of {len(scores)}",
            field="independent",
            hint="give a count of at least 1 and at most the number of scores",
        )
    points = [scores[len(scores) - rank] for rank in _ranks(len(scores))]
    points.append(np.nextafter(scores[-1], np.float32(2)))
    points = sorted(set(points))
    # Within (a, b] at most the scores above a are reached. Giving b the limit for those keeps the whole step at or
    # above its limit, and costs nothing in the tail, where no score lies between two points.
    above = len(scores) - np.searchsorted(scores, np.asarray(points), side="right")
    limits = _upper_limits(above, len(scores), weight, confidence)
    rates = np.minimum.accumulate(np.concatenate(([1.0], limits[:-1])))
    counted = "" if independent is None else f", counted as {independent:,} independent ones"
    method = (
        f"{source}: {len(scores):,} impostor comparisons{counted}; each rate is a {confidence:.0%} upper limit "
        f"(Clopper-Pearson); supported up to a score of {scores[-1]:.4f}, none seen above, "
        f"no rate below {rates[-1]:.1e} is claimed"
    )
    return ScoreTable(tuple(float(one) for one in points), tuple(float(one) for one in rates), method)


def check_table(table: ScoreTable) -> None:
    """Raises InvalidInput unless scores ascend strictly, and rates stay in (0, 1] and do not rise; of the genuine
    scores, rates stay in [0, 1] and do not fall."""
    ascending = all(before < after for before, after in pairwise(table.scores))
    falling = all(before >= after for before, after in pairwise(table.rates))
    finite = all(math.isfinite(one) for one in table.scores) and all(0.0 < one <= 1.0 for one in table.rates)
    if not table.scores or len(table.scores) != len(table.rates) or not (ascending and falling and finite):
        raise InvalidInput(
            "the score table needs as many rates as scores, scores ascending, rates in (0, 1] and not rising",
            field="score_table",
            hint="measure it with `matcher calibrate`",
        )
    if table.genuine is not None:
        _check_genuine(table.genuine)


def _check_genuine(table: GenuineTable) -> None:
    columns = (table.estimates, table.low_rates, table.high_rates)
    rising = all(before < after for before, after in pairwise(table.scores)) and all(
        before <= after for one in columns for before, after in pairwise(one)
    )
    between = all(
        0.0 <= low <= estimate <= high <= 1.0
        for estimate, low, high in zip(*columns, strict=False)  # their lengths are looked at below
    )
    of_one_length = {len(table.scores)} == {len(one) for one in columns} and len(table.scores) > 0
    if not (of_one_length and rising and between and all(math.isfinite(one) for one in table.scores)):
        raise InvalidInput(
            "the genuine scores need estimates between low_rates and high_rates, as many as scores, all ascending",
            field="score_table.genuine",
            hint="measure it with `matcher calibrate`",
        )


def _rate(table: ScoreTable, score: np.float32) -> float:
    return float(false_match_rates(table, np.asarray([score]))[0])


def _ranks(count: int) -> list[int]:
    """Ranks from the top (1 is the highest score) at which a table has points: all, then ever fewer, the last `count`.

    A point at rank r is given the limit for the rank after it, so a step may not exceed the ratio.
    """
    ranks, rank = [], 1
    while rank < count:
        ranks.append(rank)
        rank = max(rank + 1, int(rank * _RATE_RATIO_MAX))
    return [*ranks, count]


def _upper_limits(reached: NDArray[np.int64], count: int, weight: float, confidence: float) -> Float64:
    hits, trials = reached * weight, count * weight
    with np.errstate(invalid="ignore", divide="ignore"):
        limits = betaincinv(hits + 1.0, np.maximum(trials - hits, 0.0), confidence)
    return np.where(reached >= count, 1.0, np.asarray(limits, dtype=np.float64))
