"""The filter on the device: which pairs of a row and a probe reach their integer cut-off.

One program takes a tile of rows, holds its codes in shared memory where they fit, and goes through the probes. The
sums of a tile live in registers (int8 products, int32 sums: exact) and are compared with one integer per probe;
only the places of what reached it are written, at slots that an atomic counter gives out. Nothing else leaves the
chip. A tile that is given a slot beyond the buffer names itself in a list, so that the host can run that tile again
with room for it; nothing is dropped.

Written in the Triton language: on Hopper `tl.dot` of int8 becomes `wgmma ... s32.s8.s8` (a test compiles for it);
without a GPU the interpreter (TRITON_INTERPRET=1, set before this module is imported) runs the same code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# A survivor is place << PROBE_BITS | probe, the place being slab * rows per slab + row.
PROBE_BITS = 20
PROBES_MAX = 1 << PROBE_BITS
# int64 numbers before the survivors in their buffer: how many there are, how many tiles lack room, two unused
# (so that the survivors stay aligned).
HEADER = 4


class Tile(NamedTuple):
    """The shape in which the kernel works: `rows` and `probes` of a tile, powers of two of 16 or more; `warps` and
    `stages` as Triton has them."""

    rows: int
    probes: int
    warps: int
    stages: int


# For up to 16 probes: bound by reading the codes, so small tiles, many of them in flight.
FEW = Tile(rows=64, probes=16, warps=4, stages=3)
# Beyond: bound by the tensor cores; of 64 or 128 columns an instruction, since one of fewer waits for shared memory.
SOME = Tile(rows=128, probes=64, warps=8, stages=2)
MANY = Tile(rows=128, probes=128, warps=8, stages=2)
# What MANY takes where products come from registers (compute capability 8); on 9 it takes 198 KB, and has 227.
_MANY_SHARED_BYTES = 140_000
# A tile of rows is held whole up to this width; of wider rows, so many values are multiplied at a time.
_HELD_MAX = 512
_CHUNK = 128


class Slabs(NamedTuple):
    """Which rows to look at, per slab, on the device: where its first code stands (int64 [m], in the codes), how
    many rows (int32 [m]), and which row of the cut-offs holds for them (int32 [m])."""

    at: torch.Tensor
    rows: torch.Tensor
    law: torch.Tensor


class Probes(NamedTuple):
    """n probes padded to a multiple of the tile's: codes int8 [n, width], cut-offs int32 [laws, n]. Padding and
    probes that are not served have a cut-off that nothing reaches."""

    codes: torch.Tensor
    cuts: torch.Tensor


class Found(NamedTuple):
    """Where survivors go: `survivors` int64 [HEADER + capacity], `lost` int64 [m] for tiles that lacked room."""

    survivors: torch.Tensor
    lost: torch.Tensor


@triton.jit
def filter_rows(
    codes,
    slab_at,
    slab_rows,
    slab_law,
    probes,
    cuts,
    tiles,
    survivors,
    lost,
    probe_count,
    capacity,
    lost_capacity,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PROBES: tl.constexpr,
    TILES_PER_SLAB: tl.constexpr,
    LISTED: tl.constexpr,
    BITS: tl.constexpr,
    FIRST_SLOT: tl.constexpr,
):
    if LISTED:
        tile = tl.load(tiles + tl.program_id(0))
        row_tile = (tile // (probe_count // PROBES)).to(tl.int32)
        probe_first = (tile % (probe_count // PROBES)).to(tl.int32) * PROBES
        probe_last = probe_first + PROBES
    else:
        row_tile = tl.program_id(0)
        probe_first = 0
        probe_last = probe_count
    slab = row_tile // TILES_PER_SLAB
    first = (row_tile % TILES_PER_SLAB) * ROWS
    valid = tl.load(slab_rows + slab) - first
    if valid > 0:
        law = tl.load(slab_law + slab).to(tl.int64)
        start = tl.multiple_of(tl.load(slab_at + slab), 16) + first.to(tl.int64) * WIDTH
        row = tl.arange(0, ROWS)
        column = tl.arange(0, CHUNK)
        codes_at = codes + start + (row * WIDTH)[:, None] + column[None, :]
        if CHUNK == WIDTH:
            held = tl.load(codes_at)
        for probe_at in range(probe_first, probe_last, PROBES):
            probe = probe_at + tl.arange(0, PROBES)
            probes_at = probes + (probe * WIDTH)[:, None] + column[None, :]
            if CHUNK == WIDTH:
                sums = tl.dot(held, tl.trans(tl.load(probes_at)), out_dtype=tl.int32)
            else:
                sums = tl.zeros((ROWS, PROBES), tl.int32)
                for k in range(0, WIDTH, CHUNK):
                    sums = tl.dot(tl.load(codes_at + k), tl.trans(tl.load(probes_at + k)), sums, out_dtype=tl.int32)
            cut = tl.load(cuts + law * probe_count + probe)
            reached = (sums >= cut[None, :]) & (row < valid)[:, None]
            # Each row's survivors are written one after another, the first probe first: `turn` counts down.
            turn = (PROBES - tl.arange(0, PROBES))[None, :]
            best = tl.max(tl.where(reached, turn, 0), axis=1)
            if tl.max(best, axis=0) > 0:
                place = (slab.to(tl.int64) * (TILES_PER_SLAB * ROWS) + first + row) << BITS
                counter = survivors + tl.zeros((ROWS,), tl.int32)
                refused = best < 0
                while tl.max(best, axis=0) > 0:
                    slot = tl.atomic_add(counter, 1, mask=best > 0, sem="relaxed")
                    record = place | (probe_at + PROBES - best).to(tl.int64)
                    tl.store(survivors + FIRST_SLOT + slot, record, mask=(best > 0) & (slot < capacity))
                    refused = refused | ((best > 0) & (slot >= capacity))
                    best = tl.max(tl.where(reached & (turn < best[:, None]), turn, 0), axis=1)
                if tl.max(refused.to(tl.int32), axis=0) > 0:
                    number = tl.atomic_add(survivors + 1, 1, sem="relaxed")
                    this = row_tile.to(tl.int64) * (probe_count // PROBES) + probe_at // PROBES
                    tl.store(lost + number, this, mask=number < lost_capacity)


def tile_for(probes: int, shared_bytes: int) -> Tile:
    """The shape for a batch of so many probes, on a device whose programs may have so much shared memory."""
    if probes <= FEW.probes:
        return FEW
    return SOME if probes <= SOME.probes or shared_bytes < _MANY_SHARED_BYTES else MANY


def width_of(dimension: int) -> int:
    """Codes per row: the dimension, padded with zeros to a power of two, or to a multiple of 128 beyond 512."""
    if dimension > _HELD_MAX:
        return -(-dimension // _CHUNK) * _CHUNK
    return max(32, 1 << (dimension - 1).bit_length())


def constants(tile: Tile, width: int, rows_per_slab: int, *, listed: bool) -> dict[str, Any]:
    """What the kernel is compiled with."""
    return {
        "WIDTH": width,
        "CHUNK": width if width <= _HELD_MAX else _CHUNK,
        "ROWS": tile.rows,
        "PROBES": tile.probes,
        "TILES_PER_SLAB": rows_per_slab // tile.rows,
        "LISTED": listed,
        "BITS": PROBE_BITS,
        "FIRST_SLOT": HEADER,
    }


def launch(
    tile: Tile,
    codes: torch.Tensor,
    slabs: Slabs,
    probes: Probes,
    found: Found,
    rows_per_slab: int,
    tiles: torch.Tensor | None = None,
) -> None:
    """Add to `found` what reaches its cut-off: in all tiles, or in those that `tiles`, int64 [m], names."""
    programs = len(slabs.rows) * (rows_per_slab // tile.rows) if tiles is None else len(tiles)
    if not programs:
        return
    filter_rows[(programs,)](
        codes,
        slabs.at,
        slabs.rows,
        slabs.law,
        probes.codes,
        probes.cuts,
        found.lost if tiles is None else tiles,
        found.survivors,
        found.lost,
        probes.codes.shape[0],
        found.survivors.shape[0] - HEADER,
        found.lost.shape[0],
        **constants(tile, probes.codes.shape[1], rows_per_slab, listed=tiles is not None),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
