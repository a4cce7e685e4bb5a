"""What became of one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from matcher_service.models.embedder.card import ModelCard
from matcher_service.terms import Float32

# A picture or part of one: [height, width, 3], red first.
Pixels = NDArray[np.uint8]


class Form(StrEnum):
    """What a picture shows. The tokens are part of the wire contract."""

    PHOTOGRAPH = "photograph"
    """Anything; the face is searched for, and there must be exactly one."""
    CROP = "crop"
    """One face as a detector cuts it out: its borders are the box of the face, brows to chin."""


class Judgement(StrEnum):
    """Whether a picture gave a template and, if not, why. The tokens are part of the wire contract."""

    TEMPLATE = "TEMPLATE"
    NO_FACE = "NO_FACE"
    SEVERAL_FACES = "SEVERAL_FACES"
    TOO_SMALL = "TOO_SMALL"
    TOO_BLURRED = "TOO_BLURRED"
    UNREADABLE = "UNREADABLE"


@dataclass(frozen=True, slots=True)
class Embedding:
    """The answer to one picture: a raw `template` float32 [dimension] if the judgement is TEMPLATE, else None.

    `quality` in [0, 1] (see `quality.py`), 0 where no single face was found; `detail` says in words what was wrong.
    """

    judgement: Judgement
    # Kept out of what is printed, and so out of every log.
    template: Float32 | None = field(default=None, repr=False)
    quality: float = 0.0
    face_width_px: float = 0.0
    sharpness: float = 0.0
    detail: str = ""


class Embedder(Protocol):
    """Computes in the calling thread, one batch at a time; may hold the interpreter's lock all the while."""

    @property
    def card(self) -> ModelCard: ...

    def embed(self, pictures: Sequence[bytes], form: Form) -> list[Embedding]:
        """One answer per picture (the bytes of a JPEG or PNG file), whatever the pictures are."""
        ...


class TemplateMaker(Protocol):
    """An embedder as the gateway uses it: it does not hold up the event loop."""

    @property
    def card(self) -> ModelCard: ...

    async def embed(self, pictures: Sequence[bytes], form: Form) -> list[Embedding]:
        """As `Embedder.embed`. Raises Overloaded if too many pictures wait already, ModelsUnavailable if none can be
        looked at now."""
        ...

    async def close(self) -> None: ...
