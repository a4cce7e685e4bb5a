"""The GPU scanner beside its rivals, every figure from one run: `python -m benchmarks.gpu --help`.

First its answers are checked against a float64 scan: random and crowded rows, withdrawn rows, ties at the floor, and
a survivor buffer far too small. Nothing is timed if one is wrong. Then the ceilings of this card are measured, then
searches at a threshold and for the best few, at each size and batch, then the rivals on the same rows and probes, then
searching while rows are enrolled.

`--dry-run` walks the same path at tiny sizes, without a GPU in the kernel's interpreter: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks.gpu_rivals import rivals
from matcher_service.index.gpu import kernel
from matcher_service.index.gpu.devices import Device
from matcher_service.index.gpu.scanner import GpuScanner
from matcher_service.index.gpu.scanners import GpuScanners
from matcher_service.index.gpu.slabs import SlabPool
from matcher_service.index.scanner import Hits
from matcher_service.index.scanners import BySize
from matcher_service.index.score import exact_scores
from matcher_service.terms import Float32

SEED = 5
COUNT = 10
THRESHOLD = 0.4
_SEGMENT_ROWS = 1_000_000
_ENROL_ROWS_PER_S = 10_000
# Probes whose timed answers are judged by a float64 scan, up to so many rows, which then takes a minute.
_JUDGED = 2
_JUDGED_ROWS_MAX = 10_000_000

Find = Callable[[GpuScanners, list[GpuScanner], Float32], list[NDArray[np.int64]]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a run goes through. `square` is the side of the products that give the ceilings."""

    references: tuple[int, ...]
    batches: tuple[int, ...]
    dimension: int
    seconds: float
    checked: int
    square: int
    copied_bytes: int


FULL = Sizes((1_000_000, 10_000_000, 100_000_000), (1, 8, 64, 256, 1024, 4096), 512, 2.0, 20_000, 8192, 8 << 30)
DRY = Sizes((600, 1200), (1, 20), 64, 0.0, 500, 64, 1 << 20)


@dataclass(frozen=True, slots=True)
class Row:
    """One line: `latency_ms` the median, `of_products` and `of_streaming` the shares of the best square int8 product
    and of the time to stream the codes once. `agrees`: the share of the probes judged (ours by a float64 scan, rivals
    by ours) with the same rows; None where none was."""

    scanner: str
    references: int
    batch: int
    wanted: str
    queries_per_second: float
    latency_ms: float
    of_products: float | None
    of_streaming: float | None
    agrees: float | None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--dimension", type=int)
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes; the times mean nothing")
    parser.add_argument("--json", type=Path, help="write everything there too")
    given = parser.parse_args(arguments)
    device = Device(given.device)
    if device.torch.type == "cpu" and not given.dry_run:
        print("no GPU here: only --dry-run makes sense", file=sys.stderr)
        return 2
    base = DRY if given.dry_run else FULL
    sizes = Sizes(
        tuple(given.references or base.references),
        tuple(given.batch or base.batches),
        given.dimension or base.dimension,
        base.seconds if given.seconds is None else given.seconds,
        base.checked,
        base.square,
        base.copied_bytes,
    )
    name = torch.cuda.get_device_name(device.torch) if device.torch.type == "cuda" else "no GPU: interpreted"
    print(f"{name}, torch {torch.__version__}, {'dry run: NOT A MEASUREMENT' if given.dry_run else 'measured'}")
    wrong = checked(device, sizes)
    if wrong:
        print("WRONG ANSWERS: " + "; ".join(wrong), file=sys.stderr)
        return 1
    print("answers: random, crowded, withdrawn, ties and overflow all equal the float64 scan\n")
    found = ceilings(device.torch, sizes)
    for what, value in found.items():
        print(f"{what}: {value:,.2f}")
    print()
    rows: list[Row] = []
    notes: list[str] = []
    enrolling: list[dict[str, float]] = []
    for references in sizes.references:
        measure(device, references, sizes, found, rows, notes, enrolling)
    _print(rows, notes, enrolling)
    if given.json:
        report = {
            "device": name,
            "dry_run": given.dry_run,
            "ceilings": found,
            "rows": [asdict(row) for row in rows],
            "notes": notes,
            "enrolling": enrolling,
        }
        given.json.write_text(json.dumps(report, indent=1))
    return 0


# --- correctness -----------------------------------------------------------------------------------


def checked(device: Device, sizes: Sizes) -> list[str]:
    """What is wrong with the answers; [] if nothing is."""
    source = np.random.default_rng(SEED)
    dimension, count = sizes.dimension, sizes.checked
    random = _unit(source.standard_normal((count, dimension)))
    hub = source.standard_normal(dimension)
    spectrum = 0.97 ** np.arange(dimension) + 0.1
    crowded = _unit(source.standard_normal((count, dimension)) * spectrum + 0.5 * spectrum * hub)
    crowded[source.integers(0, count, count // 20)] = crowded[0]
    wrong: list[str] = []
    for what, stored, small in (("random", random, False), ("crowded", crowded, False), ("overflow", random, True)):
        scanners = _scanners(device, 4 * count, dimension, small=small)
        scanner = scanners.build(stored)
        probes = _probes(source, stored, 20)
        best = np.array([exact_scores(stored, probe).max() for probe in probes], np.float32)
        for floors in (np.full(20, 0.15 if small else 0.4, np.float32), best, np.nextafter(best, np.float32(2))):
            if not _equal(scanner, stored, probes, floors, np.ones(count, np.bool_)):
                wrong.append(what)
        if what == "random":
            live = source.random(count) > 0.3
            scanner.end(np.flatnonzero(~live))  # type: ignore[attr-defined]
            if not _equal(scanner, stored, probes, np.full(20, 0.3, np.float32), live):
                wrong.append("withdrawn")
        scanners.close()
    return wrong


def _equal(
    scanner: Any, stored: NDArray[np.float16], probes: Float32, floors: Float32, live: NDArray[np.bool_]
) -> bool:
    hits = scanner.scan(probes, floors)
    for number, (first, last) in enumerate(pairwise(hits.offsets)):
        scores = exact_scores(stored, probes[number])
        order = np.argsort(hits.rows[first:last])
        true = np.flatnonzero((scores >= floors[number]) & live)
        if not np.array_equal(hits.rows[first:last][order], true):
            return False
        if not np.array_equal(hits.scores[first:last][order], scores[true]):
            return False
    return True


# --- ceilings --------------------------------------------------------------------------------------


def ceilings(device: torch.device, sizes: Sizes) -> dict[str, float]:
    """The best that this card does: bytes copied (read and written), and products, square and of the dimension."""
    half = sizes.copied_bytes // 2
    source = torch.randint(-100, 100, (half,), dtype=torch.int8, device=device)
    seconds = _best_of(device, partial(torch.empty_like(source).copy_, source))
    found = {"copy, GB/s read and written": 2 * half / seconds / 1e9}
    del source
    for inner, what in ((sizes.square, "square"), (sizes.dimension, f"inner dimension {sizes.dimension}")):
        a, b = (torch.randint(-127, 128, (sizes.square, inner), dtype=torch.int8, device=device) for _ in range(2))
        operations = 2 * sizes.square**2 * inner
        found[f"int8 product, {what}, TOP/s"] = operations / _best_of(device, partial(torch._int_mm, a, b.T)) / 1e12
        kind = torch.float16 if device.type == "cuda" else torch.float32
        work = partial(torch.mm, a.to(kind), b.to(kind).T)
        found[f"float16 product, {what}, TFLOP/s"] = operations / _best_of(device, work) / 1e12
    return found


def _best_of(device: torch.device, work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(3 if device.type == "cpu" else 20):
        best = min(best, _timed(device, work))
    return best


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


# --- speed -----------------------------------------------------------------------------------------


def measure(
    device: Device,
    references: int,
    sizes: Sizes,
    ceiling: dict[str, float],
    rows: list[Row],
    notes: list[str],
    enrolling: list[dict[str, float]],
) -> None:
    """One size: ours, then each rival, on the same rows and probes."""
    needed, available = 2 * references * sizes.dimension, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if needed > 0.9 * available:
        notes.append(f"{references:,} references: {needed / 1e9:.0f} GB on the host, {available / 1e9:.0f} are free")
        return
    stored = _gallery(device.torch, references, sizes.dimension)
    pool = _probes(np.random.default_rng(SEED + 1), stored, max(sizes.batches))
    batches = {batch: pool[:batch] for batch in sizes.batches}
    # In a function of its own, so that the device is empty again before the rivals come.
    best = _measure_ours(device, stored, batches, sizes, ceiling, rows, enrolling)
    if device.torch.type == "cuda":
        torch.cuda.empty_cache()
    for rival in rivals(stored, device.torch):
        if rival.find is None:
            notes.append(f"{rival.name} at {references:,}: {rival.why}")
            continue
        for batch, probes in batches.items():
            agrees = float(np.mean((np.sort(rival.find(probes, COUNT)) == np.sort(best[batch])).all(axis=1)))
            median, rate = _repeated(device.torch, partial(rival.find, probes, COUNT), batch, sizes.seconds)
            rows.append(Row(rival.name, references, batch, f"best {COUNT}", rate, median * 1e3, None, None, agrees))


def _measure_ours(
    device: Device,
    stored: NDArray[np.float16],
    batches: dict[int, Float32],
    sizes: Sizes,
    ceiling: dict[str, float],
    rows: list[Row],
    enrolling: list[dict[str, float]],
) -> dict[int, NDArray[np.int64]]:
    """Adds the lines of the int8 filter; the best rows of each batch."""
    references, dimension = stored.shape
    scanners = _scanners(device, references, dimension)
    built = [scanners.build(stored[first : first + _SEGMENT_ROWS]) for first in range(0, references, _SEGMENT_ROWS)]
    mine = [one for one in built if isinstance(one, GpuScanner)]
    products = ceiling["int8 product, square, TOP/s"] * 1e12
    stream = references * kernel.width_of(dimension) / (ceiling["copy, GB/s read and written"] * 1e9)
    pool = batches[max(batches)]
    truth = [exact_scores(stored, probe) for probe in pool[:_JUDGED]] if references <= _JUDGED_ROWS_MAX else []
    best: dict[int, NDArray[np.int64]] = {}
    for batch, probes in batches.items():
        for wanted, find in ((f"threshold {THRESHOLD}", _threshold), (f"best {COUNT}", _top)):
            found = find(scanners, mine, probes)
            agrees = [np.array_equal(one, _true(scores, find)) for one, scores in zip(found, truth, strict=False)]
            median, rate = _repeated(device.torch, partial(find, scanners, mine, probes), batch, sizes.seconds)
            share = 2 * batch * references * dimension / median / products
            judged = float(np.mean(agrees)) if agrees else None
            rows.append(
                Row("int8 filter", references, batch, wanted, rate, median * 1e3, share, stream / median, judged)
            )
        best[batch] = np.array(found)
    enrolling.append({"references": references, **_enrol_while_searching(scanners, mine, batches, sizes)})
    scanners.close()
    return best


def _true(scores: Float32, find: Find) -> NDArray[np.int64]:
    """What `find` must give: by descending score, then by row."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    return order[:COUNT] if find is _top else order[: np.count_nonzero(scores >= np.float32(THRESHOLD))]


def _repeated(device: torch.device, work: Callable[[], object], batch: int, seconds: float) -> tuple[float, float]:
    """Median seconds and probes per second."""
    work()
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        times.append(_timed(device, work))
    return float(np.median(times)), batch * len(times) / sum(times)


def _threshold(scanners: GpuScanners, mine: list[GpuScanner], probes: Float32) -> list[NDArray[np.int64]]:
    """The rows of each probe at or above the threshold, best first."""
    floors = np.full((len(probes), len(mine)), THRESHOLD, np.float32)
    return _by_probe(scanners.scan_all(mine, probes, floors), len(probes))


def _top(scanners: GpuScanners, mine: list[GpuScanner], probes: Float32) -> list[NDArray[np.int64]]:
    """The best rows of each probe: the floor is that of a guess, then that of the first segment."""
    guess = mine[0].guess(probes, COUNT).hits
    floors = np.array([guess.scores[first:last].min() for first, last in pairwise(guess.offsets)], np.float32)
    found = [mine[0].scan(probes, floors)]
    if len(mine) > 1:
        best = [np.sort(found[0].scores[first:last])[-COUNT] for first, last in pairwise(found[0].offsets)]
        floors = np.array(best, np.float32)
        found += scanners.scan_all(mine[1:], probes, np.repeat(floors[:, None], len(mine) - 1, axis=1))
    return [rows[:COUNT] for rows in _by_probe(found, len(probes))]


def _by_probe(found: list[Hits], count: int) -> list[NDArray[np.int64]]:
    which = np.concatenate([np.repeat(np.arange(count), np.diff(hits.offsets)) for hits in found])
    rows = np.concatenate([hits.rows + number * _SEGMENT_ROWS for number, hits in enumerate(found)])
    scores = np.concatenate([hits.scores for hits in found])
    order = np.lexsort((rows, -scores, which))
    bounds = np.searchsorted(which[order], np.arange(count + 1))
    return [rows[order[first:last]] for first, last in pairwise(bounds)]


def _enrol_while_searching(
    scanners: GpuScanners, mine: list[GpuScanner], batches: dict[int, Float32], sizes: Sizes
) -> dict[str, float]:
    """How many searches go through while rows come in at the stated rate, and how many rows did."""
    batch, probes = list(batches.items())[len(batches) // 2]
    fresh = mine[0].stored[:100]
    stop = threading.Event()
    appended = 0

    def enrol() -> None:
        nonlocal appended
        tail, began = scanners.growing(sizes.dimension), time.perf_counter()
        while not stop.is_set() and tail is not None:
            tail.append(fresh)
            appended += len(fresh)
            stop.wait(max(0.0, appended / _ENROL_ROWS_PER_S - (time.perf_counter() - began)))

    torch_device = mine[0].place.filter.pool.device.torch  # type: ignore[union-attr]
    _, alone = _repeated(torch_device, partial(_threshold, scanners, mine, probes), batch, sizes.seconds)
    thread = threading.Thread(target=enrol)
    began = time.perf_counter()
    thread.start()
    _, beside = _repeated(torch_device, partial(_threshold, scanners, mine, probes), batch, sizes.seconds)
    stop.set()
    thread.join()
    took = time.perf_counter() - began
    return {
        "batch": batch,
        "queries_per_second_alone": alone,
        "queries_per_second_beside": beside,
        "rows_enrolled_per_second": appended / took,
    }


# --- data ------------------------------------------------------------------------------------------


def _scanners(device: Device, references: int, dimension: int, *, small: bool = False) -> GpuScanners:
    width = kernel.width_of(dimension)
    if device.torch.type == "cpu":
        tile = kernel.Tile(64, 16, 4, 1) if small else kernel.Tile(256, 32, 4, 1)
        slab = 256 * width
        shape: dict[str, Any] = {"slab_bytes": slab, "tile_for": lambda _: tile}
        if small:
            shape["survivors"] = tile.rows * tile.probes
    else:
        slab = 4 << 20
        shape = {"survivors": kernel.MANY.rows * kernel.MANY.probes} if small else {}
    # Besides the rows a slab for the last of each segment, and some for what is enrolled meanwhile.
    slabs = references * width // slab + references // _SEGMENT_ROWS + 64
    return GpuScanners([device], lambda one: SlabPool(one, slabs * slab, **shape), BySize())


def _gallery(device: torch.device, references: int, dimension: int) -> NDArray[np.float16]:
    """Unit rows of independent directions, made on the device."""
    stored = np.empty((references, dimension), np.float16)
    source = torch.Generator(device).manual_seed(SEED)
    for start in range(0, references, 1 << 18):
        count = min(1 << 18, references - start)
        rows = torch.randn((count, dimension), generator=source, device=device)
        stored[start : start + count] = (rows / rows.norm(dim=1, keepdim=True)).to(torch.float16).cpu().numpy()
    return stored


def _probes(source: np.random.Generator, stored: NDArray[np.float16], count: int) -> Float32:
    """Half have a mate at a cosine of about 0.55, half have none."""
    dimension = stored.shape[1]
    vectors = source.standard_normal((count, dimension)) / dimension**0.5
    mated = np.arange(count) % 2 == 0
    vectors[mated] = stored[source.integers(0, len(stored), int(mated.sum()))] + 1.5 * vectors[mated]
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float16]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float16)


def _print(rows: list[Row], notes: list[str], enrolling: list[dict[str, float]]) -> None:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    print("| scanner | references | batch | wanted | queries/s | latency ms | of products | of streaming | agrees |")
    print("|---|--:|--:|---|--:|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row.scanner} | {row.references:,} | {row.batch} | {row.wanted} | {row.queries_per_second:,.0f} | "
            f"{row.latency_ms:.3f} | {share(row.of_products)} | {share(row.of_streaming)} | {share(row.agrees)} |"
        )
    for one in enrolling:
        print(
            f"\n{one['references']:,.0f} references, batch {one['batch']:.0f}: {one['queries_per_second_alone']:,.0f} "
            f"queries/s alone, {one['queries_per_second_beside']:,.0f} while "
            f"{one['rows_enrolled_per_second']:,.0f} rows/s are enrolled"
        )
    for note in notes:
        print(f"\nnot run: {note}")


if __name__ == "__main__":
    sys.exit(main())
