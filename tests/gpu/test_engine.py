"""The engine over GPU scanners: exact at every moment of a changing gallery, and nothing withdrawn stays in codes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from matcher_service.index.compaction import CompactionBudget
from matcher_service.index.engine import Engine
from matcher_service.index.gpu.scanner import GpuScanner
from matcher_service.index.gpu.scanners import GpuScanners
from matcher_service.records import decode_gallery
from matcher_service.settings import IndexSettings
from matcher_service.shards.local import LocalShard
from tests.fake_clock import FakeClock
from tests.gpu.chips import Breakable, scanners_on
from tests.log_writer import FAR_MS, NOW_MS, LogWriter, asking, unit_rows
from tests.one_key import one_key
from tests.oracle import FlatOracle, same

BUDGET = CompactionBudget(rows_max=1_000_000, erase_after_ms=10**9)


@pytest.fixture
def devices() -> list[Breakable]:
    return [Breakable(0), Breakable(1)]


@pytest.fixture
def scanners(devices: list[Breakable]) -> Iterator[GpuScanners]:
    made = scanners_on(devices, slab_bytes=1 << 15)
    yield made
    made.close()


def engine_on(scanners: GpuScanners, tail_rows_max: int = 300) -> Engine:
    return Engine(
        build=scanners.build,
        dimension_of=lambda entry: decode_gallery(entry.record).space.dimension,
        segment_rows_max=1_000_000,
        memory_bytes_max=10**10,
        tail_rows_max=tail_rows_max,
        growing_of=scanners.growing,
    )


def test_law_2_a_streaming_runbook_is_answered_exactly_while_a_device_fails_and_recovers(
    devices: list[Breakable], scanners: GpuScanners
) -> None:
    rng = np.random.default_rng(3)
    dimension, log, engine, oracle = 32, LogWriter(), engine_on(scanners), FlatOracle()
    log.create("g", dimension)
    people = unit_rows(rng, 200, dimension)
    applied, live = 0, np.zeros(0, np.int64)
    runbook = ["insert", "insert", "search", "delete", "replace", "search", "fail", "search", "insert", "search"]
    runbook += ["merge", "search", "mend", "insert", "delete", "search"]
    for step in runbook:
        if step == "insert":
            start = len(log.entries)
            for number in range(start, start + 250):
                person = int(rng.integers(200))
                row = people[person] + 0.1 * rng.standard_normal(dimension)
                expires_at_ms = FAR_MS if number % 10 else NOW_MS
                log.enrol("g", f"r{number}", row / np.linalg.norm(row), f"s{person}", expires_at_ms)
            live = np.append(live, np.arange(start, start + 250))
        elif step == "delete":
            gone = rng.choice(live, len(live) // 5, replace=False)
            live = np.setdiff1d(live, gone)
            for number in gone:
                log.withdraw("g", f"r{number}")
        elif step == "replace":
            for number in rng.choice(live, 60, replace=False):
                log.enrol("g", f"r{number}", unit_rows(rng, 1, dimension)[0], f"s{number}")
        elif step == "merge":
            assert engine.rewrite_one(BUDGET, NOW_MS, quiet=True)
        elif step == "fail":
            devices[0].fail(RuntimeError("CUDA error: uncorrectable ECC error encountered"))
        elif step == "mend":
            devices[0].mend()
        fresh, applied = log.entries[applied:], len(log.entries)
        engine.apply(fresh)
        oracle.apply_now(fresh)
        engine.erase_ended()
        scanners.tend()
        if step == "search":
            probes = np.concatenate([people[:3], unit_rows(rng, 2, dimension)])
            for floor, rank_max in ((0.6, 100), (-np.inf, 5)):
                request = asking(probes, ("g",), floor, rank_max)
                assert same(engine.search(request), oracle.search_now(request)), (step, floor)


def gpu_parts(engine: Engine) -> list[GpuScanner]:
    return [part.scanner for part in engine.view.galleries["g"].parts if isinstance(part.scanner, GpuScanner)]


def codes_of(scanner: GpuScanner) -> np.ndarray:
    assert scanner.place is not None
    placed, rows = scanner.place.placed, scanner.place.extent.rows
    return np.concatenate([part.cpu().numpy() for _, part in placed.first_slabs(rows)])


@pytest.mark.parametrize("where", ["segment", "tail"])
def test_codes_of_a_withdrawn_row_are_erased_when_no_view_shows_it_and_not_before(
    scanners: GpuScanners, where: str
) -> None:
    """A replacement is never seen as both nor as neither, however old the view of the search is."""
    rng = np.random.default_rng(4)
    log, engine, oracle = LogWriter(), engine_on(scanners, 50 if where == "segment" else 300), FlatOracle()
    log.create("g", 32)
    rows = unit_rows(rng, 50, 32)
    for number, row in enumerate(rows):
        log.enrol("g", f"r{number}", row, f"s{number}")
    engine.apply(log.entries)
    oracle.apply_now(log.entries)
    held, asked = engine.view, asking(rows[:3], ("g",), 0.9)
    before = oracle.search_now(asked)
    (scanner,) = gpu_parts(engine)
    done = len(log.entries)
    log.withdraw("g", "r0")
    log.enrol("g", "r1", rows[2], "s1")
    engine.apply(log.entries[done:])
    oracle.apply_now(log.entries[done:])
    for number in range(3):  # views between, on which nothing ended
        log.enrol("g", f"later{number}", unit_rows(rng, 1, 32)[0], "s")
        engine.apply(log.entries[-1:])
        oracle.apply_now(log.entries[-1:])
    gc.collect()
    engine.erase_ended()
    assert codes_of(scanner)[:50].any(axis=1).all(), "erased while a view shows it"
    assert same(engine.search(asked, held), before)
    assert same(engine.search(asked), oracle.search_now(asked))
    del held
    gc.collect()
    engine.erase_ended()
    assert not codes_of(scanner)[[0, 1]].any()
    assert codes_of(scanner)[2:50].any(axis=1).all()
    assert same(engine.search(asked), oracle.search_now(asked))


def test_one_launch_per_device_answers_for_all_parts_and_galleries(
    devices: list[Breakable], scanners: GpuScanners
) -> None:
    rng = np.random.default_rng(5)
    log, engine, oracle = LogWriter(), engine_on(scanners, 40), FlatOracle()
    for gallery_id in ("g", "h"):
        log.create(gallery_id, 32)
        for number, row in enumerate(unit_rows(rng, 130, 32)):
            log.enrol(gallery_id, f"r{number}", row, f"s{number}")
    engine.apply(log.entries)
    oracle.apply_now(log.entries)
    before = [device.launches for device in devices]
    request = asking(unit_rows(rng, 5, 32), ("g", "h"), 0.4)
    result = engine.search(request)
    assert same(result, oracle.search_now(request))
    assert [device.launches - old for device, old in zip(devices, before, strict=True)] == [1, 1]
    assert result.scanned == 0
    assert result.certified == 5 * sum(len(engine.view.galleries[g].parts) for g in ("g", "h"))


async def test_a_shard_on_a_device_serves_withdraws_and_starts_again(tmp_path: Path) -> None:
    """Files hold no codes of the device: the rows are encoded again when they are opened."""
    rng = np.random.default_rng(6)
    log, oracle = LogWriter(), FlatOracle()
    log.create("g", 32)
    rows = unit_rows(rng, 400, 32)
    for number, row in enumerate(rows):
        log.enrol("g", f"r{number}", row, f"s{number}")
    for number in range(0, 400, 7):
        log.withdraw("g", f"r{number}")
    oracle.apply_now(log.entries)
    request = asking(rows[:6], ("g",), 0.5)
    settings = IndexSettings()  # type: ignore[call-arg]
    for start in range(2):
        scanners = scanners_on([Breakable()], slab_bytes=1 << 15)
        shard = await LocalShard.open(tmp_path, one_key(bytes(32)), settings, FakeClock(), scanners=scanners)
        assert bool(shard.applied_sequence) == bool(start)
        await shard.apply(log.entries)
        await shard.maintain()
        found = await shard.search(request)
        assert same(found, oracle.search_now(request))
        assert found.scanned == 0
        assert (await shard.status()).devices == {"fake:0": ""}
        await shard.close()
