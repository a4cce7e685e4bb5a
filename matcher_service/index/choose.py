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

from matcher_service.index import certificate
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
_RESCORE_NS = 0.9  # per row taken and dimension
CONVERT_NS = 0.45  # of a full scan, per row and dimension, whatever the number of probes
_PRODUCT_NS = 0.03  # of a full scan, per row, dimension and probe


_FLOORS = 201  # floors, from 0 to 1, for which the shares are predicted
_START_NS = 300_000  # that a filter takes to begin, however few its rows
_TAKEN_MAX = 0.5  # of the rows of a part: bounds what one range search can hold


class Rate(NamedTuple):
    """A code: its number of look-up tables, and the means of its rows' a and b (`certificate.factors`)."""

    tables: int
    along: float
    across: float


def blocks(dimension: int) -> tuple[int, ...]:
    """The rates that pay for a dimension, as coordinates for each 4-bit code: a coarse one for high floors and
    guesses, and a fine one for all else. At 512 dimensions, 64 and 256 tables: 160 bytes a row."""
    possible = blocks_for(dimension)
    if not possible or dimension < DIMENSION_MIN:
        return ()
    fine = possible[-1:]
    coarse = tuple(block for block in possible if block == 4 * fine[0])
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


class Costs:
    """What each way of answering costs a segment of `rows` rows, per probe and row.

    `rates` by block; `convert_ns` is that of a full scan, per row and dimension, 0 if its rows are float32
    already.
    """

    def __init__(
        self,
        rows: int,
        dimension: int,
        cosines: Float64,
        rates: Mapping[int, Rate],
        convert_ns: float = CONVERT_NS,
    ) -> None:
        self._start = _START_NS / max(1, rows)
        self._rows = rows
        self._cosines = cosines
        self._whole = (dimension * convert_ns, dimension * _PRODUCT_NS)
        self._rescore = dimension * _RESCORE_NS
        self._blocks = np.array([*rates, 0], np.int64)
        tail = certificate.tail(dimension)
        floors = np.arange(_FLOORS) / (_FLOORS - 1)
        self._coded = np.array(
            [
                [
                    _PASS_NS
                    + _TABLE_NS * rate.tables
                    + self._rescore * taken_share(floor, rate, dimension, cosines, tail)
                    for floor in floors
                ]
                for rate in rates.values()
            ]
        ).reshape(len(rates), _FLOORS)

    def whole(self, batch: int) -> float:
        """Of a full scan for one of `batch` probes."""
        return self._whole[0] / max(1, batch) + self._whole[1]

    def plan(self, floors: Float32, usable: NDArray[np.bool_]) -> Int64:
        """For each probe the block of the cheapest codes, or 0 for a full scan; int64 [n]."""
        steps = np.clip(np.nan_to_num(floors, posinf=1.0, neginf=0.0) * (_FLOORS - 1), 0, _FLOORS - 1).astype(np.int64)
        whole = np.full((1, len(floors)), self.whole(len(floors)) - self._start / max(1, len(floors)))
        cheapest = np.concatenate([self._coded[:, steps], whole]).argmin(axis=0)
        return np.asarray(np.where(usable, self._blocks[cheapest], 0))

    def floor_of_best(self, count: int) -> float:
        """The score that about `count` of the rows reach."""
        above = np.cumsum(self._cosines[::-1])[::-1] * self._rows
        return float(2 / BINS * np.count_nonzero(above >= count) - 1)

    def most_taken(self, batch: int) -> float:
        """The share of a part's rows from which on a probe is better scanned in full. Thrice that at which the
        costs are equal: the parts with the lowest cut-offs take far more than the average one."""
        return min(_TAKEN_MAX, 3 * self.whole(batch) / self._rescore)
