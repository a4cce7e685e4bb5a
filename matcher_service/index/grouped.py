"""Where sums reach the cut-offs of their probes, without a look at each of them.

Sums stand rows first, [m, n]: the largest of every so many rows is found for a whole line of probes at a time, at a
fifth of the cost. Only groups whose largest reaches a cut-off are looked into: numpy takes 20 times as long to say
where as to find the largest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from matcher_service.terms import Int64

GROUP = 16


class Grouped:
    """Sums, int32 [m, n], of m rows and n probes, in groups of `size` rows; what is left over are groups of one.
    `largest` int32 [g, n] is each group's largest."""

    def __init__(self, sums: NDArray[np.int32], size: int) -> None:
        rows, probes = sums.shape
        self._sums = sums
        self._size = size
        self._whole = rows // size
        grouped = self._whole * size
        self.largest = sums
        if size > 1:
            self.largest = sums[:grouped].reshape(size, -1).max(axis=0).reshape(self._whole, probes)
            if grouped < rows:
                self.largest = np.concatenate([self.largest, sums[grouped:]])

    def reaching(self, cut_offs: NDArray[np.int32]) -> tuple[Int64, Int64, NDArray[np.int32]]:
        """The sums that reach their probe's cut-off, int32 [n]: probes and rows, int64 [k] each, and sums int32 [k]."""
        probes = self._sums.shape[1]
        group, probe = np.divmod(np.flatnonzero(self.largest >= cut_offs), probes)
        whole = int(np.searchsorted(group, self._whole))
        # A group of one has its row behind all that the others take, and its number behind theirs.
        alone, mine = group[whole:] + self._whole * (self._size - 1), probe[whole:]
        group, probe = group[:whole], probe[:whole]
        steps = self._whole * np.arange(self._size)
        every = self._sums.reshape(-1)
        sums = every.take((group * probes + probe)[:, None] + steps * probes)
        which, step = np.nonzero(sums >= cut_offs[probe, None])
        return (
            np.concatenate([probe[which], mine]),
            np.concatenate([group[which] + steps[step], alone]),
            np.concatenate([sums[which, step], every.take(alone * probes + mine)]),
        )
