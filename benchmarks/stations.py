"""What each station of the read flow costs per probe, called one by one in process on the values it really gets.

Every figure is the processor time of the shortest of several rounds, in microseconds per probe. `merge` joins the
results of shards; the embedded form has one shard and does not call it, so it is no part of the sum there.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
import prometheus_client
from numpy.typing import NDArray

from benchmarks.closed_loop import json_request, protobuf_request
from benchmarks.served import DAY_MS, DEPLOYMENT, MESSAGE_REFERENCES, PROBE_AGE_MS_MAX, pinned
from matcher_service import decision, merge, policy, records
from matcher_service.admission import Admission, ServiceTime
from matcher_service.batching import Batch, Batcher, Found, Lane
from matcher_service.catalogue import Catalogue
from matcher_service.clock import SystemClock
from matcher_service.gateway import decode, decode_json, encode, encode_json
from matcher_service.index.compaction import CompactionBudget
from matcher_service.index.engine import Engine
from matcher_service.index.fastscan import one_thread
from matcher_service.index.scanners import BySize
from matcher_service.metrics import Metrics
from matcher_service.models.local import LocalModels
from matcher_service.settings import LimitSettings
from matcher_service.terms import (
    Actor,
    Deployment,
    EntryKind,
    Gallery,
    GalleryKind,
    IdentifyReply,
    LogEntry,
    ProbeMessage,
    SearchRequest,
    SearchResult,
    SpaceId,
    TemplateSpace,
)
from matcher_service.traces import NoTraces
from matcher_service.wire import matcher_pb2 as pb

Wire = Literal["protobuf", "json base64", "json numbers"]
STATIONS = ("decode", "policy", "admission", "batch", "models", "search", "merge", "decision", "encode")
NOT_EMBEDDED = "merge"

_ACTOR = Actor("benchmark")
_WAITING = 8  # messages that wait together when the cost of a batch is taken


def nothing_found(probes: int, sequence: int) -> SearchResult:
    """The answer of a shard that has no candidate for any probe."""
    return SearchResult(
        offsets=np.zeros(probes + 1, np.int64),
        gallery=np.zeros(0, np.int64),
        scores=np.zeros(0, np.float32),
        reference_ids=(),
        subject_ids=(),
        sequence=sequence,
    )


def catalogue_entries(space: SpaceId, gallery_id: str, threshold: float) -> list[LogEntry]:
    """The log of a service with one space, one gallery and one deployment."""
    now = SystemClock().wall_ms()
    gallery = Gallery(gallery_id, GalleryKind.CUSTODY, "benchmark", "synthetic", "benchmark", DAY_MS, space, threshold)
    deployment = Deployment(
        DEPLOYMENT, (gallery_id,), now - 1000, now + DAY_MS, PROBE_AGE_MS_MAX, "benchmark", "benchmark", rank_max=100
    )
    made = (
        (EntryKind.SPACE_REGISTERED, "", records.encode_space(TemplateSpace(space, np.zeros(space.dimension, "f4")))),
        (EntryKind.GALLERY_CREATED, gallery_id, records.encode_gallery(gallery)),
        (EntryKind.DEPLOYMENT_CREATED, "", records.encode_deployment(deployment)),
    )
    return [
        LogEntry(number, kind, now, name, "", "", 0, None, record)
        for number, (kind, name, record) in enumerate(made, start=1)
    ]


def engine_over(space: SpaceId, gallery_id: str, stored: NDArray[np.float16], threshold: float) -> Engine:
    """The index engine of a shard, with these rows sealed as a settled service has them, for one thread."""
    one_thread()
    engine = Engine(build=BySize(1).build, dimension_of=lambda _: space.dimension, segment_rows_max=1_000_000,
                    memory_bytes_max=1 << 40)  # fmt: skip
    entries = catalogue_entries(space, gallery_id, threshold)
    now = entries[0].at_ms
    engine.apply(entries)
    for begin in range(0, len(stored), MESSAGE_REFERENCES):
        engine.apply(
            [
                LogEntry(
                    len(entries) + 1 + row,
                    EntryKind.ENROL,
                    now,
                    gallery_id,
                    f"r{row}",
                    f"r{row}",
                    now + DAY_MS,
                    values.tobytes(),
                    b"",
                )
                for row, values in enumerate(stored[begin : begin + MESSAGE_REFERENCES], start=begin)
            ]
        )
    while engine.rewrite_one(CompactionBudget(1_000_000, DAY_MS), now, quiet=True):
        pass
    return engine


class Alone:
    """The engine and the stations in a process of their own, with one core: a mathematics library that was loaded
    with several would keep its threads for them, and they would compete with whatever runs beside.

    A context; `cores` as in served.pinned. Calls do not overlap.
    """

    def __init__(
        self,
        cores: Collection[int] | None,
        space: SpaceId,
        gallery_id: str,
        stored: NDArray[np.float16],
        probes: NDArray[np.float32],
        threshold: float,
        batch_probes: int,
    ) -> None:
        self._cores = cores
        self._pool = ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            initializer=_open,
            initargs=(space, gallery_id, stored, probes, threshold, batch_probes),
        )

    def __enter__(self) -> Alone:
        with pinned(self._cores):
            self._pool.submit(_index_rate, 0.0).result()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def index_rate(self, seconds: float) -> float:
        """Probes/s of the engine, in searches of `batch_probes`."""
        return self._pool.submit(_index_rate, seconds).result()

    def costs(self, free: bool, wire: Wire, message: int, seconds: float) -> dict[str, float]:
        """Microseconds per probe of each station, for messages of `message` probes; `free`: without the engine."""
        return self._pool.submit(_costs, free, wire, message, seconds).result()


class _Opened(NamedTuple):
    space: SpaceId
    gallery_id: str
    engine: Engine
    probes: NDArray[np.float32]
    threshold: float
    request: SearchRequest


_opened: list[_Opened] = []


def _open(
    space: SpaceId,
    gallery_id: str,
    stored: NDArray[np.float16],
    probes: NDArray[np.float32],
    threshold: float,
    batch_probes: int,
) -> None:
    unit = probes / np.linalg.norm(probes, axis=1, keepdims=True)
    _opened.append(
        _Opened(
            space,
            gallery_id,
            engine_over(space, gallery_id, stored, threshold),
            probes,
            threshold,
            search_request(gallery_id, np.resize(unit, (batch_probes, space.dimension)), threshold),
        )
    )


def _index_rate(seconds: float) -> float:
    return engine_probes_per_second(_opened[0].engine, _opened[0].request, seconds)


def _costs(free: bool, wire: Wire, message: int, seconds: float) -> dict[str, float]:
    def nobody(request: SearchRequest) -> SearchResult:
        return nothing_found(len(request.probes), 1)

    here = _opened[0]
    return asyncio.run(
        costs(
            here.space,
            here.gallery_id,
            here.probes[:message],
            here.threshold,
            nobody if free else here.engine.search,
            wire,
            batch_probes=len(here.request.probes),
            seconds=seconds,
        )
    )


def search_request(gallery_id: str, probes: NDArray[np.float32], threshold: float) -> SearchRequest:
    return SearchRequest(
        (gallery_id,),
        np.ascontiguousarray(probes),
        np.full((len(probes), 1), threshold, np.float32),
        np.ones(len(probes), np.int64),
        SystemClock().wall_ms(),
    )


def engine_probes_per_second(engine: Engine, request: SearchRequest, seconds: float) -> float:
    """Throughput of the engine in this thread, over `seconds`."""
    engine.search(request)
    began, rounds = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds or not rounds:
        engine.search(request)
        rounds += 1
    return rounds * len(request.probes) / took


async def costs(
    space: SpaceId,
    gallery_id: str,
    probes: NDArray[np.float32],
    threshold: float,
    search: Callable[[SearchRequest], SearchResult],
    wire: Wire,
    *,
    batch_probes: int,
    seconds: float,
) -> dict[str, float]:
    """Microseconds per probe of every station. `probes` float32 [n, d] is one message; searches are of
    `batch_probes`. Each station gets about `seconds`."""
    clock, limits, rows = SystemClock(), LimitSettings(), len(probes)  # type: ignore[call-arg]
    metrics = Metrics(prometheus_client.CollectorRegistry())
    catalogue, models = Catalogue(), LocalModels()
    catalogue.apply(catalogue_entries(space, gallery_id, threshold))
    await models.register(catalogue.spaces[space])
    read, written = _codec(space, probes, limits, wire)
    message = read()
    plan = policy.plan(message, catalogue, clock.wall_ms())
    admission = Admission(8192, 8192, ServiceTime(256, 1), clock, metrics.permits_in_use.labels("identify"))
    many = np.ascontiguousarray(np.resize(probes, (batch_probes, space.dimension)))
    adapted = await models.adapt(plan.source, plan.target, many)
    request = search_request(gallery_id, adapted, threshold)
    result = search(request)
    found = Found(result, await models.false_match_rates(space, result.scores), np.ones(batch_probes, np.bool_))
    one = Found(nothing_found(rows, 1), np.zeros(0), np.ones(rows, np.bool_))
    decisions = decision.decide(message.probe_ids, one, plan.gallery_ids, False, lambda: "alert")
    thresholds = dict(zip(plan.gallery_ids, plan.thresholds, strict=True))
    reply = IdentifyReply(decisions, 1, space, policy.POLICY_VERSION, thresholds)

    def judge() -> None:
        now_ms = clock.wall_ms()
        policy.judge_probes(message, policy.plan(message, catalogue, now_ms), now_ms)

    def pass_the_door() -> None:
        with admission.admit(_ACTOR, rows, clock.monotonic() + 60):
            pass

    async def adapt_and_calibrate() -> None:
        await models.adapt(plan.source, plan.target, many)
        await models.false_match_rates(space, found.result.scores)

    def decide() -> None:
        made = decision.decide(message.probe_ids, one, plan.gallery_ids, False, lambda: "alert")
        decision.alert_records(message, made, thresholds, 1, policy.POLICY_VERSION, True, 0)

    return {
        "decode": _shortest(lambda: read(), rows, seconds),
        "policy": _shortest(judge, rows, seconds),
        "admission": _shortest(pass_the_door, rows, seconds),
        "batch": await _batching(metrics, admission, message, plan, seconds),
        "models": await _shortest_of(adapt_and_calibrate, batch_probes, seconds),
        "search": _shortest(lambda: search(request), batch_probes, seconds),
        "merge": _shortest(
            lambda: merge.merge([result, result], plan.gallery_ids, request.rank_max), batch_probes, seconds
        ),
        "decision": _shortest(decide, rows, seconds),
        "encode": _shortest(lambda: written(reply), rows, seconds),
    }


def _codec(
    space: SpaceId, probes: NDArray[np.float32], limits: LimitSettings, wire: Wire
) -> tuple[Callable[[], ProbeMessage], Callable[[IdentifyReply], bytes]]:
    if wire == "protobuf":
        data = protobuf_request(space, probes)
        return (
            lambda: decode.probe_message(decode.parse(pb.IdentifyRequest, data), limits, _ACTOR, time.monotonic()),
            lambda reply: encode.identify_reply(reply).SerializeToString(),
        )
    text = json_request(space, probes, "base64" if wire == "json base64" else "numbers")
    return (
        lambda: decode_json.probe_message(text, limits, _ACTOR, time.monotonic()),
        lambda reply: orjson.dumps(encode_json.identify_reply(reply, rows="probes")),
    )


async def _batching(
    metrics: Metrics, admission: Admission, message: ProbeMessage, plan: policy.SearchPlan, seconds: float
) -> float:
    """A message's way through the batcher, several waiting together, around a search that costs nothing."""
    clock, rows = SystemClock(), len(message.probe_ids)

    async def search(batch: Batch) -> Found:
        return Found(nothing_found(len(batch.templates), 1), np.zeros(0), np.ones(len(batch.templates), np.bool_))

    time = ServiceTime(256, 1)
    batcher = Batcher(search, time, clock, metrics, probes_max=rows * _WAITING, searchers=1, traces=NoTraces())
    lane = Lane(plan.source, plan.target, plan.gallery_ids)

    async def submit() -> None:
        deadline = clock.monotonic() + 60
        with admission.admit(_ACTOR, rows, deadline) as permit:
            await batcher.submit(
                permit, lane, message.templates, policy.floors(plan, rows), plan.rank_max, deadline
            )  # fmt: skip

    async def several() -> None:
        async with asyncio.TaskGroup() as waiting:
            for _ in range(_WAITING):
                waiting.create_task(submit())

    running = asyncio.create_task(batcher.run())
    try:
        return await _shortest_of(several, rows * _WAITING, seconds)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _shortest(work: Callable[[], Any], probes: int, seconds: float) -> float:
    """Microseconds per probe of the fastest round; garbage collection and other processes only ever add."""
    shortest, until = float("inf"), time.perf_counter() + seconds
    while shortest == float("inf") or time.perf_counter() < until:
        began = time.process_time()
        work()
        shortest = min(shortest, time.process_time() - began)
    return shortest / probes * 1e6


async def _shortest_of(work: Callable[[], Awaitable[None]], probes: int, seconds: float) -> float:
    shortest, until = float("inf"), time.perf_counter() + seconds
    while shortest == float("inf") or time.perf_counter() < until:
        began = time.process_time()
        await work()
        shortest = min(shortest, time.process_time() - began)
    return shortest / probes * 1e6
