"""The exact CPU scanner: fast-scan codes say which rows could reach the floor, exact scores decide.

A scan has three steps, the first two for each part of the codes and slice of the probes, on all threads:
1. the codes give every row whose estimate is at or above its cut-off (`certificate.py`);
2. a float32 product drops those that are below the floor by more than that product's rounding;
3. the rest are scored exactly.
A probe that the law cannot serve, or for which a full scan is cheaper, is scanned in full. Which codes serve a
floor, or none, is `choose.py`'s to say; no choice changes an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import DataDamaged
from matcher_service.index import certificate, choose
from matcher_service.index.codes import Codes, CodesBuilder, blocks_for, packed_size
from matcher_service.index.flat import FlatScanner, Found, best_flat, gather, likely_rows, side_by_side
from matcher_service.index.rotation import Rotation, draw_rotation
from matcher_service.index.scanner import Hits, Scanner
from matcher_service.index.score import float32_margin, norms, pair_products, pair_scores
from matcher_service.index.wide import WideScanner
from matcher_service.terms import Float32, Float64, Int64

FORMAT = 1
_ALWAYS_ROWS = 64  # rows with the lowest cut-offs, re-scored for every probe
_ODD_NORM = 1e-3  # a stored row whose norm is off one by more is re-scored always
_ENCODE_ROWS = 8192
_SLICE_PROBES = 32  # times a part's rows, and 48 bytes each, bounds what one range search can hold
_TASKS = 8  # of a scan, at least, where there are so many parts
_CROWD_MIN = 200  # rows of a part that any probe may take
_WIDE_VALUES_MAX = 1 << 23  # templates of so many values are held as float32 too: 32 MiB
_NONE: Int64 = np.empty(0, np.int64)


class Near(NamedTuple):
    """Pairs of a probe and a row whose float32 product is not below the floor; and the probes given up."""

    probes: Int64
    rows: Int64
    crowded: Int64


class FastScanScanner:
    """An exact scanner over `stored`, float16 [n, d] in C order, kept and not copied.

    Build it with `build_fastscan`, or from a saved `state`. `executor` runs the parts of a scan side by side
    (None: in the caller's thread); each of its threads must have called `one_thread`. `whole` does the full
    scans (None: a FlatScanner; else one for which float16 need not be turned into float32).
    """

    def __init__(
        self,
        stored: NDArray[np.float16],
        state: Mapping[str, NDArray[Any]],
        executor: Executor | None = None,
        whole: Scanner | None = None,
    ) -> None:
        self.rows, self._dimension = int(stored.shape[0]), int(stored.shape[1])
        self._stored = stored
        self._state = {name: state[name] for name in ("rotation", "always", "norms", "cosines")}
        self._rotation = Rotation(state["rotation"])
        self._always: Int64 = np.asarray(state["always"], np.int64)
        self._norm_max, self._coded_norm_max = (float(norm) for norm in state["norms"])
        self._codes = {
            int(block): Codes.from_state(
                self._dimension,
                int(block),
                {name.partition("/")[2]: value for name, value in state.items() if name.startswith(f"{block}/")},
            )
            for block in state["blocks"]
        }
        self._executor = executor
        self._whole = whole or FlatScanner(stored, executor, self._norm_max)
        self._listed: Float32 = stored[self._always].astype(np.float32)
        self._costs = choose.Costs(
            self.rows,
            self._dimension,
            np.asarray(state["cosines"], np.float64),
            {block: choose.Rate(codes.tables, *codes.typical[:2]) for block, codes in self._codes.items()},
            choose.CONVERT_NS if whole is None else 0.0,
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything beside the stored rows, as named arrays. The rotation is secret and the codes are
        biometric data: seal them."""
        blocks = {
            f"{block}/{name}": value for block, codes in self._codes.items() for name, value in codes.state().items()
        }
        return {
            "format": np.array([FORMAT]),
            "blocks": np.array(sorted(self._codes, reverse=True), np.int64),
            **self._state,
            **blocks,
        }

    def bytes_in_memory(self) -> int:
        return int(
            self._whole.bytes_in_memory()
            + self._listed.nbytes
            + self._rotation.matrix.nbytes
            + sum(codes.bytes_in_memory() for codes in self._codes.values())
        )

    def scan(self, probes: Float32, floors: Float32) -> Hits:
        count = len(probes)
        probe_norms = norms(probes)
        usable = certificate.usable(floors, probe_norms)
        plans = self._costs.plan(floors, usable)
        certified = np.zeros(count, np.bool_)
        found: list[Near] = []
        for block in sorted({block for block in plans if block}, reverse=True):
            mine = np.flatnonzero(plans == block)
            near, served = self._filter(self._codes[block], probes, floors, probe_norms, mine)
            certified[mine[served]] = True
            found.extend(near)
        hits = [self._exact(found, certified, probes, floors)]
        whole = np.flatnonzero(~certified)
        if whole.size:
            flat = self._whole.scan(np.ascontiguousarray(probes[whole]), floors[whole])
            hits.append(Found(np.repeat(whole, np.diff(flat.offsets)), flat.rows, flat.scores))
        return gather(hits, certified)

    def guess(self, probes: Float32, count: int) -> Hits:
        """By the estimates of the finest codes, then by score: a floor that is a little too low costs more than
        the pass of coarser codes would save."""
        none = np.zeros(len(probes), np.bool_)
        wanted = min(count, self.rows)
        if wanted <= 0 or not len(probes) or not self._codes:
            return self._whole.guess(probes, count)
        floors = np.full(len(probes), self._costs.floor_of_best(wanted), np.float32)
        if not self._costs.plan(floors, floors > 0).any():
            # The scan to come will be in full: its floor hardly matters.
            return gather([best_flat(likely_rows(self._stored, wanted), probes, wanted)], none)
        codes = self._codes[min(self._codes)]
        rotated = self._rotation(probes)
        tasks = [
            _best(codes, part, rotated[start : start + _SLICE_PROBES], wanted)
            for part in range(codes.parts)
            for start in range(0, len(probes), _SLICE_PROBES)
        ]
        slices = -(-len(probes) // _SLICE_PROBES)
        best = self._run(tasks)
        estimates, rows = (
            np.concatenate(
                [
                    np.concatenate([best[part * slices + number][column] for number in range(slices)])
                    for part in range(codes.parts)
                ],
                axis=1,
            )
            for column in (0, 1)
        )
        taken = min(2 * wanted, rows.shape[1])
        chosen = np.argpartition(-estimates, taken - 1, axis=1)[:, :taken]
        likely = np.take_along_axis(rows, chosen, axis=1)
        real = likely >= 0
        which = np.repeat(np.arange(len(probes)), real.sum(axis=1))
        found = Found(which, likely[real], pair_products(self._stored, likely[real], probes, which))
        return gather([_exactly(_top(found, len(probes), wanted), self._stored, probes)], none)

    def _filter(
        self, codes: Codes, probes: Float32, floors: Float32, probe_norms: Float64, mine: Int64
    ) -> tuple[list[Near], NDArray[np.bool_]]:
        """Of the probes numbered `mine`: their near rows, and which of them the law served, bool [len(mine)]."""
        some, some_norms = probes[mine], probe_norms[mine]
        rotated = self._rotation(some)
        cut_offs, floor_of_tables = self._cut_offs(codes, floors[mine], some_norms, rotated)
        served = cut_offs.min(axis=0, initial=np.inf) > np.maximum(floor_of_tables, 1e-3)
        margins = (floors[mine] - float32_margin(self._dimension, self._norm_max, some_norms)).astype(np.float32)
        kept = np.flatnonzero(served)
        most = self._costs.most_taken(len(mine))
        slices = [kept[start : start + _SLICE_PROBES] for start in range(0, kept.size, _SLICE_PROBES)]
        runs = np.array_split(np.arange(codes.parts), min(codes.parts, max(1, -(-_TASKS // max(1, len(slices))))))
        tasks: list[Callable[[], Near]] = [
            self._near(codes, run, rotated[some_], cut_offs[:, some_], probes, mine[some_], margins[some_], most)
            for run in runs
            for some_ in slices
        ]
        if self._always.size and kept.size:
            tasks.append(self._near_listed(probes, mine[kept], margins[kept]))
        near = self._run(tasks)
        crowded = np.unique(np.concatenate([one.crowded for one in near])) if near else _NONE
        served &= ~np.isin(mine, crowded)
        return near, served

    def _cut_offs(
        self, codes: Codes, floors: Float32, probe_norms: Float64, rotated: Float32
    ) -> tuple[Float64, Float64]:
        """The range search's radius per part and probe, float64 [p, n], and the least radius that the kernel
        can take for each probe, float64 [n]."""
        cosines = floors * (1 - 2.0**-22) / (self._coded_norm_max * probe_norms)
        span, least, magnitude = certificate.tables(rotated, codes.centroids)
        reach = float(codes.typical[2])
        error = certificate.table_error(span, magnitude, codes.tables)
        error += reach * probe_norms * (certificate.rotation_error(self._dimension) + 2.0**-22)
        return certificate.cut_offs(codes.supports, cosines) * probe_norms - error, least + span / 32

    def _near(
        self,
        codes: Codes,
        run: Int64,
        rotated: Float32,
        cut_offs: Float64,
        probes: Float32,
        mine: Int64,
        margins: Float32,
        most: float,
    ) -> Callable[[], Near]:
        """Goes through a run of parts for some probes, numbered `mine`; a probe that takes more than the share
        `most` of a part is given up."""

        def task() -> Near:
            which_of, rows_of, crowded = [_NONE], [_NONE], np.zeros(mine.size, np.bool_)
            for part in run:
                scaled = (rotated / cut_offs[part, :, None]).astype(np.float32)
                offsets, rows = codes.near(part, scaled)
                if not rows.size:
                    continue
                sizes = np.diff(offsets)
                which = np.repeat(np.arange(mine.size), sizes)
                crowded |= sizes > max(_CROWD_MIN, most * (codes.bounds[part + 1] - codes.bounds[part]))
                kept = ~crowded[which]
                which_of.append(which[kept])
                rows_of.append(rows[kept])
            which, rows = np.concatenate(which_of), np.concatenate(rows_of)
            products = pair_products(self._stored, rows, probes, mine[which])
            reached = ~(products < margins[which])
            return Near(mine[which[reached]], rows[reached], mine[crowded])

        return task

    def _near_listed(self, probes: Float32, mine: Int64, margins: Float32) -> Callable[[], Near]:
        def task() -> Near:
            products = np.einsum("ij,kj->ik", probes[mine], self._listed)
            probe, row = np.nonzero(~(products < margins[:, None]))
            return Near(mine[probe], self._always[row], _NONE)

        return task

    def _exact(self, found: list[Near], certified: NDArray[np.bool_], probes: Float32, floors: Float32) -> Found:
        """The pairs that reach the floor, of the certified probes."""
        probe = np.concatenate([one.probes for one in found] or [_NONE])
        row = np.concatenate([one.rows for one in found] or [_NONE])
        kept = certified[probe]
        probe, row = probe[kept], row[kept]
        score = pair_scores(self._stored, row, probes, probe)
        kept = score >= floors[probe]
        return Found(probe[kept], row[kept], score[kept])

    def _run(self, tasks: list[Callable[[], Any]]) -> list[Any]:
        return side_by_side(tasks, self._executor)


class FastScanScanners:
    """Makes fast-scan scanners of segments large enough for a filter, flat ones of others; and turns them into
    arrays and back. `threads` scan side by side; `close` ends them."""

    def __init__(self, threads: int = 1) -> None:
        self._executor = (
            ThreadPoolExecutor(threads, thread_name_prefix="scan", initializer=one_thread) if threads > 1 else None
        )

    def build(self, stored: NDArray[np.float16]) -> Scanner:
        if not choose.worth_codes(*stored.shape):
            return self._full(stored) or FlatScanner(stored, self._executor)
        return build_fastscan(stored, executor=self._executor, whole=self._full(stored))

    def arrays(self, scanner: Scanner) -> Mapping[str, NDArray[Any]]:
        return scanner.state() if isinstance(scanner, FastScanScanner) else {}

    def load(self, stored: NDArray[np.float16], arrays: Mapping[str, NDArray[Any]]) -> Scanner:
        if not arrays:
            return self._full(stored) or FlatScanner(stored, self._executor)
        check(stored, arrays)
        return FastScanScanner(stored, arrays, self._executor, self._full(stored))

    @staticmethod
    def _full(stored: NDArray[np.float16]) -> Scanner | None:
        """The full scans of a small segment keep its rows as float32 too."""
        return WideScanner(stored, stored.astype(np.float32)) if stored.size <= _WIDE_VALUES_MAX else None

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()


def check(stored: NDArray[np.float16], state: Mapping[str, NDArray[Any]]) -> None:
    """Raises DataDamaged unless `state` can be that of a scanner over `stored`: above all, every row must be
    once in each of the codes or in the list of rows that are always re-scored."""
    rows, dimension = stored.shape
    found = [int(number) for number in np.ravel(state.get("format", ()))]
    _expect(found == [FORMAT], f"codes of format {found}, not {FORMAT}")
    blocks = [int(block) for block in np.ravel(state.get("blocks", ()))]
    _expect(set(blocks) <= set(blocks_for(dimension)) and len(set(blocks)) == len(blocks), f"codes at rates {blocks}")
    names = ("order", "packed", "bounds", "supports", "typical")
    every = {"format", "blocks", "rotation", "always", "norms", "cosines"}
    _expect(state.keys() == every | {f"{block}/{name}" for block in blocks for name in names}, "arrays by other names")
    _expect(state["rotation"].shape == (dimension, dimension), "the rotation is not that of these rows")
    _expect(state["norms"].shape == (2,) and state["cosines"].shape == (choose.BINS,), "other norms or cosines")
    for block in blocks:
        order, packed, bounds, supports, typical = (state[f"{block}/{name}"] for name in names)
        listed = np.concatenate([np.ravel(order).astype(np.int64), np.ravel(state["always"]).astype(np.int64)])
        _expect(
            listed.size == rows and np.array_equal(np.sort(listed), np.arange(rows)), "not all rows are in the codes"
        )
        bounded = bounds.ndim == 1 and bounds.size > 0 and bounds[0] == 0 and bounds[-1] == order.size
        _expect(bounded and bool((np.diff(bounds) > 0).all()), "parts without rows")
        _expect(packed.shape == (packed_size(bounds, dimension // block),), "codes are missing")
        _expect(
            supports.shape == (bounds.size - 1, certificate.ANGLES) and typical.shape == (3,), "parts without a law"
        )


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DataDamaged(otherwise, hint="the segment is rebuilt from the log; nothing is to be done")


def one_thread() -> None:
    """To be called in every thread of a scanner's executor: the scan itself keeps them busy."""
    faiss.omp_set_num_threads(1)


def build_fastscan(
    stored: NDArray[np.float16],
    blocks: tuple[int, ...] | None = None,
    executor: Executor | None = None,
    entropy: int | None = None,
    whole: Scanner | None = None,
) -> FastScanScanner:
    """A scanner over `stored`, float16 [n, d] in C order, with a rotation of its own.

    `blocks`: the rates to encode at, as coordinates for each 4-bit code (None: those that pay for the
    dimension). `entropy` is for tests; leave it None, so that the rotation comes from the operating system.
    """
    rows, dimension = stored.shape
    chosen = choose.blocks(dimension) if blocks is None else tuple(blocks)
    unknown = set(chosen) - set(blocks_for(dimension))
    if unknown:
        raise ValueError(f"no codes of {sorted(unknown)} coordinates in {dimension} dimensions")
    rotation = draw_rotation(dimension, entropy)
    row_norms = norms(stored)
    odd = np.flatnonzero(~(np.abs(row_norms - 1.0) <= _ODD_NORM))
    builders = {block: CodesBuilder(dimension, block) for block in chosen}
    for start in range(0, rows, _ENCODE_ROWS):
        here = slice(start, start + _ENCODE_ROWS)
        rotated = stored[here].astype(np.float32) @ rotation.T
        for builder in builders.values():
            builder.add(rotated, np.maximum(row_norms[here], 1e-6))
    if odd.size > max(_ALWAYS_ROWS, rows // 1000) or rows == 0:
        builders, odd = {}, np.empty(0, np.int64)  # not unit vectors: nothing to be gained from a filter
    always = np.unique(
        np.concatenate([odd, *(builder.worst(min(_ALWAYS_ROWS, rows // 1024)) for builder in builders.values())])
    ).astype(np.int64)
    coded = np.delete(row_norms, always)
    state: dict[str, NDArray[Any]] = {
        "blocks": np.array(sorted(builders, reverse=True), np.int64),
        "rotation": rotation,
        "always": always,
        "norms": np.array([row_norms.max(initial=0.0), coded.max(initial=0.0)]),
        "cosines": choose.sample_cosines(stored),
    }
    for block, builder in builders.items():
        state |= {f"{block}/{name}": value for name, value in builder.finish(always).items()}
    return FastScanScanner(stored, state, executor, whole)


def _best(codes: Codes, part: int, rotated: Float32, count: int) -> Callable[[], tuple[Float32, Int64]]:
    return lambda: codes.best(part, rotated, count)


def _top(found: Found, probes: int, wanted: int) -> Found:
    """The `wanted` pairs of each probe with the highest products."""
    ordered = np.lexsort((-found.scores, found.probes))
    begins = np.searchsorted(found.probes[ordered], np.arange(probes))
    rank = np.arange(ordered.size) - begins[found.probes[ordered]]
    kept = ordered[rank < wanted]
    return Found(found.probes[kept], found.rows[kept], found.scores[kept])


def _exactly(found: Found, stored: NDArray[np.float16], probes: Float32) -> Found:
    return found._replace(scores=pair_scores(stored, found.rows, probes, found.probes))
