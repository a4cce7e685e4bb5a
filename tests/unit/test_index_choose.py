"""Which codes serve a floor: a measured rule that changes speed and never an answer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from matcher_service.index import choose
from matcher_service.terms import Float32

RATES = {8: choose.Rate(64, 0.399, 0.492), 2: choose.Rate(256, 0.892, 0.311)}


def isotropic(rows: int = 3000, dimension: int = 512) -> np.ndarray:
    vectors = np.random.default_rng(1).standard_normal((rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def planned(costs: choose.Costs, floors: list[float]) -> list[int]:
    asked: Float32 = np.array(floors, np.float32)
    return costs.plan(asked, np.isfinite(asked) & (asked > 0)).tolist()


def test_high_floors_go_to_coarse_codes_lower_ones_to_fine_codes_and_the_lowest_to_a_full_scan() -> None:
    costs = choose.Costs(1_000_000, 512, choose.sample_cosines(isotropic()), RATES)
    batch = [0.7, 0.35, 0.05, 0.7] * 16
    assert planned(costs, batch)[:4] == [8, 2, 0, 8]


def test_probes_that_the_law_cannot_serve_are_scanned_in_full() -> None:
    costs = choose.Costs(1_000_000, 512, choose.sample_cosines(isotropic()), RATES)
    assert planned(costs, [float("nan"), float("inf"), -float("inf"), 0.0, -0.5, 1.5]) == [0, 0, 0, 0, 0, 8]


def test_without_codes_everything_is_scanned_in_full() -> None:
    assert planned(choose.Costs(1000, 512, choose.sample_cosines(isotropic()), {}), [0.5, 0.9]) == [0, 0]


def test_a_handful_of_rows_is_scanned_in_full_for_one_probe_and_filtered_for_many() -> None:
    costs = choose.Costs(8000, 512, choose.sample_cosines(isotropic()), RATES, convert_ns=0.0)
    assert planned(costs, [0.6]) == [0]
    assert 0 not in planned(costs, [0.6] * 100)


def test_the_share_taken_falls_with_the_floor_and_with_the_rate() -> None:
    cosines = choose.sample_cosines(isotropic())
    shares = [
        [choose.taken_share(floor, rate, 512, cosines, 0.2658) for floor in (0.2, 0.3, 0.4, 0.5)]
        for rate in RATES.values()
    ]
    assert all(a > b for coarse in shares for a, b in pairwise(coarse))
    assert all(coarse > fine for coarse, fine in zip(*shares, strict=True))


def test_near_duplicates_do_not_count_as_what_a_probe_usually_meets() -> None:
    stored = isotropic()
    stored[::2] = stored[0]
    assert choose.sample_cosines(stored)[-10:].sum() == 0.0


@pytest.mark.parametrize(("count", "low", "high"), [(10, 0.10, 0.16), (300, 0.05, 0.07)])
def test_the_score_of_the_best_few_is_foreseen(count: int, low: float, high: float) -> None:
    costs = choose.Costs(3000, 512, choose.sample_cosines(isotropic()), RATES)
    assert low <= costs.floor_of_best(count) <= high


def test_the_rates_of_a_dimension_fit_its_memory_and_the_kernel() -> None:
    assert choose.blocks(512) == (8, 2)
    assert choose.blocks(128) == (4, 1)
    assert choose.blocks(32) == choose.blocks(63) == ()
    assert not choose.worth_codes(100, 512)
    assert choose.worth_codes(100_000, 512)
