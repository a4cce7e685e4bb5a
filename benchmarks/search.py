"""Exact search beside its rivals, every figure from one run: `python -m benchmarks.search --help`.

Each scanner answers the same batches in turns, so that what else the machine does falls on all alike; its figure
is its best round. Answers are compared with a float64 scan of the stored rows: `identical` is the share of probes
with the same rows (the certified scan: the same rows, scores and order). `mates_found` is the share of mates at or
above the threshold that were found, or, without one, that are among the best `count`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from threadpoolctl import ThreadpoolController

from benchmarks.galleries import KINDS, REAL_COSINE_MEDIAN, Float16, Float32, Kind, Probes, gallery, probes
from benchmarks.rivals import FLAT_SETTINGS, Rival, Rows, approximate_rivals, exact_rivals
from matcher_service.index.fastscan import FastScanScanners, one_thread
from matcher_service.index.scanner import Hits, Scanner
from matcher_service.index.score import pair_scores

COUNT = 10
MATE_COSINES = (0.3, 0.4, 0.5, 0.6)
_SEGMENT_ROWS = 1_000_000
_RIVAL_ROWS_MAX = 2_500_000  # above, the rivals do not fit beside the stored rows and are streamed
ABOVE_THRESHOLD = 0.05  # how far above the threshold the mates are
_UNTHRESHOLDED_MATE = 0.4
OURS = "certified scan"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result. `threshold` null: the best 10. `ratio` is that to the best exact rival."""

    scanner: str
    setting: str
    data: str
    references: int
    dimension: int
    batch: int
    threshold: float | None
    queries_per_second: float
    mates_found: float
    identical: float
    certified: float | None
    ratio: float | None = None


class Truth(NamedTuple):
    """Per probe the rows that must be found, best first, and their scores."""

    rows: Rows
    scores: list[Float32]


class Case(NamedTuple):
    """One batch size and threshold, with its probes and their true answer."""

    batch: int
    threshold: float | None
    probes: Probes
    truth: Truth


class Ours:
    """The certified scanners over segments of at most a million rows, as the engine uses them."""

    def __init__(self, stored: Float16, threads: int, step: Callable[[], None]) -> None:
        self._makers = FastScanScanners(threads)
        # The engine searches in a thread of its own, whose FAISS loops start no further threads.
        self._searching = ThreadPoolExecutor(1, initializer=one_thread)
        self._libraries = ThreadpoolController()  # to look for them takes milliseconds
        self.stored = stored
        self.starts = list(range(0, len(stored), _SEGMENT_ROWS))
        self.scanners: list[Scanner] = []
        for start in self.starts:
            self.scanners.append(self._makers.build(stored[start : start + _SEGMENT_ROWS]))
            step()
        self.certified = 0.0

    def within(self, work: Callable[[], Any]) -> Any:
        """As `matcher serve` has it: BLAS with one thread, in a thread for searches. The rivals keep BLAS's own
        threads."""
        with self._libraries.limit(limits=1, user_api="blas"):
            return self._searching.submit(work).result()

    def find(self, vectors: Float32, threshold: float | None, count: int) -> Rows:
        return self.answer(vectors, threshold, count).rows

    def answer(self, vectors: Float32, threshold: float | None, count: int) -> Truth:
        """The answer with its scores; `certified` then says which share of (probe, segment) it rests on. To be called
        by `within`."""
        floors = np.full(len(vectors), -np.inf if threshold is None else threshold, np.float32)
        found: list[tuple[NDArray[np.int64], NDArray[np.int64], Float32]] = []
        certified = 0
        for start, scanner in zip(self.starts, self.scanners, strict=True):
            probes = np.arange(len(vectors))
            if threshold is None and start == 0:
                # As the engine does: a guess beyond which nothing reaches its worst is the answer already.
                hits, beyond = scanner.guess(vectors, count + count // 2 + 4)
                floors = self._floors(hits, count)
                of_whole = np.repeat(floors > beyond, np.diff(hits.offsets))
                certified += int((hits.certified & (floors > beyond)).sum())
                found.append(
                    (np.repeat(probes, np.diff(hits.offsets))[of_whole], hits.rows[of_whole], hits.scores[of_whole])
                )
                probes = np.flatnonzero(floors <= beyond)
            if len(probes):
                hits = scanner.scan(np.ascontiguousarray(vectors[probes]), floors[probes])
                found.append((np.repeat(probes, np.diff(hits.offsets)), hits.rows + start, hits.scores))
                certified += int(hits.certified.sum())
        self.certified = certified / (len(vectors) * len(self.scanners))
        which, rows, scores = (np.concatenate([one[column] for one in found]) for column in range(3))
        order = np.lexsort((rows, -scores, which))
        which, rows, scores = which[order], rows[order], scores[order]
        bounds = np.searchsorted(which, np.arange(len(vectors) + 1))
        most = len(rows) if threshold is not None else count
        cut = [slice(first, min(last, first + most)) for first, last in pairwise(bounds)]
        return Truth([rows[one] for one in cut], [scores[one] for one in cut])

    @staticmethod
    def _floors(hits: Hits, count: int) -> Float32:
        """The score of the count-th best row guessed: no row below it can be among the best."""
        found = np.diff(hits.offsets)
        enough = np.flatnonzero(found >= count)
        best_first = np.lexsort((-hits.scores, np.repeat(np.arange(found.size), found)))
        floors = np.full(found.size, -np.inf, np.float32)
        floors[enough] = hits.scores[best_first[hits.offsets[enough] + count - 1]]
        return floors

    def bytes_per_reference(self) -> float:
        return sum(scanner.bytes_in_memory() for scanner in self.scanners) / len(self.stored)

    def reload_s(self) -> float:
        """Seconds to read all arrays of the scanners from files and stand ready."""
        with tempfile.TemporaryDirectory() as folder:
            for number, scanner in enumerate(self.scanners):
                np.savez(Path(folder) / f"{number}.npz", **self._makers.arrays(scanner))
            began = time.perf_counter()
            for number, start in enumerate(self.starts):
                with np.load(Path(folder) / f"{number}.npz") as arrays:
                    self._makers.load(self.stored[start : start + _SEGMENT_ROWS], dict(arrays))
            return time.perf_counter() - began

    def close(self) -> None:
        self._searching.shutdown()
        self._makers.close()


def true_answer(stored: Float16, vectors: Float32, threshold: float | None, count: int) -> Truth:
    """By a float64 product of every row, and exact scores of what comes near."""
    near: list[list[NDArray[np.int64]]] = [[] for _ in vectors]
    for start in range(0, len(stored), 16_384):
        products = stored[start : start + 16_384].astype(np.float32).astype(np.float64) @ vectors.T.astype(np.float64)
        for probe in range(len(vectors)):
            scores = products[:, probe]
            if threshold is not None:
                mine = np.flatnonzero(scores >= threshold - 1e-6)
            else:
                kept = min(count + 5, len(scores))
                mine = np.argpartition(scores, len(scores) - kept)[len(scores) - kept :]
            if mine.size:
                near[probe].append(mine + start)
    rows: Rows = []
    scores_of: list[Float32] = []
    for probe, parts in enumerate(near):
        mine = np.concatenate(parts) if parts else np.empty(0, np.int64)
        scores = pair_scores(stored, mine, vectors, np.full(mine.size, probe))
        if threshold is not None:
            mine, scores = mine[scores >= np.float32(threshold)], scores[scores >= np.float32(threshold)]
        order = np.lexsort((mine, -scores))[: len(mine) if threshold is not None else count]
        rows.append(mine[order])
        scores_of.append(scores[order])
    return Truth(rows, scores_of)


def mates_found(stored: Float16, case: Case, found: Rows) -> float:
    """The share of mates, those that must be found, that are."""
    wanted = [
        probe for probe in np.flatnonzero(case.probes.mates >= 0) if case.probes.mates[probe] in case.truth.rows[probe]
    ]
    hit = sum(case.probes.mates[probe] in found[probe] for probe in wanted)
    return hit / len(wanted) if wanted else 1.0


def same_rows(found: Rows, truth: Rows) -> float:
    return float(np.mean([np.array_equal(np.sort(a), np.sort(b)) for a, b in zip(found, truth, strict=True)]))


def same_answer(found: Truth, truth: Truth) -> float:
    """The same rows, in the same order, with the same scores to the last bit."""
    return float(
        np.mean(
            [
                np.array_equal(a, b) and np.array_equal(x, y)
                for a, b, x, y in zip(found.rows, truth.rows, found.scores, truth.scores, strict=True)
            ]
        )
    )


def timed(find: Callable[[], object], seconds: float) -> float:
    """The shortest of as many calls as take about `seconds`, at least one."""
    shortest, began = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        find()
        now = time.perf_counter()
        shortest = min(shortest, now - start)
        if now - began >= seconds:
            return shortest


def bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def cases(stored: Float16, kind: Kind, batches: list[int], thresholds: list[float | None], seed: int) -> Iterator[Case]:
    for threshold in thresholds:
        cosine = _UNTHRESHOLDED_MATE if threshold is None else min(0.99, threshold + ABOVE_THRESHOLD)
        if kind == "real":
            cosine = REAL_COSINE_MEDIAN
        asked = probes(stored, kind, max(batches), cosine, seed + int(1000 * cosine))
        truth = true_answer(stored, asked.vectors, threshold, COUNT)
        for batch in batches:
            some = Probes(np.ascontiguousarray(asked.vectors[:batch]), asked.mates[:batch])
            yield Case(batch, threshold, some, Truth(truth.rows[:batch], truth.scores[:batch]))


def compare(args: argparse.Namespace, kind: Kind, references: int, progress: Progress) -> list[Row]:
    """All rows for one gallery."""
    dimension = 128 if kind == "real" else args.dimension
    task = progress.add_task(f"{kind}, {references:,} references: stored rows", total=None)
    stored = gallery(kind, references, dimension, args.seed)
    progress.update(task, description="building the certified scan", total=-(-references // _SEGMENT_ROWS), completed=0)
    began = time.perf_counter()
    ours = Ours(stored, args.threads, lambda: progress.advance(task))
    progress.console.print(
        f"{kind}, {references:,} x {dimension}: codes made in {time.perf_counter() - began:.1f} s, "
        f"{ours.bytes_per_reference():.0f} bytes per reference with the stored rows, "
        f"codes read back in {ours.reload_s():.2f} s"
    )
    progress.update(task, description="the true answers", total=None)
    listed = list(cases(stored, kind, args.batch, args.threshold, args.seed))
    rows: list[Row] = []
    if references <= _RIVAL_ROWS_MAX:
        progress.update(task, description="building the rivals", total=None)
        rivals = [] if args.ours_only else list(exact_rivals(stored, args.threads, quick=args.quick))
        rows = race(args, kind, stored, ours, rivals, listed, progress)
    else:
        rows = streamed(args, kind, stored, ours, listed, progress)
    ours.close()
    progress.remove_task(task)
    return rows


def race(
    args: argparse.Namespace,
    kind: Kind,
    stored: Float16,
    ours: Ours,
    rivals: list[Rival],
    listed: list[Case],
    progress: Progress,
) -> list[Row]:
    """Every scanner answers each case in turns, `--rounds` times."""
    mine = Rival(OURS, f"{args.threads} threads", True, ours.find, ours.within)
    runners = [mine, *rivals]
    rows: list[Row] = []
    task = progress.add_task("searching", total=len(listed) * args.rounds * len(runners))
    for case in listed:
        shortest = [float("inf")] * len(runners)
        found: list[Rows] = [[] for _ in runners]
        ask = (case.probes.vectors, case.threshold, COUNT)
        for _ in range(args.rounds):
            for number, runner in enumerate(runners):
                find = partial(runner.find, *ask)
                if not found[number]:
                    found[number] = runner.within(find)
                shortest[number] = min(shortest[number], runner.within(partial(timed, find, args.seconds)))
                progress.advance(task)
        best_rival = max((case.batch / seconds for seconds in shortest[1:]), default=None)
        for number, runner in enumerate(runners):
            speed = case.batch / shortest[number]
            answer = ours.within(partial(ours.answer, *ask)) if number == 0 else None
            rows.append(
                Row(
                    runner.name,
                    runner.setting,
                    kind,
                    len(stored),
                    stored.shape[1],
                    case.batch,
                    case.threshold,
                    speed,
                    mates_found(stored, case, found[number]),
                    same_answer(answer, case.truth) if answer else same_rows(found[number], case.truth.rows),
                    ours.certified if answer else None,
                    speed / best_rival if best_rival else None,
                )
            )
        args.told(rows[-len(runners) :])
    progress.remove_task(task)
    return rows


def streamed(
    args: argparse.Namespace, kind: Kind, stored: Float16, ours: Ours, listed: list[Case], progress: Progress
) -> list[Row]:
    """The rivals do not fit beside the stored rows: each searches one block after another; only its searching is
    timed. The certified scan has all its rows at once."""
    rows = race(args, kind, stored, ours, [], listed, progress)
    if args.ours_only:
        return rows
    streamed_from = len(rows)
    names = list(FLAT_SETTINGS)[:1]
    spent = {(number, name): 0.0 for number in range(len(listed)) for name in names}
    starts = range(0, len(stored), _SEGMENT_ROWS)
    task = progress.add_task("streamed rivals", total=len(starts) * len(listed))
    for start in starts:
        block = stored[start : start + _SEGMENT_ROWS]
        for rival in exact_rivals(block, args.threads):
            if rival.setting not in names or not rival.name.startswith("faiss IndexFlat"):
                break
            for number, case in enumerate(listed):
                asked = case.probes.vectors
                spent[number, rival.setting] += timed(lambda r=rival, a=asked, t=case.threshold: r.find(a, t, COUNT), 0)
                progress.advance(task)
    progress.remove_task(task)
    for (number, name), seconds in spent.items():
        case = listed[number]
        rows.append(
            Row(
                "faiss IndexFlatIP",
                f"{name}, in blocks of {_SEGMENT_ROWS:,} rows",
                kind,
                len(stored),
                stored.shape[1],
                case.batch,
                case.threshold,
                case.batch / seconds,
                1.0,
                1.0,
                None,
            )
        )
    args.told(rows[streamed_from:])
    return rows


def lost_mates(args: argparse.Namespace, kind: Kind, references: int, progress: Progress) -> list[Row]:
    """Approximate indexes: their speed, and the share of mates that they find, at several cosines to the mate."""
    stored = gallery(kind, references, args.dimension, args.seed)
    asked = {cosine: probes(stored, kind, 512, cosine, args.seed + 5, mated=1.0) for cosine in MATE_COSINES}
    rows: list[Row] = []
    task = progress.add_task("approximate rivals (building takes long)", total=None)
    for rival in approximate_rivals(stored):
        for cosine, some in asked.items():
            found = rival.find(some.vectors, None, COUNT)
            seconds = timed(lambda r=rival, v=some.vectors: r.find(v, None, COUNT), args.seconds)
            share = float(np.mean([mate in mine for mate, mine in zip(some.mates, found, strict=True)]))
            rows.append(
                Row(
                    rival.name,
                    f"{rival.setting}, mates at cosine {cosine}",
                    kind,
                    references,
                    args.dimension,
                    len(some.vectors),
                    None,
                    len(some.vectors) / seconds,
                    share,
                    float("nan"),
                    None,
                )
            )
    args.told(rows)
    progress.remove_task(task)
    return rows


def print_table(rows: list[Row], out: Console) -> None:
    """Plain text, one block for each gallery, threshold and batch, fastest first."""
    groups: dict[tuple[str, int, float | None, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.data, row.references, row.threshold, row.batch), []).append(row)
    for (data, references, threshold, batch), group in groups.items():
        asked = f"best {COUNT}" if threshold is None else f"threshold {threshold}"
        out.print(f"\n{data}, {references:,} references, {asked}, batch {batch}", style="bold")
        out.print(f"{'queries/s':>10} {'ratio':>6} {'mates':>6} {'same':>6} {'cert.':>6}  scanner", highlight=False)
        for row in sorted(group, key=lambda one: -one.queries_per_second):
            cells = [f"{row.queries_per_second:10.1f}"] + [
                f"{'' if value is None or value != value else format(value, '.2f'):>6}"
                for value in (row.ratio, row.mates_found, row.identical, row.certified)
            ]
            out.print(" ".join(cells) + f"  {row.scanner} ({row.setting})", highlight=False, soft_wrap=True)


def tell_json(rows: list[Row]) -> None:
    for row in rows:
        sys.stdout.write(json.dumps({name: _json(value) for name, value in asdict(row).items()}) + "\n")
    sys.stdout.flush()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"type": int, "nargs": "+"}
    parser.add_argument("--references", default=[1_000_000, 100_000, 10_000], **numbers)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--batch", default=[1, 8, 64, 256], **numbers)
    parser.add_argument(
        "--threshold",
        type=lambda text: None if text == "none" else float(text),
        nargs="+",
        default=[0.5, 0.4, 0.3, None],
        help="scores; `none` asks for the best 10 instead",
    )
    parser.add_argument("--data", choices=KINDS, nargs="+", default=["isotropic"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3, help="turns of every scanner at every case")
    parser.add_argument("--seconds", type=float, default=0.5, help="at least so long in each turn")
    parser.add_argument("--seed", type=int, default=20_250_101)
    parser.add_argument("--ours-only", action="store_true", help="leave the rivals out")
    parser.add_argument("--quick", action="store_true", help="only the settings of the rivals that tend to be best")
    parser.add_argument("--approximate", action="store_true", help="HNSW and IVF too, with the mates they lose")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    faiss.omp_set_num_threads(args.threads)
    notes = Console(stderr=True)
    notes.print(f"seed {args.seed}, {args.threads} threads, faiss {faiss.__version__}, numpy {np.__version__}")
    rows: list[Row] = []
    args.told = tell_json if args.json else (lambda some: print_table(some, Console(file=sys.stdout, width=160)))
    with bar(notes) as progress:
        for kind in args.data:
            for references in args.references:
                rows += compare(args, kind, references, progress)
                if args.approximate and kind != "real":
                    rows += lost_mates(args, kind, references, progress)
    if any(row.scanner == OURS and row.identical < 1 for row in rows):
        sys.exit("the certified scan gave another answer than the flat scan of the stored rows")


def _json(value: object) -> object:
    return None if isinstance(value, float) and value != value else value


if __name__ == "__main__":
    main()
