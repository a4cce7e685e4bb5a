"""The shipped templates are what their README says."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
from numpy.typing import NDArray

DEMO = files("matcher_service.demo")
Float64 = NDArray[np.float64]


@pytest.fixture(scope="module")
def orl() -> tuple[Float64, NDArray[np.int16], NDArray[np.int16]]:
    with DEMO.joinpath("orl_templates_dlib128.npz").open("rb") as stream, np.load(stream) as arrays:
        assert arrays["templates"].dtype == np.float32
        return arrays["templates"].astype(np.float64), arrays["subject"], arrays["shot"]


def unit(rows: Float64) -> Float64:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def genuine_and_impostor(rows: Float64, subject: NDArray[np.int16]) -> tuple[Float64, Float64]:
    first, second = np.triu_indices(len(rows), 1)
    scores = (rows @ rows.T)[first, second]
    same = subject[first] == subject[second]
    return scores[same], scores[~same]


def test_ten_shots_of_forty_people(orl: tuple[Float64, NDArray[np.int16], NDArray[np.int16]]) -> None:
    """400 finite templates of norm about 1.41, each subject and shot once."""
    templates, subject, shot = orl
    assert templates.shape == (400, 128)
    assert np.isfinite(templates).all()
    assert sorted(zip(subject.tolist(), shot.tolist(), strict=True)) == [
        (s, h) for s in range(1, 41) for h in range(1, 11)
    ]
    assert np.linalg.norm(templates, axis=1).mean() == pytest.approx(1.41, abs=0.01)


@pytest.mark.parametrize("centred", [False, True])
def test_leave_one_out_rank_1_is_the_right_person_for_every_template(
    orl: tuple[Float64, NDArray[np.int16], NDArray[np.int16]], centred: bool
) -> None:
    """Searched among the other 399, every template finds its own subject first."""
    templates, subject, _ = orl
    rows = unit(templates - templates.mean(axis=0) if centred else templates)
    scores = rows @ rows.T
    np.fill_diagonal(scores, -2)
    assert (subject[scores.argmax(axis=1)] == subject).mean() == 1.0


def test_the_cosine_quantiles_of_the_readme_hold(
    orl: tuple[Float64, NDArray[np.int16], NDArray[np.int16]],
) -> None:
    """79,800 pairs, 1,800 of them genuine, raw and centred, to the digits printed."""
    templates, subject, _ = orl
    raw = unit(templates)
    for rows, genuine_wanted, impostor_wanted, impostor_max in (
        (raw, (0.932, 0.978), (0.858, 0.917, 0.933), 0.947),
        (unit(raw - raw.mean(axis=0)), (0.500, 0.840), (-0.03, 0.373, 0.483), 0.596),
    ):
        genuine, impostor = genuine_and_impostor(rows, subject)
        assert (len(genuine), len(impostor)) == (1800, 78_000)
        np.testing.assert_allclose(np.quantile(genuine, [0.01, 0.5]), genuine_wanted, atol=6e-4)
        quantiles = np.quantile(impostor, [0.5, 0.99, 0.999])
        np.testing.assert_allclose(quantiles, impostor_wanted, atol=2e-3)
        np.testing.assert_allclose(quantiles[1:], impostor_wanted[1:], atol=6e-4)
        assert impostor.max() == pytest.approx(impostor_max, abs=6e-4)


def test_the_customary_threshold_is_no_threshold_for_a_gallery(
    orl: tuple[Float64, NDArray[np.int16], NDArray[np.int16]],
) -> None:
    """At a Euclidean distance of 0.6 between raw templates 2.1% of the impostor pairs are accepted."""
    templates, subject, _ = orl
    first, second = np.triu_indices(len(templates), 1)
    squares = (templates**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * templates @ templates.T, 0))[first, second]
    assert (distances[subject[first] != subject[second]] <= 0.6).mean() == pytest.approx(0.021, abs=5e-4)


def test_the_templates_travel_with_their_credit_and_within_300_kilobytes() -> None:
    """The README beside them gives credit as asked, and the package data stay small and hold no image."""
    credit = " ".join(DEMO.joinpath("README.md").read_text(encoding="utf-8").split())
    assert '"When using these images, please give credit to Olivetti Research Laboratory."' in credit
    assert 'F. Samaria and A. Harter, "Parameterisation of a stochastic model for human face identification"' in credit
    assert "2nd IEEE Workshop on Applications of Computer Vision, Sarasota, December 1994" in credit
    shipped = [one for one in DEMO.iterdir() if one.is_file() and not one.name.endswith(".py")]
    assert {one.name for one in shipped} == {"README.md", "orl_templates_dlib128.npz"}
    assert sum(len(one.read_bytes()) for one in shipped) <= 300_000
    with DEMO.joinpath("orl_templates_dlib128.npz").open("rb") as stream, np.load(stream) as arrays:
        assert set(arrays.files) == {"templates", "subject", "shot"}
