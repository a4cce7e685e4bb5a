"""The full scan: a float32 product of every row finds what could reach the floor, exact scores decide."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service.index.scanner import Hits
from matcher_service.index.score import exact_scores_of, float32_margin, norms
from matcher_service.terms import Float32, Int64

_BLOCK_ROWS = 4096  # rows turned to float32 at once: 8 MiB at 512 dimensions
_PROBES_MAX = 1024


class Found(NamedTuple):
    """The hits of one probe: rows int64 [m] and their final scores float32 [m]."""

    rows: Int64
    scores: Float32


NONE_FOUND = Found(np.empty(0, np.int64), np.empty(0, np.float32))


def gather(found: list[Found], certified: NDArray[np.bool_]) -> Hits:
    """The hits of a batch from those of its probes."""
    offsets = np.zeros(len(found) + 1, np.int64)
    np.cumsum([one.rows.size for one in found], out=offsets[1:])
    if not found:
        return Hits(offsets, NONE_FOUND.rows, NONE_FOUND.scores, certified)
    return Hits(
        offsets, np.concatenate([one.rows for one in found]), np.concatenate([one.scores for one in found]), certified
    )


class FlatScanner:
    """Scans every stored row for every probe. `stored` float16 [n, d], C order, is kept, not copied."""

    def __init__(self, stored: NDArray[np.float16]) -> None:
        self.rows = int(stored.shape[0])
        self._stored = stored
        self._row_norm_max = float(norms(stored).max(initial=0.0))

    def scan(self, probes: Float32, floors: Float32) -> Hits:
        return gather(scan_flat(self._stored, self._row_norm_max, probes, floors), np.zeros(len(probes), np.bool_))

    def guess(self, probes: Float32, count: int) -> Hits:
        """The best rows by the float32 product: its order differs from that of the scores only in ties."""
        return gather(best_flat(self._stored, probes, count), np.zeros(len(probes), np.bool_))

    def bytes_in_memory(self) -> int:
        return int(self._stored.nbytes)


def scan_flat(stored: NDArray[np.float16], row_norm_max: float, probes: Float32, floors: Float32) -> list[Found]:
    """Every row whose score is >= its probe's floor. Shapes as in `Scanner.scan`; `row_norm_max` bounds the
    norms of the stored rows."""
    found: list[Found] = []
    for start in range(0, len(probes), _PROBES_MAX):
        some = slice(start, start + _PROBES_MAX)
        found.extend(_scan_some(stored, row_norm_max, probes[some], floors[some]))
    return found


def _scan_some(stored: NDArray[np.float16], row_norm_max: float, probes: Float32, floors: Float32) -> list[Found]:
    dimension = stored.shape[1]
    margin = float32_margin(dimension, row_norm_max, norms(probes))
    cuts = (floors.astype(np.float64) - margin).astype(np.float32)[:, None]
    rows_of: list[list[Int64]] = [[] for _ in probes]
    for start in range(0, stored.shape[0], _BLOCK_ROWS):
        block = stored[start : start + _BLOCK_ROWS].astype(np.float32)
        # `not below` rather than `at or above`: a product that overflowed to NaN is re-scored, not lost.
        near = ~(probes @ block.T < cuts)
        for probe in np.flatnonzero(near.any(axis=1)):
            rows_of[probe].append(np.flatnonzero(near[probe]) + start)
    return [
        _at_or_above(stored, np.concatenate(rows), probes[probe], floors[probe]) if rows else NONE_FOUND
        for probe, rows in enumerate(rows_of)
    ]


def _at_or_above(stored: NDArray[np.float16], rows: Int64, probe: Float32, floor: np.float32) -> Found:
    scores = exact_scores_of(stored, rows, probe)
    kept = scores >= floor
    return Found(rows[kept], scores[kept])


def best_flat(stored: NDArray[np.float16], probes: Float32, count: int) -> list[Found]:
    """About the `count` best rows of each probe, with final scores."""
    wanted = min(count, stored.shape[0])
    if wanted <= 0:
        return [NONE_FOUND for _ in probes]
    found: list[Found] = []
    for start in range(0, len(probes), _PROBES_MAX):
        some = probes[start : start + _PROBES_MAX]
        best = np.full((len(some), 0), 0, np.float32)
        rows = np.empty((len(some), 0), np.int64)
        for first in range(0, stored.shape[0], _BLOCK_ROWS):
            products = some @ stored[first : first + _BLOCK_ROWS].astype(np.float32).T
            best = np.concatenate([best, products], axis=1)
            rows = np.concatenate(
                [rows, np.broadcast_to(np.arange(first, first + products.shape[1]), products.shape)], axis=1
            )
            if best.shape[1] > wanted:
                chosen = np.argpartition(-best, wanted - 1, axis=1)[:, :wanted]
                best, rows = np.take_along_axis(best, chosen, 1), np.take_along_axis(rows, chosen, 1)
        found.extend(Found(mine, exact_scores_of(stored, mine, probe)) for mine, probe in zip(rows, some, strict=True))
    return found
