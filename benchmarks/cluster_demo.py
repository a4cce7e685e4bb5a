"""What a cluster does when it loses a server: `python -m benchmarks.cluster_demo --help`.

Real processes on this machine: PostgreSQL, two Triton servers with two shards each (one shard is on both), two
gateways. References go in, probes with known answers are streamed to both gateways, one Triton server is killed with
SIGKILL under way and started again later. What is printed is counted, probe by probe. It ends by itself and leaves
nothing running.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.served import Service, enrol, prepare, service
from matcher_service.client import MatcherClient, ProbeAnswer, Probes, References
from matcher_service.partitions import partition_of, share
from matcher_service.terms import Outcome, SpaceId
from tests.cluster.farm import Farm, farm
from tests.cluster.served_postgres import CannotServe as NoPostgres
from tests.cluster.served_triton import ServedTriton
from tests.cluster.server_environment import CannotServe
from tests.cluster.server_environment import prepare as server_environment

GALLERY = "people"
OPERATION = "demo"
THRESHOLD = 0.6
MATE_COSINE = 0.8
MESSAGE_PROBES = 16
WHOLE_S_MAX = 180.0
# People by the shard that holds them, and of it by the servers that do.
BOTH, FIRST, SECOND, NOBODY = "on both servers", "on server 1 alone", "on server 2 alone", "enrolled nowhere"
LAYOUT = {"shard_0": share(0, 2), "shard_1": share(2, 4), "shard_2": share(3, 4)}
SERVERS = (("shard_0", "shard_1"), ("shard_0", "shard_2"))
HELD = {BOTH: LAYOUT["shard_0"], FIRST: LAYOUT["shard_1"], SECOND: LAYOUT["shard_2"]}
PHASES = ("before", "server 2 dead", "server 2 back")


class People(NamedTuple):
    """`stored` float16 [n, d] as r0, r1, ...; `probes` float32 [m, d] with the reference that each must find ("": none)
    and where that is held."""

    stored: NDArray[np.float16]
    probes: NDArray[np.float32]
    mates: list[str]
    held: list[str]


class Phase(NamedTuple):
    """What came of the probes of one phase. `counts` by where the person is held and what the answer was."""

    name: str
    counts: dict[str, Counter[str]]
    missing: list[str]
    median_ms: float
    longest_ms: float


def people(references: int, probes: int, dimension: int, seed: int) -> People:
    rng = np.random.default_rng(seed)

    def unit(rows: NDArray[Any]) -> NDArray[np.float32]:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    stored = unit(rng.standard_normal((references, dimension), np.float32)).astype(np.float16)
    strangers = unit(rng.standard_normal((probes, dimension), np.float32))
    chosen = rng.choice(references, probes // 2, replace=False)
    mates = [f"r{row}" for row in chosen] + [""] * (probes - len(chosen))
    towards = stored[chosen].astype(np.float32)
    noise = strangers[: len(chosen)]
    noise = unit(noise - (noise * towards).sum(axis=1, keepdims=True) * towards)
    strangers[: len(chosen)] = MATE_COSINE * towards + np.sqrt(1 - MATE_COSINE**2) * noise
    order = rng.permutation(probes)
    mixed = [mates[row] for row in order]
    return People(stored, strangers[order], mixed, [where(one) for one in mixed])


def where(reference_id: str) -> str:
    if not reference_id:
        return NOBODY
    partition = partition_of(GALLERY, reference_id)
    return next(name for name, partitions in HELD.items() if partition in partitions)


def told(answer: ProbeAnswer, mate: str) -> str:
    """The answer in a word: "found", "wrong" (somebody else), or its outcome."""
    decision = answer.decision
    if decision.outcome is Outcome.ALERT:
        return "found" if decision.candidates[0].reference_id == mate else "wrong"
    return decision.outcome.value


async def stream(
    client: MatcherClient, space: SpaceId, crowd: People, rows: range, first: int = 0
) -> list[ProbeAnswer]:
    """Every probe of `rows` once, as an edge node sends them."""

    async def messages() -> AsyncIterator[Probes]:
        for begin in range(0, len(rows), MESSAGE_PROBES):
            some = list(rows[begin : begin + MESSAGE_PROBES])
            yield Probes(
                space=space,
                probe_ids=[str(row) for row in some],
                templates=crowd.probes[some],
                captured_at_ms=[time.time_ns() // 1_000_000] * len(some),
                deployment_id=OPERATION,
                deadline_s=10.0,
            )
            await asyncio.sleep(0.01)

    return [answer async for answer in client.identify_stream(messages())]


async def phase(name: str, clients: list[MatcherClient], space: SpaceId, crowd: People, during: Any = None) -> Phase:
    """The probes, shared out among the gateways; `during` runs once they flow."""
    count = len(crowd.probes)
    streams = [
        asyncio.create_task(stream(client, space, crowd, range(number, count, len(clients))))
        for number, client in enumerate(clients)
    ]
    if during is not None:
        await asyncio.sleep(0.05)
        await asyncio.to_thread(during)
    answers = [answer for one in streams for answer in await one]
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*HELD, NOBODY)}
    for answer in answers:
        row = int(answer.decision.probe_id)
        counts[crowd.held[row]][told(answer, crowd.mates[row])] += 1
    if len({answer.decision.probe_id for answer in answers}) != count or len(answers) != count:
        raise RuntimeError("a probe was not answered exactly once")
    elapsed = [answer.elapsed_s * 1000 for answer in answers]
    missing = sorted({part for answer in answers for part in answer.missing})
    return Phase(name, counts, missing, float(np.median(elapsed)), max(elapsed))


async def until_whole(client: MatcherClient, space: SpaceId, crowd: People, answers_needed: int) -> float:
    """Seconds until so many answers in a row have lacked nothing: after an import shards put in order what came in, and
    on one machine they are in each other's way meanwhile."""
    began, in_a_row = time.monotonic(), 0
    while time.monotonic() - began < WHOLE_S_MAX:
        answers = await stream(client, space, crowd, range(MESSAGE_PROBES))
        in_a_row = in_a_row + 1 if all(one.answered and not one.missing for one in answers) else 0
        if in_a_row == answers_needed:
            return time.monotonic() - began
        await asyncio.sleep(0.05)
    raise RuntimeError("the cluster did not become whole")


class Change(NamedTuple):
    """One write while a server is dead: what was done, how long its acknowledgement took, what was seen of it."""

    what: str
    seconds: float
    seen: str


async def withdraw(clients: list[MatcherClient], space: SpaceId, crowd: People, held: str) -> tuple[int, Change]:
    """Withdraw somebody through the first gateway, and at once search for them through the second."""
    row = next(row for row, one in enumerate(crowd.held) if one == held)
    began = time.monotonic()
    await clients[0].withdraw(GALLERY, reference_ids=[crowd.mates[row]], reason="the demonstration")
    seconds = time.monotonic() - began
    (answer,) = await stream(clients[1], space, crowd, range(row, row + 1))
    return row, Change(f"withdraw a person {held}", seconds, told(answer, crowd.mates[row]))


async def add(clients: list[MatcherClient], space: SpaceId, held: str, dimension: int) -> tuple[People, Change]:
    """Enrol a new person through the first gateway, and search for them through the second once it is applied."""
    number = next(number for number in range(10_000) if where(f"new{number}") == held)
    template = np.random.default_rng(number).standard_normal((1, dimension)).astype(np.float32)
    name = f"new{number}"
    began = time.monotonic()
    receipts = await clients[0].enrol(
        References(gallery_id=GALLERY, space=space, reference_ids=[name], subject_ids=[name], templates=template)
    )
    seconds = time.monotonic() - began
    fresh = People(template.astype(np.float16), template, [name], [held])
    seen = "INCOMPLETE"
    for _ in range(100):
        (answer,) = await stream(clients[1], space, fresh, range(1))
        if (seen := told(answer, name)) != Outcome.NO_CANDIDATE.value:
            break
        await asyncio.sleep(0.02)
    return fresh, Change(f"enrol a person {held} ({receipts[0].outcome.value})", seconds, seen)


async def show(args: argparse.Namespace, lost: ServedTriton, gateways: list[Service], notes: Console) -> dict[str, Any]:
    """`lost` is the server to be killed, and started again."""
    space = SpaceId("demo", 1, args.dimension)
    crowd = people(args.references, args.probes, args.dimension, args.seed)
    prepare(gateways[0], space, {GALLERY: THRESHOLD}, deployment_id=OPERATION)
    notes.print(f"Importing {args.references:,} references of {args.dimension} dimensions through gateway 1")
    began = time.monotonic()
    await enrol(gateways[0], space, GALLERY, crowd.stored, deployment_id=OPERATION)
    took = time.monotonic() - began
    notes.print(f"  {args.references / took:,.0f} references/s, until every shard has the last of them")
    async with AsyncExitStack() as closing:
        clients = [await closing.enter_async_context(MatcherClient(one.grpc_address, one.token)) for one in gateways]
        notes.print("Waiting until the shards have put in order what came in")
        for client in clients:
            await until_whole(client, space, crowd, args.calm)
        notes.print(f"Streaming {args.probes:,} probes to both gateways")
        phases = [await phase(PHASES[0], clients, space, crowd)]
        notes.print("The same again; Triton server 2 is killed with SIGKILL under way")
        crossing = await phase("while it dies", clients, space, crowd, lost.kill)
        notes.print("And once more without it")
        phases.append(await phase(PHASES[1], clients, space, crowd))
        withdrawn, change = await withdraw(clients, space, crowd, BOTH)
        newcomer, addition = await add(clients, space, SECOND, args.dimension)
        notes.print("Starting server 2 again, on the files that it left")
        began = time.monotonic()
        await asyncio.to_thread(lost.start)
        for client in clients:
            await until_whole(client, space, crowd, args.calm)
        recovery_s = time.monotonic() - began
        phases.append(await phase(PHASES[2], clients, space, crowd))
        (late,) = await stream(clients[1], space, newcomer, range(1))
        (gone,) = await stream(clients[0], space, crowd, range(withdrawn, withdrawn + 1))
    return {
        "references": args.references,
        "phases": [*phases[:1], crossing, *phases[1:]],
        "changes": [change, addition],
        "recovery_s": recovery_s,
        "newcomer": told(late, newcomer.mates[0]),
        "withdrawn": told(gone, crowd.mates[withdrawn]),
        "withdrawn_held": BOTH,
    }


def judged(found: dict[str, Any]) -> list[str]:
    """What went against the promises; empty if nothing did."""
    before, crossing, dead, back = found["phases"]
    wrong = []
    for one in found["phases"]:
        for held, counts in one.counts.items():
            if counts["wrong"] or counts["REJECTED"]:
                wrong.append(f"{one.name}: {held}: {dict(counts)}")
            if held != NOBODY and counts["NO_CANDIDATE"] > (one is back and held == found["withdrawn_held"]):
                wrong.append(f"{one.name}: somebody {held} was not found, and nothing was said to be missing")
    for held in (BOTH, FIRST):
        if dead.counts[held]["INCOMPLETE"] or crossing.counts[held]["INCOMPLETE"]:
            wrong.append(f"somebody {held} was not found because server 2 is dead")
    if not dead.missing or dead.counts[SECOND]["found"] or before.missing or back.missing:
        wrong.append(f"missing: before {before.missing}, dead {dead.missing}, back {back.missing}")
    if found["changes"][0].seen == "found" or found["withdrawn"] == "found":
        wrong.append("somebody who was withdrawn was found")
    if found["newcomer"] != "found":
        wrong.append("an acknowledged enrolment was lost")
    return wrong


def report(found: dict[str, Any], console: Console) -> None:
    table = Table(title="What became of the probes")
    table.add_column("people")
    for one in found["phases"]:
        table.add_column(one.name)
    for held in (*HELD, NOBODY):
        table.add_row(
            held,
            *(
                "\n".join(f"{count} {what}" for what, count in sorted(one.counts[held].items()))
                for one in found["phases"]
            ),
        )
    table.add_row("named as missing", *("\n".join(one.missing) or "nothing" for one in found["phases"]))
    table.add_row("median, longest", *(f"{one.median_ms:.0f}, {one.longest_ms:.0f} ms" for one in found["phases"]))
    console.print(table)
    console.print("While server 2 was dead:")
    for change in found["changes"]:
        console.print(
            f"  {change.what}: acknowledged after {change.seconds * 1000:.0f} ms; searched for: {change.seen}"
        )
    console.print(f"Both gateways answered in full for a while {found['recovery_s']:.1f} s after server 2 was started.")
    console.print(f"  The person enrolled meanwhile: {found['newcomer']}. The person withdrawn: {found['withdrawn']}.")
    console.print(
        "\nWhat changed: people held by server 2 alone could not be searched for. No probe was told otherwise: each "
        "that had no candidate was answered INCOMPLETE, with the partitions that were missing."
    )
    console.print(
        "What did not change: every probe was answered once; people held elsewhere were found, those of the shard on "
        "both servers too; enrolments and withdrawals were taken, and obeyed."
    )


@contextmanager
def cluster(notes: Console) -> Iterator[tuple[Farm, list[Service]]]:
    """Everything that runs, and nothing of it afterwards."""
    with ExitStack() as closing:
        notes.print("Starting PostgreSQL and two Triton servers with two shards each")
        made = closing.enter_context(
            # One thread each: all four shards have the cores of one machine between them.
            farm(server_environment(), [{name: LAYOUT[name] for name in names} for names in SERVERS], threads=1)
        )
        shards = [
            [made.replica(number, name) for number, names in enumerate(SERVERS) if name in names] for name in LAYOUT
        ]
        notes.print("Starting two gateways")
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="matcher-gateways-")))
        gateways = [
            closing.enter_context(
                service(
                    folder / f"gateway-{number}",
                    settings={
                        **made.environment(shards),
                        "MATCHER_LOG_LEVEL": "error",
                        "MATCHER_CLUSTER__ANSWER_WITHIN_MS": "1900",
                    },
                )
            )
            for number in (1, 2)
        ]
        yield made, gateways


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=200_000)
    parser.add_argument("--probes", type=int, default=2000)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--calm", type=int, default=40, help="answers in full in a row before probes are counted")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    notes = Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with cluster(notes) as (made, gateways):
            found = asyncio.run(show(args, made.servers[1], gateways, notes))
    except (CannotServe, NoPostgres) as reason:
        notes.print(f"there can be no cluster here: {reason}", markup=False)
        return 1
    except KeyboardInterrupt:
        notes.print("Interrupted; everything is stopped.")
        return 130
    wrong = judged(found)
    if args.json:
        plain = {**found, "phases": [one._asdict() for one in found["phases"]], "wrong": wrong}
        print(json.dumps({**plain, "changes": [one._asdict() for one in found["changes"]]}))
    else:
        report(found, Console())
    for one in wrong:
        notes.print(f"Against what is promised: {one}", markup=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
