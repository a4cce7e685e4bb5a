"""The best rows of each probe, picked out of blocks of integer sums as these come in.

A sum bounds a score from above (`integer_bound.py`), it does not order the rows. Those of a block that it likely places
among the best are multiplied at once: the count-th largest product so far is a floor, and it rises. Those that could
reach it are kept for the end, when the floor says of most that they cannot. A block's rows are dealt into groups
(`grouped.py`): the count-th largest of the groups' largest is a sum that at least `count` rows reach, and to find it
means sorting a sixteenth of the sums.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from matcher_service.index.grouped import GROUP, Grouped
from matcher_service.index.integer_bound import CUT_OFF_MAX, CUT_OFF_MIN
from matcher_service.index.integer_products import Int32, Sums
from matcher_service.index.score import float32_margin, norms
from matcher_service.terms import Float32, Int64

# A probe longer than this might have products that overflow.
_NORM_MAX = 1e6

# Of pairs of a row and a probe, int64 [m] each, the products, float32 [m], within `score.float32_margin` of the scores.
PairProducts = Callable[[Int64, Int64], Float32]

Kind = TypeVar("Kind", np.float32, np.int32)


class Picked(NamedTuple):
    """Pairs of a probe and a row, int64 [m] each, in no order, with products of at least the probe's cut, float32 [n]:
    at least as many as were wanted, or all rows. Of a row that is missing the product or the score is below the cut."""

    probes: Int64
    rows: Int64
    cuts: Float32


class Best:
    """Picks at least `count` rows with the largest products for each probe, from several threads; none for a probe
    that is not `served`, bool [n], as it has no codes."""

    def __init__(self, sums: Sums, count: int, products: PairProducts) -> None:
        self._sums = sums
        self.served = sums.cuts.served
        self._count = count
        self._products = products
        probes = len(self.served)
        self._top = np.full((probes, count), -np.inf, np.float32)
        self._floors = np.full(probes, -np.inf, np.float32)
        self._cut_offs = np.where(self.served, CUT_OFF_MIN, CUT_OFF_MAX).astype(np.int32)
        self._likely = self._cut_offs
        self._taken: list[tuple[Int64, Int64, Float32]] = []
        self._left: list[tuple[Int64, Int64, Int32]] = []
        self._lock = threading.Lock()

    def take(self, run: slice) -> None:
        """Look at a run of rows."""
        for first, sums in self._sums.blocks(run):
            self._look(sums, first)

    def picked(self, products: PairProducts) -> Picked:
        """Of all rows looked at; `products` are as those of the whole, to multiply the last ones with."""
        which, rows, sums = _joined(self._left, np.int32)
        near = sums >= self._cut_offs[which]
        which, rows = which[near], rows[near]
        self._keep(which, rows, products(rows, which))
        which, rows, scores = _joined(self._taken, np.float32)
        kept = scores >= self._floors[which]
        return Picked(which[kept], rows[kept], self._floors)

    def _look(self, sums: Int32, first: int) -> None:
        """At the sums, int32 [m, n], of the rows from `first` on with all probes."""
        size = next(size for size in (GROUP, 4, 1) if size == 1 or len(sums) >= 4 * size * self._count)
        grouped = Grouped(sums, size)
        with self._lock:
            likely, cut_offs = self._likely.copy(), self._cut_offs
        lacking = np.flatnonzero(cut_offs == CUT_OFF_MIN)
        if lacking.size:
            likely[lacking] = self._reached_by_count(grouped.largest[:, lacking])
            seeds = np.full(likely.size, CUT_OFF_MAX, np.int32)
            seeds[lacking] = likely[lacking]
            which, rows, _ = grouped.reaching(seeds)
            self._multiply(which, rows + first)
            cut_offs = self._cut_offs
        which, rows, found = grouped.reaching(cut_offs)
        rows += first
        if lacking.size:
            unknown = found < seeds[which]
            which, rows, found = which[unknown], rows[unknown], found[unknown]
        now = found >= likely[which]
        self._multiply(which[now], rows[now])
        with self._lock:
            self._left.append((which[~now], rows[~now], found[~now]))

    def _reached_by_count(self, largest: Int32) -> Int32:
        """The sum that at least so many of the groups' largest, int32 [g, k], reach; int32 [k]."""
        groups = len(largest)
        if groups < self._count:
            return np.full(largest.shape[1], CUT_OFF_MIN, np.int32)
        return np.asarray(np.partition(largest.T, groups - self._count, axis=1)[:, groups - self._count])

    def _multiply(self, which: Int64, rows: Int64) -> None:
        if not which.size:
            return
        products = self._products(rows, which)
        with self._lock:
            self._keep(which, rows, products)
            self._cut_offs = np.where(self.served, self._sums.cuts.of(self._floors), CUT_OFF_MAX)
            self._likely = np.where(self.served, self._sums.cuts.near(self._floors), CUT_OFF_MAX)

    def _keep(self, which: Int64, rows: Int64, products: Float32) -> None:
        """Keep those of different pairs whose products, float32 [k], reach the floors, and raise these."""
        reached = products >= self._floors[which]
        if not reached.any():
            return
        which, rows, products = which[reached], rows[reached], products[reached]
        self._taken.append((which, rows, products))
        by_probe = which.argsort(kind="stable")
        counts = np.bincount(which, minlength=len(self._floors))
        some = counts.nonzero()[0]
        counts = counts[some]
        both = np.full((some.size, self._count + int(counts.max())), -np.inf, np.float32)
        both[:, : self._count] = self._top[some]
        before = np.repeat(counts.cumsum() - counts, counts)
        both[np.repeat(np.arange(some.size), counts), self._count + np.arange(which.size) - before] = products[by_probe]
        both.partition(both.shape[1] - self._count, axis=1)
        self._top[some] = both[:, -self._count :]
        self._floors[some] = both[:, -self._count]


def _joined(parts: list[tuple[Int64, Int64, NDArray[Kind]]], kind: type[Kind]) -> tuple[Int64, Int64, NDArray[Kind]]:
    none = np.empty(0, np.int64)
    return (
        np.concatenate([none, *(one[0] for one in parts)]),
        np.concatenate([none, *(one[1] for one in parts)]),
        np.concatenate([np.empty(0, kind), *(one[2] for one in parts)]),
    )


def picked_of(products: Float32, rows: Int64, count: int) -> Picked:
    """The same of the largest products of several runs of rows, float32 [n, m], and their rows, int64 [n, m], -1 for
    none: of each run at least `count`, or all that it has. Of rows just at the cut some may be missing."""
    width = products.shape[1]
    cuts = np.full(len(products), -np.inf, np.float32)
    if width >= count:
        cuts = np.ascontiguousarray(np.partition(products, width - count, axis=1)[:, width - count])
    which, place = np.nonzero((products >= cuts[:, None]) & (rows >= 0))
    return Picked(which, rows[which, place], cuts)


def beyond(cuts: Float32, probes: Float32, row_norm_max: float) -> Float32:
    """What no row's score exceeds whose float32 product is below its probe's cut, float32 [n]."""
    probe_norms = norms(probes)
    limit = cuts.astype(np.float64) + float32_margin(probes.shape[1], row_norm_max, probe_norms)
    return np.where(probe_norms < _NORM_MAX, limit, np.inf).astype(np.float32)
