"""Thresholds by target: from "at most so many false alerts per unmated probe at this size" to a score, with what the
calibration can promise. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from matcher_service.models.score_calibrator import (
    false_match_rate_for_fpir,
    false_match_rates,
    fpir,
    threshold_for_rate,
)
from matcher_service.terms import Float64, GenuineTable, Limits, ScoreTable


@dataclass(frozen=True, slots=True)
class Promise:
    """What a score table says of one threshold over `references` references: the false-positive identification rate
    with its limits, and the false-negative one of people with one reference (None: the table has no comparisons of
    people with themselves). `references_max`: up to how many references `fpir_wanted` is promised."""

    threshold: float
    references: int
    fpir_wanted: float
    fpir_estimate: float
    fpir_low: float
    fpir_high: float
    references_max: int
    fnir: Limits | None = None


def threshold_for(table: ScoreTable, fpir_wanted: float, references: int) -> Promise:
    """The least threshold at which the upper limit of the FPIR is at most `fpir_wanted`.

    Raises InvalidInput if the data behind the table do not support that, saying what they do support.
    """
    return promise(table, threshold_limits(table, fpir_wanted, references).high, fpir_wanted, references)


def threshold_limits(table: ScoreTable, fpir_wanted: float, references: int) -> Limits:
    """The least thresholds at which the best estimate, the lower and the upper limit of the FPIR are at most
    `fpir_wanted`: how well the table knows the threshold. Without estimates and lower limits in the table the estimate
    is the upper limit, and the lower one the least score there is. Raises InvalidInput as `threshold_for`."""
    rate = false_match_rate_for_fpir(fpir_wanted, references)
    high = threshold_for_rate(table, rate)
    estimate = threshold_for_rate(_curve(table, table.estimates), rate) if table.estimates else high
    low = threshold_for_rate(_curve(table, table.low_rates), rate) if table.low_rates else -1.0
    return Limits(min(estimate, high), min(low, estimate, high), high)


def promise(table: ScoreTable, threshold: float, fpir_wanted: float, references: int) -> Promise:
    """What the table says of a threshold that was chosen in whatever way. Without estimates and lower limits in the
    table these are given as the upper limit and 0; the lower limit is 0 too beyond the table's last score."""
    high = float(false_match_rates(table, [threshold])[0])
    estimate = _between(table, table.estimates, threshold) if table.estimates else high
    low = _between(table, table.low_rates, threshold) if table.low_rates and threshold <= table.scores[-1] else 0.0
    # log1p(-1e-17) is not 0, and a table claims no rate of 0.
    most = math.log1p(-fpir_wanted) / math.log1p(-high) if high < 1.0 else 0.0
    return Promise(
        threshold=threshold,
        references=references,
        fpir_wanted=fpir_wanted,
        fpir_estimate=float(fpir(min(estimate, high), references)),
        fpir_low=float(fpir(min(low, high), references)),
        fpir_high=float(fpir(high, references)),
        references_max=int(most * (1.0 + 1e-9)),
        fnir=None if table.genuine is None else missed(table.genuine, threshold),
    )


def missed(genuine: GenuineTable, threshold: float) -> Limits:
    """The false non-match rate at a threshold. Between two scores of the table the estimate runs straight, and the
    limits are those of the score below and the score above: never narrower than what was measured."""
    scores = genuine.scores
    above = int(np.searchsorted(scores, threshold, side="left"))
    below = above if above < len(scores) and scores[above] == threshold else above - 1
    return Limits(
        estimate=float(np.interp(threshold, scores, genuine.estimates, left=0.0, right=1.0)),
        low=genuine.low_rates[below] if below >= 0 else 0.0,
        high=genuine.high_rates[above] if above < len(scores) else 1.0,
    )


def _between(table: ScoreTable, rates: tuple[float, ...], threshold: float) -> float:
    values = np.maximum(np.asarray(rates), 1e-300)
    logs: Float64 = np.interp([threshold], table.scores, np.log(values))
    found = float(np.exp(logs[0]))
    return 0.0 if found < 1e-290 else found


def _curve(table: ScoreTable, rates: Sequence[float]) -> ScoreTable:
    """The table with other rates at its scores, none of them 0."""
    return ScoreTable(table.scores, tuple(max(one, 1e-300) for one in rates), table.method)
