"""How much a picture of a face can be trusted to give a useful template.

Two things are measured, both on the face itself. Its width in the picture: a small face is enlarged, and what was
never there cannot be compared. Its sharpness: the share of its fine change from pixel to pixel that a further blur
takes away, across and down, the lesser of the two (F. Crete and others, "The blur effect: perception and estimation
with a new no-reference perceptual blur metric", 2007). A sharp face loses half of it, a blurred one little: it had
little left to lose. Both are compared with limits that the model card states for its model: below the lower one the
face is refused, at the upper one nothing more is gained.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter1d

from matcher_service.models.embedder.card import ModelCard
from matcher_service.models.embedder.outcome import Pixels
from matcher_service.terms import Float64

# The face is looked at as the middle of a chip of this size and padding: eyes to mouth, without hair and background.
CHIP_PX = 150
CHIP_PADDING = 0.25
_BLUR_PX = 9


def sharpness(chip: Pixels) -> float:
    """In [0, 1), of a face chip uint8 [CHIP_PX, CHIP_PX, 3]; 0 for a face without any change."""
    first, last = CHIP_PX // 4, CHIP_PX - CHIP_PX // 4
    grey: Float64 = chip[first:last, first:last].astype(np.float64).mean(axis=2)
    return min(_lost_to_blur(grey, axis) for axis in (0, 1))


def _lost_to_blur(grey: Float64, axis: int) -> float:
    change = float(np.abs(np.diff(grey, axis=axis)).sum())
    left = float(np.abs(np.diff(uniform_filter1d(grey, _BLUR_PX, axis=axis), axis=axis)).sum())
    return max(0.0, 1.0 - left / change) if change > 0 else 0.0


def quality(card: ModelCard, face_width_px: float, face_sharpness: float) -> float:
    """In [0, 1]: the weaker of width and sharpness, each 0 at the limit of refusal and 1 where nothing is gained."""
    width = _share(face_width_px, card.face_width_px_min, card.face_width_px_good)
    return min(width, _share(face_sharpness, card.sharpness_min, card.sharpness_good))


def _share(value: float, least: float, good: float) -> float:
    """Straight from 0 at `least` to 1 at `good`."""
    if value >= good:
        return 1.0
    return max(0.0, (value - least) / (good - least))
