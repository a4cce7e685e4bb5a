"""The full scan: a float32 product of every row finds what could reach the floor, exact scores decide."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from matcher_service.index.guessing import guess_rows
from matcher_service.index.products import Products
from matcher_service.index.scanner import Hits, Tally
from matcher_service.index.score import float32_margin, norms, not_below, pair_scores, widen
from matcher_service.terms import Float32, Int64

_BLOCK_ROWS = 1024  # rows of one product: 2 MiB at 512 dimensions, so that they stay in the cache
_WIDEN_ROWS = 256  # rows turned to float32 at once: they stay in the cache meanwhile
_PROBES_MAX = 1024
_FEW_PROBES = 8  # up to here BLAS gains nothing over one product after another
_FEW_HITS = 128  # rows that a probe may reach in a run of rows before all of these are gone through once more
_THREAD_ROWS = 16_384

Result = TypeVar("Result")


class Found(NamedTuple):
    """The hits of a batch of probes, in columns, in no order: int64 [m], int64 [m], float32 [m]."""

    probes: Int64
    rows: Int64
    scores: Float32


NOTHING = Found(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


def side_by_side(tasks: list[Callable[[], Result]], executor: Executor | None) -> list[Result]:
    """The results of the tasks, in their order; the last task runs in this thread."""
    if executor is None or len(tasks) < 2:
        return [task() for task in tasks]
    others = [executor.submit(task) for task in tasks[:-1]]
    last = tasks[-1]()
    return [*(other.result() for other in others), last]


def gather(found: list[Found], certified: NDArray[np.bool_]) -> Hits:
    """The hits of a batch, with those of a probe side by side."""
    probes = np.concatenate([one.probes for one in found] or [NOTHING.probes])
    by_probe = np.argsort(probes, kind="stable")
    offsets = np.zeros(certified.size + 1, np.int64)
    np.cumsum(np.bincount(probes, minlength=certified.size), out=offsets[1:])
    return Hits(
        offsets,
        np.concatenate([one.rows for one in found] or [NOTHING.rows])[by_probe],
        np.concatenate([one.scores for one in found] or [NOTHING.scores])[by_probe],
        certified,
    )


class FlatScanner:
    """Scans every stored row for every probe. `stored` float16 [n, d], C order, finite, is kept, not copied;
    `executor` shares the rows among its threads where that helps; `norm_max` bounds their norms (None: it is
    computed)."""

    def __init__(
        self, stored: NDArray[np.float16], executor: Executor | None = None, norm_max: float | None = None
    ) -> None:
        self.rows = int(stored.shape[0])
        self._stored = stored
        self._norm_max = float(norms(stored).max(initial=0.0)) if norm_max is None else norm_max
        self._executor = executor
        self._products = [Products(stored[start : start + _THREAD_ROWS]) for start in range(0, self.rows, _THREAD_ROWS)]

    def scan(self, probes: Float32, floors: Float32) -> Hits:
        found = scan_flat(self._stored, self._products, self._norm_max, probes, floors, self._executor)
        return gather([found], np.zeros(len(probes), np.bool_))

    def guess(self, probes: Float32, count: int) -> Hits:
        """The best of some rows: the scan to come goes through all of them whatever its floor."""
        return gather([best_of_some(self._stored, probes, count)], np.zeros(len(probes), np.bool_))

    def bytes_in_memory(self) -> int:
        return int(self._stored.nbytes)


def scan_flat(
    stored: NDArray[np.float16],
    products: list[Products],
    norm_max: float,
    probes: Float32,
    floors: Float32,
    executor: Executor | None = None,
) -> Found:
    """Every row whose score is >= its probe's floor. Shapes as in `Scanner.scan`; `products` are those of runs of
    `_THREAD_ROWS` stored rows, `norm_max` bounds the norms of the rows."""
    if not len(probes) or not len(stored):
        return NOTHING
    probe_norms = norms(probes)
    cuts = (floors.astype(np.float64) - float32_margin(stored.shape[1], norm_max, probe_norms)).astype(np.float32)
    # No product of such a probe overflows, and hardly any row reaches its floor.
    few = len(probes) <= _FEW_PROBES and bool(((cuts > 0) & (probe_norms < 1e6)).all())
    near: list[tuple[Int64, Int64]] = []
    tally = Tally(len(probes))
    for start in range(0, len(probes), _PROBES_MAX):
        some = slice(start, start + _PROBES_MAX)
        tasks = [
            _near(
                stored,
                products[number] if few else None,
                number * _THREAD_ROWS,
                min((number + 1) * _THREAD_ROWS, len(stored)),
                probes[some],
                cuts[some],
                tally,
            )
            for number in range(len(products))
        ]
        near.extend((which + start, rows) for which, rows in side_by_side(tasks, executor))
    which = np.concatenate([one[0] for one in near])
    rows = np.concatenate([one[1] for one in near])
    scores = pair_scores(stored, rows, probes, which)
    reached = scores >= floors[which]
    return Found(which[reached], rows[reached], scores[reached])


def _near(
    stored: NDArray[np.float16],
    products: Products | None,
    first: int,
    last: int,
    probes: Float32,
    cuts: Float32,
    tally: Tally,
) -> Callable[[], tuple[Int64, Int64]]:
    """Finds, among the rows from `first` to `last`, the pairs whose float32 product is not below its cut."""

    def task() -> tuple[Int64, Int64]:
        if products is not None:
            best, row = products.best(probes, min(_FEW_HITS, last - first))
            if last - first <= _FEW_HITS or not (best[:, -1] >= cuts).any():
                which, place = np.nonzero(best >= cuts[:, None])
                return which, row[which, place] + first
        return _by_blocks(stored, first, last, probes, cuts, tally)

    return task


def _by_blocks(
    stored: NDArray[np.float16], first: int, last: int, probes: Float32, cuts: Float32, tally: Tally
) -> tuple[Int64, Int64]:
    wide = np.empty((min(_BLOCK_ROWS, last - first), stored.shape[1]), np.float32)
    which: list[Int64] = []
    rows: list[Int64] = []
    for start in range(first, last, _BLOCK_ROWS):
        probe, row = not_below(probes @ _widened(stored[start : min(start + _BLOCK_ROWS, last)], wide).T, cuts)
        tally.add(row.size)
        which.append(probe)
        rows.append(row + start)
    return np.concatenate(which), np.concatenate(rows)


def _widened(block: NDArray[np.float16], wide: Float32) -> Float32:
    """The block as float32, in `wide`."""
    for start in range(0, len(block), _WIDEN_ROWS):
        here = slice(start, min(start + _WIDEN_ROWS, len(block)))
        widen(block[here], wide[here])
    return wide[: len(block)]


def best_of_some(stored: NDArray[np.float16], probes: Float32, count: int) -> Found:
    """About the `count` best of every so many rows for each probe, with their scores."""
    step = max(1, len(stored) // max(1, guess_rows(len(stored), count)))
    found = _best_flat(stored[::step], probes, count)
    return found._replace(rows=found.rows * step)


def _best_flat(stored: NDArray[np.float16], probes: Float32, count: int) -> Found:
    """About the `count` best rows of each probe, with their scores."""
    wanted = min(count, len(stored))
    if wanted <= 0 or not len(probes):
        return NOTHING
    best = np.empty((len(probes), 0), np.float32)
    rows = np.empty((len(probes), 0), np.int64)
    wide = np.empty((min(_BLOCK_ROWS, len(stored)), stored.shape[1]), np.float32)
    for start in range(0, len(stored), _BLOCK_ROWS):
        block = stored[start : start + _BLOCK_ROWS]
        products = probes @ _widened(block, wide).T
        numbers = np.broadcast_to(np.arange(start, start + len(block)), products.shape)
        best, rows = np.concatenate([best, products], axis=1), np.concatenate([rows, numbers], axis=1)
        if best.shape[1] > wanted:
            chosen = np.argpartition(-best, wanted - 1, axis=1)[:, :wanted]
            best, rows = np.take_along_axis(best, chosen, 1), np.take_along_axis(rows, chosen, 1)
    which = np.repeat(np.arange(len(probes)), wanted)
    return Found(which, rows.ravel(), pair_scores(stored, rows.ravel(), probes, which))
