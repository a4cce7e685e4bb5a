"""Latency against load, measured from when each message should have been sent: `python -m benchmarks.open_loop --help`.

Messages arrive at random at a constant mean rate (a Poisson process), whatever the service does; what the flow
control of a stream holds back waits here, and that wait counts. A run is invalid if the generator itself was late.
The rate is swept to find the knee: the highest rate at which nearly all is answered in time and p99 holds. Half of
it and twice it are then measured on their own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc.aio
import httpx
import numpy as np
import uvloop
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from benchmarks.closed_loop import STREAM_METHOD, bearer, clear_channel, over_grpc_streams, protobuf_request
from benchmarks.galleries import gallery, probes
from benchmarks.served import Service, enrol, pinned, prepare, service, two_cores
from matcher_service.terms import SpaceId
from matcher_service.wire import matcher_pb2 as pb

GALLERY = "watchlist"
SPACE_NAME = "bench"
LAG_MS_MAX = 1.0
IN_TIME_MIN = 0.98
# Before this, the generator sleeps; nearer to the time it turns in the loop, since timers are coarse.
_SPIN_S = 0.003
_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
_TEXT_WIDTH = 50


class Row(NamedTuple):
    """One rate. Rates are in probes/s, times in milliseconds from the intended sending.

    `goodput`: probes answered in full within the deadline while the load lasted, per second. `in_time`: the share of
    all probes that were answered in full within the deadline. `unsent`: messages that were given up before the stream
    took them. `refused`: probes that came back without an answer. `service_p50_ms` counts from the actual
    sending. `resident_mb`: growth of the service's memory, NaN if it is another's. `lag_max_ms`: the longest stall that
    the generator saw in itself. `stall_max_ms`: the longest time without any answer while some message waited for one;
    what exceeds `lag_max_ms` is the service's. `refusals_timed`: messages that admission refused, and `refused_soon`
    the share of them refused within 5 ms of their receipt, both by the service's own clock.
    """

    what: str
    offered: float
    goodput: float
    in_time: float
    sent: int
    unsent: int
    refused: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    service_p50_ms: float
    lag_p99_ms: float
    valid: bool
    resident_mb: float = float("nan")
    lag_max_ms: float = float("nan")
    stall_max_ms: float = float("nan")
    refusals_timed: int = 0
    refused_soon: float = float("nan")

    def kept_up(self, p99_ms_max: float) -> bool:
        return self.valid and self.in_time >= IN_TIME_MIN and self.p99_ms <= p99_ms_max


class Refusals(NamedTuple):
    """Messages that admission refused since the start, and how many of them within 5 ms of their receipt."""

    count: int
    soon: int

    @classmethod
    def of(cls, served: Service) -> Refusals:
        text = httpx.get(f"{served.http_address}/metrics").raise_for_status().text
        found = {
            (sample.name, sample.labels.get("le")): int(sample.value)
            for family in text_string_to_metric_families(text)
            if family.name == "matcher_refusal_seconds"
            for sample in family.samples
        }
        return cls(found["matcher_refusal_seconds_count", None], found["matcher_refusal_seconds_bucket", "0.005"])

    def since(self, before: Refusals) -> Refusals:
        return Refusals(self.count - before.count, self.soon - before.soon)


NO_REFUSALS = Refusals(0, 0)


@dataclass(slots=True)
class Tally:
    """What became of the messages of one run. Histograms hold microseconds, up to two minutes."""

    deadline_s: float
    ends: float = float("inf")
    arrived: int = 0
    answered: int = 0
    answered_meanwhile: int = 0
    refused: int = 0
    sent: int = 0
    unsent: int = 0
    last_reply_at: float = 0.0
    stall_max_s: float = 0.0
    from_intended: HdrHistogram = field(default_factory=lambda: HdrHistogram(1, 120_000_000, 3))
    from_sending: HdrHistogram = field(default_factory=lambda: HdrHistogram(1, 120_000_000, 3))
    lag: HdrHistogram = field(default_factory=lambda: HdrHistogram(1, 120_000_000, 3))

    def take(self, reply: pb.IdentifyReply, intended: float, sending: float, now: float) -> None:
        self.stall_max_s = max(self.stall_max_s, now - max(self.last_reply_at, sending))
        self.last_reply_at = now
        self.from_intended.record_value(max(1, round((now - intended) * 1e6)))
        self.from_sending.record_value(max(1, round((now - sending) * 1e6)))
        whole = sum(one.outcome in (pb.ALERT, pb.NO_CANDIDATE) for one in reply.decisions)
        self.refused += len(reply.decisions) - whole
        if now - intended <= self.deadline_s:
            self.answered += whole
            self.answered_meanwhile += whole if now <= self.ends else 0

    def row(
        self,
        what: str,
        rate: float,
        message: int,
        seconds: float,
        resident_bytes: float,
        refusals: Refusals = NO_REFUSALS,
    ) -> Row:
        def at(histogram: HdrHistogram, percent: float) -> float:
            return float(histogram.get_value_at_percentile(percent)) / 1000 if histogram.total_count else float("nan")

        lag = at(self.lag, 99)
        return Row(
            what,
            rate,
            self.answered_meanwhile / seconds,
            self.answered / max(1, self.arrived * message),
            self.sent,
            self.unsent,
            self.refused,
            at(self.from_intended, 50),
            at(self.from_intended, 90),
            at(self.from_intended, 99),
            at(self.from_intended, 99.9),
            at(self.from_intended, 100),
            at(self.from_sending, 50),
            lag,
            lag <= LAG_MS_MAX,
            resident_bytes / 2**20,
            at(self.lag, 100),
            self.stall_max_s * 1000,
            refusals.count,
            refusals.soon / refusals.count if refusals.count else float("nan"),
        )


class _Line:
    """One stream of an edge node: an outbox, a writer and a reader. The outbox holds the newest `outbox_max` messages,
    as a camera's does that falls behind; what is older is given up."""

    def __init__(self, call: Any, tally: Tally, outbox_max: int) -> None:
        self._call = call
        self._tally = tally
        self._outbox_max = outbox_max
        self._outbox: deque[tuple[float, bytes]] = deque()
        self._more = asyncio.Event()
        self._ended = False
        self._ids = itertools.count()
        self._unanswered: dict[str, tuple[float, float]] = {}

    def put(self, intended: float, body: bytes) -> None:
        if len(self._outbox) == self._outbox_max:
            self._outbox.popleft()
            self._tally.unsent += 1
        self._outbox.append((intended, body))
        self._more.set()

    def end(self) -> None:
        self._ended = True
        self._more.set()

    async def write(self) -> None:
        while True:
            while self._outbox:
                intended, body = self._outbox.popleft()
                now = time.monotonic()
                if now - intended > self._tally.deadline_s:
                    self._tally.unsent += 1
                    continue
                name = f"{next(self._ids):x}"
                self._unanswered[name] = (intended, now)
                self._tally.sent += 1
                # As the client of this service does: the deadline is what is left of it.
                left_ms = max(1, round((self._tally.deadline_s - (now - intended)) * 1000))
                # Repeating a field of protobuf replaces its value.
                own = pb.IdentifyRequest(message_id=name, deadline_ms=left_ms)
                await self._call.write(body + own.SerializeToString())
            if self._ended:
                await self._call.done_writing()
                return
            self._more.clear()
            await self._more.wait()

    async def read(self) -> None:
        while (data := await self._call.read()) is not grpc.aio.EOF:
            now = time.monotonic()
            reply = pb.IdentifyReply.FromString(data)
            intended, sending = self._unanswered.pop(reply.message_id)
            self._tally.take(reply, intended, sending, now)


async def _generate(lines: Sequence[_Line], bodies: Sequence[bytes], rate: float, seconds: float, tally: Tally,
                    source: np.random.Generator) -> None:  # fmt: skip
    """Hands messages to the lines at random moments of mean `rate` per second; `tally.lag` has how late it was."""
    begins = time.monotonic() + 0.05
    intended = begins
    tally.ends = begins + seconds
    for number in itertools.count():
        intended += source.exponential(1 / rate)
        if intended - begins > seconds:
            return
        # No event announces that time has passed.
        while (left := intended - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left - _SPIN_S if left > _SPIN_S else 0)
        tally.lag.record_value(max(1, round(-left * 1e6)))
        tally.arrived += 1
        lines[number % len(lines)].put(intended, bodies[number % len(bodies)])


async def run_at(
    served: Service, address: str, bodies: Sequence[bytes], args: argparse.Namespace, what: str, probes_rate: float,
    seconds: float,
) -> Row:  # fmt: skip
    """One run at a mean rate of probes/s over `args.streams` streams of as many connections."""
    tally = Tally(args.deadline_s)
    before, refused = served.resident_bytes() if served.process_id else float("nan"), Refusals.of(served)
    source = np.random.default_rng(args.seed)
    channels = [clear_channel(address) for _ in range(args.streams)]
    try:
        calls = [one.stream_stream(STREAM_METHOD)(metadata=bearer(served.token)) for one in channels]
        lines = [_Line(call, tally, args.outbox) for call in calls]
        async with asyncio.TaskGroup() as work:
            for line in lines:
                work.create_task(line.write())
                work.create_task(line.read())
            await _generate(lines, bodies, probes_rate / args.message, seconds, tally, source)
            for line in lines:
                line.end()
    finally:
        for channel in channels:
            await channel.close()
    after = served.resident_bytes() if served.process_id else float("nan")
    return tally.row(what, probes_rate, args.message, seconds, after - before, Refusals.of(served).since(refused))


async def capacity(served: Service, address: str, bodies: Sequence[bytes], args: argparse.Namespace) -> float:
    """Probes/s with the streams kept full; where the sweep takes its rates from."""
    seconds = min(args.seconds, 5.0)
    driven = await over_grpc_streams(
        address, served.token, bodies, seconds=seconds, streams=args.streams, window=12, warm_up_s=0.5
    )
    messages = len(driven.replies)
    return messages / seconds * float(args.message)


async def sweep(
    served: Service, address: str, bodies: Sequence[bytes], args: argparse.Namespace, notes: Console
) -> list[Row]:
    """The rates in rising order, then half the knee and twice the knee; an invalid run is tried again, and the last
    try is reported."""

    async def run(what: str, rate: float, seconds: float) -> Row:
        for _ in range(args.tries):
            row = await run_at(served, address, bodies, args, what, rate, seconds)
            notes.print(line_of(row))
            if row.valid:
                break
        return row

    rates = args.rates
    if not rates:
        full = await capacity(served, address, bodies, args)
        notes.print(f"{full:,.0f} probes/s with the streams kept full")
        rates = [round(full * fraction, -1) or 1.0 for fraction in _FRACTIONS]
    rows = []
    for rate in sorted(rates):
        rows.append(await run("sweep", rate, args.seconds))
    if (knee := knee_of(rows, args.p99_ms_max)) is not None:
        for what, rate in (("half the knee", knee / 2), ("twice the knee", knee * 2)):
            rows.append(await run(what, rate, args.hold_seconds or args.seconds))
    return rows


def knee_of(rows: Sequence[Row], p99_ms_max: float) -> float | None:
    """The highest swept rate of the unbroken run of rates, from the lowest on, that the service kept up with."""
    kept = [
        row.offered for row in itertools.takewhile(lambda row: row.kept_up(p99_ms_max), rows) if row.what == "sweep"
    ]
    return kept[-1] if kept else None


def line_of(row: Row) -> str:
    return (
        f"{row.what}: {row.offered:,.0f} probes/s offered, {row.goodput:,.0f} answered, p50 {row.p50_ms:.1f} ms, "
        f"p99 {row.p99_ms:.1f} ms{'' if row.valid else f', INVALID: the generator was {row.lag_p99_ms:.1f} ms late'}"
    )


def markdown(rows: Sequence[Row], p99_ms_max: float) -> str:
    """The table, what it says of the knee, and the plot in text."""
    lines = [
        "| run | offered, probes/s | answered in time, probes/s | share in time | unsent messages | refused probes "
        "| p50 ms | p90 ms | p99 ms | p99.9 ms | max ms | service p50 ms "
        "| longest silence ms | generator lag p99 ms | lag max ms | valid | memory, MB |",
        f"|---|{'--:|' * 14}---|--:|",
    ]
    for row in rows:
        times = " | ".join(
            f"{value:.2f}"
            for value in (
                row.p50_ms,
                row.p90_ms,
                row.p99_ms,
                row.p999_ms,
                row.max_ms,
                row.service_p50_ms,
                row.stall_max_ms,
                row.lag_p99_ms,
                row.lag_max_ms,
            )
        )
        memory = "" if row.resident_mb != row.resident_mb else f"{row.resident_mb:+.1f}"
        lines.append(
            f"| {row.what} | {row.offered:,.0f} | {row.goodput:,.0f} | {row.in_time:.1%} | {row.unsent} "
            f"| {row.refused} | {times} | {'yes' if row.valid else 'NO'} | {memory} |"
        )
    return "\n".join([*lines, "", *verdict(rows, p99_ms_max), "", "```", *text_plot(rows), "```"])


def verdict(rows: Sequence[Row], p99_ms_max: float) -> list[str]:
    knee = knee_of(rows, p99_ms_max)
    if knee is None:
        return ["No knee: not even the lowest rate was kept up with, or its run was invalid."]
    peak = max(row.goodput for row in rows)
    said = [f"Knee: {knee:,.0f} probes/s (98% answered in time, p99 at most {p99_ms_max:g} ms)."]
    for row in rows:
        if row.what == "half the knee":
            said.append(f"Half the knee: p99 is {row.p99_ms / row.service_p50_ms:.1f} times the median service time.")
        if row.what == "twice the knee":
            said.append(f"Twice the knee: goodput is {row.goodput / peak:.0%} of the peak, {peak:,.0f} probes/s.")
            if row.refusals_timed:
                said.append(
                    f"Of its {row.refusals_timed:,} refusals {row.refused_soon:.1%} came within 5 ms of receipt."
                )
    return said


def text_plot(rows: Sequence[Row]) -> list[str]:
    """p99 against the rate, one bar a line, on a logarithmic scale from 0.1 ms."""
    swept = [row for row in rows if row.what == "sweep" and row.p99_ms == row.p99_ms]
    most = max((row.p99_ms for row in swept), default=1.0)
    decades = max(1.0, np.log10(max(most, 0.2) / 0.1))
    return [
        f"{row.offered:>9,.0f}/s  {'#' * max(1, round(np.log10(max(row.p99_ms, 0.11) / 0.1) / decades * _TEXT_WIDTH))} "
        f"p99 {row.p99_ms:.1f} ms{'' if row.valid else '  (invalid)'}"
        for row in swept
    ]


def draw(rows: Sequence[Row], file: Path) -> None:
    """Latency against rate as PNG, invalid runs crossed out; needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    swept = [row for row in rows if row.what == "sweep" and row.p50_ms == row.p50_ms]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    rates = [row.offered for row in swept]
    for name, label in (("p50_ms", "p50"), ("p90_ms", "p90"), ("p99_ms", "p99"), ("p999_ms", "p99.9")):
        axes.plot(rates, [getattr(row, name) for row in swept], marker="o", label=label)
        crossed = [row for row in swept if not row.valid]
        axes.plot([row.offered for row in crossed], [getattr(row, name) for row in crossed], "kx", markersize=9)
    axes.set(xlabel="offered, probes/s", ylabel="ms from the intended sending", yscale="log", xlim=(0, None))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(StrMethodFormatter(""))
    axes.grid(visible=True, which="major", alpha=0.3)
    goodput = axes.twinx()
    goodput.plot(rates, [row.goodput for row in swept], linestyle="--", color="grey", label="answered in time")
    goodput.set(ylabel="answered in time, probes/s", ylim=(0, None))
    axes.legend(loc="upper left")
    goodput.legend(loc="lower right")
    figure.savefig(file, dpi=100)


def bodies_of(args: argparse.Namespace, templates: NDArray[np.float32]) -> list[bytes]:
    space = SpaceId(SPACE_NAME, 1, args.dimension)
    return [
        protobuf_request(
            space, templates[first : first + args.message], deadline_ms=max(1, round(args.deadline_s * 1000))
        )
        for first in range(0, len(templates), args.message)
    ]


@contextmanager
def target(args: argparse.Namespace, notes: Console) -> Iterator[tuple[Service, str]]:
    """The service to load: one of its own on a core of its own, or the one at --address, prepared beforehand by
    --prepare or as this benchmark does."""
    if args.address:
        http_port = args.http_port
        yield (
            Service(0, http_port, int(args.address.rsplit(":", 1)[1]), args.token_file.read_text().strip()),
            args.address,
        )
        return
    cores = two_cores()
    notes.print("server and client on a core each" if cores else "one core only: expect an invalid run")
    server_cores, client_cores = cores or (None, None)
    with (
        tempfile.TemporaryDirectory() as folder,
        service(Path(folder), cores=server_cores) as served,
        pinned(client_cores),
    ):
        yield served, served.grpc_address


async def measure(args: argparse.Namespace, notes: Console) -> list[Row]:
    stored = gallery("isotropic", args.references, args.dimension, args.seed)
    asked = probes(stored, "isotropic", 64 * args.message, args.threshold + 0.2, args.seed + 1, args.mated)
    with target(args, notes) as (served, address):
        if not args.address or args.prepare:
            space = SpaceId(SPACE_NAME, 1, args.dimension)
            prepare(served, space, {GALLERY: args.threshold})
            await enrol(served, space, GALLERY, stored)
            await asyncio.sleep(args.settle)
        return await sweep(served, address, bodies_of(args, asked.vectors), args, notes)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="host:port of gRPC, on loopback, of a running service; default: start one")
    parser.add_argument("--http-port", type=int, default=8080, help="of that service, for --prepare")
    parser.add_argument("--token-file", type=Path, help="the token of that service")
    parser.add_argument("--prepare", action="store_true", help="make space, gallery and deployment there first")
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--mated", type=float, default=0.0, help="share of the probes with a mate: each is an alert")
    parser.add_argument("--message", type=int, default=8, help="probes of a message")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--outbox", type=int, default=16, help="messages that wait for a stream; older are given up")
    parser.add_argument("--deadline-s", type=float, default=2.0)
    parser.add_argument("--rates", type=float, nargs="+", help="probes/s; default: fractions of what it takes at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each rate of the sweep")
    parser.add_argument("--hold-seconds", type=float, help="at half and twice the knee; default: as the sweep")
    parser.add_argument("--tries", type=int, default=3, help="of a run that turns out invalid")
    parser.add_argument("--p99-ms-max", type=float, default=100.0, help="what still counts as keeping up")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds for the index to come to rest")
    parser.add_argument("--seed", type=int, default=20_250_101)
    parser.add_argument("--png", type=Path, help="draw latency against rate into this file")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    args = parser.parse_args(arguments)
    if args.address and not args.token_file:
        parser.error("--address needs --token-file")
    return args


def main() -> None:
    args = parse()
    notes = Console(stderr=True)
    notes.print(f"seed {args.seed}")
    rows = uvloop.run(measure(args, notes))
    if args.json:
        for row in rows:
            print(json.dumps({name: None if value != value else value for name, value in row._asdict().items()}))
    else:
        print(markdown(rows, args.p99_ms_max))
    if args.png:
        draw(rows, args.png)
    if any(not row.valid for row in rows):
        sys.exit(f"a run is invalid: the generator's own lag exceeds {LAG_MS_MAX} ms at p99")


if __name__ == "__main__":
    main()
