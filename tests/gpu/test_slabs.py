"""Slabs are allocated once; rows are appended, ended and let go in them without moving, within a budget."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from matcher_service.errors import MemoryRefused
from matcher_service.index.gpu import kernel
from matcher_service.index.gpu.codes import choose_scale, encode, usual_scale
from matcher_service.index.gpu.slabs import Placed, SlabPool
from tests.gpu.chips import Breakable, quick

SLAB = 1 << 15  # 512 rows of 64


def pool(slabs: int = 8) -> SlabPool:
    return SlabPool(Breakable(), slabs * SLAB, slab_bytes=SLAB, tile_for=quick)


def unit(seed: int, rows: int, dimension: int = 64) -> np.ndarray:
    wide = np.random.default_rng(seed).standard_normal((rows, dimension))
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)


def codes_in(placed: Placed) -> np.ndarray:
    rows = placed.extent.rows
    return np.concatenate([part.cpu().numpy() for _, part in placed.first_slabs(rows)] or [np.empty((0, 64), np.int8)])


def test_appending_writes_behind_what_is_there_and_allocates_nothing() -> None:
    into, stored = pool(), unit(1, 1300)
    memory = into.codes.data_ptr()
    placed, seen = Placed(into, 64, usual_scale(64)), []
    for some in np.split(stored, [1, 2, 500, 512, 513, 1200]):
        placed.append(some)
        seen.append(placed.extent)
    assert into.codes.data_ptr() == memory
    assert into.slabs_free == 8 - 3
    assert [extent.rows for extent in seen] == [1, 2, 500, 512, 513, 1200, 1300]
    assert [int(extent.counts.sum()) for extent in seen] == [1, 2, 500, 512, 513, 1200, 1300]
    assert np.array_equal(codes_in(placed), encode(stored, usual_scale(64), "cpu").codes.numpy())
    # What an earlier reader was told is still so.
    assert seen[0].counts.tolist() == [1]
    assert seen[0].at.tolist() == seen[-1].at[:1].tolist()


def test_the_law_of_the_rows_covers_each_row_and_only_grows() -> None:
    into, stored = pool(), unit(2, 600)
    stored[300:] = (stored[300:].astype(np.float32) * 1.5).astype(np.float16)
    placed = Placed(into, 64, usual_scale(64), odd_max=0)
    for some in np.split(stored, 6):
        before = placed.extent.law
        placed.append(some)
        assert placed.extent.law.error >= before.error
        assert placed.extent.law.reach >= before.reach
    near = codes_in(placed)[:, :64].astype(np.float64) * usual_scale(64)
    wide = stored.astype(np.float64)
    assert np.linalg.norm(wide - near, axis=1).max() <= placed.extent.law.error
    assert np.linalg.norm(near, axis=1).max() <= placed.extent.law.reach


def test_rows_far_worse_than_the_rest_get_no_codes_and_do_not_loosen_the_law() -> None:
    stored = unit(3, 500)
    stored[::50] = 0
    stored[::50, 0] = 60.0
    encoded = encode(stored, usual_scale(64), "cpu")
    assert encoded.odd.tolist() == list(range(0, 500, 50))
    assert not encoded.codes[torch.from_numpy(encoded.odd)].any()
    assert encoded.law.error < 2.5 * usual_scale(64) * (64 / 12) ** 0.5
    few = encode(stored, usual_scale(64), "cpu", odd_max=4)
    assert few.odd.size == 4
    assert few.law.error > 10


def test_an_ended_row_is_all_zeros_and_its_neighbours_are_not() -> None:
    into = pool()
    placed = Placed(into, 64, usual_scale(64))
    placed.append(unit(4, 1100))
    before = codes_in(placed)
    gone = np.array([0, 511, 512, 1099])
    placed.end(gone)
    after = codes_in(placed)
    assert not after[gone].any()
    kept = np.delete(np.arange(1100), gone)
    assert np.array_equal(after[kept], before[kept])


def test_a_full_device_refuses_with_what_to_do_and_nothing_has_changed() -> None:
    into = pool(3)
    placed, other = Placed(into, 64, usual_scale(64)), Placed(into, 64, usual_scale(64))
    placed.append(unit(5, 600))
    with pytest.raises(MemoryRefused, match=r"index\.gpu_bytes_max: .* 1 of 3 slabs free") as refused:
        other.append(unit(6, 600))
    assert refused.value.hint
    assert (other.extent.rows, into.slabs_free) == (0, 1)
    with pytest.raises(MemoryRefused):
        placed.append(unit(7, 2000))
    assert placed.extent.rows == 600
    placed.append(unit(7, 900))
    assert (placed.extent.rows, into.slabs_free) == (1500, 0)


def test_slabs_of_rows_that_nobody_holds_are_erased_and_used_again() -> None:
    into = pool(2)
    placed = Placed(into, 64, usual_scale(64))
    placed.append(unit(8, 1024))
    assert into.slabs_free == 0
    extent = placed.extent
    del placed
    gc.collect()
    into.collect()
    assert into.slabs_free == 2
    assert not into.codes.any(), "biometric data left in device memory"
    assert extent.rows == 1024
    again = Placed(into, 64, usual_scale(64))
    again.append(unit(9, 1024))
    assert codes_in(again).any(axis=1).all()


def test_dimensions_share_a_pool() -> None:
    into = SlabPool(Breakable(), 6 << 17, slab_bytes=1 << 17, tile_for=quick)
    for dimension in (32, 100, 512):
        placed = Placed(into, dimension, usual_scale(dimension))
        placed.append(unit(dimension, 300, dimension))
        assert placed.width == kernel.width_of(dimension)
        near = codes_in(placed)
        assert near.shape == (300, placed.width)
        assert not near[:, dimension:].any()


@pytest.mark.parametrize(("length", "power"), [(1.0, 1), (0.1, 1), (5.0, 3)])
def test_the_chosen_scale_is_about_the_best_there_is(length: float, power: int) -> None:
    wide = np.random.default_rng(10).standard_normal((400, 128)) ** power
    stored = (length * wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
    wide = stored.astype(np.float64)

    def error(scale: float) -> float:
        near = np.clip(np.rint(wide / scale), -127, 127) * scale
        return float(np.quantile(np.linalg.norm(wide - near, axis=1), 0.99))

    best = min(error(float(scale)) for scale in np.geomspace(1e-4, 0.3, 60) * length)
    assert error(choose_scale(stored)) < 1.25 * best


def test_a_gallery_of_nothing_or_of_zeros_has_a_scale() -> None:
    assert choose_scale(np.empty((0, 64), np.float16)) == usual_scale(64)
    assert choose_scale(np.zeros((3, 64), np.float16)) == usual_scale(64)
