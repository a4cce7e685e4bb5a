"""Synthetic references share the moments of real impostors, and the demo's thresholds keep what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from matcher_service.demo.calibration import Calibration, calibrate
from matcher_service.demo.data import Faces, enrolment, load_faces
from matcher_service.demo.distractors import Generator, fit, impostor_scores, moments, raw_templates
from matcher_service.errors import InvalidInput
from matcher_service.models.template_adapter import adapt


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    steps: list[int] = []
    found = calibrate(enrolment(load_faces()), np.random.default_rng(3), steps.append, draws=30_000)
    assert sum(steps) == 30_000
    return found


def test_two_distractors_score_like_two_real_strangers(calibration: Calibration) -> None:
    """Mean, spread and upper quantiles of the scores between synthetic templates are near the real ones: the root
    mean square, which the shrinkage is solved for, within 2%; the 99% and 99.9% points within 0.04."""
    real, synthetic = calibration.real, calibration.synthetic_to_synthetic
    assert np.hypot(synthetic.mean, synthetic.std) == pytest.approx(np.hypot(real.mean, real.std), rel=0.04)
    assert synthetic.std == pytest.approx(real.std, rel=0.02)
    assert synthetic.mean == pytest.approx(real.mean, abs=0.03)
    assert synthetic.quantile_99 == pytest.approx(real.quantile_99, abs=0.04)
    assert synthetic.quantile_999 == pytest.approx(real.quantile_999, abs=0.04)


def test_distractors_are_no_easier_than_real_strangers_for_those_enrolled(calibration: Calibration) -> None:
    """Against the enrolled templates the scores of distractors spread at least as widely as the real impostors'."""
    real, synthetic = calibration.real, calibration.synthetic_to_real
    assert synthetic.std >= real.std
    assert synthetic.quantile_99 >= real.quantile_99
    assert synthetic.quantile_999 >= real.quantile_999
    assert synthetic.std < 1.25 * real.std


def test_the_moments_of_real_impostors_are_those_of_an_independent_count(calibration: Calibration) -> None:
    """14,875 pairs of different people among 175 templates: mean -0.02, spread 0.15, highest about 0.56."""
    faces = enrolment(load_faces())
    rows = faces.templates.astype(np.float64) - faces.templates.mean(axis=0, dtype=np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    scores = [float(rows[i] @ rows[j]) for i in range(175) for j in range(i) if faces.subjects[i] != faces.subjects[j]]
    assert calibration.real.comparisons == len(scores) == 35 * 34 // 2 * 25
    assert calibration.real.mean == pytest.approx(np.mean(scores), abs=1e-4)
    assert calibration.real.std == pytest.approx(np.std(scores), abs=1e-4)
    assert calibration.real.quantile_999 == pytest.approx(np.quantile(scores, 0.999), abs=1e-3)
    assert calibration.real.highest == pytest.approx(max(scores), abs=1e-3)


def test_calibration_sees_no_probe_and_nobody_who_is_enrolled_nowhere(calibration: Calibration) -> None:
    """With every other template replaced by nonsense, the centre and both tables are the same."""
    faces = load_faces()
    held = np.isin(faces.row_ids, enrolment(faces).row_ids)
    spoilt = Faces(np.where(held[:, None], faces.templates, np.float32(99)), faces.subjects, faces.shots)
    again = calibrate(enrolment(spoilt), np.random.default_rng(3), lambda _: None, draws=30_000)
    assert again.space.centre.tobytes() == calibration.space.centre.tobytes()
    assert again.real_table == calibration.real_table
    assert again.synthetic_table == calibration.synthetic_table
    np.testing.assert_allclose(again.space.centre, enrolment(faces).templates.mean(axis=0), atol=1e-6)


def test_a_distractor_that_goes_over_the_wire_is_adapted_back_to_itself(calibration: Calibration) -> None:
    """The raw form of a synthetic unit row has a real template's distance from the centre, and adapts to that row."""
    units = calibration.generator.draw(200, np.random.default_rng(5))
    raw = raw_templates(units, calibration.space.centre, calibration.template_length)
    np.testing.assert_allclose(adapt(raw, calibration.space, calibration.space), units, atol=1e-6)
    distances = np.linalg.norm(raw - calibration.space.centre, axis=1)
    np.testing.assert_allclose(distances, calibration.template_length, rtol=1e-5)
    assert 0.4 < calibration.template_length < 0.7


def test_draws_are_unit_rows_that_repeat_with_their_seed(calibration: Calibration) -> None:
    """The same generator state draws the same people; another state, others."""
    generator = calibration.generator
    drawn = generator.draw(50, np.random.default_rng(8))
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-6)
    assert drawn.tobytes() == generator.draw(50, np.random.default_rng(8)).tobytes()
    assert drawn.tobytes() != generator.draw(50, np.random.default_rng(9)).tobytes()


def test_the_shrinkage_is_solved_from_the_impostor_pairs() -> None:
    """Templates drawn from a known covariance: what is drawn from the fitted generator has their impostor spread,
    where the covariance of so few, unshrunk, would be wider by half."""
    seed = 12
    print("seed", seed)
    rng = np.random.default_rng(seed)
    truth = Generator(np.diag(np.linspace(1.0, 0.2, 64)), 0.0)
    people = truth.draw(40, rng)
    subjects = np.repeat(np.arange(40), 3).astype(np.int16)
    units = np.repeat(people, 3, axis=0) + 0.02 * rng.standard_normal((120, 64)).astype(np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    fitted = fit(units, subjects)
    assert 0.2 < fitted.shrinkage < 0.9
    wanted = moments(impostor_scores(units, subjects)).std
    drawn = fitted.draw(2000, rng)
    assert moments(impostor_scores(drawn, np.arange(2000, dtype=np.int16))).std == pytest.approx(wanted, rel=0.05)
    covariance = units.T.astype(np.float64) @ units / len(units)
    assert np.sqrt(np.square(covariance).sum()) > 1.3 * wanted


def test_one_person_has_no_impostors() -> None:
    """A generator cannot be fitted to a single subject."""
    with pytest.raises(InvalidInput) as refused:
        fit(np.eye(4, dtype=np.float32), np.ones(4, dtype=np.int16))
    assert refused.value.field == "subjects"
