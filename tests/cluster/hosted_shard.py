"""Shards as a real Triton server hosts them, asked as a gateway asks, and a log in PostgreSQL that a test writes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from matcher_service.clock import SystemClock
from matcher_service.gallery import seal
from matcher_service.gallery.keys import Keyring
from matcher_service.gallery.log import SqlGalleryLog
from matcher_service.gallery.postgres import open_postgres_log
from matcher_service.models.repository import assemble
from matcher_service.partitions import ALL_PARTITIONS, Partitions, ranges
from matcher_service.settings import StorageSettings
from matcher_service.shards import exchange
from matcher_service.shards.exchange import ShardAnswer, ShardState
from matcher_service.terms import EntryKind, LogEntry, SearchRequest, SearchResult, ShardStatus
from matcher_service.triton_endpoints import Asking, ModelRefused, TritonAddress, TritonEndpoints
from tests.cluster.served_triton import ServedTriton
from tests.cluster.server_environment import ROOT, ServerEnvironment

LEASE_MS = 500.0
REACHED_S_MAX = 60.0


@contextmanager
def served_shards(
    environment: ServerEnvironment,
    folder: Path,
    log_url: str,
    keys_dir: Path,
    shards: Mapping[str, Partitions],
    settings: Mapping[str, str] | None = None,
    **options: str,
) -> Iterator[ServedTriton]:
    """One server with a model for each of `shards`; their volumes are folders of these names in `folder`/volumes.
    `settings` are more parameters of theirs, `options` are the server's, with underscores for its hyphens."""
    parameters = {
        name: {
            "partitions": ranges(partitions) or "none",
            "data_dir": str(folder / "volumes" / name),
            "keys_dir": str(keys_dir),
            "log_url": log_url,
            "threads": "1",
            "memory_bytes_max": str(10**9),
            **(settings or {}),
        }
        for name, partitions in shards.items()
    }
    made = assemble(ROOT / "triton_models", folder / "models", models=(), shards=parameters)
    told = {name.replace("_", "-"): value for name, value in options.items()}
    served = ServedTriton(environment, made, folder / "server.log", options=told)
    served.start()
    try:
        yield served
    finally:
        served.stop()


@asynccontextmanager
async def asked(served: ServedTriton) -> AsyncIterator[Asking]:
    """The way to a server, with as much time as a busy machine may need."""
    endpoints = TritonEndpoints(TritonAddress((served.grpc_endpoint,), 600.0, 60.0))
    try:
        yield endpoints.each(endpoints.deadline())[0]
    finally:
        await endpoints.close()


async def ask(asking: Asking, name: str, request: SearchRequest) -> ShardAnswer:
    try:
        found = await asking(name, exchange.request_tensors(request), exchange.OUTPUTS)
    except ModelRefused as refused:
        raise exchange.refusal_of(refused.message) from refused
    return exchange.answer_of(found, len(request.probes), len(request.gallery_ids))


async def state_of(asking: Asking, name: str, assign: Partitions | None = None) -> ShardState:
    found = await asking(name, exchange.status_tensors(assign), exchange.OUTPUTS)
    return exchange.answer_of(found, 0, 0).state


async def until_state(asking: Asking, name: str, holds: Callable[[ShardState], bool]) -> ShardState:
    """The first state for which it holds."""
    async with asyncio.timeout(REACHED_S_MAX):
        while not holds(state := await state_of(asking, name)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return state


def fresh(sequence: int, partitions: Partitions | None = None) -> Callable[[ShardState], bool]:
    """Whether a shard has applied so much, is within the lease and, if named, answers for exactly these partitions."""

    def it_is(state: ShardState) -> bool:
        age = state.caught_up_age_ms
        reached = state.sequence >= sequence and age is not None and age <= LEASE_MS
        return reached and (partitions is None or state.partitions == partitions)

    return it_is


async def open_log(log_url: str, keys_dir: Path) -> SqlGalleryLog:
    return await open_postgres_log(log_url, keys_dir, StorageSettings(), SystemClock())


class HostedShard:
    """A ReplayedShard whose entries a test chooses: they are put into the database's table as they are, and the shard
    that Triton hosts reads them there. It owns every partition."""

    def __init__(self, asking: Asking, name: str, log_url: str, keyring: Keyring) -> None:
        self._asking = asking
        self._name = name
        self._log_url = log_url
        self._keyring = keyring
        self._written = 0

    async def begin(self) -> None:
        """With a log that is empty again, which the shard notices by itself."""
        await asyncio.to_thread(self._empty)
        await until_state(self._asking, self._name, lambda state: state.sequence == 0 and fresh(0)(state))

    def _empty(self) -> None:
        with psycopg.connect(self._log_url, autocommit=True) as connection:
            connection.execute("TRUNCATE entry")

    async def apply(self, entries: Sequence[LogEntry]) -> None:
        fitting = [entry for entry in entries if entry.sequence > self._written]
        if fitting:
            await asyncio.to_thread(self._insert, fitting)
            self._written = fitting[-1].sequence
        await until_state(self._asking, self._name, fresh(self._written))

    def _insert(self, entries: Sequence[LogEntry]) -> None:
        with psycopg.connect(self._log_url) as connection, connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO entry (sequence, kind, at_ms, gallery_id, reference_id, subject_id, expires_at_ms, "
                "sealed, record) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
                [(*entry[:7], self._sealed(entry), entry.record) for entry in entries],
            )

    def _sealed(self, entry: LogEntry) -> bytes | None:
        if entry.kind is EntryKind.GALLERY_CREATED:
            self._keyring.create(entry.gallery_id)
        if entry.template is None:
            return None
        cipher = self._keyring.cipher(entry.gallery_id)
        assert cipher is not None
        names = seal.template_names(entry.gallery_id, entry.reference_id, entry.sequence)
        return seal.seal(cipher, seal.nonces(1)(), entry.template, names)

    async def search(self, request: SearchRequest) -> SearchResult:
        return (await ask(self._asking, self._name, request)).result

    async def status(self) -> ShardStatus:
        state = await state_of(self._asking, self._name)
        return ShardStatus(state.sequence, state.live, state.dead, state.bytes_in_memory, state.segments)

    async def close(self) -> None:
        """The server stays, for the next one."""


@dataclass(frozen=True)
class ServedShard:
    """A server with one shard, and what its log's entries are sealed with."""

    server: ServedTriton
    log_url: str
    keyring: Keyring

    def shard(self, asking: Asking) -> HostedShard:
        return HostedShard(asking, exchange.MODEL, self.log_url, self.keyring)


@contextmanager
def served_shard(environment: ServerEnvironment, folder: Path, log_url: str) -> Iterator[ServedShard]:
    """A shard that owns everything, over a log that has its tables and nothing in them."""
    keys_dir = folder / "keys"
    # In a thread, because the test that first asks for the server has an event loop running.
    with ThreadPoolExecutor(1) as aside:
        aside.submit(lambda: asyncio.run(_make_log(log_url, keys_dir))).result()
    with served_shards(environment, folder, log_url, keys_dir, {exchange.MODEL: ALL_PARTITIONS}) as server:
        yield ServedShard(server, log_url, Keyring.open(keys_dir))


async def _make_log(log_url: str, keys_dir: Path) -> None:
    await (await open_log(log_url, keys_dir)).close()
