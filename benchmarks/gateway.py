"""What the path from socket to decision costs: `python -m benchmarks.gateway --help`.

Throughput of a real service over each path, with the search real and with the search free (a shard behind the same
seam that answers at once without candidates), beside the engine's own throughput, called in process by one thread in
the same run; and the cost of each station. The server has one core and the client another, where there are two.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import uvloop
from numpy.typing import NDArray
from rich.console import Console

from benchmarks import closed_loop
from benchmarks.closed_loop import Driven, Outcomes
from benchmarks.galleries import gallery
from benchmarks.served import Service, enrol, pinned, prepare, service, two_cores
from benchmarks.stations import NOT_EMBEDDED, STATIONS, Alone, Wire, nothing_found
from matcher_service import bootstrap, forms, settings
from matcher_service.shards.local import LocalShard
from matcher_service.terms import SearchRequest, SearchResult, SpaceId

Search = Literal["real", "free"]
GALLERY = "watchlist"
BATCH_PROBES_MAX = 256
SETTLE_S = 3.0


class FreeShard(LocalShard):
    """Takes in references as ever, and finds nobody, at once."""

    async def search(self, request: SearchRequest) -> SearchResult:
        return nothing_found(len(request.probes), self.applied_sequence)


class Way(NamedTuple):
    """A way to the service: its name, how the templates travel, and what drives it."""

    name: str
    wire: Wire
    drive: Callable[[Service, list[bytes], float], Awaitable[Driven]]
    outcomes: Outcomes


class Row(NamedTuple):
    path: str
    search: Search
    probes_per_second: float
    index_probes_per_second: float
    ratio: float
    probes_per_message: int
    server_cpu_us_per_probe: float
    client_busy: float
    stations_us_per_probe: dict[str, float]

    @property
    def elsewhere_us(self) -> float:
        """What the server's processor time holds beyond the stations: sockets, framing, event loop, threads."""
        return self.server_cpu_us_per_probe - sum(
            cost for name, cost in self.stations_us_per_probe.items() if name != NOT_EMBEDDED
        )


async def _stream(args: argparse.Namespace, served: Service, bodies: list[bytes], seconds: float) -> Driven:
    return await closed_loop.over_grpc_streams(
        served.grpc_address,
        served.token,
        bodies,
        seconds=seconds,
        streams=args.streams,
        window=args.window,
        warm_up_s=args.warm_up,
    )


async def _http(kind: str, args: argparse.Namespace, served: Service, bodies: list[bytes], seconds: float) -> Driven:
    return await closed_loop.over_http(
        served.http_port,
        "/v1/identify",
        served.token,
        kind,
        bodies,
        seconds=seconds,
        connections=args.connections,
        warm_up_s=args.warm_up,
    )


def paths(args: argparse.Namespace) -> list[Way]:
    protobuf, json_text = closed_loop.protobuf_outcomes, closed_loop.json_outcomes
    return [
        Way("grpc stream", "protobuf", partial(_stream, args), protobuf),
        Way("http protobuf", "protobuf", partial(_http, closed_loop.PROTOBUF, args), protobuf),
        Way("http json", "json numbers", partial(_http, closed_loop.JSON, args), json_text),
        Way("http json base64", "json base64", partial(_http, closed_loop.JSON, args), json_text),
    ]


def messages(space: SpaceId, probes: NDArray[np.float32], wire: Wire, size: int) -> list[bytes]:
    """The probes as encoded messages of `size`."""
    cut = [probes[first : first + size] for first in range(0, len(probes), size)]
    if wire == "protobuf":
        return [closed_loop.protobuf_request(space, one) for one in cut]
    return [closed_loop.json_request(space, one, "base64" if wire == "json base64" else "numbers") for one in cut]


async def measure(args: argparse.Namespace, folder: Path, notes: Console) -> list[Row]:
    cores = two_cores()
    server_cores, client_cores = cores or (None, None)
    notes.print("server and client on a core each" if cores else "one core only: server and client share it")
    space = SpaceId("bench", 1, args.dimension)
    stored = gallery("isotropic", args.references, args.dimension, args.seed)
    # Nobody of the watchlist passes by: what a live stream is made of, and alerts would time the disk instead.
    probes = np.random.default_rng(args.seed + 1).standard_normal((32 * args.message, args.dimension), np.float32)
    rows: list[Row] = []
    with Alone(server_cores, space, GALLERY, stored, probes, args.threshold, BATCH_PROBES_MAX) as alone:
        for search in args.search:
            command = ["-m", "benchmarks.gateway", "--serve", search]
            if args.profile:
                command += ["--profile", f"{args.profile}.{search}"]
            with service(folder / search, cores=server_cores, command=command) as served, pinned(client_cores):
                prepare(served, space, {GALLERY: args.threshold})
                await enrol(served, space, GALLERY, stored)
                await asyncio.sleep(args.settle)
                for path in paths(args):
                    if args.path and path.name not in args.path:
                        continue
                    notes.print(f"{path.name}, search {search}")
                    bodies = messages(space, probes, path.wire, args.message)
                    before = alone.index_rate(args.seconds / 2)
                    cpu_before = served.cpu_s()
                    driven = await path.drive(served, bodies, args.seconds)
                    cpu_s = served.cpu_s() - cpu_before
                    answered = closed_loop.answered_probes(driven.replies, path.outcomes)
                    rate = answered / driven.seconds
                    index = (before + alone.index_rate(args.seconds / 2)) / 2
                    rows.append(
                        Row(
                            path.name,
                            search,
                            rate,
                            index,
                            rate / index,
                            args.message,
                            # The warm-up is in the processor time, so it counts as if it ran at the same rate.
                            cpu_s / (rate * (driven.seconds + args.warm_up)) * 1e6,
                            driven.client_busy,
                            alone.costs(search == "free", path.wire, args.message, args.station_seconds),
                        )
                    )
    return rows


def markdown(rows: list[Row]) -> str:
    """Two tables: throughput, and microseconds per probe at each station."""
    lines = [
        "| path | search | probes/s | engine alone, probes/s | ratio | server CPU, us/probe | client busy |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.path} | {row.search} | {row.probes_per_second:,.0f} | {row.index_probes_per_second:,.0f} "
            f"| {row.ratio:.2f} | {row.server_cpu_us_per_probe:.1f} | {row.client_busy:.0%} |"
        )
    lines += [
        "",
        f"| us/probe | search | {' | '.join(STATIONS)} | elsewhere |",
        f"|---|---|{'--:|' * (len(STATIONS) + 1)}",
    ]
    for row in rows:
        cells = " | ".join(f"{row.stations_us_per_probe[name]:.2f}" for name in STATIONS)
        lines.append(f"| {row.path} | {row.search} | {cells} | {row.elsewhere_us:.1f} |")
    return "\n".join(lines)


def serve(search: Search, profile: str | None) -> int:
    """The service of this benchmark: the product's own start, with the shard replaced if the search is free."""
    if search == "free":
        setattr(forms, "LocalShard", FreeShard)  # noqa: B010
    loaded = settings.load()
    if profile is None:
        return bootstrap.serve(loaded)
    profiler = cProfile.Profile()
    code: int = profiler.runcall(bootstrap.serve, loaded)
    profiler.dump_stats(profile)
    return code


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--message", type=int, default=32, help="probes of a message")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--window", type=int, default=12, help="unanswered messages of a stream")
    parser.add_argument("--connections", type=int, default=16, help="HTTP connections")
    parser.add_argument("--search", nargs="+", choices=["real", "free"], default=["real", "free"])
    parser.add_argument("--path", nargs="+", help="only these paths, by name")
    parser.add_argument("--seconds", type=float, default=6.0, help="measured time of each path")
    parser.add_argument("--warm-up", type=float, default=1.5)
    parser.add_argument("--settle", type=float, default=SETTLE_S, help="seconds for the index to come to rest")
    parser.add_argument("--station-seconds", type=float, default=0.4, help="measured time of each station")
    parser.add_argument("--seed", type=int, default=20_250_101)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the tables")
    parser.add_argument("--profile", help="write the server's profile (cProfile) to this file, .real and .free")
    parser.add_argument("--serve", choices=["real", "free"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.serve:
        sys.exit(serve(args.serve, args.profile))
    notes = Console(stderr=True)
    notes.print(f"seed {args.seed}, {args.references:,} references of {args.dimension} dimensions")
    with tempfile.TemporaryDirectory() as folder:
        rows = uvloop.run(measure(args, Path(folder), notes))
    if args.json:
        for row in rows:
            print(json.dumps(row._asdict()))
    else:
        print(markdown(rows))


if __name__ == "__main__":
    main()
