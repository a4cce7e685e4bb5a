"""Rows over several devices: placed by room, searched together, moved to the CPU and back; the same answers always."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import structlog.testing
import torch

from matcher_service.errors import StartRefused
from matcher_service.index.choose import FEW_PROBES
from matcher_service.index.fastscan import FastScanScanner
from matcher_service.index.flat import FlatScanner
from matcher_service.index.gpu.devices import Device
from matcher_service.index.gpu.opening import open_gpu_scanners
from matcher_service.index.gpu.scanner import GpuScanner
from matcher_service.index.gpu.scanners import RETRY_S, GpuScanners
from matcher_service.index.scanners import BySize, scanners_for
from matcher_service.settings import IndexSettings
from tests.contract.test_scanners import agrees, gallery, probes_of
from tests.gpu.chips import REAL, Breakable, scanners_on

DEVICE_ERROR = RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def segments(scanners: GpuScanners, seeds: range, rows: int = 300) -> list[GpuScanner]:
    built = [scanners.build(gallery(seed, rows, 64, copies=0.05)) for seed in seeds]
    assert all(isinstance(one, GpuScanner) for one in built)
    return built  # type: ignore[return-value]


def answers(scanners: GpuScanners, built: list[GpuScanner], certified: bool | None = True) -> None:
    """Law 2, for all of them asked together, at floors of their own. So few probes that the CPU certifies none."""
    probes = np.concatenate([probes_of(seed, one.stored, 1, 1.0) for seed, one in enumerate(built[:FEW_PROBES])])
    floors = np.linspace(0.35, 0.6, len(built) * len(probes), dtype=np.float32).reshape(len(probes), len(built))
    for number, hits in enumerate(scanners.scan_all(built, probes, floors)):
        agrees(hits, built[number].stored, probes, np.ascontiguousarray(floors[:, number]))
        if certified is not None:
            assert hits.certified.all() == certified


def test_law_2_segments_of_several_devices_are_searched_together() -> None:
    devices = [Breakable(number) for number in range(3)]
    scanners = scanners_on(devices)
    built = segments(scanners, range(7))
    homes = [one.place.filter.pool.device.name for one in built if one.place]
    assert sorted(homes) == ["fake:0"] * 3 + ["fake:1"] * 2 + ["fake:2"] * 2
    answers(scanners, built)
    assert [device.launches for device in devices] == [1, 1, 1]
    scanners.close()


def test_rows_that_no_device_has_room_for_are_searched_on_the_cpu_and_placed_when_there_is_room() -> None:
    scanners = scanners_on([Breakable()], slabs=2, slab_bytes=1 << 15)
    with structlog.testing.capture_logs() as logged:
        built = segments(scanners, range(4))
    assert [one.place is not None for one in built] == [True, True, False, False]
    assert [line["event"] for line in logged] == ["gpu_without_room"] * 2
    answers(scanners, built, certified=None)
    assert not scanners.tend()
    del built[0]
    gc.collect()
    assert scanners.tend()
    assert sum(one.place is not None for one in built) == 2
    answers(scanners, built, certified=None)
    scanners.close()


@pytest.mark.parametrize("moment", ["searching", "building", "appending", "guessing"])
def test_a_device_that_fails_is_said_to_be_lost_its_rows_go_on_on_the_cpu_and_come_back(moment: str) -> None:
    clock = Clock()
    devices = [Breakable(0), Breakable(1)]
    scanners = scanners_on(devices, monotonic=clock)
    built = segments(scanners, range(4))
    tail, stored = scanners.growing(64), gallery(9, 200, 64)
    assert tail is not None
    tail.append(stored[:100])
    answers(scanners, built)
    with structlog.testing.capture_logs() as logged:
        for device in devices:
            device.fail(DEVICE_ERROR)
            if moment != "searching":
                # What a launch would report, in the middle of something else.
                with pytest.raises(Exception, match="illegal memory"), device.work():
                    raise DEVICE_ERROR
        if moment == "building":
            built += segments(scanners, range(4, 5))
        if moment == "appending":
            tail.append(stored[100:])
            whole = FlatScanner(stored)
            assert tail.view(stored, whole) is whole
        if moment == "guessing":
            assert np.diff(built[0].guess(probes_of(3, built[0].stored, 2, 1.0), 5).hits.offsets).tolist() == [5, 5]
        answers(scanners, built, certified=False)
    assert {line["device"] for line in logged if line["event"] == "gpu_lost"} == {"fake:0", "fake:1"}
    assert scanners.condition()["fake:0"] == "CUDA error: an illegal memory access was encountered"
    assert scanners.growing(64) is None

    for _ in range(2):  # tried again, in vain
        clock.now += RETRY_S + 1
        while scanners.tend():
            pass
        answers(scanners, built, certified=False)
    for device in devices:
        device.mend()
    clock.now += RETRY_S + 1
    while scanners.tend():
        pass
    assert scanners.condition() == {"fake:0": "", "fake:1": ""}
    assert all(one.place is not None for one in built)
    answers(scanners, built)
    scanners.close()


def test_while_devices_are_lost_large_segments_get_the_cpus_codes() -> None:
    class Coded(Breakable):
        pass

    device = Coded()
    scanners = GpuScanners([device], scanners_on([device])._pool_of, BySize(), monotonic=lambda: 0.0)
    stored = gallery(30, 2500, 128)
    scanner = scanners.build(stored)
    assert isinstance(scanner, GpuScanner)
    device.lost = "gone"
    probes = probes_of(30, stored, 3, 1.0)
    floors = np.full(3, 0.5, np.float32)
    agrees(scanner.scan(probes, floors), stored, probes, floors)
    # Its place is with a device that will not be tried before the clock says so.
    scanner.place = None
    scanners.tend()
    assert isinstance(scanner.fallback, FastScanScanner)
    agrees(scanner.scan(probes, floors), stored, probes, floors)
    scanners.close()


def test_a_search_without_device_memory_is_answered_by_the_cpu_and_the_device_is_not_lost() -> None:
    device = Breakable()
    scanners = scanners_on([device])
    built = segments(scanners, range(2))
    device.fail(torch.OutOfMemoryError("CUDA out of memory"))
    with structlog.testing.capture_logs() as logged:
        answers(scanners, built, certified=False)
    assert {line["event"] for line in logged} == {"gpu_search_on_cpu"}
    assert scanners.condition() == {"fake:0": ""}
    device.mend()
    answers(scanners, built)
    scanners.close()


def test_one_failing_device_leaves_the_others_answers_certified() -> None:
    devices = [Breakable(0), Breakable(1)]
    scanners = scanners_on(devices)
    built = segments(scanners, range(4))
    devices[1].fail(DEVICE_ERROR)
    probes = probes_of(3, built[0].stored, 2, 1.0)
    hits = scanners.scan_all(built, probes, np.full((2, 4), 0.5, np.float32))
    assert sorted(bool(one.certified.all()) for one in hits) == [False, False, True, True]
    answers(scanners, built, certified=None)
    scanners.close()


def test_a_start_without_what_is_asked_for_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartRefused, match="has no cuda:99"):
        Device("cuda:99")
    with pytest.raises(StartRefused, match="is no device"):
        Device("gpu one")
    if not REAL:
        with pytest.raises(StartRefused, match="no GPU"):
            scanners_for(IndexSettings(scanner="gpu"))  # type: ignore[call-arg]
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(StartRefused, match=r"index\.scanner"):
            Device("cpu")


def test_the_settings_open_the_devices_they_name() -> None:
    name = "cuda:0" if REAL else "cpu"
    settings = IndexSettings(scanner="gpu", gpu_devices=(name,), gpu_bytes_max=64 << 20)  # type: ignore[call-arg]
    scanners = open_gpu_scanners(settings, BySize())
    assert isinstance(scanners, GpuScanners)
    assert scanners.condition() == {name: ""}
    stored = gallery(40, 100, 64)
    probes = probes_of(40, stored, 2, 1.0)
    floors = np.full(2, 0.4, np.float32)
    agrees(scanners.build(stored).scan(probes, floors), stored, probes, floors)
    scanners.close()
