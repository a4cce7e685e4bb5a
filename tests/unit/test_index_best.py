"""Law 2: what is picked out of blocks of integer sums is everything that reaches the cut, and enough of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.index import integer_products
from matcher_service.index.best import Best, Picked, beyond, picked_of
from matcher_service.index.integer_bound import code_rows
from matcher_service.index.integer_products import Sums
from matcher_service.index.score import exact_scores, pair_scores
from matcher_service.terms import Float32, Int64


def scores_of(stored: np.ndarray, probes: Float32, counted: list[int], rows: Int64, which: Int64) -> Float32:
    counted.append(rows.size)
    return pair_scores(stored, rows, probes, which)


def picked_in(stored: np.ndarray, probes: Float32, count: int, runs: list[slice], coded: bool) -> tuple[Picked, int]:
    """By two threads, and how many pairs were multiplied."""
    codes, law = code_rows(stored)
    counted: list[int] = []
    products = partial(scores_of, stored, probes, counted)
    best = Best(Sums(stored, codes if coded else None, law, probes), count, products)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(best.take, runs))
    return best.picked(products), sum(counted)


@given(
    seed=st.integers(0, 2**32),
    dimension=st.sampled_from([1, 2, 8, 33]),
    probes=st.integers(1, 5),
    widths=st.lists(st.integers(1, 900), min_size=1, max_size=6),
    count=st.integers(1, 40),
    values=st.sampled_from([1, 3, 50, 10**6]),
    coded=st.booleans(),
)
def test_law_2_all_that_reach_the_cut_are_picked_and_at_least_as_many_as_wanted(
    seed: int, dimension: int, probes: int, widths: list[int], count: int, values: int, coded: bool
) -> None:
    # Few different values: ties with the last one picked.
    draw = np.random.default_rng(seed)
    stored = (draw.integers(-values, values, (sum(widths), dimension)) / values).astype(np.float16)
    asked = (draw.integers(-values, values + 1, (probes, dimension)) / values).astype(np.float32)
    runs = [slice(*run) for run in pairwise(np.concatenate([[0], np.cumsum(widths)]).tolist())]
    picked, _ = picked_in(stored, asked, count, runs, coded)
    for probe in range(probes):
        rows = np.sort(picked.rows[picked.probes == probe])
        if not asked[probe].any():
            assert not rows.size  # it has no codes
            continue
        assert np.array_equal(rows, np.flatnonzero(exact_scores(stored, asked[probe]) >= picked.cuts[probe]))
        assert rows.size >= min(count, len(stored))


@pytest.mark.parametrize("most", [127, 63])
def test_few_of_the_rows_are_multiplied(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(integer_products, "probe_code_max", lambda: most)
    draw = np.random.default_rng(5)
    stored = (draw.standard_normal((60_000, 256)) / 16).astype(np.float16)
    probes = (draw.standard_normal((100, 256)) / 16).astype(np.float32)
    picked, multiplied = picked_in(stored, probes, 10, [slice(0, 30_000), slice(30_000, 60_000)], False)
    assert multiplied < 100 * 600
    for probe in range(100):
        scores = exact_scores(stored, probes[probe])
        assert set(np.argsort(-scores)[:10]) <= set(picked.rows[picked.probes == probe])


def test_law_2_of_the_best_of_several_runs_the_best_are_picked_and_none_where_there_is_none() -> None:
    none = -np.inf
    products = np.array([[0.9, 0.5, 0.6, 0.4], [0.3, 0.2, -0.5, none]], np.float32)
    rows = np.array([[7, 3, 10, 11], [4, 6, 12, -1]])
    for count, expected, cuts in (
        (2, [(0, 7), (0, 10), (1, 4), (1, 6)], [0.6, 0.2]),
        (4, [(0, 3), (0, 7), (0, 10), (0, 11), (1, 4), (1, 6), (1, 12)], [0.4, none]),
        (5, [(0, 3), (0, 7), (0, 10), (0, 11), (1, 4), (1, 6), (1, 12)], [none, none]),
    ):
        picked = picked_of(products, rows, count)
        assert sorted(zip(picked.probes.tolist(), picked.rows.tolist(), strict=True)) == expected
        assert np.array_equal(picked.cuts, np.array(cuts, np.float32))


@given(seed=st.integers(0, 2**32), length=st.sampled_from([1.0, 1e-3, 1e5, 1e7]))
def test_law_2_no_score_of_a_row_that_was_left_is_beyond_the_limit(seed: int, length: float) -> None:
    draw = np.random.default_rng(seed)
    stored = (draw.standard_normal((400, 64)) / 8).astype(np.float16)
    probes = (draw.standard_normal((3, 64)) * length).astype(np.float32)
    picked, _ = picked_in(stored, probes, 5, [slice(0, 400)], True)
    limits = beyond(picked.cuts, probes, float(np.linalg.norm(stored.astype(np.float64), axis=1).max()))
    for probe in range(3):
        left = np.setdiff1d(np.arange(400), picked.rows[picked.probes == probe])
        scores = pair_scores(stored, left, probes, np.full(left.size, probe))
        assert (scores <= limits[probe]).all()
        assert np.isfinite(limits[probe]) == (np.linalg.norm(probes[probe].astype(np.float64)) < 1e6)
