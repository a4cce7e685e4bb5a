"""Whether live impostor scores still look like those of the calibration. Pure.

Two histograms of the same bins are compared by the largest distance of their distributions (Kolmogorov and Smirnov).
Live scores are not independent (one camera, the same passers-by), so the test counts them as fewer, and a distance
below `distance_of_concern` is never a drift however many scores there are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import kolmogorov

from matcher_service.errors import InvalidInput

DISTANCE_OF_CONCERN = 0.05
P_VALUE_OF_CONCERN = 1e-3
LIVE_MIN = 200


class Drift(NamedTuple):
    """`distance` in [0, 1] between the two distributions; `p_value` that chance gives as much; `is_drift` if both say
    so; `is_measured` is False with too few live scores to tell."""

    distance: float
    p_value: float
    live: float
    is_measured: bool
    is_drift: bool


def drift(
    calibrated: ArrayLike,
    live: ArrayLike,
    *,
    scores_per_independent: float = 1.0,
    distance_of_concern: float = DISTANCE_OF_CONCERN,
) -> Drift:
    """From counts per bin [b] of the calibration and of the live service. `scores_per_independent`: how many live
    scores are worth one independent one. Raises InvalidInput for histograms that do not fit together."""
    before, now = np.asarray(calibrated, np.float64), np.asarray(live, np.float64)
    if before.shape != now.shape or before.ndim != 1 or before.sum() <= 0 or (before < 0).any() or (now < 0).any():
        raise InvalidInput(
            "the histograms do not have the same bins", field="live", hint="compare histograms of one template space"
        )
    if scores_per_independent < 1.0:
        raise InvalidInput("a score cannot be worth more than one", field="scores_per_independent")
    seen = float(now.sum()) / scores_per_independent
    if seen < LIVE_MIN:
        return Drift(0.0, 1.0, seen, False, False)
    distance = float(np.abs(np.cumsum(before) / before.sum() - np.cumsum(now) / now.sum()).max())
    size = seen * float(before.sum()) / (seen + float(before.sum()))
    p_value = float(kolmogorov(np.sqrt(size) * distance))
    return Drift(distance, p_value, seen, True, distance >= distance_of_concern and p_value < P_VALUE_OF_CONCERN)
