"""The exact CPU scanner: fast-scan codes say which rows could reach the floor, exact scores decide.

A scan has three steps, the first two for each part of the codes and slice of the probes, on all threads and in one
call (`refined.py`):
1. the codes give every row whose estimate is at or above its cut-off (`certificate.py`);
2. a float32 product drops those that are below the floor by more than that product's rounding;
3. the rest are scored exactly.
A probe that the law cannot serve, or for which a full scan is cheaper, is scanned in full. Which codes serve a
floor, or none, is `choose.py`'s to say; no choice changes an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import DataDamaged
from matcher_service.halves import largest_magnitude, widen, widened
from matcher_service.index import certificate, choose
from matcher_service.index import crew as crews
from matcher_service.index.codes import Codes, CodesBuilder, blocks_for, packed_size
from matcher_service.index.crew import Crew
from matcher_service.index.flat import FlatScanner, Found, Kept, crew_scores, gather, kept_of
from matcher_service.index.integer_bound import Law, law_measured, law_within, longest_error, scale_of, strays
from matcher_service.index.products import Products
from matcher_service.index.refined import Refined
from matcher_service.index.rotation import Rotation, draw_rotation
from matcher_service.index.scanner import Guess, Hits, Scanner, Tally, unsure
from matcher_service.index.score import float32_margin, norms, pair_scores
from matcher_service.terms import Float32, Float64, Int64

FORMAT = 1
_ALWAYS_ROWS = 64  # rows with the lowest cut-offs, re-scored for every probe
_ODD_NORM = 1e-3  # a stored row whose norm is off one by more is re-scored always
_ENCODE_ROWS = 1024  # what it takes for them stays below interpreter.LARGE_BLOCK_BYTES
_SLICE_PROBES = 32  # times a part's rows, and 48 bytes each, bounds what one range search can hold
_TASKS = 8  # of a scan, at least, where there are so many parts
_ALONE_PAIRS = 25_000  # up to so many rows times probes one thread is done before a second has begun
_GUESS_PARTS = 2  # a guess goes through one part in so many
_GUESS_FOLD = 3  # and asks for so many times the rows that are wanted
_KEPT_VALUES_MAX = 1 << 23  # of templates for whose full scans is kept what these need: 40 MiB
_CUT_MIN = 1e-3  # the least cut-off that probes are divided by
_NONE: Int64 = np.empty(0, np.int64)


class FastScanScanner:
    """An exact scanner over `stored`, float16 [n, d] in C order, kept and not copied.

    Build it with `build_fastscan`, or from a saved `state`. `crew` runs the parts of a scan side by side
    (None: in the caller's thread); each of its threads must have called `one_thread`. `kept`: what full
    scans need of few rows (None: computed each time).
    """

    def __init__(
        self,
        stored: NDArray[np.float16],
        state: Mapping[str, NDArray[Any]],
        crew: Crew | None = None,
        kept: Kept | None = None,
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
        products = Products(stored)
        self._refined = {block: Refined(codes, products) for block, codes in self._codes.items()}
        self._crew = crew
        if "law" in state:
            self._state["law"] = state["law"]
            law = Law(*state["law"].tolist())
        else:  # of a file of an earlier release
            law = law_within(largest_magnitude(stored), self._norm_max, self._dimension)
        self._whole = FlatScanner(stored, crew, self._norm_max, kept, law)
        self._listed: Float32 = widened(stored[self._always])
        sample = choose.looked_at(stored)
        self._costs = choose.Costs(
            self.rows,
            self._dimension,
            np.asarray(state["cosines"], np.float64),
            {block: self._rate(codes, sample) for block, codes in self._codes.items()},
            sample,
            strays(law, sample),
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
            + self._costs.bytes_in_memory()
            + sum(codes.bytes_in_memory() for codes in self._codes.values())
        )

    def scan(self, probes: Float32, floors: Float32) -> Hits:
        probe_norms = norms(probes)
        usable = certificate.usable(floors, probe_norms)
        plans = self._costs.plan(probes, probe_norms, floors, usable)
        certified = np.zeros(len(probes), np.bool_)
        hits: list[Found] = []
        chosen = set(plans.tolist())
        for block in chosen - {0}:
            if len(chosen) == 1:
                found, certified = self._filter(block, probes, floors, probe_norms)
                hits.append(found)
            else:
                mine = np.flatnonzero(plans == block)
                found, certified[mine] = self._filter(block, probes[mine], floors[mine], probe_norms[mine])
                hits.append(found._replace(probes=mine[found.probes]))
        if not certified.all():
            whole = np.flatnonzero(~certified)
            flat = self._whole.scan(np.ascontiguousarray(probes[whole]), floors[whole])
            certified[whole] = flat.certified
            hits.append(Found(np.repeat(whole, np.diff(flat.offsets)), flat.rows, flat.scores))
        return gather(hits, certified)

    def guess(self, probes: Float32, count: int) -> Guess:
        """Of probes for which codes will pay, the best by the estimates of the finest in every so many parts, then by
        product; of the others the best of all rows."""
        wanted = min(count, self.rows)
        if wanted <= 0 or not len(probes) or not self._codes or self._costs.guess_is_dear(len(probes)):
            return self._whole.guess(probes, count)
        floors = np.full(len(probes), self._costs.floor_of_best(wanted), np.float32)
        probe_norms = norms(probes)
        coded = self._costs.plan(probes, probe_norms, floors, certificate.usable(floors, probe_norms), True) > 0
        if coded.all():
            return unsure(gather([self._likely(probes, wanted)], np.zeros(len(probes), np.bool_)))
        if not coded.any():
            return self._whole.guess(probes, count)
        mine, others = np.flatnonzero(coded), np.flatnonzero(~coded)
        likely = self._likely(np.ascontiguousarray(probes[mine]), wanted)
        whole = self._whole.guess(np.ascontiguousarray(probes[others]), count)
        limits = np.full(len(probes), np.inf, np.float32)
        limits[others] = whole.beyond
        found = Found(np.repeat(others, np.diff(whole.hits.offsets)), whole.hits.rows, whole.hits.scores)
        certified = np.zeros(len(probes), np.bool_)
        certified[others] = whole.hits.certified
        hits = gather([likely._replace(probes=mine[likely.probes]), found], certified)
        return Guess(hits, limits)

    def _likely(self, probes: Float32, count: int) -> Found:
        """Rows that may be among the `count` best: more than these, since estimates err."""
        wanted = min(_GUESS_FOLD * count, self.rows)
        block = min(self._codes)
        refined, parts = self._refined[block], range(0, self._codes[block].parts, _GUESS_PARTS)
        # Where several parts are gone through, each gives more than its share; where one is, it is asked for more.
        asked = min(self.rows, wanted if len(parts) > 1 else 2 * wanted)
        pairs = np.concatenate([probes, self._rotation(probes)], axis=1)
        starts = range(0, len(probes), _SLICE_PROBES)
        best = self._run(
            [_best(refined, part, pairs[start : start + _SLICE_PROBES], asked) for part in parts for start in starts],
            len(probes) * self.rows // _GUESS_PARTS,
        )
        products, rows = (
            np.concatenate(
                [
                    np.concatenate([best[number + part * len(starts)][column] for number in range(len(starts))])
                    for part in range(len(parts))
                ],
                axis=1,
            )
            for column in (0, 1)
        )
        kept = min(wanted, rows.shape[1])
        products = np.where(rows >= 0, products, -np.inf)
        chosen = np.argpartition(-products, kept - 1, axis=1)[:, :kept]
        likely = np.take_along_axis(rows, chosen, axis=1)
        real = likely >= 0
        which, row = np.repeat(np.arange(len(probes)), real.sum(axis=1)), likely[real]
        return Found(which, row, pair_scores(self._stored, row, probes, which))

    def _filter(
        self, block: int, probes: Float32, floors: Float32, probe_norms: Float64
    ) -> tuple[Found, NDArray[np.bool_]]:
        """The hits of the probes that the law served, and which these are, bool [n]."""
        codes = self._codes[block]
        rotated = self._rotation(probes)
        cut_offs, floor_of_tables = self._cut_offs(codes, floors, probe_norms, rotated)
        # Divided by its least product, a probe is rounded again: 2^-20 more than the margin covers that.
        least = (floors - float32_margin(self._dimension, self._norm_max, probe_norms)) * (1 - 2.0**-20)
        served = (cut_offs.min(axis=0, initial=np.inf) > np.maximum(floor_of_tables, _CUT_MIN)) & (least > _CUT_MIN)
        numbers = np.arange(len(probes))
        if not served.all():
            numbers = numbers[served]
            probes, rotated, least, cut_offs = probes[served], rotated[served], least[served], cut_offs[:, served]
        # Rounded to float32, they must not rise.
        lower = 1 - 2.0**-22
        products = (least[:, None] * lower).astype(np.float32)
        found = self._near(block, probes, rotated, products, (cut_offs * lower).astype(np.float32))
        if self._always.size:
            # `Not below` rather than `at or above`: a product that overflowed to NaN is re-scored, not lost.
            row, which = (~(self._listed @ probes.T < products[:, 0])).nonzero()
            found.append((which, self._always[row]))
        which = np.concatenate([one[0] for one in found]) if found else numbers[:0]
        rows = np.concatenate([one[1] for one in found]) if found else numbers[:0]
        scores = crew_scores(self._stored, rows, probes, which, self._crew)
        which = numbers[which]
        reached = scores >= floors[which]
        return Found(which[reached], rows[reached], scores[reached]), served

    def _near(
        self, block: int, probes: Float32, rotated: Float32, least: Float32, cut_offs: Float32
    ) -> list[tuple[Int64, Int64]]:
        """The pairs of a probe and a row whose estimates and float32 products may reach the floor. `least` float32
        [n, 1], `cut_offs` [p, n]."""
        refined, parts = self._refined[block], range(self._codes[block].parts)
        starts = range(0, len(probes), _SLICE_PROBES)
        step = max(1, len(parts) * len(starts) // _TASKS) if len(probes) * self.rows > _ALONE_PAIRS else len(parts)
        kept, tally = probes / least, Tally(len(probes))
        tasks = []
        for start in starts:
            some = slice(start, start + _SLICE_PROBES)
            for first in range(0, len(parts), step):
                run = parts[first : first + step]
                tasks.append(_near_task(refined, run, kept[some], rotated[some], cut_offs[:, some], start, tally))
        return self._run(tasks, self.rows * len(probes))

    def _rate(self, codes: Codes, sample: Float32) -> choose.Rate:
        """What is known of a code before any probe comes, with rows of the sample, float32 [m, d], in their place."""
        probes = np.resize(sample, (choose.FLOORS.size, self._dimension))
        probes /= np.maximum(np.linalg.norm(probes, axis=1, keepdims=True), _CUT_MIN)
        cut_offs, floor_of_tables = self._cut_offs(codes, choose.FLOORS, np.ones(len(probes)), self._rotation(probes))
        # Where the kernel could not serve a probe, every row will be gone through.
        served = cut_offs.min(axis=0, initial=np.inf) > np.maximum(floor_of_tables, _CUT_MIN)
        along, across = codes.typical[:2].tolist()
        return choose.Rate(codes.tables, along, across, np.where(served, cut_offs, -np.inf))

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

    def _run(self, tasks: list[Callable[[], Any]], pairs: int) -> list[Any]:
        return crews.run(tasks, self._crew if pairs > _ALONE_PAIRS else None)


def _near_task(
    refined: Refined, run: range, kept: Float32, rotated: Float32, cut_offs: Float32, first: int, tally: Tally
) -> Callable[[], tuple[Int64, Int64]]:
    """Goes through a run of parts for some probes, numbered from `first` on."""

    def task() -> tuple[Int64, Int64]:
        dimension = kept.shape[1]
        pairs = np.empty((len(kept), 2 * dimension), np.float32)
        pairs[:, :dimension] = kept
        which: list[Int64] = []
        rows: list[Int64] = []
        for part in run:
            np.divide(rotated, cut_offs[part, :, None], out=pairs[:, dimension:])
            offsets, found = refined.near(part, pairs)
            if found.size:
                tally.add(found.size)
                which.append(np.repeat(np.arange(first, first + len(kept)), np.diff(offsets)))
                rows.append(found)
        if not rows:
            return _NONE, _NONE
        return np.concatenate(which), np.concatenate(rows)

    return task


class FastScanScanners:
    """Makes fast-scan scanners of segments large enough for a filter, flat ones of others; and turns them into
    arrays and back. `threads` scan side by side; `close` ends them."""

    def __init__(self, threads: int = 1) -> None:
        self._crew = Crew(threads, one_thread) if threads > 1 else None

    def build(self, stored: NDArray[np.float16]) -> Scanner:
        if not choose.worth_codes(*stored.shape):
            return FlatScanner(stored, self._crew, kept=self._kept(stored))
        return build_fastscan(stored, crew=self._crew, kept=self._kept(stored))

    def arrays(self, scanner: Scanner) -> Mapping[str, NDArray[Any]]:
        return scanner.state() if isinstance(scanner, FastScanScanner) else {}

    def load(self, stored: NDArray[np.float16], arrays: Mapping[str, NDArray[Any]]) -> Scanner:
        if not arrays:
            return FlatScanner(stored, self._crew, kept=self._kept(stored))
        check(stored, arrays)
        return FastScanScanner(stored, arrays, self._crew, self._kept(stored))

    @staticmethod
    def _kept(stored: NDArray[np.float16]) -> Kept | None:
        return kept_of(stored) if stored.size <= _KEPT_VALUES_MAX else None

    def close(self) -> None:
        if self._crew is not None:
            self._crew.close()


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
    _expect(
        state.keys() - {"law"} == every | {f"{block}/{name}" for block in blocks for name in names},
        "arrays by other names",
    )
    _expect(state["rotation"].shape == (dimension, dimension), "the rotation is not that of these rows")
    law = state.get("law", np.ones(3))
    _expect(law.shape == (3,) and bool((law > 0).all() and np.isfinite(law).all()), "codes of integers without a law")
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
    """To be called in every thread of a scanner's crew: the scan itself keeps them busy."""
    faiss.omp_set_num_threads(1)


def build_fastscan(
    stored: NDArray[np.float16],
    blocks: tuple[int, ...] | None = None,
    crew: Crew | None = None,
    entropy: int | None = None,
    kept: Kept | None = None,
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
    row_norms: Float64 = np.empty(rows)
    scale, longest = scale_of(largest_magnitude(stored)), 0.0
    builders = {block: CodesBuilder(dimension, block) for block in chosen}
    for start in range(0, rows, _ENCODE_ROWS):
        here = slice(start, start + _ENCODE_ROWS)
        halves = stored[here]
        wide_rows = widen(halves, np.empty(halves.shape, np.float32))
        row_norms[here] = norms(wide_rows)
        longest = max(longest, longest_error(wide_rows, scale))
        rotated = wide_rows @ rotation.T
        for builder in builders.values():
            builder.add(rotated, np.maximum(row_norms[here], 1e-6))
    odd = np.flatnonzero(~(np.abs(row_norms - 1.0) <= _ODD_NORM))
    if odd.size > max(_ALWAYS_ROWS, rows // 1000) or rows == 0:
        builders, odd = {}, np.empty(0, np.int64)  # not unit vectors: nothing to be gained from a filter
    always = np.unique(
        np.concatenate([odd, *(builder.worst(min(_ALWAYS_ROWS, rows // 2048)) for builder in builders.values())])
    ).astype(np.int64)
    coded = np.delete(row_norms, always)
    state: dict[str, NDArray[Any]] = {
        "blocks": np.array(sorted(builders, reverse=True), np.int64),
        "rotation": rotation,
        "always": always,
        "norms": np.array([row_norms.max(initial=0.0), coded.max(initial=0.0)]),
        "cosines": choose.sample_cosines(stored),
        "law": np.array(law_measured(scale, longest, float(row_norms.max(initial=0.0)), dimension)),
    }
    for block, builder in builders.items():
        state |= {f"{block}/{name}": value for name, value in builder.finish(always).items()}
    return FastScanScanner(stored, state, crew, kept)


def _best(refined: Refined, part: int, pairs: Float32, count: int) -> Callable[[], tuple[Float32, Int64]]:
    return lambda: refined.best(part, pairs, count)
