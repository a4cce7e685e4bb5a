"""The filter finds exactly the pairs whose integer product reaches the cut-off, however little room there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from matcher_service.index.gpu import filter as filters
from matcher_service.index.gpu import kernel
from matcher_service.index.gpu.filter import Filter
from matcher_service.index.gpu.slabs import Placed, SlabPool
from tests.gpu.chips import FINE, REAL, Breakable, quick

ROOM = FINE.rows * FINE.probes


def pool(survivors: int = 1 << 16, slabs: int = 40, **more: object) -> SlabPool:
    return SlabPool(Breakable(), slabs << 15, slab_bytes=1 << 15, survivors=survivors, **more)  # type: ignore[arg-type]


def placed_rows(into: SlabPool, seed: int, rows: int, dimension: int = 64) -> tuple[Placed, np.ndarray]:
    source = np.random.default_rng(seed)
    stored = (source.standard_normal((rows, dimension)) / dimension**0.5).astype(np.float16)
    placed = Placed(into, dimension, 0.005, odd_max=0)
    placed.append(stored)
    return placed, stored


def wanted(placed: list[Placed], codes: np.ndarray, cuts: np.ndarray) -> set[tuple[int, int, int]]:
    """By plain integers, from the codes that are on the device."""
    found = set()
    for group, one in enumerate(placed):
        rows = np.concatenate([part.cpu().numpy() for _, part in one.first_slabs(one.extent.rows)])
        sums = codes.astype(np.int64) @ rows[:, : codes.shape[1]].astype(np.int64).T
        cut = cuts[group].astype(np.int64)
        for probe, row in zip(*np.nonzero((sums >= cut[:, None]) & (cut > 0)[:, None]), strict=True):
            found.add((int(probe), group, int(row)))
    return found


def given_by(filter_: Filter, placed: list[Placed], codes: np.ndarray, cuts: np.ndarray) -> list[tuple[int, int, int]]:
    return [
        (int(probe), int(group), int(row))
        for pairs in filter_.pairs([one.extent for one in placed], codes, cuts)
        for probe, group, row in zip(*pairs, strict=True)
    ]


def codes_of(seed: int, count: int, dimension: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, (count, dimension)).astype(np.int8)


@pytest.mark.parametrize("probes", [1, 16, 17, 70])
@pytest.mark.parametrize("shape", ["quick", "fine"])
def test_segments_with_cut_offs_of_their_own_are_filtered_in_one_go(probes: int, shape: str) -> None:
    into = pool(tile_for=(lambda _: FINE) if shape == "fine" else quick)
    placed = [placed_rows(into, seed, rows)[0] for seed, rows in ((1, 700), (2, 1), (3, 512), (4, 65))]
    codes = codes_of(5, probes)
    cuts = np.random.default_rng(6).integers(20_000, 60_000, (4, probes)).astype(np.int32)
    cuts[:, 0] = 0  # not to be served
    found = given_by(Filter(into), placed, codes, cuts)
    assert len(found) == len(set(found))
    assert set(found) == wanted(placed, codes, cuts)


def test_a_cut_off_at_the_very_sum_keeps_the_row_and_the_next_integer_drops_it() -> None:
    into = pool()
    placed, _ = placed_rows(into, 11, 300)
    codes = codes_of(12, 5)
    rows = np.concatenate([part.cpu().numpy() for _, part in placed.first_slabs(300)])[:, :64].astype(np.int64)
    best = (codes.astype(np.int64) @ rows.T).max(axis=1)
    at = given_by(Filter(into), [placed], codes, best[None, :].astype(np.int32))
    assert {probe for probe, _, _ in at} == set(range(5))
    assert given_by(Filter(into), [placed], codes, best[None, :].astype(np.int32) + 1) == []


def test_tiles_that_lack_room_are_run_again_and_nothing_is_lost_or_twice() -> None:
    """Half of all pairs survive, several times what the buffer holds."""
    into = pool(survivors=ROOM, tile_for=lambda _: FINE)
    placed = [placed_rows(into, seed, rows)[0] for seed, rows in ((21, 300), (22, 100))]
    codes = codes_of(23, 20)
    cuts = np.full((2, 20), 1, np.int32)
    before = into.device.launches
    found = given_by(Filter(into), placed, codes, cuts)
    assert len(found) > 3 * ROOM
    assert into.device.launches - before > 2
    assert len(found) == len(set(found))
    assert set(found) == wanted(placed, codes, cuts)


@pytest.mark.parametrize("together", ["few survivors", "few lost tiles"])
def test_more_than_is_sensible_at_once_is_halved_by_probes_then_by_slabs(
    monkeypatch: pytest.MonkeyPatch, together: str
) -> None:
    into = pool(survivors=ROOM, tile_for=lambda _: FINE)
    if together == "few survivors":
        monkeypatch.setattr(filters, "_TOGETHER_MAX", 2000)
    else:
        into.found = kernel.Found(into.found.survivors, torch.zeros(8, dtype=torch.int64, device=into.device.torch))
    placed = [placed_rows(into, seed, rows)[0] for seed, rows in ((31, 600), (32, 70))]
    codes = codes_of(33, 20)
    cuts = np.full((2, 20), 1, np.int32)
    pieces = list(Filter(into).pairs([one.extent for one in placed], codes, cuts))
    assert len(pieces) > 2
    found = [one for pairs in pieces for one in zip(*(column.tolist() for column in pairs), strict=True)]
    assert len(found) == len(set(found))
    assert set(found) == wanted(placed, codes, cuts)


@pytest.mark.parametrize("dimension", [1, 33, 100, 640])
def test_dimensions_of_every_kind_are_padded(dimension: int) -> None:
    into = SlabPool(Breakable(), 8 << 19, slab_bytes=1 << 19, tile_for=quick, survivors=1 << 16)
    placed, _ = placed_rows(into, 41, 300, dimension)
    codes = codes_of(42, 3, dimension)
    cuts = np.full((1, 3), 2000 * max(1, dimension // 8), np.int32)
    assert set(given_by(Filter(into), [placed], codes, cuts)) == wanted([placed], codes, cuts)


def test_a_buffer_that_one_tile_could_overflow_is_refused() -> None:
    with pytest.raises(ValueError, match="less than one tile"):
        pool(survivors=ROOM - 1, tile_for=lambda _: FINE)


@pytest.mark.parametrize(
    ("probes", "shared_bytes", "shape"),
    [
        (1, 232_448, kernel.FEW),
        (16, 101_376, kernel.FEW),
        (17, 232_448, kernel.SOME),
        (65, 232_448, kernel.MANY),
        (4096, 166_912, kernel.MANY),
        (4096, 101_376, kernel.SOME),
    ],
)
def test_the_shape_suits_the_batch_and_the_device(probes: int, shared_bytes: int, shape: kernel.Tile) -> None:
    assert kernel.tile_for(probes, shared_bytes) == shape


@pytest.mark.skipif(not REAL, reason="shapes for a GPU are too slow in the interpreter")
@pytest.mark.parametrize("probes", [1, 16, 17, 64, 65, 300])
def test_the_shapes_for_this_gpu_agree_with_plain_integers(probes: int) -> None:
    into = SlabPool(Breakable(), 64 << 20, slab_bytes=4 << 20)
    placed = [placed_rows(into, seed, rows, 512)[0] for seed, rows in ((51, 20_000), (52, 3000))]
    codes = codes_of(53, probes, 512)
    cuts = np.full((2, probes), 250_000, np.int32)
    assert set(given_by(Filter(into), placed, codes, cuts)) == wanted(placed, codes, cuts)
