"""The gallery shard on a real tritonserver, following a real PostgreSQL: equal answers however the partitions are
shared out, whatever happened to its volume, and never a wrong one while partitions change hands."""

from __future__ import annotations

import asyncio
import random
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import prometheus_client
import pytest

from matcher_service.clock import SystemClock
from matcher_service.errors import InvalidInput, MatcherError
from matcher_service.gallery.erasure_receipts import SqlErasureReceipts
from matcher_service.gallery.resealing import SqlKeyRotations
from matcher_service.merge import merge
from matcher_service.metrics import Metrics
from matcher_service.models.repository import assemble
from matcher_service.partitions import ALL_PARTITIONS, NO_PARTITIONS, Partitions, partition_of, share
from matcher_service.settings import IndexSettings
from matcher_service.shards.local import LocalShard
from matcher_service.shards.scattered import Scattered
from matcher_service.shards.triton import TritonReplica
from matcher_service.terms import (
    Actor,
    Cause,
    CreateGallery,
    Enrol,
    Gallery,
    GalleryKind,
    LogEntry,
    RegisterSpace,
    SearchRequest,
    SearchResult,
    SpaceId,
    TemplateSpace,
    Withdraw,
)
from matcher_service.triton_endpoints import TritonClients
from tests.cluster.fixtures import MODELS
from tests.cluster.hosted_shard import ask, asked, fresh, open_log, served_shards, state_of, until_state
from tests.cluster.served_postgres import ServedPostgres
from tests.cluster.served_triton import ServedTriton, ServerDied
from tests.cluster.server_environment import ServerEnvironment
from tests.cluster.test_server_values import numpy_2_before
from tests.log_writer import unit_rows
from tests.one_key import one_key

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CLERK = Actor("clerk")
SPACE = SpaceId("s", 1, 128)
GALLERIES = ("custody", "immigration")
SHARDS = ("a", "b", "c", "d")
ROWS = 6000


@dataclass
class World:
    """A log with references in two galleries. `templates` are the references' by name."""

    log_url: str
    keys_dir: Path
    rng: np.random.Generator
    templates: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    sequence: int = 0

    async def write(self, rows: int) -> None:
        """Enrol so many references, each of a subject of its own, and withdraw a tenth as many of those before."""
        log = await open_log(self.log_url, self.keys_dir)
        try:
            if not self.sequence:
                space = TemplateSpace(SPACE, np.zeros(SPACE.dimension, np.float32))
                galleries = [
                    Gallery(name, GalleryKind.CUSTODY, "c", "b", "p", 10**11, SPACE, 0.3) for name in GALLERIES
                ]
                await log.append([RegisterSpace(space), *map(CreateGallery, galleries)], CLERK)
            gone = self.rng.permutation(len(self.templates))[: rows // 10]
            names = list(self.templates)
            leaving = [names[place] for place in gone.tolist()]
            for name in leaving:
                del self.templates[name]
            await log.append([Withdraw(*name, "released") for name in leaving], CLERK)
            fresh_rows = unit_rows(self.rng, rows, SPACE.dimension).astype(np.float16)
            start = self.sequence
            wishes = []
            for number, row in enumerate(fresh_rows):
                name = (GALLERIES[number % 2], f"r{start + number}")
                self.templates[name] = row
                wishes.append(Enrol(*name, f"s{start + number}", row.tobytes()))
            for first in range(0, len(wishes), 4000):
                await log.append(wishes[first : first + 4000], CLERK)
            self.sequence = await log.head()
        finally:
            await log.close()

    async def entries(self) -> list[LogEntry]:
        log = await open_log(self.log_url, self.keys_dir)
        try:
            found: list[LogEntry] = []
            while some := await log.read(found[-1].sequence if found else 0, 4000):
                found += some
            return found
        finally:
            await log.close()

    def request(self, probes: int, floor: float = 0.35, rank_max: int = 10) -> SearchRequest:
        """Probes near to references of both galleries."""
        names = list(self.templates)
        chosen = self.rng.integers(0, len(names), probes)
        near = np.stack([self.templates[names[place]] for place in chosen.tolist()]).astype(np.float64)
        near += 0.1 * self.rng.standard_normal(near.shape)
        near /= np.linalg.norm(near, axis=1, keepdims=True)
        return SearchRequest(
            GALLERIES,
            np.ascontiguousarray(near, np.float32),
            np.full((probes, 2), floor, np.float32),
            np.full(probes, rank_max, np.int64),
            SystemClock().wall_ms(),
        )


@pytest.fixture(scope="module")
def world(postgres_server: ServedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One for all tests here: each leaves it as its `templates` say."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    folder = tmp_path_factory.mktemp("world")
    name = f"shards_{uuid.uuid4().hex}"
    made = World(postgres_server.create(name), folder / "keys", np.random.default_rng(seed))
    asyncio.run(made.write(ROWS))
    yield made
    postgres_server.drop(name)


@pytest.fixture
async def embedded(world: World, tmp_path: Path) -> AsyncIterator[LocalShard]:
    """The same references in one shard in this process."""
    shard = await LocalShard.open(
        tmp_path / "embedded",
        one_key(bytes(32)),
        IndexSettings(threads=1, memory_bytes_max=10**9),
        SystemClock(),
    )
    await shard.apply(await world.entries())
    yield shard
    await shard.close()


@pytest.fixture(scope="module")
def served(
    server_environment: ServerEnvironment, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedTriton]:
    """Four shards on one server; the first owns everything."""
    partitions = dict.fromkeys(SHARDS, NO_PARTITIONS) | {"a": ALL_PARTITIONS}
    folder = tmp_path_factory.mktemp("served")
    with served_shards(server_environment, folder, world.log_url, world.keys_dir, partitions) as server:
        yield server


def assert_equal(one: SearchResult, other: SearchResult) -> None:
    """To the bit of ids and 1e-5 of scores."""
    assert one.offsets.tolist() == other.offsets.tolist()
    assert one.gallery.tolist() == other.gallery.tolist()
    assert list(one.reference_ids) == list(other.reference_ids)
    assert list(one.subject_ids) == list(other.subject_ids)
    np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-5)


async def test_answers_are_equal_with_one_two_and_four_shards_before_and_after_re_assignment(
    served: ServedTriton, world: World, embedded: LocalShard
) -> None:
    """Law 2: batches of 1 to 1,024 probes, with floors and without, are answered as by one shard in this process."""
    async with asked(served) as asking:
        for count in (1, 2, 4, 1):
            for number, name in enumerate(SHARDS):
                await state_of(asking, name, share(number, count) if number < count else NO_PARTITIONS)
            for number, name in enumerate(SHARDS):
                owned = share(number, count) if number < count else NO_PARTITIONS
                await until_state(asking, name, fresh(world.sequence, owned))
            requests = [world.request(probes) for probes in (1, 32, 64, 256, 1024)]
            for request in (*requests, world.request(32, -np.inf)):
                answers = [await ask(asking, name, request) for name in SHARDS[:count]]
                assert frozenset().union(*(one.state.partitions for one in answers)) == ALL_PARTITIONS
                merged = merge([one.result for one in answers], request.gallery_ids, request.rank_max)
                assert_equal(merged, await embedded.search(request))
        state = await state_of(asking, "a")
        assert sum(state.live.values()) == len(world.templates)
        assert state.bytes_in_memory > len(world.templates) * SPACE.dimension * 2


async def test_partitions_change_hands_while_searches_and_enrolments_go_on(served: ServedTriton, world: World) -> None:
    """Law 4: whatever moment an answer is of, it is complete and right for the partitions that it claims."""
    plan = [(share(0, 2), share(1, 2)), (share(1, 2), share(0, 2))] * 2 + [(ALL_PARTITIONS, NO_PARTITIONS)]
    claims: set[Partitions] = set()
    done = asyncio.Event()

    def check(
        result: SearchResult, claimed: Partitions, request: SearchRequest, live: dict[tuple[str, str], np.ndarray]
    ):
        for probe, row in enumerate(request.probes):
            here = slice(*result.offsets[probe : probe + 2].tolist())
            found = {
                (GALLERIES[gallery], name)
                for gallery, name in zip(result.gallery[here], result.reference_ids[here], strict=True)
            }
            names = list(live)
            scores = np.stack([live[name] for name in names]).astype(np.float64) @ row.astype(np.float64)
            expected = {name for name, score in zip(names, scores, strict=True) if score >= 0.5}
            assert {one for one in expected if partition_of(*one) in claimed} <= found
            assert found <= expected

    async with asked(served) as asking:
        await until_state(asking, "a", fresh(world.sequence, ALL_PARTITIONS))

        async def search(name: str) -> None:
            while not done.is_set():
                request = world.request(8, 0.5, rank_max=1000)
                answer = await ask(asking, name, request)
                claims.add(answer.state.partitions)
                check(answer.result, answer.state.partitions, request, world.templates)

        async def reassign() -> None:
            for first, second in plan:
                await state_of(asking, "a", first)
                await state_of(asking, "b", second)
                await until_state(asking, "a", fresh(world.sequence, first))
                await until_state(asking, "b", fresh(world.sequence, second))
            done.set()

        async with asyncio.TaskGroup() as tasks:
            for one in (search("a"), search("b"), reassign()):
                tasks.create_task(one)
    assert {share(0, 2), share(1, 2)} <= claims


async def test_a_withdrawn_reference_is_gone_once_the_sequence_is_reached(served: ServedTriton, world: World) -> None:
    """Law 5: the sequence and the age in an answer are those of the view that was searched."""
    async with asked(served) as asking:
        for _ in range(10):
            name, row = next(iter(world.templates.items()))
            log = await open_log(world.log_url, world.keys_dir)
            await log.append([Withdraw(*name, "released")], CLERK)
            head = await log.head()
            await log.close()
            del world.templates[name]
            world.sequence = head
            probe = np.ascontiguousarray(row, np.float32)[None]
            request = SearchRequest(
                GALLERIES, probe, np.full((1, 2), 0.9, np.float32), np.array([10]), SystemClock().wall_ms()
            )
            async with asyncio.timeout(30):
                while True:
                    answer = await ask(asking, "a", request)
                    if answer.state.sequence >= head:
                        break
                    # Not yet: the lease must run out for an answer as old as this one.
                    assert answer.state.caught_up_age_ms is not None
            assert name[1] not in answer.result.reference_ids


async def test_a_shard_recovers_by_itself_on_an_empty_a_stale_and_a_corrupt_volume(
    server_environment: ServerEnvironment, world: World, tmp_path: Path
) -> None:
    """Killed, left behind, damaged, emptied: started again it answers as one that was never away, and until it knows
    the whole log no answer counts as fresh."""
    with served_shards(server_environment, tmp_path, world.log_url, world.keys_dir, {"a": ALL_PARTITIONS}) as server:
        async with asked(server) as asking:
            await until_state(asking, "a", fresh(world.sequence, ALL_PARTITIONS))
        # In order, so that the files are written and a start finds them.
        server.stop()
        files = {path.name for path in (tmp_path / "volumes").rglob("*.rows")}
        assert len(files) >= 2
        for harm in ("stale", "corrupt", "killed", "empty"):
            await world.write(500)
            if harm == "corrupt":
                for path in (tmp_path / "volumes").rglob("*.rows"):
                    content = bytearray(path.read_bytes())
                    content[len(content) // 2] ^= 1
                    path.write_bytes(content)
            elif harm == "empty":
                shutil.rmtree(tmp_path / "volumes")
            await asyncio.to_thread(server.start)
            async with asked(server) as asking:
                early = await state_of(asking, "a")
                assert early.sequence == world.sequence or not fresh(0)(early)
                await until_state(asking, "a", fresh(world.sequence, ALL_PARTITIONS))
                request = world.request(64)
                found = (await ask(asking, "a", request)).result
                names = list(world.templates)
                rows = np.stack([world.templates[name] for name in names]).astype(np.float64)
                scores = request.probes.astype(np.float64) @ rows.T
                for probe in range(64):
                    here = slice(*found.offsets[probe : probe + 2].tolist())
                    expected = {names[place][1] for place in np.flatnonzero(scores[probe] >= 0.35)}
                    assert set(found.reference_ids[here]) == expected, harm
            server.kill() if harm == "corrupt" else server.stop()


async def test_a_shards_files_are_sealed_anew_and_rid_of_who_was_withdrawn_and_it_is_on_record(
    server_environment: ServerEnvironment, postgres_server: ServedPostgres, tmp_path: Path
) -> None:
    """The gateway that records it knows of the shard only what the shard's state tells."""
    name = f"erased_{uuid.uuid4().hex}"
    world = World(postgres_server.create(name), tmp_path / "keys", np.random.default_rng(1))
    await world.write(300)
    clients = TritonClients()
    log = await open_log(world.log_url, world.keys_dir)
    try:
        # What has ended leaves memory and files within these hours: 4 s.
        with served_shards(
            server_environment,
            tmp_path,
            world.log_url,
            world.keys_dir,
            {"a": ALL_PARTITIONS},
            settings={"erase_within_h": "0.0011"},
        ) as server:
            replica = TritonReplica(f"{server.grpc_endpoint}/a", clients, SystemClock())
            metrics = Metrics(prometheus_client.CollectorRegistry())
            shard = Scattered([[replica]], SystemClock(), metrics, hedge_after_s=1, answer_within_s=5)
            async with asked(server) as asking:
                await until_state(asking, "a", fresh(world.sequence, ALL_PARTITIONS))
            rotations, receipts = SqlKeyRotations(log), SqlErasureReceipts(log)
            await rotations.rotate("custody", "a test", True, CLERK)
            while await rotations.reseal_some():
                pass
            (ended,) = await log.append([Withdraw("custody", "r0", "released")], CLERK)
            assert not isinstance(ended, MatcherError)
            # From a shard that cannot be asked nothing is concluded.
            down = Scattered(
                [[TritonReplica("127.0.0.1:1/a", clients, SystemClock())]], SystemClock(), metrics,
                hedge_after_s=1, answer_within_s=5,
            )  # fmt: skip
            assert await down.told_keys() == {"127.0.0.1:1/a": None}
            assert await rotations.retire(await down.told_keys(), SystemClock().wall_ms()) == []
            assert await down.told_erased() == {"127.0.0.1:1/a": -1}
            retired: Sequence[str] = []
            complete = 0
            async with asyncio.timeout(120):
                while not (complete and retired):
                    await log.erase(SystemClock().wall_ms())
                    await shard.look()
                    retired = retired or await rotations.retire(await shard.told_keys(), SystemClock().wall_ms())
                    complete += (await receipts.report(await shard.told_erased())).completed
                    await asyncio.sleep(0.1)
            assert retired == ["custody"]
            (receipt,) = await receipts.receipts("custody", "s0", 0, 10)
            stores = {one.store: one.at_ms for one in receipt.stores}
            assert stores[f"segments of {server.grpc_endpoint}/a"] is not None
            assert (stores["write_ahead_log"], stores["database"]) != (None, None)
            (record,) = [one for one in await log.audit(0, 10_000) if one["action"] == "erasure.complete"]
            assert str(record["facts"]).count(server.grpc_endpoint) == 1
            assert len(list((tmp_path / "keys" / "galleries").glob("*.2.key"))) == 1
            assert len(list((tmp_path / "keys" / "galleries").glob("*.key"))) == len(GALLERIES)
            # Started again it reads its files under the new key. An old connection would wait before it is made anew.
            await clients.close()
            server.stop()
            await asyncio.to_thread(server.start)
            async with asked(server) as asking:
                await until_state(asking, "a", fresh(await log.head(), ALL_PARTITIONS))
    finally:
        await clients.close()
        await log.close()
        postgres_server.drop(name)


async def test_a_shard_without_its_keys_or_its_log_says_so_and_serves_when_they_are_there(
    server_environment: ServerEnvironment, postgres_server: ServedPostgres, tmp_path: Path
) -> None:
    """The model is ready, the shard is not: it claims nothing and names the reason, and needs no hands later."""
    url = postgres_server.create(f"late_{tmp_path.name}")
    try:
        with served_shards(server_environment, tmp_path, url, tmp_path / "keys", {"a": ALL_PARTITIONS}) as server:
            async with asked(server) as asking:
                state = await until_state(asking, "a", lambda state: "keys" in state.refusal)
                assert (state.partitions, state.caught_up_age_ms) == (NO_PARTITIONS, None)
                request = SearchRequest(
                    ("g",), np.eye(2, 4, dtype=np.float32), np.zeros((2, 1), np.float32), np.ones(2, np.int64), 0
                )
                answer = await ask(asking, "a", request)
                assert answer.state.partitions == NO_PARTITIONS
                assert answer.result.offsets.tolist() == [0, 0, 0]
                log = await open_log(url, tmp_path / "keys")
                await log.append([RegisterSpace(TemplateSpace(SPACE, np.zeros(SPACE.dimension, np.float32)))], CLERK)
                await log.close()
                state = await until_state(asking, "a", fresh(1, ALL_PARTITIONS))
                assert state.refusal == ""
    finally:
        postgres_server.drop(f"late_{tmp_path.name}")


async def test_a_request_that_makes_no_sense_is_refused_with_its_cause(served: ServedTriton, world: World) -> None:
    """And the next one is answered."""
    async with asked(served) as asking:
        await until_state(asking, "a", fresh(world.sequence))
        probes = np.ones((2, SPACE.dimension - 1), np.float32)
        request = SearchRequest(GALLERIES, probes, np.zeros((2, 2), np.float32), np.ones(2, np.int64), 0)
        with pytest.raises(InvalidInput) as refused:
            await ask(asking, "a", request)
        assert refused.value.cause is Cause.WRONG_DIMENSION
        assert len((await ask(asking, "a", world.request(3))).result.scores) >= 3


@pytest.mark.parametrize("harm", ["numpy", "settings"])
def test_a_shard_that_cannot_be_right_does_not_load(
    server_environment: ServerEnvironment, tmp_path: Path, harm: str
) -> None:
    """With a numpy that harms tensors, or settings that make no sense, the server says so instead of serving."""
    parameters = {"data_dir": str(tmp_path / "a"), "keys_dir": str(tmp_path / "keys"), "log_url": "postgresql://h/n"}
    if harm == "settings":
        del parameters["keys_dir"]
    made = assemble(MODELS, tmp_path / "models", models=(), shards={"a": parameters})
    if harm == "numpy":
        numpy_2_before(tmp_path / "numpy2", made / "a/1/model.py")
    server = ServedTriton(server_environment, made, tmp_path / "server.log")
    with pytest.raises(ServerDied):
        server.start()
    log = server.log_file.read_text(errors="replace")
    assert ("tensors do not arrive as they were sent" if harm == "numpy" else "keys_dir: Field required") in log
