"""Law 2: what is picked out of blocks of products is everything that reaches the cut, and enough of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.index.best import Best, beyond, picked_of
from matcher_service.index.score import pair_scores


@given(
    seed=st.integers(0, 2**32),
    probes=st.integers(1, 5),
    widths=st.lists(st.integers(1, 900), min_size=1, max_size=6),
    count=st.integers(1, 40),
    values=st.sampled_from([3, 50, 10**6]),
)
def test_law_2_all_that_reach_the_cut_are_picked_and_at_least_as_many_as_wanted(
    seed: int, probes: int, widths: list[int], count: int, values: int
) -> None:
    # Few different values: ties with the last one picked.
    draw = np.random.default_rng(seed)
    products = (draw.integers(-values, values, (probes, sum(widths))) / values).astype(np.float32)
    starts = np.concatenate([[0], np.cumsum(widths)]).tolist()
    best = Best(probes, count)
    with ThreadPoolExecutor(2) as threads:
        list(
            threads.map(
                lambda run: best.take(np.ascontiguousarray(products[:, run[0] : run[1]].T), run[0]),
                pairwise(starts),
            )
        )
    picked = best.picked()
    for probe in range(probes):
        rows = np.sort(picked.rows[picked.probes == probe])
        assert np.array_equal(rows, np.flatnonzero(products[probe] >= picked.cuts[probe]))
        assert rows.size >= min(count, products.shape[1])


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
    best = Best(3, 5)
    best.take(stored.astype(np.float32) @ probes.T, 0)
    picked = best.picked()
    limits = beyond(picked.cuts, probes, float(np.linalg.norm(stored.astype(np.float64), axis=1).max()))
    for probe in range(3):
        left = np.setdiff1d(np.arange(400), picked.rows[picked.probes == probe])
        scores = pair_scores(stored, left, probes, np.full(left.size, probe))
        assert (scores <= limits[probe]).all()
        assert np.isfinite(limits[probe]) == (np.linalg.norm(probes[probe].astype(np.float64)) < 1e6)
