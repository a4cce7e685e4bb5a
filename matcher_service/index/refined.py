"""Codes over the stored rows: the filter and the products of what it takes, in one call of FAISS.

An index of FAISS that refines (`IndexRefine`) asks its first index for the rows in range and its second for their
products. Both see the same vector, so probes are handed over as pairs: first the probe over the least product
that counts, then the rotated probe over its cut-off. Each index picks its half, and the range is one for both.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from matcher_service.index.codes import Codes
from matcher_service.index.products import Products
from matcher_service.terms import Float32, Int64


class Refined:
    """The codes of a segment over its stored rows. Both are kept, neither is copied."""

    def __init__(self, codes: Codes, products: Products) -> None:
        self._kept = (codes, products)
        dimension = products.index.d
        self._maps = (_half(dimension, 0, dimension), _half(dimension, dimension, codes.coded))
        self._exact = faiss.IndexPreTransform(self._maps[0], products.index)
        self._parts = []
        for part in codes.indexes:
            coded = faiss.IndexPreTransform(self._maps[1], part)
            # The numbers of rows must agree for FAISS, though a part has only some of the rows.
            coded.ntotal = products.index.ntotal
            refined = faiss.IndexRefine(coded, self._exact)
            self._parts.append((refined, coded))

    def near(self, part: int, pairs: Float32) -> tuple[Int64, Int64]:
        """Offsets int64 [n + 1] and row numbers of every row of the part whose estimate, but for the table error,
        and whose product are at least one. `pairs` float32 [n, 2 d]: probes over the least product that counts,
        beside rotated probes over their cut-offs."""
        lims, _, rows = self._parts[part][0].range_search(pairs, 1.0)
        return lims.astype(np.int64), rows

    def best(self, part: int, pairs: Float32, count: int) -> tuple[Float32, Int64]:
        """The rows with the largest estimates and their products, [n, count]; -1 for a row where there is none.
        `pairs` float32 [n, 2 d]: probes beside rotated probes. No promise."""
        products, rows = self._parts[part][0].search(pairs, count)
        return products, rows


def _half(dimension: int, first: int, count: int) -> Any:
    """Picks `count` coordinates from `first` on out of a pair."""
    picked = faiss.RemapDimensionsTransform(2 * dimension, count)
    faiss.copy_array_to_vector(np.arange(first, first + count, dtype=np.int32), picked.map)
    return picked
