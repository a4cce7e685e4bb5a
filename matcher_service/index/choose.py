"""Which codes serve a floor, or whether a full scan is cheaper. No choice changes an answer.

The costs are those of one thread, in nanoseconds, measured on an x86 core with AVX2 at 512 dimensions and
scaled with the dimension; only their ratios matter. What a filter costs is its pass over the codes and the
re-scoring of the rows that it takes. How many it will take is predicted from the cosines of pairs of stored
rows, sampled when the segment was built: a probe looks like them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from matcher_service.index.codes import blocks_for
from matcher_service.terms import Float32, Float64, Int64

BINS = 200
DIMENSION_MIN = 64  # below, the law's tail is as wide as the scores
ROWS_MIN = 2000
_SAMPLE_PROBES = 256
_DUPLICATE = 0.9
_SAMPLE_ROWS = 8192
_PASS_NS = 0.05  # of a pass, per row, beside its tables
_TABLE_NS = 0.0082  # per row and table
_RESCORE_NS = 0.8  # per row taken and dimension
_CONVERT_NS = 0.45  # of a full scan, per row and dimension, whatever the number of probes
_PRODUCT_NS = 0.03  # of a full scan, per row, dimension and probe


class Rate(NamedTuple):
    """A code: its number of look-up tables, and the means of its rows' a and b (`certificate.factors`)."""

    tables: int
    along: float
    across: float


def blocks(dimension: int) -> tuple[int, ...]:
    """The rates that pay for a dimension, as coordinates for each 4-bit code: a coarse one for high floors
    and a fine one for low floors."""
    possible = blocks_for(dimension)
    if not possible or dimension < DIMENSION_MIN:
        return ()
    fine = possible[-1:]
    coarse = tuple(block for block in possible if block == 2 * fine[0])
    return coarse + fine


def worth_codes(rows: int, dimension: int) -> bool:
    """Whether a segment is large enough for codes; else a full scan takes no longer than the filter's start."""
    return rows >= ROWS_MIN and bool(blocks(dimension))


def sample_cosines(stored: NDArray[np.float16]) -> Float64:
    """The distribution of the cosines between stored rows, float64 [BINS]: shares of [-1, 1] in equal bins.

    Pairs of near duplicates are left out: a probe that meets a crowd of them is found out as it is scanned.
    """
    rows = stored.shape[0]
    if rows < 2:
        return np.full(BINS, 1 / BINS)
    first = np.unique(np.linspace(0, rows - 1, _SAMPLE_PROBES).astype(np.int64))
    second = np.unique(np.linspace(0, rows - 1, _SAMPLE_ROWS).astype(np.int64))
    some, others = stored[first].astype(np.float32), stored[second].astype(np.float32)
    cosines = (some @ others.T)[first[:, None] != second[None, :]]
    counts, _ = np.histogram(cosines[cosines < _DUPLICATE], bins=BINS, range=(-1, 1))
    return np.asarray(counts / max(1, counts.sum()))


def taken_share(floor: float, rate: Rate, dimension: int, cosines: Float64, tail: float) -> float:
    """The share of the rows that a filter is expected to take at a floor."""
    centres = (np.arange(BINS) + 0.5) * (2 / BINS) - 1
    spread = rate.across * np.sqrt(1 - centres**2) / np.sqrt(dimension - 1)
    cut_off = floor * rate.along - np.sqrt(1 - floor * floor) * rate.across * tail
    return float(np.sum(cosines * ndtr((centres * rate.along - cut_off) / np.maximum(spread, 1e-9))))


def plan(
    floors: Float32,
    usable: NDArray[np.bool_],
    dimension: int,
    cosines: Float64,
    rates: Mapping[int, Rate],
    tail: float,
) -> Int64:
    """For each probe the key of the cheapest of `rates`, or 0 for a full scan; int64 [n]."""
    chosen = np.zeros(len(floors), np.int64)
    batch = len(floors)
    whole = dimension * (_CONVERT_NS / batch + _PRODUCT_NS)
    for floor in np.unique(floors[usable]):
        height = min(float(floor), 1.0)
        costs = {0: whole}
        for block, rate in rates.items():
            share = taken_share(height, rate, dimension, cosines, tail)
            costs[block] = _PASS_NS + _TABLE_NS * rate.tables + _RESCORE_NS * dimension * share
        chosen[usable & (floors == floor)] = min(costs, key=lambda block: costs[block])
    return chosen
