"""What access control and the audit cost: `python -m benchmarks.access --help`.

Two real services side by side on one core, the client on another. One is as it is served: an edge credential's token on
every stream, each message numbered, scopes, rights, rates, replays, climbs, bands, and every alert in the audit before
it is disclosed. In the other all of that is taken out. Both answer the same probes in turn, and the ratio of each pair
of rounds is what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import uvloop
from rich.console import Console

from benchmarks import closed_loop
from benchmarks.galleries import gallery
from benchmarks.served import DEPLOYMENT, SERVE, Service, enrol, pinned, prepare, service, two_cores
from matcher_service import bootstrap, settings
from matcher_service.access import bands, standing, verbs
from matcher_service.access.conduct import Conduct
from matcher_service.gallery.log import SqlGalleryLog
from matcher_service.terms import SpaceId
from matcher_service.wire import matcher_pb2 as pb

GALLERY = "watchlist"
PROBES_PER_S = 100_000


class Row(NamedTuple):
    """Probes per second of each round, with everything and without; `ratio` is the median over the rounds."""

    alerts: float
    with_access: list[float]
    without: list[float]
    ratio: float
    ratio_least: float
    ratio_most: float


class Numbering:
    """Ends each sending with a stream's nonce and the next number, where protobuf reads them all the same."""

    def __init__(self) -> None:
        self._nonce = secrets.token_bytes(16)
        self._number = 0

    def __call__(self, body: bytes) -> bytes:
        self._number += 1
        tail = pb.IdentifyRequest(stream_nonce=self._nonce, stream_sequence=self._number)
        return body + tail.SerializeToString()


def edge_token(served: Service) -> str:
    """A token of the benchmark's deployment, as an edge node gets it."""
    with httpx.Client(base_url=served.http_address, trust_env=False) as http:
        body = {"deployment_id": DEPLOYMENT, "probes_per_s": PROBES_PER_S}
        issued = http.post("/v1/credentials", json=body, headers={"Authorization": f"Bearer {served.token}"})
        issued.raise_for_status()
        given = http.post("/v1/tokens", headers={"Authorization": f"Bearer {issued.json()['secret']}"})
        given.raise_for_status()
        return str(given.json()["token"])


def bodies(args: argparse.Namespace, space: SpaceId, stored: Any, rng: np.random.Generator) -> list[bytes]:
    """Probes of nobody, and among them the share of --alerts that are somebody enrolled."""
    probes = rng.standard_normal((32 * args.message, args.dimension), np.float32)
    mates = rng.random(len(probes)) < args.alerts
    probes[mates] = stored[rng.integers(0, len(stored), mates.sum())]
    return [
        closed_loop.protobuf_request(space, probes[first : first + args.message])
        for first in range(0, len(probes), args.message)
    ]


async def measure(args: argparse.Namespace, folder: Path, notes: Console) -> Row:
    cores = two_cores()
    server_cores, client_cores = cores or (None, None)
    space = SpaceId("bench", 1, args.dimension)
    rng = np.random.default_rng(args.seed)
    stored = gallery("isotropic", args.references, args.dimension, args.seed)
    rates: dict[str, list[float]] = {"on": [], "off": []}
    with ExitStack() as stack:
        commands = {"on": SERVE, "off": ("-m", "benchmarks.access", "--serve-bare")}
        running = {
            name: stack.enter_context(service(folder / name, cores=server_cores, command=command))
            for name, command in commands.items()
        }
        stack.enter_context(pinned(client_cores))
        for served in running.values():
            prepare(served, space, {GALLERY: args.threshold})
            await enrol(served, space, GALLERY, stored)
        tokens = {"on": edge_token(running["on"]), "off": running["off"].token}
        await asyncio.sleep(args.settle)
        sent = bodies(args, space, stored, rng)
        for number in range(args.rounds):
            for name in ("on", "off") if number % 2 else ("off", "on"):
                driven = await closed_loop.over_grpc_streams(
                    running[name].grpc_address,
                    tokens[name],
                    sent,
                    seconds=args.seconds,
                    streams=args.streams,
                    window=args.window,
                    warm_up_s=args.warm_up,
                    finish=Numbering() if name == "on" else bytes,
                )
                answered = closed_loop.answered_probes(driven.replies, closed_loop.protobuf_outcomes)
                rates[name].append(answered / driven.seconds)
            notes.print(f"round {number + 1}: with {rates['on'][-1]:,.0f}, without {rates['off'][-1]:,.0f} probes/s")
    ratios = [one / other for one, other in zip(rates["on"], rates["off"], strict=True)]
    return Row(args.alerts, rates["on"], rates["off"], statistics.median(ratios), min(ratios), max(ratios))


def serve_bare() -> int:
    """The service without access control and audit, which exists for this comparison only."""

    async def do_nothing(*_: Any) -> None:
        return None

    def allow(*_: Any) -> None:
        return None

    setattr(SqlGalleryLog, "record", do_nothing)  # noqa: B010
    for name in ("admit_case", "completed"):
        setattr(Conduct, name, do_nothing)
    for name in ("admit", "disclosed"):
        setattr(Conduct, name, allow)
    setattr(verbs, "require", allow)  # noqa: B010
    setattr(standing, "require", allow)  # noqa: B010
    setattr(bands, "reply_for", lambda _, reply: reply)  # noqa: B010
    setattr(bands, "require_an_edge", allow)  # noqa: B010
    return bootstrap.serve(settings.load())


def markdown(row: Row) -> str:
    with_access, without = statistics.median(row.with_access), statistics.median(row.without)
    return "\n".join(
        [
            "| alerts per probe | with access and audit, probes/s | without, probes/s | ratio (least to most) |",
            "|--:|--:|--:|--:|",
            f"| {row.alerts:g} | {with_access:,.0f} | {without:,.0f} "
            f"| {row.ratio:.3f} ({row.ratio_least:.3f} to {row.ratio_most:.3f}) |",
        ]
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--alerts", type=float, default=0.001, help="share of probes that alert")
    parser.add_argument("--message", type=int, default=32, help="probes of a message")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--window", type=int, default=12, help="unanswered messages of a stream")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of measurements")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured time of each")
    parser.add_argument("--warm-up", type=float, default=1.0)
    parser.add_argument("--settle", type=float, default=3.0, help="seconds for the index to come to rest")
    parser.add_argument("--seed", type=int, default=20_250_101)
    parser.add_argument("--json", action="store_true", help="a JSON object instead of the table")
    parser.add_argument("--serve-bare", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.serve_bare:
        sys.exit(serve_bare())
    notes = Console(stderr=True)
    notes.print(f"seed {args.seed}, {args.references:,} references of {args.dimension} dimensions")
    with tempfile.TemporaryDirectory() as folder:
        row = uvloop.run(measure(args, Path(folder), notes))
    print(json.dumps(row._asdict()) if args.json else markdown(row))


if __name__ == "__main__":
    main()
