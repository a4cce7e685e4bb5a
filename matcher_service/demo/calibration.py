"""What the demo learns from the enrolled templates before anything is served: the space with its centre and score
table, the generator of distractors, and the tables from which thresholds are set.

Nothing here sees a probe, nor subjects 36 to 40.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from matcher_service.demo.data import SPACE, Faces
from matcher_service.demo.distractors import Generator, Moments, fit, impostor_scores, moments
from matcher_service.models.score_calibrator import measure_table
from matcher_service.models.template_adapter import adapt
from matcher_service.terms import Float32, ScoreTable, TemplateSpace

# Enough comparisons with the enrolled templates to support a rate of 2e-7, a quarter of what 20,000 references need:
# at the very edge of its data a threshold would be as random as the highest score drawn.
CALIBRATION_DRAWS = 100_000
_BLOCK_DRAWS = 4_000


@dataclass(frozen=True, slots=True)
class Calibration:
    """`space` has the centre and the table of the real impostor pairs; `synthetic_table` is of distractors against
    the enrolled templates. `template_length` is the mean distance of a real raw template from the centre."""

    space: TemplateSpace
    generator: Generator
    real_table: ScoreTable
    synthetic_table: ScoreTable
    real: Moments
    synthetic_to_real: Moments
    synthetic_to_synthetic: Moments
    template_length: float


def calibrate(
    enrolled: Faces, rng: np.random.Generator, advance: Callable[[int], None], draws: int = CALIBRATION_DRAWS
) -> Calibration:
    """From the enrolled real templates alone. `advance` is told how many of the `draws` were made since."""
    centre = np.asarray(enrolled.templates.mean(axis=0, dtype=np.float64), dtype=np.float32)
    bare = TemplateSpace(SPACE, centre)
    units = _as_stored(adapt(enrolled.templates, bare, bare))
    impostors = impostor_scores(units, enrolled.subjects)
    people = len(set(enrolled.subjects.tolist()))
    real_table = measure_table(
        impostors, source=f"enrolled real templates of {people} people, whose pairs are not independent"
    )
    generator = fit(units, enrolled.subjects)

    against_real, among = [], []
    for start in range(0, draws, _BLOCK_DRAWS):
        count = min(_BLOCK_DRAWS, draws - start)
        drawn = _as_stored(generator.draw(count, rng))
        against_real.append((units @ drawn.T).ravel())
        among.append((drawn[: count // 2 : 10] @ drawn[count // 2 :].T).ravel())
        advance(count)
    synthetic = np.concatenate(against_real)
    synthetic_table = measure_table(synthetic, source=f"{draws:,} synthetic templates against the enrolled real ones")
    return Calibration(
        space=TemplateSpace(SPACE, centre, score_table=real_table),
        generator=generator,
        real_table=real_table,
        synthetic_table=synthetic_table,
        real=moments(impostors),
        synthetic_to_real=moments(synthetic),
        synthetic_to_synthetic=moments(np.concatenate(among)),
        template_length=float(np.linalg.norm(enrolled.templates - centre, axis=1).mean()),
    )


def _as_stored(units: Float32) -> Float32:
    """Adapted rows with the rounding of the stored float16 row."""
    return units.astype(np.float16).astype(np.float32)
