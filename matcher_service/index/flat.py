"""The full scan: a float32 product of every row finds what could reach the floor, exact scores decide.

To turn float16 into float32 costs more than the product with a few probes. For the open tail and for small segments
the rows are therefore also held as float32, which takes three times the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service.halves import widen
from matcher_service.index import crew as crews
from matcher_service.index.best import Best, beyond, picked_of
from matcher_service.index.crew import Crew, Result
from matcher_service.index.grouped import not_below
from matcher_service.index.products import Products
from matcher_service.index.scanner import Guess, Hits, Tally
from matcher_service.index.score import float32_margin, norms, pair_scores
from matcher_service.terms import Float32, Int64

_BLOCK_ROWS = 1024  # rows of one product: 2 MiB at 512 dimensions, so that they stay in the cache
_SMALL_PROBES = 24  # up to here of so few that BLAS multiplies them without making a copy first
_SMALL_ROWS = 128
_WIDEN_ROWS = 256  # rows turned to float32 at once: they stay in the cache meanwhile
_PROBES_MAX = 1024
_FEW_PROBES = 4  # up to here one product after another costs less than to turn rows into float32, or to read those
_FEW_ROWS_MIN = 4096  # that are float32 already; fewer stay in the cache nearest to a core
_FEW_HITS = 128  # rows that a probe may reach in a run of rows before all of these are gone through once more
_RUN_ROWS_MAX = 16_384
_PRODUCTS_AT_ONCE = 1 << 19  # 2 MiB: below interpreter.LARGE_BLOCK_BYTES; to look at fewer costs as much
_ALONE_PAIRS = 5_000  # up to so many rows times probes one thread is done before a second has begun
_ALONE_SCORES = 256  # the same of exact scores


class Found(NamedTuple):
    """The hits of a batch of probes, in columns, in no order: int64 [m], int64 [m], float32 [m]."""

    probes: Int64
    rows: Int64
    scores: Float32


NOTHING = Found(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


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
    `crew` shares the rows among its threads where that helps; `norm_max` bounds their norms (None: it is
    computed); `wide` float32 [n, d] equals `stored` and is kept too (None: rows are turned into float32 as needed)."""

    def __init__(
        self,
        stored: NDArray[np.float16],
        crew: Crew | None = None,
        norm_max: float | None = None,
        wide: Float32 | None = None,
    ) -> None:
        self.rows = int(stored.shape[0])
        self._stored = stored
        self._wide = wide
        self._norm_max = float(norms(stored).max(initial=0.0)) if norm_max is None else norm_max
        self._crew = crew
        half = -(-self.rows // (2 * _BLOCK_ROWS)) * _BLOCK_ROWS
        self._starts = range(0, self.rows, max(1, min(_RUN_ROWS_MAX, half)))
        self._few_probes = _FEW_PROBES if wide is None or self.rows >= _FEW_ROWS_MIN else 0

    def scan(self, probes: Float32, floors: Float32) -> Hits:
        return gather([self._scan(probes, floors)], np.zeros(len(probes), np.bool_))

    def guess(self, probes: Float32, count: int) -> Guess:
        """The best of all rows: a scan would go through all of them too."""
        wanted = min(count, self.rows)
        if 0 < wanted <= _FEW_HITS and 0 < len(probes) <= self._few_probes:
            tasks = [partial(self.best_of_run, start, probes, wanted) for start in self._starts]
            bests = self._run(tasks, len(probes))
            products, rows = (np.concatenate([one[column] for one in bests], axis=1) for column in (0, 1))
            picked = picked_of(products, rows, wanted)
        else:
            best = Best(len(probes), wanted)
            if wanted > 0 and len(probes):
                columns = np.ascontiguousarray(probes.T)
                self._run([_best_task(self, best, start, columns) for start in self._starts], len(probes))
            picked = best.picked()
        scores = self._scores(picked.rows, probes, picked.probes)
        hits = gather([Found(picked.probes, picked.rows, scores)], np.zeros(len(probes), np.bool_))
        return Guess(hits, beyond(picked.cuts, probes, self._norm_max))

    def bytes_in_memory(self) -> int:
        return int(self._stored.nbytes + (0 if self._wide is None else self._wide.nbytes))

    def run_of(self, start: int) -> slice:
        """The rows of the run that begins with `start`."""
        return slice(start, min(start + self._starts.step, self.rows))

    @cached_property
    def products(self) -> list[Products]:
        """Of each run."""
        return [Products(self._stored[self.run_of(start)]) for start in self._starts]

    def best_of_run(self, start: int, probes: Float32, count: int) -> tuple[Float32, Int64]:
        """The largest products of a run and their rows, [n, at most count], best first; -1 for none."""
        run = self.run_of(start)
        found, rows = self.products[start // self._starts.step].best(probes, min(count, run.stop - start))
        return found, np.where(rows >= 0, rows + start, rows)

    def blocks_of_run(self, start: int, columns: Float32) -> Iterator[tuple[int, Float32]]:
        """The products of a run with probes, float32 [d, n]: float32 [m, n], some rows after the others, with the first
        of them. To be used before the next are asked for."""
        run = self.run_of(start)
        dimension, count = columns.shape
        block = _SMALL_ROWS if count <= _SMALL_PROBES else _BLOCK_ROWS
        room = np.empty((min(block, run.stop - start) if self._wide is None else 0, dimension), np.float32)
        at_once = max(1, _PRODUCTS_AT_ONCE // (_BLOCK_ROWS * count)) * _BLOCK_ROWS
        held = np.empty((min(at_once, run.stop - start), count), np.float32)
        for first in range(start, run.stop, at_once):
            last = min(first + at_once, run.stop)
            for begin in range(first, last, block):
                here = slice(begin, min(begin + block, last))
                rows = _widened(self._stored[here], room) if self._wide is None else self._wide[here]
                np.matmul(rows, columns, out=held[begin - first : here.stop - first])
            yield first, held[: last - first]

    def _scan(self, probes: Float32, floors: Float32) -> Found:
        if not len(probes) or not self.rows:
            return NOTHING
        probe_norms = norms(probes)
        margin = float32_margin(self._stored.shape[1], self._norm_max, probe_norms)
        cuts = (floors.astype(np.float64) - margin).astype(np.float32)
        # No product of such a probe overflows, and hardly any row reaches its floor.
        few = len(probes) <= self._few_probes and bool(((cuts > 0) & (probe_norms < 1e6)).all())
        near: list[tuple[Int64, Int64]] = []
        tally = Tally(len(probes))
        for first in range(0, len(probes), _PROBES_MAX):
            some = probes[first : first + _PROBES_MAX]
            columns, cut = np.ascontiguousarray(some.T), cuts[first : first + _PROBES_MAX]
            tasks = [_near_task(self, start, some if few else None, columns, cut, tally) for start in self._starts]
            near.extend((which + first, rows) for which, rows in self._run(tasks, len(some)))
        which = np.concatenate([one[0] for one in near])
        rows = np.concatenate([one[1] for one in near])
        scores = pair_scores(self._stored, rows, probes, which)
        # A score that is not a number reaches no floor, not even -inf.
        reached = scores >= floors[which]
        return Found(which[reached], rows[reached], scores[reached])

    def _scores(self, rows: Int64, probes: Float32, which: Int64) -> Float32:
        halves = [slice(0, rows.size // 2), slice(rows.size // 2, rows.size)]
        tasks = [partial(pair_scores, self._stored, rows[half], probes, which[half]) for half in halves]
        return np.concatenate(crews.run(tasks, self._crew if rows.size > _ALONE_SCORES else None))

    def _run(self, tasks: Sequence[Callable[[], Result]], probes: int) -> list[Result]:
        return crews.run(tasks, self._crew if probes * self.rows > _ALONE_PAIRS else None)


def _near_task(
    scanner: FlatScanner, start: int, few: Float32 | None, columns: Float32, cuts: Float32, tally: Tally
) -> Callable[[], tuple[Int64, Int64]]:
    """Finds, among the rows of a run, the pairs whose float32 product is not below its cut. `columns` float32 [d, n];
    `few` the same probes, float32 [n, d], where they are few and hardly a row will reach its cut."""

    def task() -> tuple[Int64, Int64]:
        if few is not None:
            best, row = scanner.best_of_run(start, few, _FEW_HITS)
            if best.shape[1] < _FEW_HITS or not (best[:, -1] >= cuts).any():
                which, place = np.nonzero((best >= cuts[:, None]) & (row >= 0))
                return which, row[which, place]
        which_of: list[Int64] = []
        rows_of: list[Int64] = []
        for first, products in scanner.blocks_of_run(start, columns):
            probe, row = not_below(products, cuts)
            tally.add(row.size)
            which_of.append(probe)
            rows_of.append(row + first)
        return np.concatenate(which_of), np.concatenate(rows_of)

    return task


def _best_task(scanner: FlatScanner, best: Best, start: int, columns: Float32) -> Callable[[], None]:
    """Shows `best` the products of a run with probes, float32 [d, n]."""

    def task() -> None:
        for first, products in scanner.blocks_of_run(start, columns):
            best.take(products, first)

    return task


def _widened(block: NDArray[np.float16], wide: Float32) -> Float32:
    """The block as float32, in `wide`."""
    for start in range(0, len(block), _WIDEN_ROWS):
        here = slice(start, min(start + _WIDEN_ROWS, len(block)))
        widen(block[here], wide[here])
    return wide[: len(block)]
