"""Which codes serve a floor, or whether a full scan is cheaper. No choice changes an answer.

The costs are those of one of two busy threads, in nanoseconds, measured on an x86 core with AVX-512 at 512
dimensions and scaled with the dimension; only their ratios matter. What a filter costs is its pass over the codes and
the products of the rows that it takes. How many it will take follows from its parts' cut-offs and a probe's cosines
with some stored rows; for few rows and probes, where that would cost more than it tells, from those of stored rows with
each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from matcher_service.halves import widened
from matcher_service.index.codes import blocks_for
from matcher_service.terms import Float32, Float64, Int64

BINS = 200
DIMENSION_MIN = 64  # below, the law's tail is as wide as the scores
ROWS_MIN = 2000
_SAMPLE_PROBES = (64, 256)  # at least and at most; one row in 512 between them
_DUPLICATE = 0.9
_SAMPLE_ROWS = 8192
_CENTRES: Float64 = np.asarray((np.arange(BINS) + 0.5) * (2 / BINS) - 1, np.float64)
FLOORS: Float32 = np.linspace(0, 1, 101, dtype=np.float32)  # for which the shares are predicted
_LOOKED_AT_MAX = 1024  # stored rows that a probe is compared with before a scan
_LOOK_PAIRS_MIN = 50_000  # rows times probes from which on the look pays

_PASS_NS = 0.34  # of a pass, per row, beside its tables
_TABLE_NS = 0.0147  # per row and table
_TAKEN_NS = 0.8  # per row taken and dimension: mostly the time in which memory answers, with two that ask it
FEW_PROBES = 4  # of a full scan: up to here a product of each row costs less than to code the rows
_START_NS = 120_000  # that a filter takes to begin, however few its rows
_FEW_NS = 0.11  # of a full scan of few probes, per row, dimension and probe
_CODE_NS = 0.31  # of a full scan of many, per row and dimension, whatever the number of probes
_SUM_NS = 0.0047  # and per row, dimension and probe
_STRAY_NS = 0.7  # per row and dimension that reached a probe's cut-off in it and not the floor
_STRAY_WIDTH = 0.02  # within which rows count as near to a cut-off: a sample is no more than that
_GUESS_NS = 600_000  # of a guess by codes, per probe, beside half a pass: after it comes a scan, after a full one none


class Rate(NamedTuple):
    """A code: its number of look-up tables, the means of its rows' a and b (`certificate.factors`), and what the
    estimate of each of its parts has to reach for each of `FLOORS`, float64 [p, len(FLOORS)]."""

    tables: int
    along: float
    across: float
    cut_offs: Float64


def blocks(dimension: int) -> tuple[int, ...]:
    """The rates that pay for a dimension, as coordinates for each 4-bit code: a coarse one for high floors, and a
    fine one for all else. At 512 dimensions 102 and 256 tables: 179 bytes a row."""
    possible = blocks_for(dimension)
    if not possible or dimension < DIMENSION_MIN:
        return ()
    fine = possible[-1]
    coarse = [block for block in possible if 2 * fine <= block <= 2.5 * fine]
    return (*coarse[:1], fine)


def worth_codes(rows: int, dimension: int) -> bool:
    """Whether a segment is large enough for codes; else a full scan takes no longer than the filter's start."""
    return rows >= ROWS_MIN and bool(blocks(dimension))


def sample_cosines(stored: NDArray[np.float16]) -> Float64:
    """The distribution of the cosines between stored rows, float64 [BINS]: shares of [-1, 1] in equal bins.

    Pairs of near duplicates are left out: a probe that meets a crowd of them is found out as it is looked at.
    """
    rows = stored.shape[0]
    if rows < 2:
        return np.full(BINS, 1 / BINS)
    probes = np.clip(rows // 512, *_SAMPLE_PROBES)
    first = np.unique(np.linspace(0, rows - 1, probes).astype(np.int64))
    second = np.unique(np.linspace(0, rows - 1, _SAMPLE_ROWS).astype(np.int64))
    some, others = widened(stored[first]), widened(stored[second])
    cosines = (some @ others.T)[first[:, None] != second[None, :]]
    counts, _ = np.histogram(cosines[cosines < _DUPLICATE], bins=BINS, range=(-1, 1))
    return np.asarray(counts / max(1, counts.sum()))


def looked_at(stored: NDArray[np.float16]) -> Float32:
    """The rows that probes are compared with before a scan, float32 [m, d]: every so many of the stored ones."""
    rows = stored.shape[0]
    count = min(_LOOKED_AT_MAX, max(32, rows // 512), rows)
    return widened(stored[np.linspace(0, max(0, rows - 1), count).astype(np.int64)])


def stray_shares(margin: float) -> Float32:
    """The chance that a row's sum reaches a cut-off and its score not the floor, float32 [len(FLOORS), BINS]."""
    below = (_CENTRES - FLOORS[:, None]) / _STRAY_WIDTH
    return np.asarray(ndtr(below + margin / _STRAY_WIDTH) - ndtr(below), np.float32)


def taken_shares(rate: Rate, dimension: int) -> Float32:
    """The chance that a row is taken, float32 [len(FLOORS), BINS], for the cosines in the middle of the bins."""
    spread = np.maximum(rate.across * np.sqrt(1 - _CENTRES**2) / np.sqrt(dimension - 1), 1e-9)
    taken = ndtr((_CENTRES * rate.along - rate.cut_offs[:, :, None]) / spread)
    return np.asarray(taken.sum(axis=0) / max(1, len(rate.cut_offs)), np.float32)


class Costs:
    """What each way of answering costs a segment of `rows` rows, per row.

    `rates` by block; `sample`: what `looked_at` gave. `margin`: by how much a full scan's sums let rows below a floor
    reach it.
    """

    def __init__(
        self,
        rows: int,
        dimension: int,
        cosines: Float64,
        rates: Mapping[int, Rate],
        sample: Float32,
        margin: float,
    ) -> None:
        self._rows = rows
        self._dimension = dimension
        self._cosines = cosines
        self._sample = sample
        self._blocks = np.array([*rates, 0], np.int64)
        self._taken_ns = dimension * _TAKEN_NS
        self._pass = np.array([_PASS_NS + _TABLE_NS * rate.tables for rate in rates.values()])
        self._shares = [*(taken_shares(rate, dimension) for rate in rates.values()), stray_shares(margin)]
        self._usual = np.array([shares @ cosines for shares in self._shares])

    def guess_is_dear(self, probes: int) -> bool:
        """Whether to begin guesses by codes takes so many probes longer than a full scan, whatever comes after."""
        whole = self._dimension * min(_FEW_NS * probes, _CODE_NS + _SUM_NS * probes)
        return _GUESS_NS * probes >= self._rows * whole

    def plan(
        self,
        probes: Float32,
        probe_norms: Float64,
        floors: Float32,
        usable: NDArray[np.bool_],
        guessed: bool = False,
    ) -> Int64:
        """For each probe the block of the cheapest codes, or 0 for a full scan; int64 [n]. `guessed`: with codes the
        floor has to be guessed first."""
        if not usable.all():
            plans = np.zeros(len(probes), np.int64)
            plans[usable] = self._plan(probes[usable], probe_norms[usable], floors[usable], guessed)
            return plans
        return self._plan(probes, probe_norms, floors, guessed)

    def _plan(self, probes: Float32, probe_norms: Float64, floors: Float32, guessed: bool) -> Int64:
        batch = len(probes)
        if len(self._blocks) == 1 or not batch:
            return np.zeros(batch, np.int64)
        steps = np.minimum(floors * (FLOORS.size - 1), FLOORS.size - 1).astype(np.int64)
        looks = batch * self._rows >= _LOOK_PAIRS_MIN
        share = self._seen(probes, probe_norms, steps) if looks else self._usual[:, steps]
        coded = self._pass[:, None] + self._taken_ns * share[:-1]
        if guessed:
            coded += self._pass[-1] / 2 + _GUESS_NS / max(1, self._rows)
        cheapest = coded.argmin(axis=0)
        best = coded[cheapest, np.arange(batch)] + _START_NS / max(1, self._rows * batch)
        return np.where(self._in_full(best, share[-1]), 0, self._blocks[cheapest])

    def _in_full(self, coded: Float64, strays: Float64) -> NDArray[np.bool_]:
        """Which probes share a full scan so that all together cost least, bool [n], if by codes they cost so much.

        Many share the coding of the rows, and each adds its sums and what strays above its cut-off; few cost the same
        each.
        """
        many = coded - self._dimension * (_SUM_NS + _STRAY_NS * strays)
        few = coded - self._dimension * _FEW_NS
        by_sums = (-many).argsort()[: max(FEW_PROBES + 1, np.count_nonzero(many > 0))]
        by_products = (-few).argsort()[: min(FEW_PROBES, np.count_nonzero(few > 0))]
        saved = many[by_sums].sum() - self._dimension * _CODE_NS if by_sums.size > FEW_PROBES else 0.0
        in_full = np.zeros(len(coded), np.bool_)
        in_full[by_sums if saved > few[by_products].sum() else by_products] = True
        return in_full

    def _seen(self, probes: Float32, probe_norms: Float64, steps: Int64) -> Float64:
        """The share of the rows that each rate will take for each probe, and a full scan in vain, by its cosines with
        some of them."""
        cosines = (probes @ self._sample.T) / probe_norms.astype(np.float32)[:, None]
        bins = np.clip((cosines + 1) * (BINS / 2), 0, BINS - 1).astype(np.int64)
        bins += steps[:, None] * BINS
        return np.array([shares.ravel()[bins].mean(axis=1) for shares in self._shares])

    def floor_of_best(self, count: int) -> float:
        """The score that about `count` of the rows reach."""
        above = np.cumsum(self._cosines[::-1])[::-1] * self._rows
        return float(2 / BINS * np.count_nonzero(above >= count) - 1)

    def bytes_in_memory(self) -> int:
        return int(self._sample.nbytes + sum(shares.nbytes for shares in self._shares))
