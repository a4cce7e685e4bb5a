"""Intervals recover known rates at the stated coverage, and say nothing where nothing is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.errors import InvalidInput
from matcher_service.evaluation.intervals import (
    Rate,
    clopper_pearson,
    clustered_rate,
    clustered_rates,
    detectable_ratio,
    dyadic_variance,
    power_of_ratio,
    rate_ratio,
    resampled_band,
    subject_weights,
)

SIMULATIONS = 200
# Three standard errors of a coverage of 95% seen in 200 simulations.
COVERAGE_MIN = 0.95 - 3 * np.sqrt(0.95 * 0.05 / SIMULATIONS)
SEED = 19795


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_exact_limits_enclose_the_share_and_mirror_when_events_and_non_events_change_places(counts: tuple[int, int]):
    events, trials = counts
    low, high = clopper_pearson(events, trials)
    assert low <= events / trials <= high
    mirrored_low, mirrored_high = clopper_pearson(trials - events, trials)
    assert low == pytest.approx(1 - mirrored_high, abs=1e-12)
    assert high == pytest.approx(1 - mirrored_low, abs=1e-12)


def test_no_event_in_300_independent_trials_bounds_the_rate_by_the_rule_of_three():
    rate = clustered_rate(np.zeros(300), np.ones(300), confidence=0.90)
    assert rate.low == 0.0
    assert rate.high == pytest.approx(3 / 300, rel=0.01)


def test_without_events_each_subject_counts_once_however_often_it_was_tried():
    often = clustered_rate(np.zeros(5), np.full(5, 1000))
    once = clustered_rate(np.zeros(5), np.ones(5))
    assert often.high == once.high > 0.5


def test_no_trials_say_nothing():
    rate = clustered_rate(np.zeros(0), np.zeros(0))
    assert (rate.low, rate.high, rate.is_measured) == (0.0, 1.0, False)


@pytest.mark.parametrize(("events", "trials"), [(2, 1), (-1, 3)])
def test_counts_that_make_no_sense_are_refused(events: int, trials: int):
    with pytest.raises(InvalidInput):
        clopper_pearson(events, trials)


@pytest.mark.parametrize(("mean", "within"), [(0.1, 0.5), (0.02, 0.3), (0.5, 0.9)])
def test_clustered_limits_hold_the_true_rate_in_95_of_100_sets_of_correlated_trials(mean: float, within: float):
    """Trials of a subject share its own rate, drawn from a beta law; limits that forget it hold far less often."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    subjects, each = 120, 8
    strength = 1 / within - 1
    held = held_by_naive = 0
    widths = []
    for _ in range(SIMULATIONS):
        own = rng.beta(mean * strength, (1 - mean) * strength, subjects)
        events = rng.binomial(each, own)
        rate = clustered_rate(events, np.full(subjects, each))
        held += rate.low <= mean <= rate.high
        widths.append(rate.high - rate.low)
        low, high = clopper_pearson(events.sum(), subjects * each)
        held_by_naive += low <= mean <= high
    assert held / SIMULATIONS >= COVERAGE_MIN
    assert held_by_naive / SIMULATIONS < COVERAGE_MIN
    # Not by being vague: about as wide as the true spread asks for.
    spread = np.sqrt(mean * (1 - mean) / subjects * (within + (1 - within) / each))
    assert np.mean(widths) < 3.5 * 1.96 * spread


def test_resampled_band_holds_the_true_mean_in_95_of_100_sets():
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    subjects = 80
    weights = subject_weights(subjects, 500, rng)
    held = np.zeros(2)
    for _ in range(SIMULATIONS):
        trials = rng.integers(1, 9, subjects)
        own = rng.normal([0.3, 0.6], 0.1, (subjects, 2))
        low, high = resampled_band(own * trials[:, None], trials, weights)
        held += (low <= [0.3, 0.6]) & (high >= [0.3, 0.6])
    # A percentile interval of 80 subjects holds a little less than it says: 94%.
    assert (held / SIMULATIONS >= COVERAGE_MIN - 0.01).all()
    assert (held / SIMULATIONS <= 0.99).all()


def test_points_of_a_curve_are_the_rates_of_their_own():
    rng = np.random.default_rng(SEED)
    trials = rng.integers(1, 5, 30)
    events = rng.binomial(trials[:, None], [0.0, 0.1, 0.5])
    curve = clustered_rates(events, trials)
    for point in range(3):
        assert curve.at(point) == pytest.approx(clustered_rate(events[:, point], trials))


def test_dyadic_variance_of_independent_pairs_is_the_sum_of_squares_and_of_a_hub_much_more():
    rng = np.random.default_rng(SEED)
    found = []
    for _ in range(400):
        upper = np.triu(rng.normal(size=(30, 30)), 1)
        found.append(dyadic_variance(upper + upper.T))
    assert np.mean(found) == pytest.approx(30 * 29 / 2, rel=0.15)
    hub = np.zeros((30, 30))
    hub[0, 1:] = hub[1:, 0] = 1.0
    assert dyadic_variance(hub) > 25 * 29


def _rate(events: int, trials: int) -> Rate:
    low, high = clopper_pearson(events, trials)
    return Rate(events, trials, trials, float(trials), events / trials, float(low), float(high), 0.95)


def test_the_ratio_of_two_rare_rates_is_held_in_95_of_100_pairs_of_samples():
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    held = 0
    for _ in range(SIMULATIONS):
        ratio = rate_ratio(_rate(rng.binomial(2000, 0.03), 2000), _rate(rng.binomial(5000, 0.01), 5000))
        held += ratio.low <= 3.0 <= ratio.high
    assert held / SIMULATIONS >= COVERAGE_MIN


def test_nothing_bounds_a_ratio_to_a_rate_that_was_never_seen():
    ratio = rate_ratio(_rate(8, 100), _rate(0, 100))
    assert ratio.high == float("inf")
    assert 1.0 < ratio.low < 8.0


def test_stated_power_is_the_share_of_samples_that_show_the_ratio():
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    stated = power_of_ratio(3.0, 0.01, 800, 2000)
    shown = sum(
        rate_ratio(_rate(rng.binomial(800, 0.03), 800), _rate(rng.binomial(2000, 0.01), 2000)).low > 1.0
        for _ in range(600)
    )
    assert shown / 600 == pytest.approx(stated, abs=3 * np.sqrt(0.25 / 600))


def test_a_larger_sample_shows_a_smaller_ratio_and_five_people_show_none():
    small, large = detectable_ratio(0.01, 500, 500), detectable_ratio(0.01, 20_000, 20_000)
    assert 1.2 < large < 2.0 < small
    assert power_of_ratio(large, 0.01, 20_000, 20_000) >= 0.8
    assert detectable_ratio(0.2, 5, 5) == float("inf")
