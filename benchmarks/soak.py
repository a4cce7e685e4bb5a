"""Memory and open files of a service under hours of ordinary use: `python -m benchmarks.soak --help`.

Streams of probes open, go on for a while and close, every third by leaving without a word; meanwhile a clerk enrols
and withdraws. The memory that the process holds is sampled; its slope after a warm-up is a least-squares line. The
exit code is 1 if the slope or the open files exceed what is allowed, or if an answer was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvloop
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.galleries import Probes as Asked
from benchmarks.galleries import gallery, probes
from benchmarks.served import DEPLOYMENT, Service, enrol, prepare, service
from matcher_service.client import MatcherClient, Probes, ReceiptOutcome, References
from matcher_service.terms import Decision, Outcome, SpaceId

GALLERY = "watchlist"
SLOPE_MB_PER_MIN_MAX = 1.0
FILES_MORE_MAX = 16
MESSAGES_OF_A_STREAM = 40


class Sample(NamedTuple):
    """`at_s` since the load began; `probes` answered so far."""

    at_s: float
    resident_mb: float
    files: int
    threads: int
    probes: int


class Soak:
    """The load, and what became of it."""

    def __init__(self, served: Service, args: argparse.Namespace, stored: NDArray[np.float16], asked: Asked) -> None:
        self._served = served
        self._args = args
        self._stored = stored
        self._asked = asked
        self._space = SpaceId("soak", 1, args.dimension)
        self._ends = time.monotonic() + args.seconds
        self.outcomes: Counter[str] = Counter()
        self.wrong = 0
        self.enrolled = self.withdrawn = self.streams = 0

    @property
    def going(self) -> bool:
        return time.monotonic() < self._ends

    async def edge_node(self, number: int) -> None:
        """One stream after another."""
        args = self._args
        pause_s = args.message * args.streams / args.rate
        source = np.random.default_rng(args.seed + number)
        async with MatcherClient(self._served.grpc_address, self._served.token) as client:
            for turn in itertools.count():
                if not self.going:
                    return
                self.streams += 1
                leaves_after = int(source.integers(1, MESSAGES_OF_A_STREAM)) if turn % 3 == 2 else sys.maxsize
                sent: dict[str, int] = {}
                async with aclosing(client.identify_stream(self._messages(source, pause_s, sent))) as answers:
                    async for answer in answers:
                        decision = answer.decision
                        self.outcomes[decision.outcome.value] += 1
                        self.wrong += not is_right(decision, sent[decision.probe_id])
                        if len(sent) > leaves_after * args.message:
                            break

    async def _messages(
        self, source: np.random.Generator, pause_s: float, sent: dict[str, int]
    ) -> AsyncIterator[Probes]:
        for number in range(MESSAGES_OF_A_STREAM):
            if not self.going:
                return
            rows = source.integers(0, len(self._asked.vectors), self._args.message)
            names = [f"{number}-{at}" for at in range(len(rows))]
            sent.update(zip(names, self._asked.mates[rows].tolist(), strict=True))
            yield Probes(
                space=self._space,
                probe_ids=names,
                templates=self._asked.vectors[rows],
                captured_at_ms=[time.time_ns() // 1_000_000] * len(rows),
                deployment_id=DEPLOYMENT,
            )
            await asyncio.sleep(pause_s * float(source.uniform(0.5, 1.5)))

    async def clerk(self) -> None:
        """Enrols people who are nobody's mate, and withdraws them again."""
        source = np.random.default_rng(self._args.seed - 1)
        async with MatcherClient(self._served.grpc_address, self._served.token) as client:
            for turn in itertools.count():
                if not self.going:
                    return
                names = [f"guest{turn}-{at}" for at in range(10)]
                drawn = source.standard_normal((10, self._args.dimension)).astype(np.float32)

                async for receipt in client.enrol_stream(self._guests(names, drawn)):
                    self.enrolled += receipt.outcome is ReceiptOutcome.ENROLLED
                withdrawal = await client.withdraw(GALLERY, reference_ids=names, reason="end of the visit")
                self.withdrawn += len(withdrawal.reference_ids)
                await asyncio.sleep(self._args.clerk_s)

    async def _guests(self, names: list[str], drawn: NDArray[np.float32]) -> AsyncIterator[References]:
        yield References(
            gallery_id=GALLERY,
            space=self._space,
            reference_ids=names,
            subject_ids=names,
            templates=drawn / np.linalg.norm(drawn, axis=1, keepdims=True),
        )

    async def sampled(self, notes: Console) -> list[Sample]:
        found: list[Sample] = []
        began = time.monotonic()
        while self.going:
            found.append(sample(self._served, time.monotonic() - began, self.outcomes.total()))
            notes.print(
                f"{found[-1].at_s:6.0f} s  {found[-1].resident_mb:7.1f} MB  {found[-1].files} files  "
                f"{found[-1].probes:,} probes"
            )
            await asyncio.sleep(self._args.every_s)
        return found


def sample(served: Service, at_s: float, answered: int) -> Sample:
    process = Path(f"/proc/{served.process_id}")
    return Sample(
        at_s,
        served.resident_bytes() / 2**20,
        len(os.listdir(process / "fd")),
        len(os.listdir(process / "task")),
        answered,
    )


def is_right(decision: Decision, mate: int) -> bool:
    """`mate`: row of the only reference that may be found, -1 for none. A refusal is no wrong answer."""
    if decision.outcome not in (Outcome.ALERT, Outcome.NO_CANDIDATE):
        return True
    return [one.subject_id for one in decision.candidates] == ([f"r{mate}"] if mate >= 0 else [])


def slope_mb_per_min(samples: Sequence[Sample], warm_up_s: float) -> float:
    """Least-squares slope of the resident memory after `warm_up_s`; NaN for fewer than three samples."""
    later = [one for one in samples if one.at_s >= warm_up_s]
    if len(later) < 3:
        return float("nan")
    slope, _ = np.polyfit([one.at_s / 60 for one in later], [one.resident_mb for one in later], 1)
    return float(slope)


async def soak(args: argparse.Namespace, notes: Console) -> dict[str, Any]:
    stored = gallery("isotropic", args.references, args.dimension, args.seed)
    asked = probes(stored, "isotropic", 4096, args.threshold + 0.2, args.seed + 1, args.mated)
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as served:
        space = SpaceId("soak", 1, args.dimension)
        prepare(served, space, {GALLERY: args.threshold})
        await enrol(served, space, GALLERY, stored)
        load = Soak(served, args, stored, asked)
        async with asyncio.TaskGroup() as work:
            sampling = work.create_task(load.sampled(notes))
            work.create_task(load.clerk())
            for number in range(args.streams):
                work.create_task(load.edge_node(number))
    samples = sampling.result()
    later = [one for one in samples if one.at_s >= args.warm_up_s] or samples
    return {
        "minutes": args.seconds / 60,
        "probes": load.outcomes.total(),
        "outcomes": dict(load.outcomes),
        "wrong": load.wrong,
        "streams": load.streams,
        "enrolled": load.enrolled,
        "withdrawn": load.withdrawn,
        "resident_mb_first": samples[0].resident_mb,
        "resident_mb_after_warm_up": later[0].resident_mb,
        "resident_mb_last": later[-1].resident_mb,
        "slope_mb_per_min": slope_mb_per_min(samples, args.warm_up_s),
        "files_after_warm_up": later[0].files,
        "files_most": max(one.files for one in later),
        "threads_most": max(one.threads for one in later),
    }


def failed(row: dict[str, Any]) -> list[str]:
    """What exceeds what is allowed, in words."""
    more = row["files_most"] - row["files_after_warm_up"]
    said = []
    if row["slope_mb_per_min"] > SLOPE_MB_PER_MIN_MAX:
        said.append(f"memory grows by {row['slope_mb_per_min']:.2f} MB a minute")
    if more > FILES_MORE_MAX:
        said.append(f"{more} more files are open than after the warm-up")
    if row["wrong"]:
        said.append(f"{row['wrong']} answers were wrong")
    return said


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--warm-up-s", type=float, default=300.0, help="before it, memory may grow")
    parser.add_argument("--every-s", type=float, default=10.0, help="between samples")
    parser.add_argument("--rate", type=float, default=1000.0, help="probes/s in all")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--message", type=int, default=8, help="probes of a message")
    parser.add_argument("--clerk-s", type=float, default=0.5, help="between ten enrolments and their withdrawal")
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--mated", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=20_250_101)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    row = uvloop.run(soak(args, Console(stderr=True)))
    if args.json:
        print(json.dumps({name: None if value != value else value for name, value in row.items()}))
    else:
        for name, value in row.items():
            print(f"{name.replace('_', ' '):>28}  {f'{value:.2f}' if isinstance(value, float) else value}")
    if wrong := failed(row):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
