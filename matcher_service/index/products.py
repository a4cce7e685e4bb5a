"""Float32 products of few probes, or of rows here and there, by FAISS.

A product is a float32 sum of exact terms, within `score.float32_margin` of the score. The kernel of FAISS' scalar
quantiser goes through the very float16 rows, without a copy, several times as fast as turning them into float32.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from matcher_service.halves import widen
from matcher_service.terms import Float32, Int64

_ROWS_AT_ONCE = 512  # as float32 1 MiB at 512 dimensions


class Products:
    """`stored` float16 [n, d] in C order, finite, kept and not copied."""

    def __init__(self, stored: NDArray[np.float16]) -> None:
        self._stored = stored
        self.index = faiss.IndexScalarQuantizer(
            stored.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        # FAISS' own zero-copy loading sets these fields so.
        codes: Any = self.index.codes
        place = faiss.swig_ptr(stored.reshape(-1).view(np.uint8))
        codes.is_owned = False
        codes.view_data = codes.c_ptr = place
        codes.view_size = codes.c_size = stored.nbytes
        self.index.ntotal = len(stored)
        self.index.is_trained = True

    def best(self, probes: Float32, count: int) -> tuple[Float32, Int64]:
        """The `count` largest products of each probe and their rows, [n, count], best first; -1 for a row where
        there is none. In this thread alone if it has called `one_thread`."""
        products, rows = self.index.search(probes, count)
        return products, rows


def stored_pair_products(stored: NDArray[np.float16], rows: Int64, probes: Float32, which: Int64) -> Float32:
    """Products float32 [m] of pairs: row `rows[i]` of `stored`, float16 [n, d] in C order and finite, and probe
    `which[i]`, int64 [m] each. Each row is turned into float32 once, for all its pairs."""
    products = np.empty(rows.size, np.float32)
    by_row = rows.argsort()
    rows, which = rows[by_row], which[by_row]
    first = np.flatnonzero(np.diff(rows, prepend=-1))
    place = np.repeat(np.arange(first.size), np.diff(first, append=rows.size))
    wide = np.empty((min(_ROWS_AT_ONCE, first.size), stored.shape[1]), np.float32)
    for start in range(0, first.size, _ROWS_AT_ONCE):
        some = first[start : start + _ROWS_AT_ONCE]
        stop = first[start + _ROWS_AT_ONCE] if start + _ROWS_AT_ONCE < first.size else rows.size
        pairs = slice(some[0], stop)
        here = widen(np.take(stored, rows[some], axis=0), wide[: some.size])
        products[by_row[pairs]] = pair_products(here, place[pairs] - start, probes, which[pairs])
    return products


def pair_products(wide: Float32, rows: Int64, probes: Float32, which: Int64) -> Float32:
    """Products float32 [m] of pairs: row `rows[i]` of `wide`, float32 [n, d], and probe `which[i]`, int64 [m] each."""
    products = np.empty(rows.size, np.float32)
    # Named, so that they outlive the call.
    read = [np.ascontiguousarray(one) for one in (wide, rows, probes, which)]
    faiss.pairwise_indexed_inner_product(  # type: ignore[attr-defined]
        wide.shape[1], rows.size, *map(faiss.swig_ptr, read), faiss.swig_ptr(products)
    )
    return products
