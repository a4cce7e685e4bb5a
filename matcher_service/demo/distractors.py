"""Synthetic templates of people who do not exist, to fill a gallery beyond the few real ones.

They are drawn from a Gaussian about the centre, with the covariance of the enrolled real templates, and normalised.
The covariance of so few people overstates how alike two strangers are, because it sees few of the directions in which
people differ. It is therefore shrunk towards the isotropic one, by exactly as much as makes the mean square of the
score between two draws that of the real impostor pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import InvalidInput
from matcher_service.terms import Float32, Float64


class Moments(NamedTuple):
    """What is compared between real and synthetic impostor scores."""

    comparisons: int
    mean: float
    std: float
    quantile_99: float
    quantile_999: float
    highest: float


def moments(scores: Float32) -> Moments:
    """Of scores [m], at least one."""
    quantiles = np.quantile(scores, [0.99, 0.999])
    mean, std = scores.mean(dtype=np.float64), scores.std(dtype=np.float64)
    return Moments(len(scores), float(mean), float(std), float(quantiles[0]), float(quantiles[1]), float(scores.max()))


def impostor_scores(units: Float32, subjects: NDArray[np.int16]) -> Float32:
    """Scores [m] of all pairs of unit rows [n, d] of different subjects, each pair once."""
    first, second = np.triu_indices(len(units), 1)
    scores = (units.astype(np.float64) @ units.T.astype(np.float64))[first, second]
    return np.asarray(scores[subjects[first] != subjects[second]], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Generator:
    """`factor` float64 [d, d], a square root of the covariance; `shrinkage` in [0, 1], how far towards isotropic."""

    factor: Float64
    shrinkage: float

    def draw(self, count: int, rng: np.random.Generator) -> Float32:
        """Unit rows float32 [count, d], each of another person."""
        rows = rng.standard_normal((count, len(self.factor))) @ self.factor.T
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def fit(units: Float32, subjects: NDArray[np.int16]) -> Generator:
    """The generator for adapted real templates, unit rows [n, d], of at least two subjects.

    With covariance D of trace 1, the mean square of the score between two draws is tr(D^2) up to the effect of
    normalising. For D = (1 - s) C + s I / d it is 1/d + (1 - s)^2 (tr(C^2) - 1/d), which is solved for s. Raises
    InvalidInput if all rows are of one subject.
    """
    rows = units.astype(np.float64)
    dimension = rows.shape[1]
    impostors = impostor_scores(units, subjects).astype(np.float64)
    if len(impostors) == 0:
        raise InvalidInput("all templates are of one subject", field="subjects", hint="give at least two people's")
    covariance = rows.T @ rows / np.square(rows).sum()
    excess = float(np.square(covariance).sum()) - 1.0 / dimension
    wanted = float(np.square(impostors).mean()) - 1.0 / dimension
    kept = float(np.sqrt(np.clip(wanted / excess, 0.0, 1.0))) if excess > 0 else 0.0
    shrunk = kept * covariance + (1.0 - kept) * np.eye(dimension) / dimension
    values, vectors = np.linalg.eigh(shrunk)
    return Generator(vectors * np.sqrt(np.maximum(values, 0.0)), 1.0 - kept)


def raw_templates(units: Float32, centre: Float32, length: float) -> Float32:
    """What a model would have put out for these unit rows: `length` away from the centre, float32 [n, d]."""
    return np.asarray(centre.astype(np.float64) + length * units.astype(np.float64), dtype=np.float32)
