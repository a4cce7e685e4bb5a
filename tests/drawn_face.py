"""Drawn faces: pictures of nobody, plain enough to be made here and face enough for a detector to find.

No photograph of a person is in this repository. What the tests of the embedder need is a picture in which the
detector sees one face, or two, or none, and which can be made smaller and more blurred; not a likeness.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Picture = NDArray[np.uint8]


def drawn_face(person: int, *, width: int = 200, shift: int = 0) -> Picture:
    """A picture uint8 [1.2 width, width, 3] of one drawn face; each `person` has proportions of their own."""
    rng = np.random.default_rng(person)
    scale = width * 4 / 400  # drawn large, then made smaller: smooth edges
    canvas = Image.new("RGB", (width * 4, int(width * 4.8)), (70, 80, 95))
    pen = ImageDraw.Draw(canvas)
    spread, eye_size, mouth, nose, jaw = rng.uniform(-1, 1, 5)
    skin = np.array([205, 165, 140]) + rng.integers(-25, 26)
    hair = tuple(int(one) for one in rng.integers(20, 70, 3))

    def oval(x: float, y: float, rx: float, ry: float, colour: tuple[int, ...]) -> None:
        box = [(x - rx + shift) * scale, (y - ry) * scale, (x + rx + shift) * scale, (y + ry) * scale]
        pen.ellipse(box, fill=colour)

    def shade(by: float) -> tuple[int, ...]:
        return tuple(int(np.clip(one * by, 0, 255)) for one in skin)

    oval(200, 480, 190, 110, (50, 55, 70))  # shoulders
    oval(200, 400, 60, 90, shade(0.75))  # neck
    oval(200, 215, 128, 165, hair)
    oval(200, 245, 112 + 6 * jaw, 150, shade(0.9))
    oval(200, 240, 100 + 6 * jaw, 140, shade(1.0))
    oval(200, 150, 70, 40, shade(1.1))  # forehead
    for side in (-1, 1):
        x = 200 + side * (46 + 4 * spread)
        oval(x, 216, 36, 24, shade(0.72))  # socket
        oval(x, 196, 34, 7, hair)  # brow
        oval(x, 220, 22 + 3 * eye_size, 11 + 2 * eye_size, (235, 232, 228))
        oval(x, 220, 10 + eye_size, 10 + eye_size, (35, 28, 25))
        oval(x + side * 18, 285, 24, 22, shade(1.08))  # cheek
    oval(200, 255, 11, 46, shade(1.15))  # bridge of the nose
    oval(200, 290, 26 + 4 * nose, 13, shade(0.82))
    oval(200, 285, 22 + 4 * nose, 11, shade(1.1))
    for side in (-1, 1):
        oval(200 + side * (13 + 2 * nose), 295, 6, 4, shade(0.4))
    oval(200, 333, 42 + 5 * mouth, 13, (150, 70, 70))
    oval(200, 332, 36 + 5 * mouth, 3, (70, 25, 30))
    oval(200, 355, 30, 6, shade(0.8))
    canvas = canvas.filter(ImageFilter.GaussianBlur(2.5 * scale))
    picture = np.asarray(canvas.resize((width, int(width * 1.2)), Image.Resampling.LANCZOS)).astype(np.float64)
    # Skin has a grain; without it a picture looks out of focus to any measure of sharpness.
    picture += rng.normal(0, 4, picture.shape[:2])[:, :, None]
    return np.clip(picture, 0, 255).astype(np.uint8)


def empty_room(width: int = 240) -> Picture:
    """A picture without a face."""
    rows = np.linspace(60, 190, int(width * 1.2))[:, None, None]
    return np.broadcast_to(rows, (int(width * 1.2), width, 3)).astype(np.uint8)


def encoded(picture: Picture, form: str = "PNG", **options: int) -> bytes:
    """The picture as the bytes of a PNG or JPEG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form, **options)
    return file.getvalue()
