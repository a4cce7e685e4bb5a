"""Law 2: the score is the float64 product of the float32 probe and the float16 row, rounded to float32."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.index.products import Products
from matcher_service.index.score import exact_scores, float32_margin, norm_bound, norms, pair_scores
from matcher_service.terms import Float32


def rows_and_probes(seed: int, rows: int, dimension: int, probes: int = 1) -> tuple[np.ndarray, Float32]:
    print(f"seed {seed}")
    source = np.random.default_rng(seed)
    stored = source.standard_normal((rows, dimension)) / np.sqrt(dimension)
    asked = source.standard_normal((probes, dimension)) / np.sqrt(dimension)
    return stored.astype(np.float16), asked.astype(np.float32)


@given(st.integers(0, 2**32), st.integers(1, 700), st.integers(1, 600))
def test_law_2_a_row_scores_the_same_to_the_last_bit_alone_and_among_many(seed: int, dimension: int, rows: int) -> None:
    stored, probes = rows_and_probes(seed, rows, dimension, 2)
    together = exact_scores(stored, probes[0])
    some = np.unique(np.random.default_rng(seed).integers(0, rows, 5))
    assert [exact_scores(stored[row : row + 1], probes[0])[0] for row in some] == list(together[some])
    assert np.array_equal(exact_scores(stored[some], probes[0]), together[some])
    assert np.array_equal(pair_scores(stored, some, probes, np.zeros(some.size, np.int64)), together[some])


@given(st.integers(0, 2**32), st.integers(1, 64))
def test_law_2_the_score_is_the_true_product_rounded_to_float32(seed: int, dimension: int) -> None:
    stored, probes = rows_and_probes(seed, 1, dimension)
    true = sum(
        (Fraction(float(x)) * Fraction(float(q)) for x, q in zip(stored[0], probes[0], strict=True)), Fraction(0)
    )
    score = exact_scores(stored, probes[0])[0]
    # The float64 sum is within 2^-50 of the truth here, so only a truth at a rounding border may differ by one step.
    assert abs(Fraction(float(score)) - true) <= Fraction(float(np.spacing(np.abs(score)))) / 2 + Fraction(1, 2**50)


@pytest.mark.parametrize("dimension", [1, 7, 128, 512])
def test_a_float32_product_is_within_its_margin_of_the_score(dimension: int) -> None:
    stored, probes = rows_and_probes(11, 900, dimension, 50)
    margin = float32_margin(dimension, float(norms(stored).max()), norms(probes))[:, None]
    scores = np.stack([exact_scores(stored, probe) for probe in probes])
    assert (np.abs(probes @ stored.astype(np.float32).T - scores) <= margin).all()
    by_faiss, rows = Products(stored).best(probes, 900)
    assert (np.sort(rows, axis=1) == np.arange(900)).all()
    assert (np.abs(by_faiss - np.take_along_axis(scores, rows, axis=1)) <= margin).all()


def test_products_are_those_of_the_stored_rows_themselves_and_no_copy() -> None:
    stored, probes = rows_and_probes(12, 40, 64)
    products = Products(stored)
    stored[7] = probes[0].astype(np.float16)
    assert products.best(probes, 1)[1].tolist() == [[7]]
    assert products.best(probes, 50)[1][0, 40:].tolist() == [-1] * 10


def test_the_margin_bounds_the_worst_signs_too() -> None:
    """All products of one sign and of equal size leave the largest rounding; still within the margin."""
    dimension = 512
    stored = np.full((1, dimension), np.float16(0.0442))
    probe = np.full(dimension, 0.044194173, np.float32)
    running = np.float32(0)
    for x, q in zip(stored[0].astype(np.float32), probe, strict=True):
        running = np.float32(running + np.float32(x * q))
    margin = float32_margin(dimension, float(norms(stored).max()), norms(probe[None]))[0]
    error = abs(float(running) - float(exact_scores(stored, probe)[0]))
    assert 0 < error <= margin


def test_no_pairs_have_no_scores() -> None:
    stored, probes = rows_and_probes(5, 3, 16)
    none = np.empty(0, np.int64)
    assert pair_scores(stored, none, probes, none).size == 0


@pytest.mark.parametrize("dimension", [1, 7, 128, 2048])
def test_no_row_is_longer_than_the_bound_of_the_norms_and_hardly_any_is_shorter(dimension: int) -> None:
    stored, _ = rows_and_probes(12, 500, dimension, 1)
    wide = stored.astype(np.float32)
    longest = float(norms(wide).max())
    assert longest <= norm_bound(wide) <= longest * (1 + 2e-4)
    assert norm_bound(wide[:0]) == 0.0
