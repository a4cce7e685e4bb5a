"""What finds the candidates among the stored rows of one segment.

A Scanner is built once over immutable rows and knows nothing of liveness, expiry, subjects or ids: those
are the engine's. Its `scan` is exact; its `guess` is only a good start.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from matcher_service.terms import Float32, Int64


class Hits(NamedTuple):
    """Rows found for a batch of n probes, in columns: those of probe i stand at offsets[i]:offsets[i+1], in
    no particular order. `scores` are final scores (float64 product rounded to float32). `certified` bool [n]:
    answered through the filter's certificate; else the segment was scanned in full for that probe."""

    offsets: Int64
    rows: Int64
    scores: Float32
    certified: NDArray[np.bool_]


class Scanner(Protocol):
    rows: int

    def scan(self, probes: Float32, floors: Float32) -> Hits:
        """Every row whose score is >= the probe's floor. `probes` float32 [n, d] unit rows, C order;
        `floors` float32 [n], -inf for all rows."""
        ...

    def guess(self, probes: Float32, count: int) -> Hits:
        """About `count` rows per probe that are likely to be its best, with final scores; no promise."""
        ...

    def bytes_in_memory(self) -> int: ...
