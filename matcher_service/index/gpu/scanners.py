"""Scanners over the GPUs of one machine: which rows go where, one search over all, and what happens without a GPU.

Rows go to the device with the most room. A search asks the devices side by side, each for all of its rows in one
launch, and merges. Rows that no device has room for, or whose device failed, are searched on the CPU: in full at
once, and by the CPU's codes as soon as `tend` has made them. A device that failed is tried again, and its rows go
back to it; no answer changes meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
import structlog
from numpy.typing import NDArray

from matcher_service.errors import MatcherError, MemoryRefused, ServiceFault
from matcher_service.index.gpu.codes import choose_scale, usual_scale
from matcher_service.index.gpu.devices import Device
from matcher_service.index.gpu.filter import Filter
from matcher_service.index.gpu.scanner import GpuScanner, GpuTail, Place, scan_placed
from matcher_service.index.gpu.slabs import Placed, SlabPool
from matcher_service.index.scanner import Hits, Scanner
from matcher_service.index.scanners import Scanners
from matcher_service.terms import Float32

RETRY_S = 10.0

_log = structlog.get_logger(__name__)


class GpuScanners:
    """Makes scanners on `devices`, each with the pool that `pool_of` opens. `cpu` makes those of rows without a
    place. `monotonic` gives seconds. Raises what opening a pool raises."""

    def __init__(
        self,
        devices: Sequence[Device],
        pool_of: Callable[[Device], SlabPool],
        cpu: Scanners,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool_of = pool_of
        self._cpu = cpu
        self._monotonic = monotonic
        self._changing = threading.Lock()
        self._filters: dict[str, Filter] = {device.name: Filter(pool_of(device)) for device in devices}
        self._devices = {device.name: device for device in devices}
        self._retry_at: dict[str, float] = {}
        self._scanners: WeakSet[GpuScanner] = WeakSet()
        self._executor: Executor | None = ThreadPoolExecutor(len(devices), "gpu") if len(devices) > 1 else None

    # --- making ------------------------------------------------------------------------------------

    def build(self, stored: NDArray[np.float16]) -> Scanner:
        scanner = self.settle(GpuScanner(stored, self))
        if scanner.place is None:
            scanner.fallback = self._cpu.build(stored)
        return scanner

    def settle(self, scanner: GpuScanner) -> GpuScanner:
        """Find a place for the scanner's rows if they have none; if there is none, `tend` goes on looking."""
        if scanner.place is None:
            self._find_place(scanner)
        with self._changing:
            self._scanners.add(scanner)
        return scanner

    def arrays(self, scanner: Scanner) -> Mapping[str, NDArray[Any]]:
        """None: a device encodes faster than a disk reads."""
        return {}

    def load(self, stored: NDArray[np.float16], arrays: Mapping[str, NDArray[Any]]) -> Scanner:
        scanner = self.settle(GpuScanner(stored, self))
        if scanner.place is None:
            scanner.fallback = self._cpu.load(stored, arrays)
        return scanner

    def growing(self, dimension: int) -> GpuTail | None:
        for filter_ in self._by_room():
            return GpuTail(filter_, Placed(filter_.pool, dimension, usual_scale(dimension)), self)
        return None

    def close(self) -> None:
        if isinstance(self._executor, ThreadPoolExecutor):
            self._executor.shutdown()
        self._cpu.close()

    # --- searching ---------------------------------------------------------------------------------

    def scan_all(self, scanners: Sequence[GpuScanner], probes: Float32, floors: Float32) -> list[Hits]:
        """The hits of each scanner; `floors` float32 [n, number of scanners]."""
        places = [scanner.place for scanner in scanners]
        by_filter: dict[Filter | None, list[int]] = {}
        for number, place in enumerate(places):
            by_filter.setdefault(place.filter if place is not None else None, []).append(number)

        def on_one(filter_: Filter | None, numbers: list[int]) -> list[Hits]:
            mine = [scanners[number] for number in numbers]
            wanted = np.ascontiguousarray(floors[:, numbers])
            if filter_ is not None:
                try:
                    return scan_placed(filter_, mine, [p for n in numbers if (p := places[n])], probes, wanted)
                except ServiceFault as error:
                    self.lost(filter_, error)
            return [scanner.on_cpu().scan(probes, np.ascontiguousarray(wanted[:, i])) for i, scanner in enumerate(mine)]

        tasks: list[Callable[[], list[Hits]]] = [
            partial(on_one, filter_, numbers) for filter_, numbers in by_filter.items()
        ]
        found = list(self._executor.map(lambda task: task(), tasks)) if self._executor else [task() for task in tasks]
        by_number = {
            number: hits
            for numbers, some in zip(by_filter.values(), found, strict=True)
            for number, hits in zip(numbers, some, strict=True)
        }
        return [by_number[number] for number in range(len(scanners))]

    # --- failing and recovering --------------------------------------------------------------------

    def lost(self, filter_: Filter, error: ServiceFault) -> None:
        """A device failed while it was used, or had no memory for a search."""
        device = filter_.pool.device
        with self._changing:
            if not device.lost:
                _log.warning("gpu_search_on_cpu", device=device.name, detail=error.detail, hint=error.hint)
            elif device.name not in self._retry_at:
                self._retry_at[device.name] = self._monotonic() + RETRY_S
                _log.error("gpu_lost", device=device.name, detail=device.lost, hint=error.hint)

    def condition(self) -> dict[str, str]:
        """Of each device: empty if it works, else what is wrong with it."""
        return {name: device.lost for name, device in self._devices.items()}

    def memory(self) -> dict[str, tuple[int, int]]:
        """Of each device that works, the bytes that hold codes, and those that may."""
        pools = [one.pool for one in list(self._filters.values())]
        return {pool.device.name: (pool.bytes_used, pool.slabs * pool.slab_bytes) for pool in pools}

    def tend(self) -> bool:
        """One bounded round: try a lost device again, erase what nobody holds, give rows without a place one, or
        codes on the CPU. Whether there is more to do at once."""
        self._reopen()
        for filter_ in self._by_room():
            try:
                filter_.pool.collect()
            except ServiceFault as error:
                self.lost(filter_, error)
        with self._changing:
            without = [scanner for scanner in self._scanners if self._is_without(scanner)]
        for scanner in without:
            if self._find_place(scanner):
                scanner.fallback = None
                return True
            if scanner.fallback is None:
                scanner.fallback = self._cpu.build(scanner.stored)
                return True
        return False

    def _is_without(self, scanner: GpuScanner) -> bool:
        place = scanner.place
        return place is None or place.filter is not self._filters.get(place.filter.pool.device.name)

    def _reopen(self) -> None:
        for name, at in list(self._retry_at.items()):
            if self._monotonic() < at:
                continue
            device = self._devices[name]
            # What the old pool held is gone; its memory must be, before there is room for a new one.
            old = self._filters.pop(name, None)
            for scanner in [one for one in self._scanners if old and one.place and one.place.filter is old]:
                scanner.place = None
            del old
            try:
                device.reopen()
                fresh = Filter(self._pool_of(device))
            except MatcherError as error:
                device.lost = device.lost or error.detail
                self._retry_at[name] = self._monotonic() + RETRY_S
                continue
            with self._changing:
                self._filters[name] = fresh
                del self._retry_at[name]
            _log.info("gpu_recovered", device=name)

    def _by_room(self) -> list[Filter]:
        """Of the devices that work, the emptiest first."""
        working = [one for one in list(self._filters.values()) if not one.pool.device.lost]
        return sorted(working, key=lambda one: -one.pool.slabs_free)

    def _find_place(self, scanner: GpuScanner) -> bool:
        stored = scanner.stored
        scale: float | None = None
        for filter_ in self._by_room():
            scale = choose_scale(stored) if scale is None else scale
            try:
                placed = Placed(filter_.pool, stored.shape[1], scale)
                if len(stored):
                    placed.append(stored)
            except MemoryRefused as error:
                _log.warning("gpu_without_room", device=filter_.pool.device.name, rows=len(stored), hint=error.hint)
            except ServiceFault as error:
                self.lost(filter_, error)
            else:
                scanner.place = Place(filter_, placed, placed.extent, stored)
                return True
        scanner.place = None
        return False
