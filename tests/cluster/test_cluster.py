"""A whole cluster on real servers: the answers of one process, whatever it is made of and whatever it loses.

PostgreSQL, three Triton servers and gateways. Two servers hold shard_0, one each shard_1 and shard_2; the third one
holds the same references cut in other ways.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from rich.console import Console

from benchmarks import cluster as benchmark
from benchmarks import cluster_demo
from benchmarks.served import service
from matcher_service.client import MatcherClient, ProbeAnswer, Probes, ReceiptOutcome, References
from matcher_service.errors import MatcherError
from matcher_service.partitions import ALL_PARTITIONS, NO_PARTITIONS, Partitions, parse, partition_of, ranges, share
from matcher_service.terms import (
    Actor,
    CreateDeployment,
    CreateGallery,
    Deployment,
    EndDeployment,
    Gallery,
    GalleryKind,
    Outcome,
    RegisterSpace,
    SpaceId,
    TemplateSpace,
)
from matcher_service.triton_endpoints import Asking
from tests.cluster.farm import Farm, farm
from tests.cluster.hosted_shard import asked as shards_of
from tests.cluster.hosted_shard import fresh, state_of, until_state
from tests.cluster.served_postgres import ServedPostgres
from tests.cluster.served_triton import ServedTriton
from tests.cluster.server_environment import ServerEnvironment
from tests.log_writer import unit_rows
from tests.running_service import DAY_MS, WholeService, whole_service
from tests.served_process import served

pytestmark = pytest.mark.cluster

SPACE = SpaceId("cluster", 1, 24)
ACTOR = Actor("test")
PATIENCE_S = 120
LOOK_EVERY_S = 0.5

SERVERS = (
    {"whole": ALL_PARTITIONS, "half_1": share(1, 2), "quarter_0": share(0, 4), "quarter_1": share(1, 4)},
    {"shard_0": share(0, 2), "shard_1": share(2, 4)},
    {"shard_0": share(0, 2), "shard_2": share(3, 4)},
)


@pytest.fixture(scope="module")
def cluster(server_environment: ServerEnvironment, postgres_server: ServedPostgres) -> Iterator[Farm]:
    """The session's PostgreSQL is asked for only so that a machine without one skips or fails with its reason."""
    with farm(server_environment, SERVERS) as made:
        yield made


def one_shard(made: Farm) -> list[list[str]]:
    return [[made.replica(0, "whole")]]


def two_shards(made: Farm) -> list[list[str]]:
    return [[made.replica(1, "shard_0")], [made.replica(0, "half_1")]]


def four_shards(made: Farm) -> list[list[str]]:
    return [
        [made.replica(0, "quarter_0")],
        [made.replica(0, "quarter_1")],
        [made.replica(1, "shard_1")],
        [made.replica(2, "shard_2")],
    ]


def with_a_pair(made: Farm) -> list[list[str]]:
    """Losing server 2 costs shard_2, but not shard_0."""
    return [
        [made.replica(2, "shard_0"), made.replica(1, "shard_0")],
        [made.replica(1, "shard_1")],
        [made.replica(2, "shard_2")],
    ]


def with_pairs(made: Farm) -> list[list[str]]:
    """Losing server 2 costs nothing."""
    return [[made.replica(2, "shard_0"), made.replica(1, "shard_0")], [made.replica(0, "half_1")]]


@asynccontextmanager
async def gateway(
    made: Farm, folder: Path, shards: Sequence[Sequence[str]], **changes: Any
) -> AsyncIterator[WholeService]:
    """A gateway in this process over these shards."""
    async with whole_service(folder, **(made.sections(shards) | changes)) as one:
        yield one


async def prepared(one: WholeService, *gallery_ids: str, threshold: float = 0.9) -> str:
    """Galleries of the test's own and a deployment over them, named like the first."""
    now = time.time_ns() // 1_000_000
    galleries = [
        Gallery(name, GalleryKind.CUSTODY, "c", "b", "p", 30 * DAY_MS, SPACE, threshold) for name in gallery_ids
    ]
    deployment = Deployment(gallery_ids[0], gallery_ids, now - 1000, now + DAY_MS, 600_000, "a", "b", "c", 100)
    writes = [
        RegisterSpace(TemplateSpace(SPACE, np.zeros(SPACE.dimension, np.float32))),
        *map(CreateGallery, galleries),
        CreateDeployment(deployment),
    ]
    answers = await one.running.service.log.append(writes, ACTOR)
    assert not [answer for answer in answers if isinstance(answer, MatcherError)]
    await until(lambda: deployment.deployment_id in one.running.service.catalogue.deployments)
    return deployment.deployment_id


async def until(true: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def someone(seed: int, count: int) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed), count, SPACE.dimension)


def named(gallery_id: str, count: int, partitions: frozenset[int] = ALL_PARTITIONS) -> list[str]:
    """Ids of references that all fall into these partitions."""
    found = (
        name for name in (f"r{number}" for number in range(100_000)) if partition_of(gallery_id, name) in partitions
    )
    return [next(found) for _ in range(count)]


async def enrolled(client: MatcherClient, gallery_id: str, ids: Sequence[str], rows: np.ndarray) -> int:
    """All of them acknowledged; the sequence of the last."""
    message = References(
        gallery_id=gallery_id, space=SPACE, reference_ids=ids, subject_ids=ids, templates=rows, deadline_s=PATIENCE_S
    )
    receipts = await client.enrol(message)
    assert {one.outcome for one in receipts} == {ReceiptOutcome.ENROLLED}, receipts[0]
    return max(one.sequence for one in receipts)


async def asked(client: MatcherClient, deployment_id: str, rows: np.ndarray, **more: Any) -> list[ProbeAnswer]:
    """The answers in the order of the rows."""

    async def messages() -> AsyncIterator[Probes]:
        for begin in range(0, len(rows), 16):
            some = rows[begin : begin + 16]
            yield Probes(
                space=SPACE,
                probe_ids=[str(begin + at) for at in range(len(some))],
                templates=some,
                captured_at_ms=[time.time_ns() // 1_000_000] * len(some),
                deployment_id=deployment_id,
                **({"rank_max": 20, "deadline_s": PATIENCE_S} | more),
            )

    answers = [answer async for answer in client.identify_stream(messages())]
    assert len(answers) == len(rows), "every probe gets exactly one answer (law 3)"
    return sorted(answers, key=lambda one: int(one.decision.probe_id))


def essence(answers: Sequence[ProbeAnswer]) -> list[Any]:
    return [
        (
            one.decision.outcome,
            one.missing,
            [(c.gallery_id, c.reference_id, c.subject_id, c.score) for c in one.decision.candidates],
        )
        for one in answers
    ]


async def complete(client: MatcherClient, deployment_id: str, rows: np.ndarray, **more: Any) -> list[ProbeAnswer]:
    """Answers that lack nothing, asked for until they do: on a machine that is busy with something else a shard may be
    late, and says so."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answers = await asked(client, deployment_id, rows, **more)
            if not any(answer.missing or answer.decision.outcome is Outcome.REJECTED for answer in answers):
                return answers
            await asyncio.sleep(0.05)


def missing(answer: ProbeAnswer) -> frozenset[int]:
    """The partitions that the answer names."""
    return frozenset().union(
        *(parse(part.partition(" ")[2]) for part in answer.missing if part.startswith("partition"))
    )


def found(answer: ProbeAnswer) -> str:
    return answer.decision.candidates[0].reference_id if answer.decision.candidates else answer.decision.outcome.value


# --- equal answers -----------------------------------------------------------------------------------


async def test_a_cluster_answers_as_one_process_does_whatever_it_is_made_of(cluster: Farm, tmp_path: Path) -> None:
    """Laws 1, 2 and 5: the same candidates with the same scores from SQLite and an index in process as from 1, 2, 3 and
    4 shards, and after the loss of a replica; with ties, doubles, replacements and withdrawals."""
    seed = 12
    print("seed", seed)
    rng = np.random.default_rng(seed)
    count = 1200
    rows = someone(seed, count)
    rows[rng.choice(count, 100)] = rows[rng.choice(count, 100)]
    subjects = [f"s{number}" for number in rng.integers(0, count // 2, count)]
    probes = np.concatenate([rows[:30] + 0.05 * someone(13, 30), someone(14, 18)]).astype(np.float32)

    async def fill(one: WholeService) -> int:
        await prepared(one, "equal-a", "equal-b", threshold=0.4)
        head = 0
        for gallery_id in ("equal-a", "equal-b"):
            ids = [f"{gallery_id}-{number}" for number in range(count)]
            about = {"gallery_id": gallery_id, "space": SPACE, "deadline_s": PATIENCE_S}
            await one.client.enrol(
                References(reference_ids=ids, subject_ids=subjects, templates=rows, **about)  # type: ignore[arg-type]
            )
            replaced = References(
                reference_ids=ids[:60], subject_ids=subjects[60:120], templates=rows[::-1][:60], replace=True, **about
            )  # type: ignore[arg-type]
            await one.client.enrol(replaced)
            head = (await one.client.withdraw(gallery_id, reference_ids=ids[30:90], reason="a test")).sequence
        return head

    async with whole_service(tmp_path / "embedded") as embedded:
        head = await fill(embedded)
        expected = essence(await asked(embedded.client, "equal-a", probes, min_sequence=head))
    assert sum(len(candidates) for _, _, candidates in expected) > 100
    ways = {"1": one_shard, "2": two_shards, "3": with_a_pair, "4": four_shards, "pairs": with_pairs}
    async with gateway(cluster, tmp_path / "first", one_shard(cluster)) as first:
        head = await fill(first)
    for name, way in ways.items():
        async with gateway(cluster, tmp_path / name, way(cluster)) as one:
            assert essence(await complete(one.client, "equal-a", probes, min_sequence=head)) == expected, name
            if name == "pairs":
                async with losing(cluster, 2):
                    await asyncio.to_thread(cluster.servers[2].kill)
                    for _ in range(3):
                        assert essence(await complete(one.client, "equal-a", probes, min_sequence=head)) == expected


async def test_partitions_that_move_change_no_answer_of_a_gateway(cluster: Farm, tmp_path: Path) -> None:
    """Laws 4 and 5: given to the new owner first, partitions move while probes stream and no answer is another one;
    taken first, what nobody holds is named until it is held again, and the rest is as it was."""
    moved, others = share(1, 4), share(1, 2)
    rows = someone(31, 600)
    ids = named("moving", len(rows))
    probes = np.concatenate([rows[:40] + 0.05 * someone(32, 40), someone(33, 8)]).astype(np.float32)
    shards = [[cluster.replica(0, name)] for name in ("quarter_0", "quarter_1", "half_1")]
    seen: list[ProbeAnswer] = []
    async with gateway(cluster, tmp_path, shards) as one, AsyncExitStack() as closing:
        deployment = await prepared(one, "moving", threshold=0.4)
        head = await enrolled(one.client, "moving", ids, rows)
        # More than any probe has, so that what is left is all that the others hold.
        more = {"min_sequence": head, "rank_max": 50}
        expected = essence(await complete(one.client, deployment, probes, **more))
        assert max(len(candidates) for _, _, candidates in expected) < 50
        held_by_moved = [
            any(partition_of(gallery_id, reference_id) in moved for gallery_id, reference_id, *_ in candidates)
            for _, _, candidates in expected
        ]
        assert True in held_by_moved
        assert False in held_by_moved

        def check(answers: Sequence[ProbeAnswer]) -> None:
            for answer, (_, _, candidates) in zip(answers, expected, strict=True):
                absent = missing(answer)
                found = essence([answer])[0][2]
                # Rows that a shard does not answer for any more may be found until it has let go of them.
                left = [c for c in candidates if c in found or partition_of(c[0], c[1]) not in absent]
                assert found == left
                without = Outcome.INCOMPLETE if absent else Outcome.NO_CANDIDATE
                assert answer.decision.outcome is (Outcome.ALERT if left else without)
            seen.extend(answers)

        asking = await closing.enter_async_context(shards_of(cluster.servers[0]))
        # The other tests find the shards as they were made.
        for name, partitions in (("quarter_1", moved), ("half_1", others)):
            closing.push_async_callback(assigned, asking, name, partitions, head)

        async def answered_during(work: Coroutine[Any, Any, None]) -> list[ProbeAnswer]:
            seen.clear()
            moving = asyncio.create_task(work)
            try:
                while not moving.done():
                    check(await asked(one.client, deployment, probes, **more))
                await moving
            finally:
                moving.cancel()
            check(await complete(one.client, deployment, probes, **more))
            return list(seen)

        given_first = await answered_during(commanded(cluster, shards, "move", ranges(moved), "--from=1", "--to=2"))
        assert sum(not answer.missing for answer in given_first) > len(probes)
        assert (await state_of(asking, "quarter_1")).partitions == NO_PARTITIONS
        await commanded(cluster, shards, "list")
        taken_first = await answered_during(in_order(asking, (("half_1", others), ("quarter_1", moved)), head))
        assert moved in {missing(answer) for answer in taken_first}


async def commanded(made: Farm, shards: Sequence[Sequence[str]], *arguments: str) -> None:
    """`matcher shards`, as an operator gives it with the settings of a gateway."""
    command = [sys.executable, "-m", "matcher_service", "shards", *arguments]
    environment = os.environ | made.environment(shards)
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


async def in_order(asking: Asking, steps: Sequence[tuple[str, Partitions]], sequence: int) -> None:
    for name, partitions in steps:
        await assigned(asking, name, partitions, sequence)


async def assigned(asking: Asking, name: str, partitions: Partitions, sequence: int) -> None:
    """Until the shard answers for exactly these."""
    await state_of(asking, name, partitions)
    await until_state(asking, name, fresh(sequence, partitions))


async def supervise(server: ServedTriton) -> None:
    """The rule of docs/SHARDS.md, by which whatever runs a server in earnest keeps it running: start it when it has
    ended, and anew when it has not been ready at three looks."""
    unready = 0
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        unready = 0 if not server.has_ended and await asyncio.to_thread(server.is_ready) else unready + 1
        if server.has_ended or unready == 3:
            starting = asyncio.create_task(asyncio.to_thread(again, server))
            try:
                await asyncio.shield(starting)
            finally:
                # Whoever ends the supervision finds the server as one start left it.
                await asyncio.wait([starting])
            unready = 0


def again(server: ServedTriton) -> None:
    server.kill()
    server.start()


@asynccontextmanager
async def losing(made: Farm, server: int) -> AsyncIterator[Callable[[], None]]:
    """Whatever the test does to the server, it is there afterwards, started anew. Meanwhile, once the test has let it
    go on (SIGCONT), it is supervised."""
    supervising: list[asyncio.Task[None]] = []
    it, before = made.servers[server], made.servers[server].pid

    def go_on() -> None:
        it.send(signal.SIGCONT)
        if not supervising:
            supervising.append(asyncio.create_task(supervise(it)))

    try:
        yield go_on
    finally:
        for task in supervising:
            task.cancel()
        await asyncio.gather(*supervising, return_exceptions=True)
        print(it.log_tail(20))
        if it.pid == before or it.has_ended or not await asyncio.to_thread(it.is_ready):
            await asyncio.to_thread(again, it)


async def test_models_on_triton_change_no_answer(cluster: Farm, served_models: ServedTriton, tmp_path: Path) -> None:
    """The gateway computes templates and rates itself, or has them computed: the same bits. It starts although one of
    the endpoints of models does not answer."""
    name = "models"
    ids, rows = named(name, 30), someone(15, 30)
    models = [free_endpoint(), served_models.grpc_endpoint]
    async with (
        gateway(cluster, tmp_path / "own", one_shard(cluster)) as own,
        whole_service(tmp_path / "triton", **cluster.sections(one_shard(cluster), models=models)) as other,
    ):
        await prepared(own, name)
        # Written to the log by hand, without the wait of an acknowledged change.
        await until(lambda: name in other.running.service.catalogue.galleries)
        head = await enrolled(other.client, name, ids, rows)
        expected = essence(await complete(own.client, name, rows, min_sequence=head))
        assert [candidates[0][1] for _, _, candidates in expected] == ids
        assert essence(await complete(other.client, name, rows, min_sequence=head)) == expected


def free_endpoint() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


# --- losing a Triton server ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_loss_of_a_server_is_said_and_costs_only_what_it_alone_held(
    cluster: Farm, tmp_path: Path, loss: signal.Signals
) -> None:
    """Laws 3, 4, 5 and 7, with searches and enrolments under way: every probe is answered once; whoever is not found
    although enrolled is said to be INCOMPLETE; what was acknowledged is found when the server is back."""
    name = f"loss-{loss.name}"
    ids = named(name, 240)
    rows = someone(20, 240)
    async with gateway(cluster, tmp_path, with_a_pair(cluster)) as one, losing(cluster, 2) as go_on:
        await prepared(one, name)
        head = await enrolled(one.client, name, ids[:120], rows[:120])
        before = await complete(one.client, name, rows[:120], min_sequence=head)
        assert [found(answer) for answer in before] == ids[:120]
        searching = asyncio.create_task(several(one.client, name, rows[:120], 6))
        enrolling = asyncio.create_task(each_enrolled(one.client, name, ids[120:], rows[120:]))
        await asyncio.sleep(0.1)
        cluster.servers[2].send(loss)
        for answers in await searching:
            for answer, name_of_mate in zip(answers, ids[:120], strict=True):
                if found(answer) != name_of_mate:
                    assert answer.decision.outcome is Outcome.INCOMPLETE
                    assert partition_of(name, name_of_mate) in missing(answer)
        acknowledged = await enrolling
        assert acknowledged == ids[120:], "enrolment needs no shard"
        async with asyncio.timeout(PATIENCE_S):
            told: set[tuple[str, ...]] = set()
            while told != {("partitions 192-255",)}:
                told = {answer.missing for answer in await asked(one.client, name, rows[:8])}
        if loss is signal.SIGKILL:
            await asyncio.to_thread(again, cluster.servers[2])
        else:
            go_on()
        after = await complete(one.client, name, rows)
        assert [found(answer) for answer in after] == ids


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["the process of its shard is killed", "it stands still for good"])
async def test_a_supervised_server_comes_back_without_hands_and_nothing_wrong_is_said_meanwhile(
    cluster: Farm, tmp_path: Path, loss: str
) -> None:
    """Law 4. Triton itself starts no model's process again, and cannot tell that it stands still: the shard's guard
    ends the server in the first case, and the rule of whatever keeps it running sees the second."""
    name = f"supervised-{loss.split()[0]}"
    ids, rows = named(name, 80), someone(25, 80)
    server = cluster.servers[2]
    async with gateway(cluster, tmp_path, with_a_pair(cluster)) as one, losing(cluster, 2):
        await prepared(one, name)
        head = await enrolled(one.client, name, ids, rows)
        assert [found(answer) for answer in await complete(one.client, name, rows, min_sequence=head)] == ids
        lost, processes = server.pid, psutil.Process(server.pid).children(recursive=True)
        supervising = asyncio.create_task(supervise(server))
        try:
            if loss == "it stands still for good":
                server.send(signal.SIGSTOP)
            else:
                (shard,) = (own for own in processes if own.ppid() == lost and "/shard_2/" in " ".join(own.cmdline()))
                shard.kill()
            lacking, whole = 0, False
            async with asyncio.timeout(PATIENCE_S):
                while server.pid == lost or not whole:
                    answers = await asked(one.client, name, rows)
                    for answer, mate in zip(answers, ids, strict=True):
                        if found(answer) != mate:
                            assert answer.decision.outcome is Outcome.INCOMPLETE
                            assert partition_of(name, mate) in missing(answer)
                            lacking += 1
                    whole = not any(answer.missing for answer in answers)
            assert lacking
        finally:
            supervising.cancel()
            await asyncio.gather(supervising, return_exceptions=True)
        assert not [left for left in processes if left.is_running() and left.status() != psutil.STATUS_ZOMBIE], (
            "guards and shards end with their server"
        )


async def several(client: MatcherClient, deployment_id: str, rows: np.ndarray, rounds: int) -> list[list[ProbeAnswer]]:
    return [await asked(client, deployment_id, rows) for _ in range(rounds)]


async def each_enrolled(client: MatcherClient, gallery_id: str, ids: Sequence[str], rows: np.ndarray) -> list[str]:
    """One message after another; the references that were acknowledged."""
    done = []
    for begin in range(0, len(ids), 10):
        await enrolled(client, gallery_id, ids[begin : begin + 10], rows[begin : begin + 10])
        done += ids[begin : begin + 10]
        await asyncio.sleep(0.01)
    return done


async def test_nobody_is_found_after_their_withdrawal_was_acknowledged(cluster: Farm, tmp_path: Path) -> None:
    """Law 5, with all replicas there, with one that stands still (SIGSTOP), and when it goes on: through another
    gateway than the one that acknowledged, at once, again and again."""
    name = "withdrawn"
    ids = named(name, 12)
    rows = someone(30, 12)
    # The replica that will stand still is all that this gateway has of its half, and is asked at once.
    alone = [[cluster.replica(2, "shard_0")], [cluster.replica(0, "half_1")]]
    async with (
        gateway(cluster, tmp_path / "a", with_a_pair(cluster)) as one,
        gateway(cluster, tmp_path / "b", alone) as other,
        losing(cluster, 2) as go_on,
    ):
        await prepared(one, name)
        head = await enrolled(one.client, name, ids, rows)
        assert [found(answer) for answer in await complete(other.client, name, rows, min_sequence=head)] == ids

        async def gone(row: int) -> None:
            for client in (other.client, one.client):
                (answer,) = await asked(client, name, rows[row : row + 1])
                assert found(answer) != ids[row], "found after its withdrawal was acknowledged"

        async def withdraw(row: int) -> None:
            await one.client.withdraw(name, reference_ids=[ids[row]], reason="a test")

        for row in range(4):
            await withdraw(row)
            await gone(row)
        for row in range(4, 8):
            await complete(other.client, name, rows[:1])
            # Searches are under way at the replica when it stops, and it still holds their answers when it goes on.
            under_way = asyncio.create_task(asked(other.client, name, rows, deadline_s=10.0))
            await asyncio.sleep(0.002 * row)
            cluster.servers[2].send(signal.SIGSTOP)
            await withdraw(row)
            later = [asyncio.create_task(gone(row)) for _ in range(5)]
            await asyncio.sleep(0.05)
            go_on()
            await asyncio.gather(*later)
            for _ in range(10):
                await gone(row)
            await under_way
        last = await complete(other.client, name, rows)
        assert [found(answer) for answer in last][8:] == ids[8:]
        assert not {found(answer) for answer in last} & set(ids[:8])


async def test_an_endpoint_that_accepts_and_never_answers_is_waited_for_no_longer_than_set(
    cluster: Farm, tmp_path: Path
) -> None:
    """As one replica of a shard it costs nothing but the hedge; as the only one its partitions are named as missing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        mute = f"127.0.0.1:{silent.getsockname()[1]}/shard_0"
        paired = [[mute, cluster.replica(1, "shard_0")], [cluster.replica(0, "half_1")]]
        alone = [[mute], [cluster.replica(0, "half_1")]]
        async with (
            gateway(cluster, tmp_path / "paired", paired) as one,
            gateway(cluster, tmp_path / "alone", alone) as other,
        ):
            await prepared(one, "mute")
            ids, rows = named("mute", 40), someone(40, 40)
            head = await enrolled(one.client, "mute", ids, rows)
            answers = await complete(one.client, "mute", rows, min_sequence=head)
            assert [found(answer) for answer in answers] == ids
            for answer, mate in zip(await asked(other.client, "mute", rows), ids, strict=True):
                assert missing(answer) >= share(0, 2)
                assert found(answer) == (
                    mate if partition_of("mute", mate) not in missing(answer) else Outcome.INCOMPLETE.value
                )


async def test_a_shard_far_behind_does_not_pass_for_one_that_has_what_is_required(
    cluster: Farm, tmp_path: Path
) -> None:
    """Law 5: with min_sequence set an answer is as of it at least, or says what is missing, or is a refusal."""
    name = "behind"
    behind = [[cluster.replica(2, "shard_0")], [cluster.replica(0, "half_1")]]
    async with (
        gateway(cluster, tmp_path / "pair", with_pairs(cluster)) as one,
        gateway(cluster, tmp_path / "alone", behind) as other,
        losing(cluster, 2) as go_on,
    ):
        await prepared(one, name)
        cluster.servers[2].send(signal.SIGSTOP)
        ids, rows = named(name, 3000, share(0, 2)), someone(50, 3000)
        head = await enrolled(one.client, name, ids, rows)
        probes, mates = rows[-20:], ids[-20:]
        assert [found(answer) for answer in await complete(one.client, name, probes, min_sequence=head)] == mates
        go_on()
        sure = 0
        async with asyncio.timeout(PATIENCE_S):
            while sure < 3:
                for answer in await asked(other.client, name, probes, min_sequence=head, deadline_s=1.0):
                    if answer.decision.outcome is Outcome.ALERT:
                        assert answer.sequence >= head
                        sure += 1
                    else:
                        assert answer.missing or answer.decision.outcome is Outcome.REJECTED
        answers = await complete(other.client, name, probes, min_sequence=head)
        assert [found(answer) for answer in answers] == mates


# --- losing PostgreSQL ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["SIGKILL", "SIGSTOP"])
async def test_without_its_log_a_cluster_says_nothing_that_it_cannot_know(
    cluster: Farm, tmp_path: Path, loss: str
) -> None:
    """Laws 1, 5 and 7: whoever was found before is then found, or said to be missing or refused; nothing that was
    acknowledged is lost; and all is well again by itself."""
    name = f"log-{loss}"
    ids, rows = named(name, 200), someone(60, 200)
    async with gateway(cluster, tmp_path, two_shards(cluster)) as one:
        await prepared(one, name)
        head = await enrolled(one.client, name, ids[:100], rows[:100])
        assert [found(answer) for answer in await complete(one.client, name, rows[:100], min_sequence=head)] == ids[
            :100
        ]
        acknowledged: list[str] = []
        enrolling = asyncio.create_task(those_acknowledged(one.client, name, ids[100:], rows[100:], acknowledged))
        searching = asyncio.create_task(several(one.client, name, rows[:20], 3))
        await asyncio.sleep(0.1)
        if loss == "SIGKILL":
            await asyncio.to_thread(cluster.postgres.kill)
        else:
            cluster.postgres.pause()
        try:
            await asyncio.sleep(1.0)
            for answer in await asked(one.client, name, rows[:20], deadline_s=2.0):
                assert answer.decision.outcome in (Outcome.REJECTED, Outcome.INCOMPLETE), answer
        finally:
            if loss == "SIGKILL":
                await asyncio.to_thread(cluster.postgres.start)
            else:
                cluster.postgres.resume()
        for answers in await searching:
            for answer, mate in zip(answers, ids[:20], strict=True):
                assert found(answer) == mate or answer.missing or answer.decision.cause, answer
        await enrolling
        await complete(one.client, name, someone(99, 1))
        await enrolled(one.client, name, ["afterwards"], someone(61, 1))
        held = {one.reference_id for one in await one.running.service.log.references(name, "", 1000)}
        assert {*ids[:100], *acknowledged, "afterwards"} <= held
        at = {mate: row for mate, row in zip(ids, rows, strict=True)}
        sure = [*ids[:100], *acknowledged]
        assert [
            found(answer) for answer in await asked(one.client, name, np.array([at[mate] for mate in sure]))
        ] == sure


async def those_acknowledged(
    client: MatcherClient, gallery_id: str, ids: Sequence[str], rows: np.ndarray, acknowledged: list[str]
) -> None:
    """Enrols in messages of ten, with a key each, as long as it takes; notes what has been acknowledged."""

    async def messages() -> AsyncIterator[References]:
        for begin in range(0, len(ids), 10):
            some = ids[begin : begin + 10]
            yield References(
                gallery_id=gallery_id,
                space=SPACE,
                reference_ids=some,
                subject_ids=some,
                templates=rows[begin : begin + 10],
                deadline_s=PATIENCE_S,
            )
            await asyncio.sleep(0.02)

    async for receipt in client.enrol_stream(messages()):
        if receipt.outcome in (ReceiptOutcome.ENROLLED, ReceiptOutcome.REPEATED):
            acknowledged.append(receipt.reference_id)


# --- losing a gateway ----------------------------------------------------------------------------------


async def test_what_a_killed_gateway_acknowledged_is_held_by_the_others(cluster: Farm, tmp_path: Path) -> None:
    """Law 5: SIGKILL during enrolment and searches; the other gateway goes on, and finds all that was acknowledged."""
    name = "gateway-kill"
    ids, rows = named(name, 400), someone(70, 400)
    environment = cluster.environment(two_shards(cluster))
    async with gateway(cluster, tmp_path / "kept", two_shards(cluster)) as kept:
        await prepared(kept, name)
        acknowledged: list[str] = []
        with served(tmp_path / "killed", tmp_path / "killed.log", **environment) as process:
            async with MatcherClient(f"127.0.0.1:{process.grpc_port}", process.token) as client:
                enrolling = asyncio.create_task(those_acknowledged(client, name, ids, rows, acknowledged))
                await until(lambda: len(acknowledged) > 50)
                searching = asyncio.create_task(several(kept.client, name, rows[:50], 4))
                process.kill()
                enrolling.cancel()
                await asyncio.gather(enrolling, return_exceptions=True)
            await searching
        head = await enrolled(kept.client, name, ["afterwards"], someone(71, 1))
        at = {mate: row for mate, row in zip(ids, rows, strict=True)}
        answers = await complete(kept.client, name, np.array([at[mate] for mate in acknowledged]), min_sequence=head)
        assert [found(answer) for answer in answers] == acknowledged


async def test_a_gateway_that_stood_still_does_not_act_on_an_authority_that_ended(
    cluster: Farm, tmp_path: Path
) -> None:
    """Laws 5 and 11: SIGSTOP of one gateway; the deployment ends through the other; when the first goes on, a probe
    that reached it meanwhile is refused."""
    name = "gateway-stop"
    rows = someone(80, 1)
    environment = cluster.environment(two_shards(cluster))
    async with gateway(cluster, tmp_path / "other", two_shards(cluster)) as other:
        await prepared(other, name)
        head = await enrolled(other.client, name, ["someone"], rows)
        with served(tmp_path / "still", tmp_path / "still.log", **environment) as process:
            async with MatcherClient(f"127.0.0.1:{process.grpc_port}", process.token) as client:
                (answer,) = await complete(client, name, rows, min_sequence=head)
                assert found(answer) == "someone"
                process.process.send_signal(signal.SIGSTOP)
                waiting = [asyncio.create_task(asked(client, name, rows)) for _ in range(3)]
                await asyncio.sleep(0.1)
                await other.running.service.change(EndDeployment(name), ACTOR)
                process.process.send_signal(signal.SIGCONT)
                for answers in await asyncio.gather(*waiting):
                    assert answers[0].decision.outcome is Outcome.REJECTED, answers[0]
            assert process.terminate() == 0


async def test_gateways_share_ports_on_one_machine_and_each_has_its_metrics(cluster: Farm, tmp_path: Path) -> None:
    """When one of them is killed, the port is answered all the same."""
    name = "shared"
    http_port, grpc_port, *metrics_ports = free_ports(4)
    environment = {
        **cluster.environment(one_shard(cluster)),
        "MATCHER_SERVER__SHARE_PORTS": "true",
        "MATCHER_SERVER__HTTP_PORT": str(http_port),
        "MATCHER_SERVER__GRPC_PORT": str(grpc_port),
    }
    for number in range(2):
        folder = tmp_path / f"g{number}"
        folder.mkdir(mode=0o700)
        (folder / "token").touch(0o600)
        (folder / "token").write_text("t" * 43)
    async with gateway(cluster, tmp_path / "setup", one_shard(cluster)) as setup:
        await prepared(setup, name)
        head = await enrolled(setup.client, name, ["someone"], someone(90, 1))
    with (
        served(tmp_path / "g0", tmp_path / "g0.log", **environment, MATCHER_SERVER__METRICS_PORT=str(metrics_ports[0])),
        served(
            tmp_path / "g1", tmp_path / "g1.log", **environment, MATCHER_SERVER__METRICS_PORT=str(metrics_ports[1])
        ) as second,
    ):
        for _ in range(8):
            # A client of its own each time: the kernel gives connections to either process.
            async with MatcherClient(f"127.0.0.1:{grpc_port}", "t" * 43) as client:
                (answer,) = await complete(client, name, someone(90, 1), min_sequence=head)
                assert found(answer) == "someone"
        async with httpx.AsyncClient() as http:
            texts = [(await http.get(f"http://127.0.0.1:{port}/metrics")).text for port in metrics_ports]
            assert all("matcher_partitions_missing 0.0" in text for text in texts)
            second.kill()
            async with MatcherClient(f"127.0.0.1:{grpc_port}", "t" * 43) as client:
                (answer,) = await complete(client, name, someone(90, 1), min_sequence=head)
                assert found(answer) == "someone"
            assert (await http.get(f"http://127.0.0.1:{http_port}/readyz")).status_code == 200


def free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


# --- the demonstration and the benchmark, short ----------------------------------------------------------


async def test_the_demonstration_counts_what_a_lost_server_changes(cluster: Farm, tmp_path: Path) -> None:
    """Nothing went against the promises, and every probe is in its tables."""
    args = cluster_demo.parse(["--references", "2000", "--probes", "200", "--calm", "3"])
    settings = {**cluster.environment(with_a_pair(cluster)), "MATCHER_LOG_LEVEL": "error"}
    with ExitStack() as closing:
        gateways = [closing.enter_context(service(tmp_path / name, settings=settings)) for name in "ab"]
        seen = await cluster_demo.show(args, cluster.servers[2], gateways, Console(quiet=True))
    assert cluster_demo.judged(seen) == []
    for phase in seen["phases"]:
        assert sum(count for counts in phase.counts.values() for count in counts.values()) == 200
    printed = io.StringIO()
    cluster_demo.report(seen, Console(file=printed, width=120))
    assert "partitions 192-255" in printed.getvalue()


async def test_the_benchmark_measures_only_what_agrees(cluster: Farm, tmp_path: Path) -> None:
    args = benchmark.parse(
        [
            "--references",
            "800",
            "--dimension",
            "32",
            "--batch",
            "8",
            "--rounds",
            "1",
            "--seconds",
            "0.3",
            "--settle",
            "0",
        ]
    )
    (row,) = await benchmark.measure(args, cluster, "whole", tmp_path, Console(quiet=True))
    assert row.ratio == pytest.approx(row.probes_per_second / row.engine_probes_per_second)
    assert tuple(row.stations_ms) == benchmark.STATIONS
    assert set(row.cpu_ms) == {"client", "gateway", "triton", "shard", "engine"}
    assert "ratio" in benchmark.markdown([row])
