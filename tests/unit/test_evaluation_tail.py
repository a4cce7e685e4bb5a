"""Known laws of impostor scores are recovered inside the stated limits, and nothing is claimed beyond the data."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta, norm

from matcher_service.errors import InvalidInput
from matcher_service.evaluation import generalised_pareto as gp
from matcher_service.evaluation.comparisons import BINS, Comparisons, Tail, at_or_above, compare_all, edges
from matcher_service.evaluation.generalised_pareto import Pareto
from matcher_service.evaluation.impostor_tail import fit_tail, score_table
from matcher_service.evaluation.intervals import clopper_pearson
from matcher_service.evaluation.thresholds import false_alerts, genuine_table
from matcher_service.models.promise import missed, promise, threshold_for, threshold_limits
from matcher_service.models.score_calibrator import check_table, false_match_rates
from matcher_service.terms import ScoreTable

SIMULATIONS = 200
COVERAGE_MIN = 0.95 - 3 * np.sqrt(0.95 * 0.05 / SIMULATIONS)
SEED = 19795


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def score_of_rate(rate: float, dimension: int) -> float:
    """At which score of two random directions the false-match rate is `rate`."""
    return float(np.sqrt(beta.isf(2 * rate, 0.5, (dimension - 1) / 2)))


def held(tail, score: float, rate: float) -> bool | None:
    if score > tail.supported_score:
        return None
    low = np.exp(np.interp(score, tail.scores, np.log(np.maximum(tail.low, 1e-300))))
    high = np.exp(np.interp(score, tail.scores, np.log(tail.high)))
    return bool(low <= rate <= high)


# --- counting ----------------------------------------------------------------------------------------------


def test_streamed_counts_and_tail_equal_those_of_all_scores_at_once(monkeypatch: pytest.MonkeyPatch):
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    monkeypatch.setattr("matcher_service.evaluation.comparisons._BLOCK_ROWS", 7)
    monkeypatch.setattr("matcher_service.evaluation.comparisons._BLOCK_COLUMNS", 31)
    subjects = rng.integers(0, 60, 300)
    units = unit(rng.normal(size=(300, 16)))
    told = []
    found = compare_all(units, subjects, rng=rng, clusters=9, tail_kept=50, advance=told.append)

    scores = units.astype(np.float64) @ units.T.astype(np.float64)
    first, second = np.triu_indices(300, 1)
    same = subjects[first] == subjects[second]
    impostors, genuine = scores[first, second][~same], scores[first, second][same]
    assert found.impostors == len(impostors) == sum(told)
    assert np.allclose(np.sort(found.genuine), np.sort(genuine), atol=1e-6)
    highest = np.sort(impostors)[::-1]
    assert len(found.tail.scores) >= 50
    assert np.allclose(found.tail.scores[:50], highest[:50], atol=1e-6)
    reached = at_or_above(found.histogram)
    expected = len(impostors) - np.searchsorted(np.sort(impostors), edges())
    # A score that lies on an edge may be rounded to either side of it.
    assert np.abs(reached - expected).max() <= 2


def test_a_subject_in_two_groups_is_refused():
    units = unit(np.random.default_rng(SEED).normal(size=(4, 8)))
    with pytest.raises(InvalidInput, match="two groups"):
        compare_all(units, ["a", "a", "b", "c"], ["x", "y", "x", "y"], rng=np.random.default_rng(1))


def test_clusters_stay_within_a_group_so_that_groups_can_be_counted_apart():
    rng = np.random.default_rng(SEED)
    subjects = np.repeat(np.arange(100), 2)
    labels = np.where(subjects < 30, "a", "b")
    found = compare_all(unit(rng.normal(size=(200, 8))), subjects, labels, rng=rng)
    mine = np.flatnonzero(np.asarray(found.cluster_label) == "a")
    assert found.between(mine).sum() == 60 * 59 // 2 - 30


# --- the law -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [-0.35, -0.1, 0.0, 0.2])
def test_fitted_parameters_scatter_about_the_true_ones_as_theory_says(shape: float):
    print(f"seed {SEED}")
    excesses = gp.draw(Pareto(shape, 0.03), (SIMULATIONS, 1000), np.random.default_rng(SEED))
    shapes, scales = gp.fit(excesses)
    spread = np.sqrt(np.diag(np.linalg.inv(gp.information(Pareto(shape, 0.03)))) / 1000)
    assert abs(shapes.mean() - shape) < 4 * spread[0] / np.sqrt(SIMULATIONS) + 0.005
    assert shapes.std() == pytest.approx(spread[0], rel=0.25)
    assert scales.mean() == pytest.approx(0.03, rel=0.02)
    assert scales.std() == pytest.approx(spread[1], rel=0.25)


def test_the_fit_is_a_maximum_of_the_likelihood():
    excesses = gp.draw(Pareto(-0.2, 0.05), (700,), np.random.default_rng(SEED))
    shape, scale = gp.fit(excesses)
    around = np.array([[0.01, 0], [-0.01, 0], [0, 1e-3], [0, -1e-3], [0.01, 1e-3], [-0.01, -1e-3]])
    best = gp.log_likelihood(excesses, np.array([shape]), np.array([scale]))[0]
    assert (gp.log_likelihood(excesses, shape + around[:, 0], scale + around[:, 1]) < best).all()
    assert np.abs(gp.scores(excesses, Pareto(float(shape), float(scale))).mean(axis=0)).max() < 1e-3


@pytest.mark.parametrize("at", [1, 5])
def test_the_table_of_the_anderson_darling_test_is_what_simulation_gives(at: int):
    print(f"seed {SEED}")
    simulated = gp.simulated_quantiles(gp.AD_SHAPES[at], 2000, 400, np.random.default_rng(SEED))
    assert simulated[:4] == pytest.approx(gp.AD_QUANTILES[at][:4], rel=0.08)


def test_the_test_of_fit_rejects_the_true_law_as_often_as_it_says_and_another_law_nearly_always():
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    true = gp.draw(Pareto(-0.15, 1.0), (SIMULATIONS, 400), rng)
    other = np.abs(rng.normal(size=(50, 400))) ** 0.4
    rejected = [
        gp.goodness_of_fit(row, Pareto(float(a), float(b))) < 0.1 for row, a, b in zip(true, *gp.fit(true), strict=True)
    ]
    assert np.mean(rejected) == pytest.approx(0.1, abs=3 * np.sqrt(0.09 / SIMULATIONS))
    against = [
        gp.goodness_of_fit(row, Pareto(float(a), float(b))) < 0.1
        for row, a, b in zip(other, *gp.fit(other), strict=True)
    ]
    assert np.mean(against) > 0.95


# --- coverage ----------------------------------------------------------------------------------------------


def counted(scores: NDArray[np.float64], subjects: int, rng: np.random.Generator) -> Comparisons:
    """Comparisons whose scores are drawn independently of their subjects."""
    clusters = 16
    first, second = rng.integers(0, clusters, (2, len(scores)))
    bins = np.clip(((scores + 1) * BINS / 2).astype(int), 0, BINS - 1)
    upper = np.bincount((first * clusters + second) * BINS + bins, minlength=clusters**2 * BINS)
    upper = upper.reshape(clusters, clusters, BINS)
    counts = upper + upper.transpose(1, 0, 2) - np.eye(clusters, dtype=int)[..., None] * upper
    order = np.argsort(-scores)[:1000]
    tail = Tail(scores[order], first[order], second[order])
    histogram = np.bincount(bins, minlength=BINS)
    return Comparisons(
        counts, histogram, tail, np.zeros(0), np.zeros(0, np.int64), subjects, subjects, ("",) * clusters
    )


def test_a_tail_that_is_generalised_pareto_is_held_within_its_limits_at_the_stated_coverage():
    """Half the comparisons lie below 0.2; above, the law is known exactly."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    law = Pareto(-0.12, 0.08)
    rates = np.array([1e-2, 1e-3, 1e-4, 5e-5])
    scores = 0.2 + law.scale * np.expm1(-law.shape * np.log(rates / 0.5)) / law.shape
    kept = {rate: [] for rate in rates}
    for _ in range(SIMULATIONS):
        drawn = np.where(rng.random(20_000) < 0.5, 0.2 + gp.draw(law, (20_000,), rng), rng.uniform(-0.5, 0.2, 20_000))
        tail = fit_tail(counted(drawn, 20_000, rng))
        for rate, score in zip(rates, scores, strict=True):
            found = held(tail, score, rate)
            if found is not None:
                kept[rate].append(found)
    for rate, results in kept.items():
        print(rate, len(results), np.mean(results))
        assert len(results) > SIMULATIONS / 2
        assert np.mean(results) >= COVERAGE_MIN


@pytest.mark.parametrize("hubs", [0.0, 0.25])
def test_scores_of_real_shape_are_held_at_the_stated_coverage_also_when_some_subjects_are_like_everybody(hubs: float):
    """Random directions have a beta law, not the fitted one; hubs lean towards one direction, so that their pairs are
    high together, and limits that count pairs as independent would be far too narrow."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    dimension, subjects = 32, 160

    def people(count: int) -> NDArray[np.float32]:
        rows = unit(rng.normal(size=(count, dimension))).astype(np.float64)
        lean = np.where(rng.random(count) < hubs, rng.uniform(0.2, 0.7, count), 0.0)
        rows[:, 0] += lean
        return unit(rows)

    probes = [0.35, 0.5, 0.6]
    if hubs:
        many = compare_all(people(9000), np.arange(9000), rng=rng)
        reached = at_or_above(many.histogram) / many.impostors
        truth = [float(np.interp(score, edges(), reached)) for score in probes]
    else:
        truth = [float(beta.sf(score**2, 0.5, (dimension - 1) / 2) / 2) for score in probes]
    kept: dict[float, list[bool]] = {score: [] for score in probes}
    effects = []
    for _ in range(SIMULATIONS):
        tail = fit_tail(compare_all(people(subjects), np.arange(subjects), rng=rng, clusters=20))
        effects.append(tail.fit.design_effect if tail.fit else np.nan)
        for score, rate in zip(probes, truth, strict=True):
            found = held(tail, score, rate)
            if found is not None:
                kept[score].append(found)
    print(truth, {score: (len(one), np.mean(one)) for score, one in kept.items()}, np.nanmean(effects))
    for results in kept.values():
        assert np.mean(results) >= COVERAGE_MIN
    assert len(kept[0.5]) > SIMULATIONS / 2
    assert np.nanmean(effects) > (1.8 if hubs else 1.0)


# --- what is not claimed -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tail_of_20_million():
    rng = np.random.default_rng(SEED)
    return fit_tail(compare_all(unit(rng.normal(size=(6500, 48))), np.arange(6500), rng=rng))


def test_support_ends_a_decade_beyond_the_effective_comparisons_at_most(tail_of_20_million):
    tail = tail_of_20_million
    assert tail.comparisons == 6500 * 6499 // 2
    assert tail.estimates[-1] >= 0.09 / tail.effective_comparisons
    assert tail.high[-1] <= 10.5 * tail.estimates[-1]


def test_the_table_is_sound_never_below_the_limits_and_claims_nothing_beyond_its_end(tail_of_20_million):
    tail = tail_of_20_million
    table = score_table(tail, "simulated")
    check_table(table)
    between = np.linspace(tail.scores[0], tail.scores[-1], 5000)
    limits = np.exp(np.interp(between, tail.scores, np.log(tail.high)))
    assert (false_match_rates(table, between) >= limits * (1 - 1e-9)).all()
    assert false_match_rates(table, [0.99])[0] == pytest.approx(table.rates[-1])
    assert f"{table.rates[-1]:.1e}" in table.method


def test_a_threshold_that_the_data_cannot_support_is_refused_and_the_refusal_says_how_far_they_reach(
    tail_of_20_million,
):
    table = score_table(tail_of_20_million, "simulated")
    with pytest.raises(InvalidInput, match=f"{table.rates[-1]:.2e}"):
        threshold_for(table, 0.001, 100_000_000)


def test_a_set_without_a_law_that_fits_is_counted_and_not_extrapolated():
    """Two kinds of impostors, of which one is a fifth of the tail: no single law fits."""
    rng = np.random.default_rng(SEED)
    low, high = rng.normal(0.0, 0.05, 60_000), rng.uniform(0.30, 0.31, 4000)
    tail = fit_tail(counted(np.concatenate([low, high]), 64_000, rng))
    assert tail.fit is None
    assert len(tail.rejected) > 0
    assert tail.supported_score <= 0.31
    assert tail.estimates[-1] >= 10 / 64_000


def test_three_people_are_refused_and_forty_support_less_than_their_78_000_pairs_seem_to():
    rng = np.random.default_rng(SEED)
    with pytest.raises(InvalidInput, match="calibrate nothing"):
        fit_tail(compare_all(unit(rng.normal(size=(2, 8))), [1, 2], rng=rng))
    people = np.repeat(rng.normal(size=(40, 24)), 10, axis=0)
    units = unit(people + 0.3 * rng.normal(size=people.shape))
    tail = fit_tail(compare_all(units, np.repeat(np.arange(40), 10), rng=rng))
    assert tail.comparisons == 78_000
    assert tail.effective_comparisons < 8_000


# --- thresholds hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("references", "wanted", "galleries"), [(1_000, 0.01, 10), (10_000, 0.01, 2), (100_000, 0.05, 1)]
)
def test_calibrated_thresholds_hold_on_unmated_probes_that_took_no_part(references: int, wanted: float, galleries: int):
    """Observed false alerts lie within what was promised, and the limit was not bought by promising nothing."""
    print(f"seed {SEED}")
    rng = np.random.default_rng([SEED, references])
    dimension, probes = 64, 2_000
    table = score_table(
        fit_tail(compare_all(unit(rng.normal(size=(8_000, dimension))), np.arange(8_000), rng=rng)), "simulated"
    )
    promised = threshold_for(table, wanted, references)
    assert promised.fpir_high <= wanted * (1 + 1e-6)
    assert promised.fpir_estimate >= wanted / 8
    observed = 0
    for _ in range(galleries):
        highest = np.full(probes, -1.0, dtype=np.float32)
        searched = unit(rng.normal(size=(probes, dimension)))
        for start in range(0, references, 10_000):
            block = unit(rng.standard_normal(size=(min(10_000, references - start), dimension), dtype=np.float32))
            np.maximum(highest, (searched @ block.T).max(axis=1), out=highest)
        observed += int((highest >= promised.threshold).sum())
    low, high = false_alerts(promised, probes * galleries, confidence=0.99)
    print(promised, observed, (low, high))
    assert low <= observed <= high


def test_a_promise_holds_up_to_the_size_that_it_names_and_no_further(tail_of_20_million):
    table = score_table(tail_of_20_million, "simulated")
    promised = threshold_for(table, 0.01, 5_000)
    assert 5_000 <= promised.references_max < 5_600
    assert promise(table, promised.threshold, 0.01, promised.references_max).fpir_high <= 0.01 * (1 + 1e-8)
    assert promise(table, promised.threshold, 0.01, promised.references_max + 1).fpir_high > 0.01


def test_a_lower_threshold_promises_a_higher_rate(tail_of_20_million):
    table = score_table(tail_of_20_million, "simulated")
    rates = [promise(table, threshold, 0.01, 1000).fpir_estimate for threshold in (0.4, 0.5, 0.6)]
    assert rates[0] > rates[1] > rates[2] > 0


def test_the_threshold_of_a_target_is_known_within_limits_that_narrow_with_the_data(tail_of_20_million):
    table = score_table(tail_of_20_million, "simulated")
    few = score_table(
        fit_tail(compare_all(unit(np.random.default_rng(SEED).normal(size=(700, 48))), np.arange(700),
                             rng=np.random.default_rng(SEED))), "simulated"
    )  # fmt: skip
    wide, narrow = threshold_limits(few, 0.05, 100), threshold_limits(table, 0.05, 100)
    for one in (wide, narrow):
        assert one.low < one.estimate < one.high
    # The law is known here: the true threshold lies within.
    true = score_of_rate(-np.expm1(np.log1p(-0.05) / 100), 48)
    assert narrow.low <= true <= narrow.high
    assert narrow.high - narrow.low < wide.high - wide.low
    assert threshold_for(table, 0.05, 100).threshold == narrow.high


def test_beyond_the_end_of_a_table_nothing_is_known_of_how_low_a_rate_is(tail_of_20_million):
    table = score_table(tail_of_20_million, "simulated")
    within, beyond = (promise(table, table.scores[-1] + more, 0.01, 1000) for more in (-1e-3, 1e-3))
    assert within.fpir_low > 0
    assert beyond.fpir_low == 0
    assert 0 < beyond.fpir_high <= within.fpir_high


# --- whom a threshold misses -------------------------------------------------------------------------------


def of_genuine(scores: NDArray[np.float64], subjects: NDArray[np.int64]) -> Comparisons:
    """Comparisons of which only those of people with themselves matter."""
    one = counted(np.zeros(30), 3, np.random.default_rng(1))
    return dataclasses.replace(one, genuine=scores, genuine_subject=subjects)


def test_genuine_scores_below_a_score_are_counted_and_what_stands_between_two_is_never_too_narrow():
    rng = np.random.default_rng(SEED)
    people = np.repeat(rng.normal(size=(50, 24)), 4, axis=0)
    found = compare_all(unit(people + 0.5 * rng.normal(size=people.shape)), np.repeat(np.arange(50), 4), rng=rng)
    table = genuine_table(found)
    assert (table.comparisons, table.subjects) == (300, 50)
    check_table(ScoreTable((0.0, 1.0), (1.0, 0.5), "made up", genuine=table))
    below = [float((found.genuine < one).mean()) for one in table.scores]
    assert table.estimates == pytest.approx(below)
    assert (table.estimates[0], table.estimates[-1]) == (0.0, 1.0)
    assert np.diff(table.estimates).max() < 0.02
    for before, after in itertools.pairwise(table.scores):
        between = missed(table, (before + after) / 2)
        assert between.low == missed(table, before).low
        assert between.high == missed(table, after).high
    lowest, highest = missed(table, -1.0), missed(table, 1.0)
    assert (lowest.estimate, lowest.low) == (0.0, 0.0)
    assert 0 < lowest.high < 0.1
    assert (highest.estimate, highest.high) == (1.0, 1.0)
    assert 0.9 < highest.low < 1


def test_without_two_templates_of_anybody_nothing_is_said_of_whom_a_threshold_misses():
    rng = np.random.default_rng(SEED)
    assert genuine_table(compare_all(unit(rng.normal(size=(40, 16))), np.arange(40), rng=rng)) is None


def test_the_share_of_people_missed_is_held_at_the_stated_coverage_though_some_are_harder_to_recognise():
    """Each person has a level of their own, so that their comparisons fail together."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    subjects, each = 80, 6
    truth = {rate: float(norm.ppf(rate, 0.6, np.hypot(0.1, 0.08))) for rate in (0.02, 0.1, 0.5)}
    kept = {rate: [] for rate in truth}
    ignored = {rate: [] for rate in truth}
    for _ in range(SIMULATIONS):
        scores = (rng.normal(0.6, 0.1, (subjects, 1)) + rng.normal(0, 0.08, (subjects, each))).ravel()
        table = genuine_table(of_genuine(scores, np.repeat(np.arange(subjects), each)))
        for rate, threshold in truth.items():
            found = missed(table, threshold)
            kept[rate].append(found.low <= rate <= found.high)
            alone = clopper_pearson((scores < threshold).sum(), len(scores))
            ignored[rate].append(alone[0] <= rate <= alone[1])
    print({rate: (np.mean(kept[rate]), np.mean(ignored[rate])) for rate in truth})
    for results in kept.values():
        assert np.mean(results) >= COVERAGE_MIN
    assert min(map(np.mean, ignored.values())) < COVERAGE_MIN
