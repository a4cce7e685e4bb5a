"""Sums of integer codes by ONNX Runtime: the numbers of int64 arithmetic, and no row that reaches a floor below its
cut-off."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matcher_service.index import integer_products
from matcher_service.index.integer_bound import (
    CODE_MAX,
    CUT_OFF_MIN,
    MIDDLE,
    code_rows,
    law_measured,
    law_within,
    longest_error,
    scale_of,
)
from matcher_service.index.integer_products import Sums, probe_code_max, sums_into, sums_of_codes_into
from matcher_service.index.score import exact_scores, norms


@pytest.fixture
def unknown_processor() -> Iterator[None]:
    probe_code_max.cache_clear()
    yield
    probe_code_max.cache_clear()


def all_sums(sums: Sums, rows: int, probes: int) -> np.ndarray:
    found = np.full((rows, probes), CUT_OFF_MIN, np.int32)
    for first, some in sums.blocks(slice(0, rows)):
        found[first : first + len(some)] = some
    return found


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 3000),
    dimension=st.sampled_from([1, 3, 64, 130, 512]),
    probes=st.integers(1, 70),
    extreme=st.booleans(),
)
def test_law_2_sums_are_those_of_integers(seed: int, rows: int, dimension: int, probes: int, extreme: bool) -> None:
    draw = np.random.default_rng(seed)
    most = probe_code_max()
    ends = [-CODE_MAX, CODE_MAX] if extreme else list(range(-CODE_MAX, CODE_MAX + 1))
    coded = (draw.choice(ends, (rows, dimension)) + MIDDLE).astype(np.uint8)
    codes = draw.choice([-most, most] if extreme else list(range(-most, most + 1)), (dimension, probes)).astype(np.int8)
    found = np.empty((rows, probes), np.int32)
    sums_of_codes_into(found, coded, codes)
    assert np.array_equal(found, (coded.astype(np.int64) - MIDDLE) @ codes.astype(np.int64))


@pytest.mark.parametrize("largest", [6e-8, 1e-4, 0.2, 1.0, 60_000.0])
def test_rows_are_coded_on_their_scale_and_rounded_to_the_nearest(largest: float) -> None:
    draw = np.random.default_rng(3)
    stored = (draw.uniform(-largest, largest, (2500, 96))).astype(np.float16)
    stored[7, 5] = largest
    codes, law = code_rows(stored)
    wide = stored.astype(np.float64)
    off = np.abs(codes.astype(np.float64) - MIDDLE - wide / law.scale)
    assert off.max() <= 0.5
    assert codes.max() == MIDDLE + CODE_MAX
    # The same as they are read: a product with the unit vectors shows the codes.
    found = np.empty((2500, 96), np.int32)
    sums_into(found, stored, law.scale, np.eye(96, dtype=np.int8))
    near = np.abs(found - wide / law.scale)
    assert near.max() <= 0.5 + 2.0**-12
    assert np.abs(found).max() == CODE_MAX


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    dimension=st.sampled_from([1, 3, 64, 512]),
    length=st.sampled_from([1.0, 1e-6, 0.2, 7.0]),
    probe_length=st.sampled_from([1.0, 1e-3, 1e7]),
    spiky=st.booleans(),
    held=st.booleans(),
)
def test_law_2_a_row_at_or_above_the_floor_always_reaches_the_cut_off(
    seed: int, dimension: int, length: float, probe_length: float, spiky: bool, held: bool
) -> None:
    """Floors are put at the very scores, and one float32 number around them."""
    draw = np.random.default_rng(seed)
    wide = draw.standard_normal((80, dimension))
    if spiky:
        wide = wide**5
    stored = (length * wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
    probes = (wide[:9] + draw.standard_normal((9, dimension))).astype(np.float32)
    probes *= np.float32(probe_length) / np.maximum(np.linalg.norm(probes, axis=1, keepdims=True), 1e-9)
    codes, law = code_rows(stored)
    assumed = law_within(float(np.abs(stored).max()), float(norms(stored).max()), dimension)
    assert assumed.scale == law.scale
    assert assumed.error >= law.error
    assert assumed.reach >= law.reach
    known = law_measured(
        law.scale, longest_error(stored.astype(np.float32), law.scale), float(norms(stored).max()), dimension
    )
    assert law.error <= known.error <= 1.01 * law.error + law.scale * 2.0**-9 * dimension**0.5
    assert law.reach <= known.reach <= assumed.reach
    sums = Sums(stored, codes if held else None, law if held else assumed, probes)
    found = all_sums(sums, 80, 9)
    scores = np.array([exact_scores(stored, probe) for probe in probes]).T
    for rank in (1, 2, 40, 80):
        at = np.sort(scores, axis=0)[-rank]
        for floors in (at, np.nextafter(at, np.float32(-9e9)), np.nextafter(at, np.float32(9e9))):
            assert not ((scores >= floors) & (found < sums.cuts.of(floors))).any()


def test_the_bounds_are_tight_enough_to_filter() -> None:
    draw = np.random.default_rng(7)
    wide = draw.standard_normal((20_000, 512))
    stored = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
    probes = (stored[:50] + 0.04 * draw.standard_normal((50, 512))).astype(np.float32)
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    sums = Sums(stored, None, law_within(float(np.abs(stored).max()), 1.001, 512), probes)
    reached = all_sums(sums, 20_000, 50) >= sums.cuts.of(np.full(50, 0.3, np.float32))
    assert 50 <= reached.sum() <= 60
    near = all_sums(sums, 20_000, 50) >= sums.cuts.near(np.full(50, 0.3, np.float32))
    assert near.sum() == 50


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_probe_without_codes_keeps_every_row_and_disturbs_no_other(value: float) -> None:
    draw = np.random.default_rng(8)
    stored = (draw.standard_normal((300, 64)) / 8).astype(np.float16)
    probes = (draw.standard_normal((3, 64)) / 8).astype(np.float32)
    alone = all_sums(Sums(stored, None, code_rows(stored)[1], probes[[0, 2]]), 300, 2)
    probes[1] = value
    sums = Sums(stored, None, code_rows(stored)[1], probes)
    assert sums.cuts.served.tolist() == [True, False, True]
    assert sums.cuts.of(np.full(3, 0.9, np.float32))[1] == CUT_OFF_MIN
    assert np.array_equal(all_sums(sums, 300, 3)[:, [0, 2]], alone)


def test_endless_floors_have_cut_offs_at_the_ends() -> None:
    stored = np.ones((2, 4), np.float16)
    sums = Sums(stored, None, code_rows(stored)[1], np.ones((2, 4), np.float32))
    assert sums.cuts.of(np.array([-np.inf, np.inf], np.float32)).tolist() == [CUT_OFF_MIN, 2**31 - 1]


def test_rows_of_zeros_have_a_scale() -> None:
    codes, law = code_rows(np.zeros((3, 8), np.float16))
    assert (codes == MIDDLE).all()
    assert law.scale == scale_of(0.0) == 1.0
    assert code_rows(np.empty((0, 8), np.float16))[0].shape == (0, 8)


@pytest.mark.usefixtures("unknown_processor")
def test_a_processor_that_cuts_sums_off_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those do that add two products of bytes in 16 bits."""
    honest = integer_products.sums_of_codes_into

    def saturating(out: np.ndarray, coded: np.ndarray, codes: np.ndarray) -> None:
        products = coded.astype(np.int64)[:, :, None] * codes.astype(np.int64)[None]
        pairs = np.clip(products[:, 0::2] + products[:, 1::2], -(2**15), 2**15 - 1)
        out[:] = pairs.sum(axis=1) - MIDDLE * codes.sum(axis=0, dtype=np.int64)

    monkeypatch.setattr(integer_products, "sums_of_codes_into", saturating)
    assert probe_code_max() == CODE_MAX // 2
    probe_code_max.cache_clear()
    monkeypatch.setattr(integer_products, "sums_of_codes_into", honest)
    assert probe_code_max() in (CODE_MAX // 2, CODE_MAX)


@pytest.mark.usefixtures("unknown_processor")
def test_a_library_that_multiplies_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_products, "sums_of_codes_into", lambda out, coded, codes: out.fill(1))
    with pytest.raises(RuntimeError, match="another release"):
        probe_code_max()
