"""Float32 products of probes and stored float16 rows by FAISS' scalar quantiser, over the very rows: no copy.

For few probes, or for rows here and there, its kernel is several times faster than turning rows into float32. A
product is a float32 sum of exact terms, within `score.float32_margin` of the score.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from matcher_service.terms import Float32, Int64


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
