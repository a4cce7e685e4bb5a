"""One pass of the filter over rows of many segments, in as few launches as the survivors allow.

The survivors of a launch go to a buffer of fixed size. Tiles that lacked room named themselves: they are run again,
so many at a time that all could survive. If a launch lets through more than is sensible to hold at once, its probes
are halved, then its slabs, and each half is a launch of its own. So memory is bounded and nothing is dropped,
however much survives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from matcher_service.index.gpu import kernel
from matcher_service.index.gpu.slabs import Extent, SlabPool
from matcher_service.index.integer_bound import CUT_OFF_MAX
from matcher_service.terms import Int64

# Survivors read together with their number: most searches have no more, and wait for the device once.
_READ_AHEAD = 1 << 10
# Survivors that one launch may bring to the host: 8 bytes each, and 40 more while they are sorted out.
_TOGETHER_MAX = 1 << 25


class Pairs(NamedTuple):
    """m survivors: `probes`, `groups` (which extent), `rows` (in it), int64 [m] each, in no order."""

    probes: Int64
    groups: Int64
    rows: Int64


class _Table(NamedTuple):
    """Slabs of several extents one after another; on the host which extent each is of, and its first row there."""

    slabs: kernel.Slabs
    group: Int64
    first_row: Int64


class _Piece(NamedTuple):
    slab_first: int
    slab_last: int
    probe_first: int
    probe_last: int


class Filter:
    """The filter of one pool. Tables of slabs are kept on the device between searches, for as long as the rows that
    they name do not change."""

    def __init__(self, pool: SlabPool) -> None:
        self.pool = pool
        self._last: tuple[tuple[Extent, ...], _Table] | None = None

    def pairs(self, extents: Sequence[Extent], codes: NDArray[np.int8], cuts: NDArray[np.int32]) -> Iterator[Pairs]:
        """Every pair that reaches its cut-off, in pieces. `codes` int8 [n, d], `cuts` int32 [g, n] for g extents of
        that dimension, 0 where a probe is not to be served. Raises ShardUnavailable or MemoryRefused."""
        pool, width = self.pool, kernel.width_of(codes.shape[1])
        if not len(codes) or not len(extents) or not cuts.any():
            return
        tile = pool.tile_for(len(codes))
        padded = -(-len(codes) // tile.probes) * tile.probes
        with pool.device.work():
            table = self._table(tuple(extents), pool.rows_per_slab(width))
            probes = _on_device(pool.device.torch, codes, cuts, padded, width)
        pieces = [_Piece(0, len(table.group), 0, padded)]
        while pieces:
            piece = pieces.pop()
            with pool.device.work():
                places = self._run(tile, table, probes, piece, width)
            if places is None:
                pieces.extend(_halves(piece, tile.probes))
            elif places.size:
                yield _sorted_out(places, table, piece, pool.rows_per_slab(width))

    def _table(self, extents: tuple[Extent, ...], rows_per_slab: int) -> _Table:
        last = self._last
        if last is not None and [*map(id, last[0])] == [*map(id, extents)]:
            return last[1]
        sizes = [len(extent.counts) for extent in extents]
        group = np.repeat(np.arange(len(extents)), sizes)
        first_row = np.concatenate([np.arange(size) * rows_per_slab for size in sizes])
        device = self.pool.device.torch
        slabs = kernel.Slabs(
            torch.from_numpy(np.concatenate([extent.at for extent in extents])).to(device),
            torch.from_numpy(np.concatenate([extent.counts for extent in extents])).to(device),
            torch.from_numpy(group.astype(np.int32)).to(device),
        )
        table = _Table(slabs, group, first_row)
        self._last = (extents, table)
        return table

    def _run(self, tile: kernel.Tile, table: _Table, probes: kernel.Probes, piece: _Piece, width: int) -> Int64 | None:
        """The records of the survivors of a piece, int64 [m]; None if it has too many."""
        pool, found = self.pool, self.pool.found
        slabs = kernel.Slabs(*(column[piece.slab_first : piece.slab_last] for column in table.slabs))
        some = kernel.Probes(
            probes.codes[piece.probe_first : piece.probe_last],
            probes.cuts[:, piece.probe_first : piece.probe_last].contiguous(),
        )
        rows_per_slab = pool.rows_per_slab(width)

        def launched(tiles: torch.Tensor | None) -> tuple[Int64, int, int]:
            found.survivors[: kernel.HEADER] = 0
            pool.device.launch(tile, pool.codes, slabs, some, found, rows_per_slab, tiles)
            # Copies, since the next launch writes to the same buffer.
            read = found.survivors[: kernel.HEADER + _READ_AHEAD].to("cpu", copy=True).numpy()
            count, lost = int(read[0]), int(read[1])
            kept = min(count, len(found.survivors) - kernel.HEADER)
            if kept > _READ_AHEAD:
                read = found.survivors[: kernel.HEADER + kept].to("cpu", copy=True).numpy()
            return read[kernel.HEADER : kernel.HEADER + kept], count, lost

        places, count, lost = launched(None)
        if not lost:
            return places
        one_slab = piece.slab_last - piece.slab_first == 1
        one_tile = piece.probe_last - piece.probe_first == tile.probes
        if (count > _TOGETHER_MAX or lost > len(found.lost)) and not (one_slab and one_tile):
            return None
        tiles = found.lost[:lost].clone()
        at_once = max(1, (len(found.survivors) - kernel.HEADER) // (tile.rows * tile.probes))
        again = [launched(tiles[start : start + at_once])[0] for start in range(0, lost, at_once)]
        # A tile that lacked room may have written some of its survivors before.
        return np.unique(np.concatenate([places, *again]))


def _on_device(
    device: torch.device, codes: NDArray[np.int8], cuts: NDArray[np.int32], padded: int, width: int
) -> kernel.Probes:
    wide = np.zeros((padded, width), np.int8)
    wide[: len(codes), : codes.shape[1]] = codes
    cut = np.full((len(cuts), padded), CUT_OFF_MAX, np.int32)
    cut[:, : len(codes)] = np.where(cuts > 0, cuts, CUT_OFF_MAX)
    return kernel.Probes(torch.from_numpy(wide).to(device), torch.from_numpy(cut).to(device))


def _halves(piece: _Piece, probes: int) -> list[_Piece]:
    tiles = (piece.probe_last - piece.probe_first) // probes
    if tiles > 1:
        middle = piece.probe_first + tiles // 2 * probes
        return [piece._replace(probe_last=middle), piece._replace(probe_first=middle)]
    middle = (piece.slab_first + piece.slab_last) // 2
    return [piece._replace(slab_last=middle), piece._replace(slab_first=middle)]


def _sorted_out(places: Int64, table: _Table, piece: _Piece, rows_per_slab: int) -> Pairs:
    probes = (places & (kernel.PROBES_MAX - 1)) + piece.probe_first
    slabs, rows = np.divmod(places >> kernel.PROBE_BITS, rows_per_slab)
    slabs += piece.slab_first
    return Pairs(probes, table.group[slabs], table.first_row[slabs] + rows)
