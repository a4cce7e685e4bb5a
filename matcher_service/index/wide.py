"""A full scan of few rows that are also held as float32: turning float16 into float32 costs more than a product.

For the open tail and for segments too small for codes. The float32 rows double the memory of these rows, which
are at most some ten thousand of a gallery.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from matcher_service.index.guessing import guess_rows
from matcher_service.index.scanner import Hits, Tally
from matcher_service.index.score import float32_margin, norms, not_below, pair_scores
from matcher_service.terms import Float32, Int64

# Float32 products held at once: 32 MiB.
_PRODUCTS_MAX = 1 << 23


class WideScanner:
    """Scans `wide`, float32 [n, d], which equals `stored`, float16 [n, d]; neither is copied. `row_norm_max`
    bounds the norms of the rows (None: it is computed)."""

    def __init__(self, stored: NDArray[np.float16], wide: Float32, row_norm_max: float | None = None) -> None:
        self.rows = len(stored)
        self._stored = stored
        self._wide = wide
        self._row_norm_max = float(norms(wide).max(initial=0.0)) if row_norm_max is None else row_norm_max

    def scan(self, probes: Float32, floors: Float32) -> Hits:
        margin = float32_margin(self._stored.shape[1], self._row_norm_max, norms(probes))
        cuts = (floors.astype(np.float64) - margin).astype(np.float32)
        which: list[Int64] = []
        rows: list[Int64] = []
        tally = Tally(len(probes))
        for start in range(0, len(probes), self._at_once()):
            here = slice(start, start + self._at_once())
            probe, row = not_below(probes[here] @ self._wide.T, cuts[here])
            tally.add(row.size)
            which.append(probe + start)
            rows.append(row)
        return self._exact(probes, floors, _joined(which), _joined(rows))

    def guess(self, probes: Float32, count: int) -> Hits:
        """The best of the first rows: every so many of them would be copied."""
        wanted = min(count, self.rows)
        wide = self._wide[: guess_rows(self.rows, wanted)]
        which: list[Int64] = []
        rows: list[Int64] = []
        for start in range(0, len(probes), self._at_once()):
            some = probes[start : start + self._at_once()]
            if wanted:
                best = np.argpartition(some @ wide.T, len(wide) - wanted, axis=1)[:, len(wide) - wanted :]
                which.append(np.repeat(np.arange(start, start + len(some)), wanted))
                rows.append(best.ravel())
        return self._exact(probes, np.full(len(probes), -np.inf, np.float32), _joined(which), _joined(rows))

    def bytes_in_memory(self) -> int:
        return int(self._stored.nbytes + self._wide.nbytes)

    def _at_once(self) -> int:
        return max(1, _PRODUCTS_MAX // max(1, self.rows))

    def _exact(self, probes: Float32, floors: Float32, which: Int64, rows: Int64) -> Hits:
        scores = pair_scores(self._stored, rows, probes, which)
        # A score that is not a number reaches no floor, not even -inf.
        kept = scores >= floors[which]
        which, rows, scores = which[kept], rows[kept], scores[kept]
        offsets = np.zeros(len(probes) + 1, np.int64)
        np.cumsum(np.bincount(which, minlength=len(probes)), out=offsets[1:])
        return Hits(offsets, rows, scores, np.zeros(len(probes), np.bool_))


def _joined(parts: list[Int64]) -> Int64:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
