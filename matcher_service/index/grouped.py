"""Where products reach the cuts of their probes, without a look at each of them.

Products stand rows first, float32 [m, n]. BLAS is at least as fast at rows times probes as at probes times rows, and
up to twice for few probes; and the largest of every so many rows is found for a whole line of probes at a time, at a
fifth of the cost. Only groups whose largest reaches a cut are looked into: numpy takes 20 times as long to say where
as to find the largest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from matcher_service.terms import Float32, Int64

GROUP = 16


class Grouped:
    """Products, float32 [m, n], of m rows and n probes, dealt into groups of `size` rows; what is left over are
    groups of one. `largest` float32 [g, n] is each group's largest product, NaN where one of it is."""

    def __init__(self, products: Float32, size: int) -> None:
        rows, probes = products.shape
        self._products = products
        self._size = size
        self._whole = rows // size
        grouped = self._whole * size
        largest = products
        if size > 1:
            largest = products[:grouped].reshape(size, -1).max(axis=0).reshape(self._whole, probes)
            if grouped < rows:
                largest = np.concatenate([largest, products[grouped:]])
        self.largest: Float32 = largest

    def members(self, groups: NDArray[np.bool_]) -> tuple[Int64, Int64, Float32]:
        """The products of the groups that are chosen, bool [g, n]: probes and rows, int64 [k], and products [k]."""
        group, probe = np.divmod(np.flatnonzero(groups), groups.shape[1])
        whole = int(np.searchsorted(group, self._whole))
        rows = group[:whole, None] + self._whole * np.arange(self._size)
        # A group of one has its row behind all that the others take, and its number behind theirs.
        alone = group[whole:] + self._whole * (self._size - 1)
        which = np.concatenate([np.repeat(probe[:whole], self._size), probe[whole:]])
        row = np.concatenate([rows.ravel(), alone])
        return which, row, self._products[row, which]


def not_below(products: Float32, cuts: Float32) -> tuple[Int64, Int64]:
    """Where products, float32 [m, n], are not below their probe's cut, float32 [n]: probes and rows, int64 [k] each.

    `Not below` rather than `at or above`: a product that overflowed to NaN is re-scored, not lost.
    """
    grouped = Grouped(products, GROUP)
    which, rows, values = grouped.members(~(grouped.largest < cuts))
    kept = ~(values < cuts[which])
    return which[kept], rows[kept]
