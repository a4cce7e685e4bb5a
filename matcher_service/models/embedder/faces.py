"""Where the faces of a picture are, and a face as a network is shown it: found, turned upright and cut out by dlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import dlib
import numpy as np

from matcher_service.models.embedder.outcome import Pixels

# The detector's own window is 80 pixels wide. A small picture is doubled first, so that faces from 40 pixels are
# found; a large one is made smaller, because its time grows with the area.
_DOUBLED_UP_TO_PX = 1000
_SEARCHED_PX_MAX = 2000


class Box(NamedTuple):
    """The box of a face in pixels of its picture; right and bottom are the last pixels within."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left + 1


class Faces:
    """dlib's frontal face detector and its five-point landmark model. Not to be used by two threads at once."""

    def __init__(self, landmarks: Path) -> None:
        self._detector = dlib.get_frontal_face_detector()
        self._landmarks = dlib.shape_predictor(str(landmarks))

    def find(self, pixels: Pixels) -> list[Box]:
        """The boxes of the faces, the most certain first; [] if there is none."""
        longest = max(pixels.shape[:2])
        if longest <= _DOUBLED_UP_TO_PX:
            return [_box(one, 1.0) for one in self._detector(pixels, 1)]
        scale = min(1.0, _SEARCHED_PX_MAX / longest)
        if scale < 1.0:
            pixels = dlib.resize_image(pixels, scale)
        return [_box(one, scale) for one in self._detector(pixels, 0)]

    def chip(self, pixels: Pixels, box: Box, size_px: int, padding: float) -> Pixels:
        """The face upright in a square uint8 [size_px, size_px, 3], with `padding` of its width around it."""
        points: Any = self._landmarks(pixels, dlib.rectangle(*box))
        return np.asarray(dlib.get_face_chip(pixels, points, size=size_px, padding=padding))


def whole(pixels: Pixels) -> Box:
    """The box of a picture that is a face as a detector cuts it out."""
    height, width = pixels.shape[:2]
    return Box(0, 0, width - 1, height - 1)


def _box(found: Any, scale: float) -> Box:
    sides = (found.left(), found.top(), found.right(), found.bottom())
    return Box(*(round(one / scale) for one in sides))
