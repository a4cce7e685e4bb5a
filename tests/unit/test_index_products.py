"""Float32 products of rows here and there are within their margin of the scores, each at its pair's place."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.halves import widened
from matcher_service.index.products import pair_products, stored_pair_products
from matcher_service.index.score import float32_margin, norms, pair_scores


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 3000),
    pairs=st.integers(0, 4000),
    dimension=st.sampled_from([1, 7, 64, 130]),
    crowded=st.booleans(),
)
def test_law_2_products_of_pairs_are_within_the_margin(
    seed: int, rows: int, pairs: int, dimension: int, crowded: bool
) -> None:
    draw = np.random.default_rng(seed)
    stored = draw.standard_normal((rows, dimension)).astype(np.float16)
    probes = draw.standard_normal((9, dimension)).astype(np.float32)
    which, row = draw.integers(0, 9, pairs), draw.integers(0, min(rows, 3) if crowded else rows, pairs)
    margin = float32_margin(dimension, float(norms(stored).max()), norms(probes))[which]
    scores = pair_scores(stored, row, probes, which).astype(np.float64)
    for products in (
        stored_pair_products(stored, row, probes, which),
        pair_products(widened(stored), row, probes, which),
    ):
        assert products.shape == (pairs,)
        assert (np.abs(products - scores) <= margin).all()
