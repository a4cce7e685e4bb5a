"""The integer cut-off of the GPU filter loses no row: a deterministic bound, against float64 and exact integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matcher_service.index.integer_bound import CODE_MAX, CUT_OFF_MAX, CodedProbes, Law, code_probes, cut_offs
from matcher_service.index.score import exact_scores


def coded_rows(stored: np.ndarray, scale: float) -> tuple[np.ndarray, Law]:
    wide = stored.astype(np.float64)
    codes = np.clip(np.rint(wide / scale), -CODE_MAX, CODE_MAX)
    lost = np.sqrt(((wide - codes * scale) ** 2).sum(axis=1)).max(initial=0.0)
    reach = np.sqrt(((codes * scale) ** 2).sum(axis=1)).max(initial=0.0)
    up = 1 + 2.0**-36
    return codes.astype(np.int64), Law(scale, float(lost) * up, float(reach) * up)


def loses_nothing(stored: np.ndarray, probes: np.ndarray, floors: np.ndarray, scale: float) -> int:
    """Checks each pair, and gives the number of pairs that a probe with a cut-off lets through."""
    codes, law = coded_rows(stored, scale)
    coded = code_probes(probes)
    cuts = cut_offs(coded, floors[:, None], [law])[0]
    sums = coded.codes.astype(np.int64) @ codes.T
    through = 0
    for probe, (cut, floor) in enumerate(zip(cuts, floors, strict=True)):
        if cut == 0:
            continue
        assert cut >= 1, "a withdrawn row, whose sum is 0, would pass"
        reaching = exact_scores(stored, probes[probe]) >= floor
        assert not (reaching & (sums[probe] < cut)).any()
        through += int((sums[probe] >= cut).sum())
    return through


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    dimension=st.sampled_from([1, 3, 64, 128, 512]),
    length=st.sampled_from([1.0, 1e-6, 0.2, 7.0]),
    spiky=st.booleans(),
    noise=st.floats(0, 3),
    span=st.floats(0.5, 30),
)
def test_law_2_a_row_at_or_above_the_floor_always_reaches_the_cut_off(
    seed: int, dimension: int, length: float, spiky: bool, noise: float, span: float
) -> None:
    """Floors are put at the very scores, and one float32 number around them."""
    source = np.random.default_rng(seed)
    wide = source.standard_normal((60, dimension))
    if spiky:
        wide = wide**5
    stored = (length * wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
    probes = stored[:12].astype(np.float32) / np.float32(length) + noise * source.standard_normal((12, dimension))
    probes = (probes / np.maximum(np.linalg.norm(probes, axis=1, keepdims=True), 1e-9)).astype(np.float32)
    scale = float(np.float32(span * length / (CODE_MAX * dimension**0.5)))
    scores = np.array([exact_scores(stored, probe) for probe in probes])
    for rank in (1, 2, 8):
        at = np.sort(scores, axis=1)[:, -rank]
        for floors in (at, np.nextafter(at, np.float32(-9)), np.nextafter(at, np.float32(9))):
            loses_nothing(stored, probes, floors, scale)


def test_the_bound_is_tight_enough_to_filter() -> None:
    source = np.random.default_rng(7)
    wide = source.standard_normal((4000, 512))
    stored = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
    probes = (stored[:50] + 0.04 * source.standard_normal((50, 512))).astype(np.float32)
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    floors = np.full(50, 0.3, np.float32)
    assert 50 <= loses_nothing(stored, probes, floors, 4.5 / (CODE_MAX * 512**0.5)) <= 60


def test_a_floor_too_low_for_a_positive_cut_off_is_not_served() -> None:
    source = np.random.default_rng(8)
    stored = (source.standard_normal((10, 64)) / 8).astype(np.float16)
    probes = (source.standard_normal((6, 64)) / 8).astype(np.float32)
    _, law = coded_rows(stored, 0.005)
    floors = np.array([-np.inf, -0.5, 0.0, 1e-6, 0.5, np.inf], np.float32)
    cuts = cut_offs(code_probes(probes), floors[:, None], [law])[0]
    assert (cuts[:4] == 0).all()
    assert cuts[4] > 0
    assert cuts[5] == CUT_OFF_MAX


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 1e-40])
def test_a_probe_that_is_no_number_or_nothing_has_no_codes(value: float) -> None:
    probes = np.full((1, 8), value, np.float32)
    coded = code_probes(probes)
    assert coded.scales.tolist() == [0.0]
    assert not coded.codes.any()
    assert cut_offs(coded, np.full((1, 1), 0.5, np.float32), [Law(0.01, 0.1, 1.0)]).tolist() == [[0]]


def test_the_cut_off_grows_with_the_floor_and_falls_with_the_error() -> None:
    source = np.random.default_rng(9)
    coded = code_probes((source.standard_normal((1, 512)) / 22).astype(np.float32))
    assert isinstance(coded, CodedProbes)
    floors = np.linspace(0.1, 0.9, 9, dtype=np.float32)[None, :]
    laws = [Law(0.0016, 0.012, 1.0)] * 9
    rising = cut_offs(coded, floors, laws)[:, 0]
    assert (np.diff(rising) > 0).all()
    looser = cut_offs(coded, floors, [law._replace(error=0.02) for law in laws])[:, 0]
    assert (looser < rising).all()
