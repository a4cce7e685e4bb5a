"""Laws of the score calibrator's mathematics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.stats import binom

from matcher_service.errors import InvalidInput
from matcher_service.models.score_calibrator import (
    check_table,
    false_match_rate_for_fpir,
    false_match_rates,
    fpir,
    measure_table,
    threshold_for_rate,
)
from matcher_service.terms import Float32, Float64, ScoreTable

TABLE = ScoreTable((0.2, 0.4, 0.5), (1.0, 1e-2, 1e-4), "made up")


def test_between_points_the_logarithm_of_the_rate_runs_straight() -> None:
    """Half-way between 1e-2 and 1e-4 is 1e-3; a point has its own rate."""
    np.testing.assert_allclose(false_match_rates(TABLE, [0.2, 0.3, 0.4, 0.45, 0.5]), [1, 1e-1, 1e-2, 1e-3, 1e-4])


def test_outside_the_points_the_rate_is_1_below_and_the_last_supported_one_above() -> None:
    """No score claims less than the last rate of the table, and below the first the rate is 1."""
    assert false_match_rates(TABLE, [-1.0, 0.1999]).tolist() == [1.0, 1.0]
    assert false_match_rates(TABLE, [0.5, 0.51, 1.0, 1.1]).tolist() == [1e-4] * 4
    lifted = ScoreTable((0.2, 0.4), (0.5, 0.25), "made up")
    assert false_match_rates(lifted, [0.19, 0.2]).tolist() == [1.0, 0.5]


@st.composite
def tables(draw: st.DrawFn) -> ScoreTable:
    scores = sorted(draw(st.sets(st.floats(-1, 1, width=32), min_size=1, max_size=12)))
    count = len(scores)
    rates = sorted(draw(st.lists(st.floats(1e-9, 1.0), min_size=count, max_size=count)), reverse=True)
    return ScoreTable(tuple(scores), tuple(rates), "drawn")


@given(tables(), st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=20))
def test_the_rate_falls_as_the_score_rises_and_stays_within_the_table(table: ScoreTable, scores: list[float]) -> None:
    """Higher scores never have a higher rate; every rate lies between the table's last and 1."""
    rates = false_match_rates(table, sorted(scores))
    assert (np.diff(rates) <= 1e-12 * rates[1:]).all()
    assert rates.min() >= table.rates[-1]
    assert rates.max() <= 1.0


@given(tables(), st.floats(1e-9, 1.0))
def test_the_threshold_of_a_rate_is_the_least_score_that_keeps_to_it(table: ScoreTable, rate: float) -> None:
    """At the threshold the rate is at most the one asked for, and one float32 step below it is not."""
    if rate < table.rates[-1]:
        with pytest.raises(InvalidInput) as refused:
            threshold_for_rate(table, rate)
        assert refused.value.field == "rate"
        return
    threshold = threshold_for_rate(table, rate)
    assert np.float32(threshold) == threshold
    assert false_match_rates(table, [threshold])[0] <= rate
    below = np.nextafter(np.float32(threshold), np.float32(-2))
    assert threshold == -1.0 or false_match_rates(table, [below])[0] > rate


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.1, math.nan])
def test_what_is_no_rate_is_refused(rate: float) -> None:
    """Rates lie in (0, 1]."""
    with pytest.raises(InvalidInput):
        threshold_for_rate(TABLE, rate)


def test_a_larger_gallery_has_a_higher_false_positive_identification_rate() -> None:
    """1-(1-FMR)^N, also where the naive formula has lost every digit."""
    assert fpir(0.01, 100) == pytest.approx(1 - 0.99**100)
    assert fpir(1e-17, 1_000_000) == pytest.approx(1e-11, rel=1e-9)
    assert fpir(1e-300, 1) == pytest.approx(1e-300)
    assert fpir([0.0, 1.0, 0.5], 10).tolist() == [0.0, 1.0, pytest.approx(1 - 2**-10)]
    assert fpir([0.0, 1.0, 0.5], 0).tolist() == [0.0, 0.0, 0.0]


@given(st.floats(1e-12, 0.999), st.integers(1, 10**9))
def test_the_rate_for_a_wanted_fpir_gives_that_fpir(wanted: float, gallery_size: int) -> None:
    """The two are inverse to each other over nine orders of gallery size."""
    assert fpir(false_match_rate_for_fpir(wanted, gallery_size), gallery_size) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("wanted", "size"), [(0.0, 10), (1.0, 10), (math.nan, 10), (0.1, 0)])
def test_an_fpir_that_cannot_be_reached_is_refused(wanted: float, size: int) -> None:
    """Certainty, impossibility and empty galleries have no threshold."""
    with pytest.raises(InvalidInput):
        false_match_rate_for_fpir(wanted, size)


SCORES = npst.arrays(np.float32, st.integers(1, 400), elements=st.floats(-1, 1, width=32))


def exact_upper_limits(reached: list[int], count: int, confidence: float = 0.95) -> Float64:
    """The Clopper-Pearson limits by bisection on the binomial distribution itself, not through the beta quantile."""
    hits = np.asarray(reached)
    low, high = np.zeros(len(hits)), np.ones(len(hits))
    for _ in range(60):
        middle = (low + high) / 2
        is_high = binom.cdf(hits, count, middle) < 1 - confidence
        low, high = np.where(is_high, low, middle), np.where(is_high, middle, high)
    return np.where(hits == count, 1.0, high)


@given(SCORES, st.lists(st.floats(-1, 1, width=32), max_size=10))
def test_a_measured_rate_is_nowhere_below_the_upper_limit_of_what_was_counted(
    scores: Float32, elsewhere: list[float]
) -> None:
    """At every score, on a point or between points, the table is at or above the exact upper limit of the share of
    impostor comparisons that reach it, with ties counted."""
    table = measure_table(scores, source="drawn")
    check_table(table)
    wanted = np.asarray([*np.sort(scores)[-40:], *elsewhere])
    limits = exact_upper_limits([int((scores >= score).sum()) for score in wanted], len(scores))
    assert (false_match_rates(table, wanted) >= limits * (1 - 1e-9)).all()


def test_a_measured_table_is_close_above_the_counted_shares() -> None:
    """Conservative, yet not wasteful: never above the limit for a tenth more hits; the last rate is 3/m to a hair."""
    seed = 11
    print("seed", seed)
    scores = np.clip(np.random.default_rng(seed).normal(0, 0.15, 20_000), -1, 1).astype(np.float32)
    table = measure_table(scores, source="normal")
    for score in np.quantile(scores, [0.01, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0]):
        reached = int((scores >= score).sum())
        (limit,) = exact_upper_limits([min(len(scores), math.ceil(reached * 1.1) + 1)], len(scores))
        assert false_match_rates(table, [score])[0] <= limit
    assert table.scores[-1] == np.nextafter(scores.max(), np.float32(2))
    assert table.rates[-1] == pytest.approx(1 - 0.05 ** (1 / 20_000))
    assert table.rates[-1] == pytest.approx(3 / 20_000, rel=2e-3)
    assert len(table.scores) < 200


def test_the_table_says_where_it_comes_from_and_where_it_ends() -> None:
    """`method` names the source, the count, the confidence, and the lowest rate that the data support."""
    table = measure_table(np.linspace(-0.5, 0.5, 1000), source="a trial", confidence=0.9)
    for words in ("a trial", "1,000 impostor", "90%", "Clopper-Pearson", "0.5000", "2.3e-03"):
        assert words in table.method


def test_scores_that_share_subjects_support_less() -> None:
    """Counted as fewer independent comparisons, the same scores have higher rates everywhere in the tail."""
    scores = np.linspace(-0.5, 0.5, 1000)
    all_counted = measure_table(scores, source="a trial")
    fewer = measure_table(scores, source="a trial", independent=40)
    assert fewer.scores == all_counted.scores
    assert fewer.rates[-1] == pytest.approx(1 - 0.05 ** (1 / 40))
    assert (np.asarray(fewer.rates[5:]) > np.asarray(all_counted.rates[5:])).all()
    assert "40 independent" in fewer.method


@pytest.mark.parametrize(
    ("scores", "arguments", "field"),
    [
        ([], {}, "impostor_scores"),
        ([0.1, math.nan], {}, "impostor_scores"),
        ([0.1, 1.5], {}, "impostor_scores"),
        ([0.1], {"confidence": 1.0}, "confidence"),
        ([0.1], {"independent": 2}, "independent"),
        ([0.1], {"independent": 0}, "independent"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_field(
    scores: list[float], arguments: dict[str, float], field: str
) -> None:
    """No scores, no cosines, no confidence, more independent comparisons than there are."""
    with pytest.raises(InvalidInput) as refused:
        measure_table(scores, source="a trial", **arguments)  # type: ignore[arg-type]
    assert refused.value.field == field


@pytest.mark.parametrize(
    "table",
    [
        ScoreTable((), (), ""),
        ScoreTable((0.1, 0.1), (0.5, 0.4), ""),
        ScoreTable((0.1, 0.2), (0.4, 0.5), ""),
        ScoreTable((0.1, 0.2), (0.5, 0.0), ""),
        ScoreTable((0.1, 0.2), (1.5, 0.1), ""),
        ScoreTable((0.1,), (0.5, 0.1), ""),
        ScoreTable((0.1, math.inf), (0.5, 0.1), ""),
        ScoreTable((0.1, 0.2), (0.5, math.nan), ""),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(table: ScoreTable) -> None:
    """Scores ascend strictly; rates stay in (0, 1] and do not rise."""
    with pytest.raises(InvalidInput) as refused:
        check_table(table)
    assert refused.value.field == "score_table"
