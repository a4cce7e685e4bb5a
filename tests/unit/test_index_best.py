"""Law 2: what is picked out of blocks of products is everything that reaches the cut, and enough of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.index.best import Best, beyond
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
                lambda run: best.take(np.ascontiguousarray(products[:, run[0] : run[1]]), run[0]),
                pairwise(starts),
            )
        )
    picked = best.picked()
    for probe in range(probes):
        rows = np.sort(picked.rows[picked.probes == probe])
        assert np.array_equal(rows, np.flatnonzero(products[probe] >= picked.cuts[probe]))
        assert rows.size >= min(count, products.shape[1])


def test_law_2_rows_that_are_numbered_are_picked_by_their_numbers_and_none_where_there_is_none() -> None:
    best = Best(2, 2)
    best.take(np.array([[0.9, 0.5, 0.1], [0.3, 0.2, -1.0]], np.float32), np.array([[7, 3, 5], [4, 6, -1]]))
    best.take(np.array([[0.6, 0.4], [-0.5, -0.6]], np.float32), np.array([[10, 11], [12, 13]]))
    picked = best.picked()
    found = sorted(zip(picked.probes.tolist(), picked.rows.tolist(), strict=True))
    assert found == [(0, 7), (0, 10), (1, 4), (1, 6)]


@given(seed=st.integers(0, 2**32), length=st.sampled_from([1.0, 1e-3, 1e5, 1e7]))
def test_law_2_no_score_of_a_row_that_was_left_is_beyond_the_limit(seed: int, length: float) -> None:
    draw = np.random.default_rng(seed)
    stored = (draw.standard_normal((400, 64)) / 8).astype(np.float16)
    probes = (draw.standard_normal((3, 64)) * length).astype(np.float32)
    best = Best(3, 5)
    best.take(probes @ stored.astype(np.float32).T, 0)
    picked = best.picked()
    limits = beyond(picked.cuts, probes, float(np.linalg.norm(stored.astype(np.float64), axis=1).max()))
    for probe in range(3):
        left = np.setdiff1d(np.arange(400), picked.rows[picked.probes == probe])
        scores = pair_scores(stored, left, probes, np.full(left.size, probe))
        assert (scores <= limits[probe]).all()
        assert np.isfinite(limits[probe]) == (np.linalg.norm(probes[probe].astype(np.float64)) < 1e6)
