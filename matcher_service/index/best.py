"""The largest products of each probe, picked out of blocks of products as these come in.

A block's rows are dealt into groups (`grouped.py`); the count-th largest of the groups' largest is a cut that at least
`count` rows reach, and to find it means sorting a sixteenth of the products.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from matcher_service.index.grouped import GROUP, Grouped
from matcher_service.index.score import float32_margin, norms
from matcher_service.terms import Float32, Int64

# A probe longer than this might have products that overflow.
_NORM_MAX = 1e6


class Picked(NamedTuple):
    """Pairs of a probe and a row, int64 [m] each, in no order: all whose product is at least the probe's cut, float32
    [n]; so are at least as many as were wanted, or all rows."""

    probes: Int64
    rows: Int64
    cuts: Float32


class Best:
    """Picks about `count` largest products of each of `probes` probes, from several threads."""

    def __init__(self, probes: int, count: int) -> None:
        self._count = count
        self._top = np.full((probes, count), -np.inf, np.float32)
        self._cuts = np.full(probes, -np.inf, np.float32)
        self._taken: list[tuple[Int64, Int64, Float32]] = []
        self._lock = threading.Lock()

    def take(self, products: Float32, first: int) -> None:
        """Products, float32 [m, n], of the rows from `first` on with all probes."""
        size = next(size for size in (GROUP, 4, 1) if size == 1 or len(products) >= 4 * size * self._count)
        grouped = Grouped(products, size)
        some = np.flatnonzero((grouped.largest >= self._cuts).any(axis=0))
        if not some.size:
            return
        cuts = np.full(len(self._cuts), np.inf, np.float32)
        cuts[some] = self._raise(some, grouped.largest[:, some].T)
        which, rows, values = grouped.members(grouped.largest >= cuts)
        near = values >= cuts[which]
        with self._lock:
            self._taken.append((which[near], rows[near] + first, values[near]))

    def _raise(self, some: Int64, largest: Float32) -> Float32:
        """The cuts of some probes, after these products of different rows, float32 [s, g]."""
        with self._lock:
            both = np.concatenate([self._top[some], largest], axis=1)
            top = np.partition(both, both.shape[1] - self._count, axis=1)[:, both.shape[1] - self._count :]
            self._top[some] = top
            cuts = top.min(axis=1)
            self._cuts[some] = cuts
        return np.asarray(cuts)

    def picked(self) -> Picked:
        none = np.empty(0, np.int64)
        which, rows, values = (np.concatenate([one[column] for one in self._taken] or [none]) for column in range(3))
        kept = values >= self._cuts[which]
        return Picked(which[kept], rows[kept], self._cuts)


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
