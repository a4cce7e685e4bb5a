"""Made-up templates have the moments they were asked to have, and are marked; drift is found and not imagined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from matcher_service.demo.data import load_faces
from matcher_service.drift import drift
from matcher_service.errors import InvalidInput
from matcher_service.evaluation import synthetic
from matcher_service.evaluation.calibration import calibrate
from matcher_service.evaluation.labelled import labelled, load_labelled

SEED = 19795


def units_about_the_mean(templates: np.ndarray, *, normalise_first: bool = False) -> np.ndarray:
    rows = templates.astype(np.float64)
    if normalise_first:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows -= rows.mean(axis=0)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_calibration_of_the_orl_templates_finds_the_figures_that_their_readme_states():
    faces = load_faces()
    units = units_about_the_mean(faces.templates, normalise_first=True)
    result = calibrate(
        units,
        labelled(faces.templates, faces.subjects),
        source="ORL",
        fpir_wanted=0.01,
        sizes=[1],
        confidence=0.95,
        seed=SEED,
    )
    document = result.document()
    assert (document["impostor_comparisons"], document["genuine_comparisons"]) == (78_000, 1_800)
    assert document["impostor_quantiles"]["0.99"] == pytest.approx(0.373, abs=0.001)
    assert document["impostor_quantiles"]["0.999"] == pytest.approx(0.483, abs=0.001)
    assert document["highest_impostor_score"] == pytest.approx(0.596, abs=0.001)
    assert document["genuine_quantiles"]["0.01"] == pytest.approx(0.500, abs=0.001)
    assert document["genuine_quantiles"]["0.5"] == pytest.approx(0.840, abs=0.001)
    # Forty people are not 78,000 independent comparisons.
    assert document["effective_comparisons"] < 10_000
    assert document["supported_rate"] > 1e-4


def test_synthetic_scores_have_the_moments_of_the_real_ones():
    print(f"seed {SEED}")
    faces = load_faces()
    units = units_about_the_mean(faces.templates)
    subjects = faces.subjects.astype(str)
    real = synthetic.moments(units, subjects)
    centre = faces.templates.mean(axis=0)
    generator = synthetic.fit(units, subjects, centre, 0.6)
    made = synthetic.generate(generator, synthetic.Wish(800, 3), np.random.default_rng(SEED))
    apart = made.templates - generator.centre
    found = synthetic.moments((apart / np.linalg.norm(apart, axis=1, keepdims=True)).astype(np.float32), made.subjects)
    assert found.impostor_std == pytest.approx(real.impostor_std, rel=0.08)
    assert found.impostor_99 == pytest.approx(real.impostor_99, abs=0.03)
    assert found.genuine_median == pytest.approx(real.genuine_median, abs=0.02)
    assert found.genuine_05 == pytest.approx(real.genuine_05, abs=0.03)
    assert made.synthetic.all()
    assert np.linalg.norm(apart, axis=1) == pytest.approx(0.6, rel=1e-5)


def test_people_of_one_group_are_more_alike_and_hubs_are_like_many():
    rng = np.random.default_rng(SEED)
    wish = synthetic.Wish(600, 1, groups=("A", "B"), group_likeness=0.1)
    made = synthetic.generate(synthetic.plain(128), wish, rng)
    units = made.templates / np.linalg.norm(made.templates, axis=1, keepdims=True)
    scores = units @ units.T
    alike = made.groups[:, None] == made.groups[None, :]
    once = np.triu(np.ones_like(alike), 1)
    within, between = scores[alike & once].mean(), scores[~alike & once].mean()
    assert within - between > 0.03
    hubs = synthetic.generate(synthetic.plain(128), synthetic.Wish(600, 1, hub_share=0.1, hub_lean=0.7), rng)
    units = hubs.templates / np.linalg.norm(hubs.templates, axis=1, keepdims=True)
    assert np.quantile(units @ units.T, 0.995) > np.quantile(scores[once], 0.995)


def test_the_same_seed_makes_the_same_people():
    one, two = (
        synthetic.generate(synthetic.plain(32), synthetic.Wish(20, 2), np.random.default_rng(SEED)) for _ in range(2)
    )
    assert (one.templates == two.templates).all()


def test_people_of_whom_there_is_one_picture_each_cannot_be_imitated():
    units = units_about_the_mean(np.random.default_rng(SEED).normal(size=(20, 16)))
    with pytest.raises(InvalidInput, match="captured twice"):
        synthetic.fit(units, np.arange(20).astype(str), np.zeros(16, np.float32), 1.0)


# --- drift -------------------------------------------------------------------------------------------------


def histogram(rng: np.random.Generator, mean: float, spread: float, count: int) -> np.ndarray:
    return np.histogram(rng.normal(mean, spread, count), np.linspace(-1, 1, 201))[0]


def test_live_scores_of_the_calibrated_law_are_no_drift_and_a_shift_of_the_camera_is():
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    calibrated = histogram(rng, 0.0, 0.15, 200_000)
    false = sum(drift(calibrated, histogram(rng, 0.0, 0.15, 2000)).is_drift for _ in range(300))
    assert false <= 2
    assert all(drift(calibrated, histogram(rng, 0.03, 0.15, 2000)).is_drift for _ in range(50))
    assert all(drift(calibrated, histogram(rng, 0.0, 0.21, 2000)).is_drift for _ in range(50))


def test_the_p_value_of_no_drift_is_uniform_enough():
    rng = np.random.default_rng(SEED)
    calibrated = histogram(rng, 0.0, 0.15, 500_000)
    values = [drift(calibrated, histogram(rng, 0.0, 0.15, 1000)).p_value for _ in range(200)]
    assert np.mean(np.asarray(values) < 0.1) <= 0.1 + 3 * np.sqrt(0.09 / 200)


def test_too_few_live_scores_tell_nothing_and_scores_of_one_camera_count_as_fewer():
    rng = np.random.default_rng(SEED)
    calibrated = histogram(rng, 0.0, 0.15, 100_000)
    few = drift(calibrated, histogram(rng, 0.5, 0.15, 100))
    assert (few.is_measured, few.is_drift) == (False, False)
    shifted = histogram(rng, 0.01, 0.15, 30_000)
    alone, together = drift(calibrated, shifted), drift(calibrated, shifted, scores_per_independent=100.0)
    assert alone.p_value < together.p_value
    # However many scores: so small a shift is of no concern.
    assert not alone.is_drift


def test_histograms_of_other_bins_are_refused():
    with pytest.raises(InvalidInput):
        drift(np.ones(10), np.ones(11))


# --- labelled sets -----------------------------------------------------------------------------------------


def test_a_labelled_file_comes_back_as_it_was_saved_and_what_it_lacks_is_named(tmp_path: Path):
    path = tmp_path / "set.npz"
    np.savez(path, templates=np.ones((3, 4)), subject=np.array([1, 1, 2]), group=np.array(["a", "a", "b"]))
    found = load_labelled(path)
    assert found.subjects.tolist() == ["1", "1", "2"]
    assert found.has_groups
    assert not found.synthetic.any()
    np.savez(path, templates=np.ones((3, 4)))
    with pytest.raises(InvalidInput, match="holds templates"):
        load_labelled(path)
    np.savez(path, templates=np.ones((3, 4)), subject=np.array([1, 2]))
    with pytest.raises(InvalidInput, match="subject"):
        load_labelled(path)
    path.write_bytes(b"not a file of arrays")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_labelled(path)


def test_a_template_that_is_not_finite_is_refused():
    with pytest.raises(InvalidInput, match="NaN"):
        labelled(np.array([[1.0, np.nan]]), ["a"])
