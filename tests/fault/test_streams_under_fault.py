"""Callers who misbehave, leave at any station, or whose clock jumps: Law 3, each probe has one answer and every permit
comes back, for everybody else as well."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from numpy.typing import NDArray

from matcher_service.client import MatcherClient, ProbeAnswer, Probes
from matcher_service.gallery.log import SqlGalleryLog
from matcher_service.models.local import LocalModels
from matcher_service.replay import Replay
from matcher_service.shards.local import LocalShard
from matcher_service.terms import Outcome, ProbeMessage, SpaceId
from matcher_service.wire import matcher_pb2 as pb
from tests.fake_clock import SteppedClock
from tests.running_service import WholeService, whole_service

SEED = 7
DIMENSION = 32
STREAM = "/matcher.v1.Matcher/IdentifyStream"
HOUR_MS = 3_600_000


def faces(count: int) -> NDArray[np.float32]:
    print("seed", SEED)
    drawn = np.random.default_rng(SEED).standard_normal((count, DIMENSION), dtype=np.float32)
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), dtype=np.float32)


@contextlib.asynccontextmanager
async def watchlist(
    data_dir: Path, clock: SteppedClock | None = None, **sections: dict[str, Any]
) -> AsyncIterator[tuple[WholeService, SpaceId, NDArray[np.float32]]]:
    """A service with 20 references under a deployment, and their templates."""
    async with whole_service(data_dir, clock, **sections) as service:
        space, stored = await service.space(DIMENSION), faces(20)
        await service.gallery("g", space)
        await service.deployment("g")
        await service.enrol("g", space, stored, [f"r{row}" for row in range(20)])
        yield service, space, stored


def message(space: SpaceId, templates: NDArray[np.float32], **more: Any) -> pb.IdentifyRequest:
    return pb.IdentifyRequest(
        space=pb.TemplateSpace(name=space.name, version=space.version, dimension=space.dimension),
        dtype=pb.FLOAT32,
        templates=templates.tobytes(),
        probe_ids=[f"p{row}" for row in range(len(templates))],
        captured_at_ms=[time.time_ns() // 1_000_000] * len(templates),
        deployment_id="op",
        deadline_ms=20_000,
        **more,
    )


async def until(so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def value(service: WholeService, name: str, **labels: str) -> float:
    return service.running.service.metrics.registry.get_sample_value(name, labels) or 0.0


def messages_answered(service: WholeService) -> float:
    return value(service, "matcher_requests_total", transport="grpc", verb="identify_stream", result="ok")


def at_rest(service: WholeService) -> bool:
    permits = value(service, "matcher_permits_in_use", flow="identify")
    return permits == 0 and value(service, "matcher_queue_probes") == 0 and value(service, "matcher_streams_open") == 0


# Those of other tests, which a failure's traceback may hold.
_held_before: set[int] = set()


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """The collector looks when it is asked: what waits for it is seen."""
    gc.collect()
    _held_before.clear()
    _held_before.update(map(id, messages_held()))
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def messages_held() -> list[object]:
    """The messages of probes that are in memory since this test began, each with its templates."""
    return [one for one in gc.get_objects() if isinstance(one, ProbeMessage) and id(one) not in _held_before]


def none_is_held() -> bool:
    """Whether the messages are gone, with the next sweep at the latest."""
    if not messages_held():
        return True
    gc.collect()
    return not messages_held()


async def answered_well(service: WholeService, space: SpaceId, stored: NDArray[np.float32]) -> None:
    answers = await service.ask(space, stored)
    found = [answers[f"p{row}"].decision.candidates[0].reference_id for row in range(len(stored))]
    assert found == [f"r{row}" for row in range(len(stored))]


def channel_to(service: WholeService) -> grpc.aio.Channel:
    """A connection of its own."""
    return grpc.aio.insecure_channel(
        f"127.0.0.1:{service.running.grpc_port}", options=[("grpc.use_local_subchannel_pool", 1)]
    )


def stream_of(service: WholeService, channel: grpc.aio.Channel) -> Any:
    call = channel.stream_stream(STREAM, pb.IdentifyRequest.SerializeToString, pb.IdentifyReply.FromString)
    return call(metadata=(("authorization", f"Bearer {service.running.token}"),))


async def test_law_3_a_caller_who_reads_nothing_holds_up_nobody_and_his_permits_come_back(tmp_path: Path) -> None:
    async with (
        watchlist(tmp_path, limits={"stream_messages_in_flight_max": 4}) as (service, space, stored),
        channel_to(service) as channel,
    ):
        stream = stream_of(service, channel)
        # Mates: each answer is long, so that unread ones soon fill what lies between.
        many = message(space, np.repeat(stored, 10, axis=0), rank_max=20)

        async def send() -> None:
            while True:
                await stream.write(many)

        sending = asyncio.create_task(send())
        # At some point all that lies between is full of answers, and the service takes no more: this many messages
        # have been answered since, besides one by each of our own rounds.
        before, taken, own = -1.0, 0.0, 0
        while taken != before:
            assert taken < 2000, "the service goes on taking in where nobody reads the answers"
            before = taken
            for _ in range(5):
                await answered_well(service, space, stored)
            own += 5
            taken = (
                value(service, "matcher_requests_total", transport="grpc", verb="identify_stream", result="ok") - own
            )
        # What he sent beyond those that may be under way waits in the transport, which holds him up.
        assert len(messages_held()) <= 4
        sending.cancel()
        await asyncio.wait((sending,))
        stream.cancel()
        await channel.close()
        await until(lambda: at_rest(service) and none_is_held())
        await answered_well(service, space, stored)


async def test_law_3_a_flood_of_tiny_messages_is_answered_one_by_one(tmp_path: Path) -> None:
    async with watchlist(tmp_path) as (service, space, stored):
        asked = np.tile(stored, (50, 1))
        answers = await service.ask(space, asked, size=1)
        assert len(answers) == len(asked)
        assert all(one.decision.outcome is Outcome.ALERT for one in answers.values())
        await until(lambda: at_rest(service) and none_is_held())


async def test_a_message_as_large_as_allowed_is_answered_and_one_larger_ends_only_its_own_call(tmp_path: Path) -> None:
    async with watchlist(tmp_path) as (service, space, stored):
        largest = service.running.service.settings.limits.probes_per_message_max
        reply = await service.client.identify(
            Probes(
                space=space,
                probe_ids=[f"p{row}" for row in range(largest)],
                templates=np.resize(stored, (largest, DIMENSION)),
                captured_at_ms=[time.time_ns() // 1_000_000] * largest,
                deployment_id="op",
            )
        )
        assert len(reply.decisions) == largest
        async with channel_to(service) as channel:
            stream = stream_of(service, channel)
            await stream.write(message(space, stored, message_id="x" * (64 << 20)))
            with pytest.raises(grpc.aio.AioRpcError):
                await stream.read()
        await until(lambda: at_rest(service) and none_is_held())
        await answered_well(service, space, stored)


async def test_a_thousand_idle_connections_cost_nobody_an_answer_and_leave_nothing(tmp_path: Path) -> None:
    async with watchlist(tmp_path) as (service, space, stored):
        files_before = len(os.listdir("/proc/self/fd"))
        opened = []
        for number in range(1000):
            port = service.running.http_port if number % 2 else service.running.grpc_port
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if number % 2 == 0:
                # The preface of HTTP/2 and empty settings: a peer that says hello and nothing more.
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            opened.append((reader, writer))
        await answered_well(service, space, stored)
        for _, writer in opened:
            writer.close()
        for _, writer in opened:
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        await until(lambda: len(os.listdir("/proc/self/fd")) <= files_before + 20)
        await answered_well(service, space, stored)


async def test_law_3_two_hundred_streams_at_once_each_get_all_their_answers(tmp_path: Path) -> None:
    permits = {"probes_in_flight_max": 20_000, "probes_in_flight_per_credential_max": 20_000}
    async with (
        watchlist(tmp_path, admission=permits) as (service, space, stored),
        channel_to(service) as one,
        channel_to(service) as two,
    ):

        async def talk(number: int) -> int:
            stream = stream_of(service, two if number % 2 else one)
            for at in range(3):
                await stream.write(message(space, stored, message_id=f"{at}"))
            await stream.done_writing()
            found = 0
            while (reply := await stream.read()) is not grpc.aio.EOF:
                found += sum(decision.outcome == pb.ALERT for decision in reply.decisions)
            return found

        assert await asyncio.gather(*(talk(number) for number in range(200))) == [3 * len(stored)] * 200
        await until(lambda: at_rest(service) and none_is_held())


STATIONS: list[tuple[type, str]] = [
    (Replay, "reached"),
    (LocalModels, "adapt"),
    (LocalShard, "search"),
    (LocalModels, "false_match_rates"),
    (SqlGalleryLog, "record"),
]


@pytest.mark.parametrize("how", ["cancelled", "connection lost"])
@pytest.mark.parametrize(("station", "method"), STATIONS, ids=[f"{kind.__name__}.{name}" for kind, name in STATIONS])
async def test_law_3_a_caller_who_leaves_at_any_station_gives_his_permits_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, station: type, method: str, how: str
) -> None:
    async with watchlist(tmp_path) as (service, space, stored):
        real: Callable[..., Awaitable[Any]] = getattr(station, method)
        let_go, waiting = asyncio.Event(), 0

        async def held_up(*args: Any, **more: Any) -> Any:
            nonlocal waiting
            waiting += 1
            await let_go.wait()
            return await real(*args, **more)

        monkeypatch.setattr(station, method, held_up)
        channel = channel_to(service)
        stream = stream_of(service, channel)
        await stream.write(message(space, stored))
        await until(lambda: waiting > 0)
        # One more behind it, which waits for a searcher or for the same station.
        await stream.write(message(space, stored))
        assert value(service, "matcher_permits_in_use", flow="identify") > 0
        assert messages_held()
        if how == "cancelled":
            stream.cancel()
        await channel.close()
        await until(lambda: value(service, "matcher_permits_in_use", flow="identify") == 0)
        let_go.set()
        await until(lambda: at_rest(service) and none_is_held())
        await answered_well(service, space, stored)


async def test_a_stepped_wall_clock_ends_no_deadline_and_loses_no_answer(tmp_path: Path) -> None:
    clock = SteppedClock()
    async with watchlist(tmp_path, clock) as (service, space, stored):

        async def asked(captured_ms: int) -> list[ProbeAnswer]:
            async with MatcherClient(f"127.0.0.1:{service.running.grpc_port}", service.running.token) as client:
                probes = Probes(
                    space=space,
                    probe_ids=[f"p{row}" for row in range(len(stored))],
                    templates=stored,
                    captured_at_ms=[captured_ms] * len(stored),
                    deployment_id="op",
                )

                async def messages() -> AsyncIterator[Probes]:
                    for step_ms in (0, HOUR_MS, -HOUR_MS):
                        clock.step_wall(step_ms)
                        yield probes

                return [answer async for answer in client.identify_stream(messages())]

        answers = await asked(clock.wall_ms())
        assert len(answers) == 3 * len(stored)
        assert {one.decision.outcome for one in answers} <= {Outcome.ALERT, Outcome.REJECTED}
        assert {one.decision.cause for one in answers} <= {"", "STALE_PROBE"}
        await answered_well(service, space, stored)
