"""Codes in device memory: slabs of one size, allocated together once, and rows that fill them.

Rows of a segment or of a tail own whole slabs. Appending writes behind the last row; ending a row writes zeros over
its codes, which no cut-off lets pass; letting go writes zeros over all slabs and gives them back. None of it moves
a row, so what a search was told about (an `Extent`) stays true while it holds the rows: those appended later lie
behind its counts, and the engine ends no row while a view exists in which it is live.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from matcher_service.errors import MemoryRefused
from matcher_service.index.gpu import kernel
from matcher_service.index.gpu.codes import ODD_MAX, encode
from matcher_service.index.gpu.devices import Device
from matcher_service.index.integer_bound import NO_ROWS, Law
from matcher_service.terms import Int64

SLAB_BYTES = 4 << 20  # 8,192 rows of 512 codes
_ROW_MULTIPLE = 256  # of the rows of a slab; each tile's rows divide it, so that no tile lies in two
_SURVIVORS = 1 << 22  # 32 MiB of places
_LOST_MIN = 1 << 16  # tiles that may lack room in one launch


class Extent(NamedTuple):
    """The first `rows` rows of a `Placed` at a moment: `at` int64 [m], where each slab begins in the codes; `counts`
    int32 [m], its rows; the law that holds for all but the `odd` rows (int64), which have no codes."""

    rows: int
    at: Int64
    counts: NDArray[np.int32]
    law: Law
    odd: Int64


class SlabPool:
    """The slabs of a device: `codes_bytes` of them in all (0: what is free), and room for so many `survivors` of a
    launch. `tile_for` gives the kernel's shape for a number of probes (None: the device says). Raises MemoryRefused if
    the device does not have so much."""

    def __init__(
        self,
        device: Device,
        codes_bytes: int = 0,
        *,
        slab_bytes: int = SLAB_BYTES,
        survivors: int = _SURVIVORS,
        tile_for: Callable[[int], kernel.Tile] | None = None,
    ) -> None:
        self.device = device
        self.slab_bytes = slab_bytes
        self._survivors = survivors
        self.tile_for = tile_for or device.tile_for
        largest = self.tile_for(kernel.PROBES_MAX)
        if survivors < largest.rows * largest.probes:
            raise ValueError(f"room for {survivors} survivors is less than one tile may have")
        with device.work():
            count = (codes_bytes or device.free_bytes()) // slab_bytes
            self.codes = device.allocate(count * slab_bytes)
            # Nothing may be left in it from whoever had the memory before.
            self.codes.zero_()
            self._free = list(range(count - 1, -1, -1))
            self.slabs = count
            # Slabs of rows that are no longer held, to be erased; filled by finalizers, hence without a lock.
            self.returned: deque[list[int]] = deque()
            self.found = kernel.Found(
                torch.zeros(kernel.HEADER + survivors, dtype=torch.int64, device=device.torch),
                # At least as many as a slab has tiles, of 32-byte rows and 16 of them: the least that is run at once.
                torch.zeros(max(_LOST_MIN, slab_bytes // (32 * 16)), dtype=torch.int64, device=device.torch),
            )

    @property
    def bytes_used(self) -> int:
        return (self.slabs - len(self._free)) * self.slab_bytes

    @property
    def slabs_free(self) -> int:
        return len(self._free)

    def rows_per_slab(self, width: int) -> int:
        rows = self.slab_bytes // width // _ROW_MULTIPLE * _ROW_MULTIPLE
        if not rows:
            raise MemoryRefused(f"a slab of {self.slab_bytes} bytes holds no tile of {width}-byte rows")
        return rows

    def slabs_for(self, rows: int, dimension: int) -> int:
        return -(-rows // self.rows_per_slab(kernel.width_of(dimension)))

    def take(self, count: int) -> list[int]:
        """So many slabs, all zero, or MemoryRefused and none."""
        with self.device.work():
            self.collect()
            if count > len(self._free):
                raise MemoryRefused(
                    f"{self.device.name} has {len(self._free)} of {self.slabs} slabs free, {count} are needed",
                    field="index.gpu_bytes_max",
                    hint="the CPU searches these rows; raise the budget, add a device, or withdraw references",
                )
            return [self._free.pop() for _ in range(count)]

    def collect(self) -> None:
        """Erase the slabs whose rows nobody holds any more, and have them back."""
        while self.returned:
            with self.device.work():
                slabs = self.returned.popleft()
                for slab in slabs:
                    self.codes[slab * self.slab_bytes : (slab + 1) * self.slab_bytes] = 0
                self.put_back(slabs)

    def put_back(self, slabs: list[int]) -> None:
        """Have slabs back that are all zero."""
        self._free.extend(reversed(slabs))


class Placed:
    """Rows of one dimension and scale in a pool. One writer appends and ends; readers hold extents."""

    def __init__(self, pool: SlabPool, dimension: int, scale: float, odd_max: int = ODD_MAX) -> None:
        self.pool = pool
        self.width = kernel.width_of(dimension)
        self.rows_per_slab = pool.rows_per_slab(self.width)
        self._dimension = dimension
        self._scale = scale
        self._odd_max = odd_max
        self._slabs: list[int] = []
        # When nobody holds these rows any more; in whatever thread lets go of them.
        weakref.finalize(self, pool.returned.append, self._slabs).atexit = False
        self._extent = Extent(0, np.empty(0, np.int64), np.empty(0, np.int32), NO_ROWS, np.empty(0, np.int64))

    @property
    def extent(self) -> Extent:
        return self._extent

    def append(self, stored: NDArray[np.float16]) -> None:
        """Append m rows, float16 [m, d]. Raises MemoryRefused (and nothing has changed) or ShardUnavailable."""
        before = self._extent
        first, last = before.rows, before.rows + len(stored)
        with self.pool.device.work():
            fresh = self.pool.take(max(0, -(-last // self.rows_per_slab) - len(self._slabs)))
            try:
                encoded = encode(stored, self._scale, self.pool.device.torch, self._odd_max - before.odd.size)
            except BaseException:
                self.pool.put_back(fresh)
                raise
            self._slabs.extend(fresh)
            self._write(first, encoded.codes)
        error, reach = max(before.law.error, encoded.law.error), max(before.law.reach, encoded.law.reach)
        counts = np.full(len(self._slabs), self.rows_per_slab, np.int32)
        counts[-1:] = last - self.rows_per_slab * (len(self._slabs) - 1)
        self._extent = Extent(
            last,
            np.array(self._slabs, np.int64) * self.pool.slab_bytes,
            counts,
            Law(self._scale, error, reach),
            np.concatenate([before.odd, encoded.odd + first]),
        )

    def _write(self, first: int, codes: torch.Tensor) -> None:
        done = 0
        while done < len(codes):
            slab, row = divmod(first + done, self.rows_per_slab)
            count = min(self.rows_per_slab - row, len(codes) - done)
            self._rows_of(slab)[row : row + count, : self._dimension] = codes[done : done + count]
            done += count

    def _rows_of(self, slab: int) -> torch.Tensor:
        start = self._slabs[slab] * self.pool.slab_bytes
        return self.pool.codes[start : start + self.rows_per_slab * self.width].view(self.rows_per_slab, self.width)

    def first_slabs(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The first rows, slab by slab: the number of the first one, and codes int8 [m, width]."""
        for slab in range(-(-rows // self.rows_per_slab)):
            first = slab * self.rows_per_slab
            yield first, self._rows_of(slab)[: rows - first]

    def end(self, rows: Int64) -> None:
        """Write zeros over the codes of `rows`: no search finds them from now on."""
        slabs, places = np.divmod(rows, self.rows_per_slab)
        with self.pool.device.work():
            for slab in np.unique(slabs).tolist():
                mine = torch.from_numpy(places[slabs == slab]).to(self.pool.device.torch)
                self._rows_of(slab)[mine] = 0
