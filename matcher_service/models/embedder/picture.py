"""The bytes of a JPEG or PNG file to pixels, within limits."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from matcher_service.errors import InvalidInput
from matcher_service.models.embedder.outcome import Pixels

FORMATS = ("JPEG", "PNG")
PIXELS_MAX = 50_000_000


def pixels_of(picture: bytes) -> Pixels:
    """uint8 [height, width, 3], red first, turned the way the camera was held. Raises InvalidInput in words that
    say nothing of what the picture shows."""
    try:
        # Only the header is read here: a small file can claim a picture that fills the memory.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(picture), formats=FORMATS)
        if image.width * image.height > PIXELS_MAX:
            raise _unreadable(f"the picture has {image.width} x {image.height} pixels", f"send at most {PIXELS_MAX:,}")
        return np.ascontiguousarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError as error:
        raise _unreadable("these bytes are no JPEG or PNG file", "send the file as it is, not a re-encoding") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable("the picture is damaged or cut short", "send the whole file") from error


def _unreadable(what: str, hint: str) -> InvalidInput:
    return InvalidInput(what, field="picture", hint=hint)
