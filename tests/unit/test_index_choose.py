"""Which codes serve a floor: a measured rule that changes speed and never an answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.index import certificate, choose
from matcher_service.index.fastscan import build_fastscan
from matcher_service.terms import Float32


def rate_of(tables: int, along: float, across: float) -> choose.Rate:
    """One part whose rows are all alike, and tables that are not rounded."""
    floors = choose.FLOORS.astype(np.float64)
    cut_offs = floors * along - np.sqrt(1 - floors**2) * across * certificate.tail(512)
    return choose.Rate(tables, along, across, cut_offs[None])


RATES = {5: rate_of(102, 0.569, 0.496), 2: rate_of(256, 0.892, 0.311)}


def isotropic(rows: int = 3000, dimension: int = 512) -> np.ndarray:
    vectors = np.random.default_rng(1).standard_normal((rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def costs_of(rows: int, rates: dict[int, choose.Rate]) -> choose.Costs:
    stored = isotropic()
    return choose.Costs(rows, 512, choose.sample_cosines(stored), rates, choose.looked_at(stored), 0.02)


def planned(costs: choose.Costs, floors: list[float], probes: np.ndarray | None = None) -> list[int]:
    asked: Float32 = np.array(floors, np.float32)
    vectors = isotropic(4000)[3000 : 3000 + len(floors)].astype(np.float32) if probes is None else probes
    return costs.plan(vectors, np.ones(len(floors)), asked, np.isfinite(asked) & (asked > 0)).tolist()


def test_high_floors_go_to_coarse_codes_lower_ones_to_fine_codes_and_the_lowest_to_a_full_scan() -> None:
    costs = costs_of(1_000_000, RATES)
    assert planned(costs, [0.7, 0.3] * 8) == [5, 2] * 8
    # A full scan that is made anyway serves what fine codes would, and not what coarse ones serve faster.
    assert planned(costs, [0.7, 0.3, 0.05, 0.7] * 16) == [5, 0, 0, 5] * 16


def test_probes_that_the_law_cannot_serve_are_scanned_in_full() -> None:
    asked = [float("nan"), float("inf"), -float("inf"), 0.0, -0.5, 1.5]
    assert planned(costs_of(1_000_000, RATES), asked) == [0, 0, 0, 0, 0, 5]


def test_without_codes_everything_is_scanned_in_full() -> None:
    assert planned(costs_of(1000, {}), [0.5, 0.9]) == [0, 0]


def test_few_rows_are_scanned_in_full_for_one_probe_and_filtered_for_many() -> None:
    costs = costs_of(1500, RATES)
    assert planned(costs, [0.6]) == [0]
    assert 0 not in planned(costs, [0.6] * 64)


def test_a_probe_amid_a_crowd_is_told_by_the_rows_it_is_compared_with() -> None:
    """Half of the rows are one face, which the pairs of stored rows do not show: near duplicates do not count."""
    stored = isotropic()
    stored[::2] = stored[0]
    costs = choose.Costs(1_000_000, 512, choose.sample_cosines(stored), RATES, choose.looked_at(stored), 0.02)
    probes = np.concatenate([stored[:1].astype(np.float32), isotropic(4000)[3000:3063].astype(np.float32)])
    plans = planned(costs, [0.5] * 64, probes)
    assert plans[0] == 0
    assert set(plans[1:]) == {5}


@given(st.lists(st.tuples(st.floats(0.5, 300.0), st.sampled_from([0.0, 0.001, 0.1])), min_size=1, max_size=12))
def test_no_other_choice_of_those_that_share_a_full_scan_costs_less(costs_of_probes: list[tuple[float, float]]) -> None:
    costs = costs_of(10**9, RATES)
    codes_ns, strays = np.array(costs_of_probes).T
    in_full = costs._in_full(codes_ns, strays)

    def cost(whole: np.ndarray) -> np.ndarray:
        """Of choices, bool [m, n]; float64 [m]."""
        many = 512 * (choose._CODE_NS + whole @ (choose._SUM_NS + choose._STRAY_NS * strays))
        few = 512 * choose._FEW_NS * whole.sum(axis=1)
        return ~whole @ codes_ns + np.where(whole.sum(axis=1) > choose.FEW_PROBES, many, few)

    every = np.array(list(itertools.product([False, True], repeat=len(codes_ns))))
    assert cost(in_full[None])[0] <= cost(every).min() * (1 + 1e-9)


def test_the_share_taken_falls_with_the_floor_and_with_the_rate_and_rises_with_the_cosine() -> None:
    coarse, fine = (choose.taken_shares(rate, 512) for rate in RATES.values())
    assert (np.diff(coarse, axis=0) <= 0).all()
    assert (np.diff(coarse, axis=1) >= 0).all()
    unrelated = choose.BINS // 2
    for floor in (20, 30, 40):
        assert coarse[floor, unrelated] > 2 * fine[floor, unrelated]


@pytest.mark.parametrize("floor", [0.2, 0.22])
def test_the_rows_that_a_filter_takes_are_foreseen(floor: float) -> None:
    """Within a factor of two: the choice between a filter and a full scan rests on it."""
    stored = isotropic(20_000)
    scanner = build_fastscan(stored, blocks=(2,), entropy=3)
    probes = isotropic(20_064)[20_000:].astype(np.float32)
    floors = np.full(64, floor, np.float32)
    rotated = scanner._rotation(probes)
    cut_offs, _ = scanner._cut_offs(scanner._codes[2], floors, np.ones(64), rotated)
    taken = sum(
        int(scanner._codes[2].near(part, rotated / cut_offs[part, :, None].astype(np.float32))[0][-1])
        for part in range(scanner._codes[2].parts)
    )
    steps = np.round(floors * 100).astype(np.int64)
    foreseen = float(scanner._costs._seen(probes, np.ones(64), steps)[0].sum()) * len(stored)
    assert foreseen / 2 <= taken <= 2 * foreseen


def test_near_duplicates_do_not_count_as_what_a_probe_usually_meets() -> None:
    stored = isotropic()
    stored[::2] = stored[0]
    assert choose.sample_cosines(stored)[-10:].sum() == 0.0


@pytest.mark.parametrize(("count", "low", "high"), [(10, 0.10, 0.16), (300, 0.05, 0.07)])
def test_the_score_of_the_best_few_is_foreseen(count: int, low: float, high: float) -> None:
    costs = costs_of(3000, RATES)
    assert low <= costs.floor_of_best(count) <= high


def test_the_rates_of_a_dimension_fit_its_memory_and_the_kernel() -> None:
    assert choose.blocks(512) == (5, 2)
    assert choose.blocks(128) == (2, 1)
    assert choose.blocks(32) == choose.blocks(63) == ()
    assert not choose.worth_codes(100, 512)
    assert choose.worth_codes(100_000, 512)
