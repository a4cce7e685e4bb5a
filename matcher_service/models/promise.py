"""Thresholds by target: from "at most so many false alerts per unmated probe at this size" to a score, with what the
calibration can promise. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from matcher_service.models.score_calibrator import (
    false_match_rate_for_fpir,
    false_match_rates,
    fpir,
    threshold_for_rate,
)
from matcher_service.terms import Float64, ScoreTable


@dataclass(frozen=True, slots=True)
class Promise:
    """What a score table says of one threshold over `references` references: the false-positive identification rate
    with its limits. `references_max`: up to how many references `fpir_wanted` is promised."""

    threshold: float
    references: int
    fpir_wanted: float
    fpir_estimate: float
    fpir_low: float
    fpir_high: float
    references_max: int


def threshold_for(table: ScoreTable, fpir_wanted: float, references: int) -> Promise:
    """The least threshold at which the upper limit of the FPIR is at most `fpir_wanted`.

    Raises InvalidInput if the data behind the table do not support that, saying what they do support.
    """
    rate = false_match_rate_for_fpir(fpir_wanted, references)
    return promise(table, threshold_for_rate(table, rate), fpir_wanted, references)


def promise(table: ScoreTable, threshold: float, fpir_wanted: float, references: int) -> Promise:
    """What the table says of a threshold that was chosen in whatever way. Without estimates and lower limits in the
    table these are given as the upper limit and 0."""
    high = float(false_match_rates(table, [threshold])[0])
    estimate = _between(table, table.estimates, threshold) if table.estimates else high
    low = _between(table, table.low_rates, threshold) if table.low_rates else 0.0
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
    )


def _between(table: ScoreTable, rates: tuple[float, ...], threshold: float) -> float:
    values = np.maximum(np.asarray(rates), 1e-300)
    logs: Float64 = np.interp([threshold], table.scores, np.log(values))
    found = float(np.exp(logs[0]))
    return 0.0 if found < 1e-290 else found
