"""The whole index engine, as a node runs it: `python -m benchmarks.engine --help`.

References come in as log entries, segments are sealed and written, the process's shard is closed and opened
again, a share of the references is withdrawn at random, and compaction cleans up. Between these, the same
batches are searched; every answer's rows are those of the flat scan of the live stored rows.

An index from which references were withdrawn is searched in turns with a fresh one: one of all references before
compaction, one of the live references after it. `of_fresh` is its share of that one's throughput, the median of turns.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.galleries import KINDS, Float16, Float32, gallery, probes
from benchmarks.search import ABOVE_THRESHOLD, bar, true_answer
from matcher_service import interpreter
from matcher_service.clock import SystemClock
from matcher_service.records import encode_gallery
from matcher_service.settings import IndexSettings
from matcher_service.shards.local import LocalShard
from matcher_service.terms import DataKey, EntryKind, Gallery, GalleryKind, LogEntry, SearchRequest, SpaceId

_GALLERY = "custody"
_BLOCK = 10_000
_FOREVER_MS = 4_000_000_000_000
_RANK_MAX = 100
_ERASE_WITHIN_S = 0.002  # so that the next round of upkeep compacts


def enrolments(stored: Float16, first: int, now_ms: int) -> list[LogEntry]:
    """Entries of one block of rows, each a subject of its own."""
    return [
        LogEntry(first + number + 2, EntryKind.ENROL, now_ms, _GALLERY, f"r{row}", f"s{row}", _FOREVER_MS, rows, b"")
        for number, (row, rows) in enumerate(
            (row, stored[row].tobytes()) for row in range(first, min(first + _BLOCK, len(stored)))
        )
    ]


async def run(args: argparse.Namespace, folder: Path, notes: Console) -> list[dict[str, object]]:
    clock = SystemClock()
    settings = IndexSettings(threads=args.threads)  # type: ignore[call-arg]
    # In a file: the engine has a copy, and both would not fit for ten million references.
    stored = gallery(args.data, args.references, args.dimension, args.seed, folder / "gallery.npy")
    asked = probes(stored, args.data, max(args.batch), args.threshold + ABOVE_THRESHOLD, args.seed + 1)
    live = np.ones(len(stored), np.bool_)
    results: list[dict[str, object]] = []

    async def search(shard: LocalShard, when: str, fresh: LocalShard | None = None) -> None:
        truth = expected(stored, live, asked.vectors, args.threshold)
        for batch in args.batch:
            request = SearchRequest(
                (_GALLERY,),
                np.ascontiguousarray(asked.vectors[:batch]),
                np.full((batch, 1), args.threshold, np.float32),
                np.full(batch, _RANK_MAX, np.int64),
                clock.wall_ms(),
            )
            times, shares, found = [], [], None
            ends = time.perf_counter() + (args.turns_seconds if fresh is not None else 0.0)
            while len(times) < args.rounds or time.perf_counter() < ends:
                began = time.perf_counter()
                found = await shard.search(request)
                times.append(time.perf_counter() - began)
                if fresh is not None:
                    began = time.perf_counter()
                    await fresh.search(request)
                    shares.append((time.perf_counter() - began) / times[-1])
            assert found is not None
            same = [
                [int(name[1:]) for name in found.reference_ids[first:last]] == truth[probe][:_RANK_MAX].tolist()
                for probe, (first, last) in enumerate(pairwise(found.offsets))
            ]
            results.append(
                {
                    "scanner": "engine",
                    "when": when,
                    "references": int(live.sum()),
                    "dimension": args.dimension,
                    "batch": batch,
                    "threshold": args.threshold,
                    "queries_per_second": batch / min(times),
                    "of_fresh": float(np.median(shares)) if shares else None,
                    "identical": float(np.mean(same)),
                    "certified": found.certified / max(1, found.certified + found.scanned),
                }
            )

    @asynccontextmanager
    async def freshly(rows: slice | NDArray[np.bool_], name: str) -> AsyncIterator[LocalShard | None]:
        """A settled index of these of the stored rows that never held others; None with `--alone`."""
        if args.alone:
            yield None
            return
        (folder / name).mkdir()
        shard = await LocalShard.open(folder / name, _key, settings, clock)
        try:
            await fill(shard, stored[rows])
            yield shard
        finally:
            await shard.close()

    async def fill(shard: LocalShard, rows: Float16, seen: Callable[[int], None] = lambda _: None) -> None:
        await shard.apply([_created(args.dimension, clock.wall_ms())])
        for first in range(0, len(rows), _BLOCK):
            block = enrolments(rows, first, clock.wall_ms())
            await shard.apply(block)
            await shard.maintain()
            seen(len(block))
        await settle(shard)

    async def settle(shard: LocalShard) -> None:
        """Until upkeep has nothing to do, also when no more references come in."""
        idle = 0
        while idle < 3:
            if (await shard.maintain()).more:
                idle = 0
            else:
                idle += 1
                await asyncio.sleep(1.1)

    with bar(notes) as progress:
        task = progress.add_task("enrolling", total=len(stored))
        data = folder / "index"
        data.mkdir()
        shard = await LocalShard.open(data, _key, settings, clock)
        began = time.perf_counter()
        await fill(shard, stored, partial(progress.advance, task))
        status = await shard.status()
        notes.print(
            f"{len(stored):,} references applied and encoded in {time.perf_counter() - began:.1f} s; "
            f"{status.segments} segments, {status.bytes_in_memory / len(stored):.0f} bytes per reference"
        )
        progress.update(task, description="searching")
        await search(shard, "fresh")
        progress.update(task, description="writing files, restarting")
        await shard.close()
        del shard  # as the process that ended would have: two of ten million references do not fit
        gc.collect()
        began = time.perf_counter()
        shard = await LocalShard.open(data, _key, settings, clock, erase_within_s=_ERASE_WITHIN_S)
        took_s = time.perf_counter() - began
        interpreter.give_back()
        notes.print(
            f"ready again in {took_s:.1f} s from {_size(data) / 2**20:.0f} MiB of files; "
            f"the process has {_resident_bytes() / len(stored):.0f} bytes per reference"
        )
        await search(shard, "restarted")
        progress.update(task, description="withdrawing")
        ended = np.random.default_rng(args.seed).choice(len(stored), int(args.withdrawn * len(stored)), replace=False)
        live[ended] = False
        for first in range(0, len(ended), _BLOCK):
            await shard.apply(withdrawals(ended[first : first + _BLOCK], len(stored) + 2 + first, clock.wall_ms()))
        async with freshly(slice(None), "fresh") as fresh:
            await search(shard, f"{args.withdrawn:.0%} withdrawn", fresh)
        progress.update(task, description="compacting")
        began = time.perf_counter()
        await settle(shard)
        notes.print(f"compacted in {time.perf_counter() - began:.1f} s")
        async with freshly(live, "fresh-live") as fresh:
            await search(shard, "compacted", fresh)
        await shard.close()
    return results


async def swept(args: argparse.Namespace, folder: Path, notes: Console) -> list[dict[str, object]]:
    """With the interpreter and the allocator as a node has them."""
    sweeping = asyncio.create_task(interpreter.sweep())
    try:
        return await run(args, folder, notes)
    finally:
        sweeping.cancel()


def withdrawals(rows: NDArray[np.int64], sequence: int, now_ms: int) -> list[LogEntry]:
    return [
        LogEntry(sequence + number, EntryKind.WITHDRAW, now_ms, _GALLERY, f"r{row}", f"s{row}", 0, None, b"")
        for number, row in enumerate(rows.tolist())
    ]


def expected(stored: Float16, live: NDArray[np.bool_], vectors: Float32, threshold: float) -> list[NDArray[np.int64]]:
    """Per probe the live rows at or above the threshold, best first, ties in the order of their ids."""
    truth = true_answer(stored, vectors, threshold, 1)
    ordered = []
    for rows, scores in zip(truth.rows, truth.scores, strict=True):
        kept = sorted(zip(scores[live[rows]], rows[live[rows]], strict=True), key=lambda one: (-one[0], f"r{one[1]}"))
        ordered.append(np.array([row for _, row in kept], np.int64))
    return ordered


def _created(dimension: int, now_ms: int) -> LogEntry:
    made = Gallery(
        _GALLERY,
        GalleryKind.CUSTODY,
        controller="benchmark",
        lawful_basis="none: synthetic",
        purpose="benchmark",
        retention_ms=_FOREVER_MS,
        space=SpaceId("synthetic", 1, dimension),
        threshold=0.0,
        created_at_ms=now_ms,
    )
    return LogEntry(1, EntryKind.GALLERY_CREATED, now_ms, _GALLERY, "", "", 0, None, encode_gallery(made))


def _key(gallery_id: str, generation: int = 0) -> DataKey:
    return DataKey(1, gallery_id.encode().ljust(32, b"."))


def _resident_bytes() -> int:
    """Memory of this process that is its own: what is mapped from files can be had back."""
    fields = Path("/proc/self/status").read_text().split()
    return 1024 * int(fields[fields.index("RssAnon:") + 1])


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--threshold", type=float, default=0.4)
    parser.add_argument("--withdrawn", type=float, default=0.2, help="share of the references, at random")
    parser.add_argument("--data", choices=[kind for kind in KINDS if kind != "real"], default="isotropic")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    # A machine changes from moment to moment by more than the two indexes differ.
    parser.add_argument("--turns-seconds", type=float, default=5.0, help="of each search beside a fresh index")
    parser.add_argument("--seed", type=int, default=20_250_101)
    parser.add_argument("--alone", action="store_true", help="no fresh index beside: two of many references do not fit")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    notes = Console(stderr=True)
    notes.print(f"seed {args.seed}, {args.threads} threads")
    interpreter.tune()
    with tempfile.TemporaryDirectory() as folder:
        results = asyncio.run(swept(args, Path(folder), notes))
    for row in results:
        if args.json:
            sys.stdout.write(json.dumps(row) + "\n")
        else:
            sys.stdout.write(
                f"{row['when']:>14}  batch {row['batch']:>4}  {row['queries_per_second']:>9.1f} queries/s  "
                f"identical {row['identical']:.2f}  certified {row['certified']:.2f}"
                + ("" if row["of_fresh"] is None else f"  {row['of_fresh']:.2f} of a fresh index's")
                + "\n"
            )
    if any(row["identical"] != 1.0 for row in results):
        sys.exit("the engine gave another answer than the flat scan of the live rows")


if __name__ == "__main__":
    main()
