"""The threshold for a gallery of a given size, from what has been measured.

A threshold is set by how often an unmated probe may alert (the false-positive identification rate), never by what is
customary: the same threshold alerts a hundred times as often over a hundred times as many references. References of
different origin have tables of their own, and the rate is taken over all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from matcher_service.errors import InvalidInput
from matcher_service.models.score_calibrator import false_match_rates
from matcher_service.terms import ScoreTable


class Part(NamedTuple):
    """`references` references whose unmated comparisons follow `table`."""

    table: ScoreTable
    references: int


def fpir_limit(parts: Sequence[Part], threshold: float) -> float:
    """Upper limit of the share of unmated probes with a candidate at `threshold` or above: 1 - product over the
    parts of (1 - FMR)^references. It rests on the tables' limits and on comparisons being independent."""
    with np.errstate(divide="ignore"):
        logs = [
            part.references * np.log1p(-false_match_rates(part.table, [threshold])[0])
            for part in parts
            if part.references > 0
        ]
    return float(-np.expm1(sum(logs)))


def threshold_for_fpir(parts: Sequence[Part], wanted: float) -> float:
    """The least float32 threshold at which `fpir_limit` is at most `wanted`.

    Raises InvalidInput if not even the highest score in the tables supports that.
    """
    low = np.float32(-1.0)
    high = np.nextafter(np.float32(max(part.table.scores[-1] for part in parts)), np.float32(2))
    lowest = fpir_limit(parts, float(high))
    if lowest > wanted:
        raise InvalidInput(
            f"an FPIR of {wanted:.3g} over {sum(part.references for part in parts):,} references is not supported; "
            f"{lowest:.3g} is the least that the measured scores can promise",
            field="fpir",
            hint="measure on more impostor comparisons, search fewer references, or accept that rate",
        )
    while (middle := (low + high) * np.float32(0.5)) not in (low, high):
        low, high = (low, middle) if fpir_limit(parts, float(middle)) <= wanted else (middle, high)
    return float(high)
