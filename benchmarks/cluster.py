"""What gateway and Triton cost beside the same engine called in process: `python -m benchmarks.cluster --help`.

PostgreSQL, one Triton server with one shard of all references, one gateway, each a real process; and in this process
the same engine over the same log. Both are driven with the same probes in turns, each turn of one between two of the
other, so that what else the machine does falls on both. The answers are compared before anything is timed.

The gateway keeps the shard at work on two batches at once, so the engine is timed with one caller and with as many
callers as it searches for at once.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# Before numpy is loaded, as `matcher serve` and the shard do: the scans share their work among threads of their own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import httpx
import numpy as np
import psutil
import uvloop
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks import closed_loop
from benchmarks.galleries import gallery, probes
from benchmarks.served import Service, enrol, prepare, service
from matcher_service import interpreter
from matcher_service.clock import SystemClock
from matcher_service.gallery.postgres import open_postgres_log
from matcher_service.index.fastscan import one_thread
from matcher_service.partitions import ALL_PARTITIONS
from matcher_service.settings import IndexSettings, StorageSettings
from matcher_service.shards.exchange import MODEL
from matcher_service.shards.local import LocalShard, searches_at_once
from matcher_service.terms import SearchRequest, SpaceId
from matcher_service.wire import matcher_pb2 as pb
from tests.cluster.farm import Farm, farm
from tests.cluster.served_postgres import CannotServe as NoPostgres
from tests.cluster.server_environment import CannotServe
from tests.cluster.server_environment import prepare as server_environment

GALLERY = "watchlist"
MATE_COSINE = 0.8
# The gateway's own stations, in the order of the flow; what is left of a batch is sockets, framing and waiting.
STATIONS = ("policy", "template_adapter", "shards", "shard_engine", "audit")


class Row(NamedTuple):
    """Rates in probes/s, the median over the rounds; `stations_ms` per batch, as the gateway measured them. Of
    `shards`, the call of the shard as the gateway sees it, `shard_engine` is the search itself. `cpu_ms` is processor
    time per batch, of each process on the way, and of the engine when it is called in process. `engine` is called again
    as soon as it has answered; `engine_busy` by several callers at once."""

    path: str
    references: int
    dimension: int
    batch: int
    threshold: float
    probes_per_second: float
    engine_probes_per_second: float
    ratio: float
    engine_busy_probes_per_second: float
    ratio_busy: float
    stations_ms: dict[str, float]
    cpu_ms: dict[str, float]


async def replayed(made: Farm, folder: Path, notes: Console) -> LocalShard:
    """The engine in this process, with all that the log holds."""
    log = await open_postgres_log(made.log_url, made.keys_dir, StorageSettings(), SystemClock(), read_only=True)
    try:
        shard = await LocalShard.open(folder, log.keyring.key, IndexSettings(), SystemClock())
        while entries := await log.read(shard.applied_sequence, 4096):
            await shard.apply(entries)
    finally:
        await log.close()
    return shard


async def settled(shard: LocalShard, seconds: float) -> None:
    """Until upkeep has nothing more to do; the shard on Triton has as long for its own."""
    until = time.monotonic() + seconds
    while True:
        more = (await shard.maintain()).more
        if not more and time.monotonic() >= until:
            return
        await asyncio.sleep(0 if more else 0.2)


def requests(vectors: NDArray[np.float32], batch: int, threshold: float) -> list[SearchRequest]:
    at_ms = SystemClock().wall_ms()
    return [
        SearchRequest(
            (GALLERY,),
            np.ascontiguousarray(vectors[first : first + batch]),
            np.full((batch, 1), threshold, np.float32),
            np.ones(batch, np.int64),
            at_ms,
        )
        for first in range(0, len(vectors), batch)
    ]


class Spent:
    """Processor time of every process on the way, in seconds, since it was made."""

    def __init__(self, made: Farm, served: Service) -> None:
        server = psutil.Process(made.servers[0].pid)
        stub = next(one for one in server.children(recursive=True) if "stub" in one.name())
        self._processes = {"gateway": psutil.Process(served.process_id), "triton": server, "shard": stub}
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        spent = {name: sum(process.cpu_times()[:2]) for name, process in self._processes.items()}
        return {"client": time.process_time(), **spent}

    def ms_per_batch(self, batches: float) -> dict[str, float]:
        return {name: (spent - self._before[name]) / batches * 1000 for name, spent in self._now().items()}


async def engine_rate(shard: LocalShard, asked: list[SearchRequest], seconds: float, callers: int = 1) -> float:
    """Probes/s of callers each of whom calls again when it has its answer."""
    began, calls, done = time.perf_counter(), itertools.count(), 0

    async def call() -> None:
        nonlocal done
        while time.perf_counter() - began < seconds or not done:
            found = await shard.search(asked[next(calls) % len(asked)])
            # Not in one line with the wait: meanwhile others have added theirs.
            done += len(found.offsets) - 1

    await asyncio.gather(*(call() for _ in range(callers)))
    return done / (time.perf_counter() - began)


async def engine_cpu_ms(shard: LocalShard, asked: list[SearchRequest]) -> float:
    """Processor time of one call in process."""
    began = time.process_time()
    for one in asked:
        await shard.search(one)
    return (time.process_time() - began) / len(asked) * 1000


async def cluster_rate(args: argparse.Namespace, served: Service, bodies: list[bytes]) -> float:
    driven = await closed_loop.over_grpc_streams(
        served.grpc_address,
        served.token,
        bodies,
        seconds=args.seconds,
        streams=args.streams,
        window=args.window,
        warm_up_s=args.warm_up,
    )
    return closed_loop.answered_probes(driven.replies, closed_loop.protobuf_outcomes) / driven.seconds


def station_sums(served: Service) -> dict[str, tuple[float, float]]:
    """Seconds and count of each station so far."""
    text = httpx.get(f"{served.http_address}/metrics").text
    sums: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        if family.name == "matcher_station_seconds":
            for sample in family.samples:
                if sample.name.endswith(("_sum", "_count")):
                    sums.setdefault(sample.labels["station"], {})[sample.name.rsplit("_", 1)[1]] = sample.value
    return {station: (one["sum"], one["count"]) for station, one in sums.items()}


async def compare(
    shard: LocalShard, served: Service, space: SpaceId, vectors: NDArray[np.float32], threshold: float
) -> int:
    """How many of these probes are found by both, which must agree. Raises RuntimeError."""
    (request,) = requests(vectors, len(vectors), threshold)
    expected = await shard.search(request)
    async with closed_loop.clear_channel(served.grpc_address) as channel:
        call = channel.unary_unary(closed_loop.UNARY_METHOD)
        body = closed_loop.protobuf_request(space, vectors)
        reply = pb.IdentifyReply.FromString(await call(body, metadata=closed_loop.bearer(served.token)))
    got = [[one.reference_id for one in decision.candidates] for decision in reply.decisions]
    wanted = [
        list(expected.reference_ids[first:last])
        for first, last in zip(expected.offsets[:-1], expected.offsets[1:], strict=True)
    ]
    scores = [one.score for decision in reply.decisions for one in decision.candidates]
    # The adapter normalises what is a unit vector already: the last bit of a score may differ.
    if got != wanted or reply.missing or not np.allclose(scores, expected.scores, rtol=0, atol=1e-5):
        raise RuntimeError(f"gateway and engine differ; missing: {list(reply.missing)}")
    return sum(map(bool, got))


async def measure(args: argparse.Namespace, made: Farm, shard_name: str, folder: Path, notes: Console) -> list[Row]:
    space = SpaceId("bench", 1, args.dimension)
    stored = gallery("isotropic", args.references, args.dimension, args.seed)
    mated = probes(stored, "isotropic", 64, MATE_COSINE, args.seed + 1, mated=0.5)
    # Nobody of the watchlist passes by while it is timed: alerts would time the disk under the audit instead.
    strangers = np.random.default_rng(args.seed + 2).standard_normal((64 * max(args.batch), args.dimension), np.float32)
    strangers /= np.linalg.norm(strangers, axis=1, keepdims=True)
    rows = []
    for batch in args.batch:
        settings = {
            # A machine that stands still for a moment makes an answer late here, not incomplete.
            **made.environment([[made.replica(0, shard_name)]], answer_within_ms=9_000),
            "MATCHER_LIMITS__DEADLINE_MS_DEFAULT": "10000",
            "MATCHER_BATCHING__BATCH_PROBES_MAX": str(batch),
            "MATCHER_LOG_LEVEL": "error",
        }
        with service(folder / f"gateway-{batch}", settings=settings) as served:
            if batch == args.batch[0]:
                prepare(served, space, {GALLERY: args.threshold})
                notes.print(f"enrolling {args.references:,} references")
                await enrol(served, space, GALLERY, stored)
                shard = await replayed(made, folder / "engine", notes)
                await settled(shard, args.settle)
            found = await compare(shard, served, space, mated.vectors, args.threshold)
            notes.print(f"batch {batch}: gateway and engine agree on {len(mated.vectors)} probes, {found} found")
            asked = requests(strangers, batch, args.threshold)
            bodies = [closed_loop.protobuf_request(space, one.probes) for one in asked]
            await cluster_rate(args, served, bodies)
            before, rates, ratios, spent = station_sums(served), [], [], []
            engine, busy, ratios_busy = [await engine_rate(shard, asked, args.seconds)], [], []
            for _ in range(args.rounds):
                spending = Spent(made, served)
                rates.append(await cluster_rate(args, served, bodies))
                # The warm-up is in the processor time, so it counts as if it ran at the same rate.
                spent.append(spending.ms_per_batch(rates[-1] * (args.seconds + args.warm_up) / batch))
                busy.append(await engine_rate(shard, asked, args.seconds, searches_at_once()))
                ratios_busy.append(rates[-1] / busy[-1])
                engine.append(await engine_rate(shard, asked, args.seconds))
                ratios.append(rates[-1] / ((engine[-2] + engine[-1]) / 2))
            after = station_sums(served)
            rows.append(
                Row(
                    "grpc stream",
                    args.references,
                    args.dimension,
                    batch,
                    args.threshold,
                    statistics.median(rates),
                    statistics.median(engine),
                    statistics.median(ratios),
                    statistics.median(busy),
                    statistics.median(ratios_busy),
                    {name: _mean_ms(before.get(name, (0, 0)), after.get(name, (0, 0))) for name in STATIONS},
                    {name: statistics.median(one[name] for one in spent) for name in spent[0]}
                    | {"engine": await engine_cpu_ms(shard, asked)},
                )
            )
    await shard.close()
    return rows


def _mean_ms(before: tuple[float, float], after: tuple[float, float]) -> float:
    count = after[1] - before[1]
    return (after[0] - before[0]) / count * 1000 if count else 0.0


def markdown(rows: list[Row]) -> str:
    lines = [
        "| batch | gateway + Triton, probes/s | engine in process, one caller, probes/s | ratio "
        "| engine in process, several callers, probes/s | ratio |",
        "|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {row.batch} | {row.probes_per_second:,.0f} | {row.engine_probes_per_second:,.0f} | {row.ratio:.2f} "
            f"| {row.engine_busy_probes_per_second:,.0f} | {row.ratio_busy:.2f} |"
            for row in rows
        ),
        "",
        f"| ms per batch | {' | '.join(STATIONS)} | between gateway and engine |",
        f"|--:|{'--:|' * (len(STATIONS) + 1)}",
    ]
    for row in rows:
        spent = row.stations_ms
        cells = " | ".join(f"{spent[name]:.2f}" for name in STATIONS)
        lines.append(f"| {row.batch} | {cells} | {spent['shards'] - spent['shard_engine']:.2f} |")
    names = list(rows[0].cpu_ms) if rows else []
    lines += ["", f"| processor ms per batch | {' | '.join(names)} |", f"|--:|{'--:|' * len(names)}"]
    lines += [f"| {row.batch} | {' | '.join(f'{row.cpu_ms[name]:.2f}' for name in names)} |" for row in rows]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--window", type=int, default=4, help="unanswered messages of a stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--warm-up", type=float, default=0.5)
    parser.add_argument("--settle", type=float, default=15.0, help="seconds for the indexes to come to rest")
    parser.add_argument("--seed", type=int, default=20_250_101)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the tables")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    notes = Console(stderr=True)
    one_thread()
    interpreter.tune()  # as the shard is
    try:
        environment = server_environment()
        with farm(environment, [{MODEL: ALL_PARTITIONS}]) as made, tempfile.TemporaryDirectory() as folder:
            rows = uvloop.run(measure(args, made, MODEL, Path(folder), notes))
    except (CannotServe, NoPostgres) as reason:
        notes.print(f"there can be no cluster here: {reason}", markup=False)
        return 1
    if args.json:
        for row in rows:
            print(json.dumps(row._asdict()))
    else:
        print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
