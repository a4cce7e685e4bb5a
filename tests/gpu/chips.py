"""Devices for tests: a real GPU where there is one, else the interpreter; and ones that fail when told to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from matcher_service.index.flat import FlatScanner
from matcher_service.index.gpu import kernel
from matcher_service.index.gpu.devices import Device
from matcher_service.index.gpu.scanners import GpuScanners
from matcher_service.index.gpu.slabs import SlabPool
from matcher_service.index.scanner import Scanner

REAL = torch.cuda.is_available()
# The interpreter takes as long for a small tile as for a large one.
FINE = kernel.Tile(rows=64, probes=16, warps=4, stages=1)
SLAB_BYTES = 1 << 17  # 256 rows of 512 codes


def quick(probes: int) -> kernel.Tile:
    """The shape that takes the least time here."""
    return kernel.tile_for(probes, 99_000) if REAL else kernel.Tile(256, 16 if probes <= 16 else 64, warps=4, stages=1)


class FlatOnly:
    """CPU scanners without codes."""

    def build(self, stored: NDArray[np.float16]) -> Scanner:
        return FlatScanner(stored)

    def arrays(self, scanner: Scanner) -> Mapping[str, NDArray[Any]]:
        return {}

    def load(self, stored: NDArray[np.float16], arrays: Mapping[str, NDArray[Any]]) -> Scanner:
        return FlatScanner(stored)

    def close(self) -> None:
        pass


class Breakable(Device):
    """A device that fails at each launch, or at each allocation, from `fail` on until `mend`."""

    def __init__(self, number: int = 0) -> None:
        super().__init__(f"cuda:{number % torch.cuda.device_count()}" if REAL else "cpu")
        self.name = f"fake:{number}"
        self.launches = 0
        self._error: Exception | None = None

    def fail(self, error: Exception) -> None:
        self._error = error

    def mend(self) -> None:
        self._error = None

    def launch(self, *given: Any, **named: Any) -> None:
        self.launches += 1
        if self._error is not None:
            raise self._error
        super().launch(*given, **named)

    def allocate(self, size: int) -> torch.Tensor:
        if self._error is not None:
            raise self._error
        return super().allocate(size)


def scanners_on(
    devices: Sequence[Device],
    *,
    slabs: int = 256,
    slab_bytes: int = SLAB_BYTES,
    tile_for: Callable[[int], kernel.Tile] = quick,
    survivors: int = 1 << 16,
    monotonic: Callable[[], float] = lambda: 0.0,
) -> GpuScanners:
    return GpuScanners(
        devices,
        lambda device: SlabPool(
            device, slabs * slab_bytes, slab_bytes=slab_bytes, tile_for=tile_for, survivors=survivors
        ),
        FlatOnly(),
        monotonic=monotonic,
    )
