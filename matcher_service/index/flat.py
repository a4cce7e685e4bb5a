"""The full scan: a product of every row finds what could reach the floor, exact scores decide.

Many probes are multiplied in integers, with a bound that loses nothing (`integer_bound.py`); few, where it would cost
more to code the rows, in float32. What that takes of the rows is kept where these are few (`Kept`), in three times the
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service.halves import largest_magnitude, widen
from matcher_service.index import crew as crews
from matcher_service.index.best import Best, PairProducts, Picked, beyond, picked_of
from matcher_service.index.choose import FEW_PROBES
from matcher_service.index.crew import Crew, Result
from matcher_service.index.grouped import GROUP, Grouped
from matcher_service.index.integer_bound import CUT_OFF_MIN, Law, code_rows, law_within
from matcher_service.index.integer_products import BLOCK_ROWS, Int32, Sums, UInt8
from matcher_service.index.products import Products, pair_products, stored_pair_products
from matcher_service.index.scanner import Guess, Hits, Tally
from matcher_service.index.score import float32_margin, norms, pair_scores
from matcher_service.terms import Float32, Float64, Int64

_PROBES_MAX = 1024
_FEW_ROWS_MIN = 4096  # fewer, held as float32, BLAS multiplies faster
_FEW_HITS = 128  # rows that a probe may reach in a run of rows before all of these are gone through once more
_RUN_ROWS_MAX = 16_384
_APART_PROBES_MIN = 64
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


class Kept(NamedTuple):
    """What a full scan would else compute each time: the rows as float32, `wide` [n, d], and their codes with their law
    (`integer_bound.py`), `codes` uint8 [n, d]; None: of these the law alone."""

    wide: Float32
    codes: UInt8 | None
    law: Law


def kept_of(stored: NDArray[np.float16]) -> Kept:
    """Of `stored`, float16 [n, d], finite."""
    return Kept(widen(stored, np.empty(stored.shape, np.float32)), *code_rows(stored))


def in_halves(of_pairs: PairProducts, rows: Int64, which: Int64, crew: Crew | None) -> Float32:
    """What `of_pairs` gives of pairs of a row and a probe, by two threads where that helps."""
    if crew is None or rows.size <= _ALONE_SCORES:
        return of_pairs(rows, which)
    halves = [slice(0, rows.size // 2), slice(rows.size // 2, rows.size)]
    return np.concatenate(crew.run([partial(of_pairs, rows[half], which[half]) for half in halves]))


def crew_scores(stored: NDArray[np.float16], rows: Int64, probes: Float32, which: Int64, crew: Crew | None) -> Float32:
    """`score.pair_scores` by two threads where that helps."""
    return in_halves(lambda rows, which: pair_scores(stored, rows, probes, which), rows, which, crew)


class FlatScanner:
    """Scans every stored row for every probe. `stored` float16 [n, d], C order, finite, is kept, not copied;
    `crew` shares the rows among its threads where that helps; `norm_max` bounds their norms and `law` is that of their
    codes (None: computed)."""

    def __init__(
        self,
        stored: NDArray[np.float16],
        crew: Crew | None = None,
        norm_max: float | None = None,
        kept: Kept | None = None,
        law: Law | None = None,
    ) -> None:
        self.rows = int(stored.shape[0])
        self._stored = stored
        self._kept = kept
        self._given_law = law if kept is None else kept.law
        self._wide = None if kept is None else kept.wide
        self._norm_max = float(norms(stored).max(initial=0.0)) if norm_max is None else norm_max
        self._crew = crew
        half = -(-self.rows // (2 * BLOCK_ROWS)) * BLOCK_ROWS
        self._starts = range(0, self.rows, max(1, min(_RUN_ROWS_MAX, half)))

    def scan(self, probes: Float32, floors: Float32) -> Hits:
        found: list[Found] = []
        certified = np.zeros(len(probes), np.bool_)
        for first in range(0, len(probes) if self.rows else 0, _PROBES_MAX):
            some = slice(first, first + _PROBES_MAX)
            one, certified[some] = self._scan(probes[some], floors[some])
            found.append(one._replace(probes=one.probes + first))
        return gather(found, certified)

    def guess(self, probes: Float32, count: int) -> Guess:
        """The best of all rows: a scan would go through all of them too."""
        wanted = min(count, self.rows)
        certified = np.zeros(len(probes), np.bool_)
        if wanted <= 0 or not len(probes):
            nothing = -np.inf if self.rows == 0 else np.inf
            return Guess(gather([], certified), np.full(len(probes), nothing, np.float32))
        served = ~certified
        if len(probes) > FEW_PROBES or (wanted > _FEW_HITS and self._small is None):
            picked, served = self._best_by_sums(probes, wanted)
            certified = served
        elif self._small is not None:
            products = np.ascontiguousarray(probes @ self._small.T)
            picked = picked_of(products, np.broadcast_to(np.arange(self.rows), products.shape), wanted)
        else:
            tasks = [partial(self._best_of_run, start, probes, wanted) for start in self._starts]
            bests = self._run(tasks, len(probes))
            products, rows = (np.concatenate([one[column] for one in bests], axis=1) for column in (0, 1))
            picked = picked_of(products, rows, wanted)
        scores = self._scores(picked.rows, probes, picked.probes)
        limits = np.where(served, beyond(picked.cuts, probes, self._norm_max), np.inf).astype(np.float32)
        return Guess(gather([Found(picked.probes, picked.rows, scores)], certified), limits)

    def bytes_in_memory(self) -> int:
        kept = [] if self._kept is None else [one for one in self._kept[:2] if one is not None]
        return int(self._stored.nbytes + sum(one.nbytes for one in kept))

    @property
    def _small(self) -> Float32 | None:
        """The rows as float32, of so few that BLAS multiplies a few probes faster than all else."""
        return self._wide if self.rows < _FEW_ROWS_MIN else None

    @cached_property
    def _products(self) -> list[Products]:
        """Of each run."""
        return [Products(self._stored[self._run_of(start)]) for start in self._starts]

    @cached_property
    def _law(self) -> Law:
        if self._given_law is not None:
            return self._given_law
        return law_within(largest_magnitude(self._stored), self._norm_max, self._stored.shape[1])

    def _run_of(self, start: int) -> slice:
        """The rows of the run that begins with `start`."""
        return slice(start, min(start + self._starts.step, self.rows))

    def _scan(self, probes: Float32, floors: Float32) -> tuple[Found, NDArray[np.bool_]]:
        """The hits, and which probes the integers' bound served, bool [n]."""
        probe_norms = norms(probes)
        least = (floors - float32_margin(self._stored.shape[1], self._norm_max, probe_norms)).astype(np.float32)
        certified = np.zeros(len(probes), np.bool_)
        if len(probes) <= FEW_PROBES and self._small is not None:
            row, few = np.nonzero(~(self._small @ probes.T < least))
            near = [(few, row)]
        else:
            near, certified = self._near_of_all(probes, probe_norms, floors, least)
        which, rows = (np.concatenate([one[column] for one in near]) for column in (0, 1))
        scores = self._scores(rows, probes, which)
        # A score that is not a number reaches no floor, not even -inf.
        reached = scores >= floors[which]
        return Found(which[reached], rows[reached], scores[reached]), certified

    def _near_of_all(
        self, probes: Float32, probe_norms: Float64, floors: Float32, least: Float32
    ) -> tuple[list[tuple[Int64, Int64]], NDArray[np.bool_]]:
        """Of each run the pairs that could reach the floor, and which probes the integers' bound served, bool [n]."""
        tally = Tally(len(probes))
        # No product of such a probe overflows, and hardly any row reaches its floor.
        if len(probes) <= FEW_PROBES and bool(((least > 0) & (probe_norms < 1e6)).all()):
            tasks = [partial(self._few, start, probes, floors, least, tally) for start in self._starts]
            return self._run(tasks, len(probes)), np.zeros(len(probes), np.bool_)
        sums = self._sums(probes)
        cut_offs = sums.cuts.of(floors)
        tasks = [partial(self._near, start, probes, least, sums, cut_offs, tally) for start in self._starts]
        return self._run(tasks, len(probes)), cut_offs > CUT_OFF_MIN

    def _few(self, start: int, probes: Float32, floors: Float32, least: Float32, tally: Tally) -> tuple[Int64, Int64]:
        """The pairs of a run whose product is not below the probe's least, of few probes that hardly a row reaches."""
        best, row = self._best_of_run(start, probes, _FEW_HITS)
        if best.shape[1] == _FEW_HITS and (best[:, -1] >= least).any():
            sums = self._sums(probes)
            return self._near(start, probes, least, sums, sums.cuts.of(floors), tally)
        which, place = np.nonzero((best >= least[:, None]) & (row >= 0))
        return which, row[which, place]

    def _best_of_run(self, start: int, probes: Float32, count: int) -> tuple[Float32, Int64]:
        """The largest products of a run and their rows, [n, at most count], best first; -1 for none."""
        run = self._run_of(start)
        found, rows = self._products[start // self._starts.step].best(probes, min(count, run.stop - start))
        return found, np.where(rows >= 0, rows + start, rows)

    def _near(
        self, start: int, probes: Float32, least: Float32, sums: Sums, cut_offs: Int32, tally: Tally
    ) -> tuple[Int64, Int64]:
        """The pairs of a run whose sum reaches the probe's cut-off and whose product is not below its least."""
        which_of: list[Int64] = []
        rows_of: list[Int64] = []
        for first, some in sums.blocks(self._run_of(start)):
            which, rows, _ = Grouped(some, GROUP).reaching(cut_offs)
            rows += first
            # `Not below`, since a product that overflowed to NaN is to be re-scored.
            kept = ~(self._pair_products(probes, rows, which) < least[which])
            which, rows = which[kept], rows[kept]
            tally.add(rows.size)
            which_of.append(which)
            rows_of.append(rows)
        return np.concatenate(which_of), np.concatenate(rows_of)

    def _sums(self, probes: Float32) -> Sums:
        return Sums(self._stored, None if self._kept is None else self._kept.codes, self._law, probes)

    def _best_by_sums(self, probes: Float32, count: int) -> tuple[Picked, NDArray[np.bool_]]:
        """The best by product, and which probes have codes, bool [n]: of the others there are none."""
        if self._kept is None or self._kept.codes is None:
            products = partial(self._pair_products, probes)
            best = Best(self._sums(probes), count, products)
            self._run([partial(best.take, self._run_of(start)) for start in self._starts], len(probes))
            return best.picked(lambda rows, which: in_halves(products, rows, which, self._crew)), best.served
        # Threads that share few rows wait for each other's floors, and each begins without one: they share the probes.
        middle = len(probes) // 2 if len(probes) >= _APART_PROBES_MIN else 0
        some = [slice(0, middle), slice(middle, len(probes))] if middle else [slice(0, len(probes))]
        picked, served = zip(
            *self._run([partial(self._best_alone, probes[one], count) for one in some], len(probes)), strict=True
        )
        return Picked(
            np.concatenate([one.probes + first.start for one, first in zip(picked, some, strict=True)]),
            np.concatenate([one.rows for one in picked]),
            np.concatenate([one.cuts for one in picked]),
        ), np.concatenate(served)

    def _best_alone(self, probes: Float32, count: int) -> tuple[Picked, NDArray[np.bool_]]:
        """The same in this thread."""
        products = partial(self._pair_products, probes)
        best = Best(self._sums(probes), count, products)
        best.take(slice(0, self.rows))
        return best.picked(products), best.served

    def _pair_products(self, probes: Float32, rows: Int64, which: Int64) -> Float32:
        if self._wide is None:
            return stored_pair_products(self._stored, rows, probes, which)
        return pair_products(self._wide, rows, probes, which)

    def _scores(self, rows: Int64, probes: Float32, which: Int64) -> Float32:
        return crew_scores(self._stored, rows, probes, which, self._crew)

    def _run(self, tasks: Sequence[Callable[[], Result]], probes: int) -> list[Result]:
        return crews.run(tasks, self._crew if probes * self.rows > _ALONE_PAIRS else None)
