"""What the hosted face_embedder does with the pictures of a request; knows arrays, not Triton."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from matcher_service.models.embedder.outcome import Embedder, Embedding, Form, Judgement
from matcher_service.models.hosted import check_row
from matcher_service.terms import Float32, SpaceId

# Not a picture, but known on both sides: its answer is known values, so that a client can prove the way there and
# back. The warm-up sends it too.
CHECK_PICTURE = b"matcher: known values"

PICTURES_MAX = 16

# The answer's tensors: measures are quality, width of the face in pixels, sharpness.
TENSORS = ("TEMPLATE", "JUDGEMENT", "MEASURES", "DETAIL", "SPACE")


def check_embedding(dimension: int) -> Embedding:
    """The answer to CHECK_PICTURE."""
    return Embedding(Judgement.TEMPLATE, np.resize(check_row(), dimension), 0.5, 64.0, 0.25, "known values")


def tensors(embedder: Embedder, pictures: Sequence[bytes], crops: Sequence[bool]) -> dict[str, np.ndarray]:
    """The answer's tensors, [n, ...] each; the template of a picture that gave none is zeros."""
    space = embedder.card.space
    found: list[Embedding] = []
    for picture, crop in zip(pictures, crops, strict=True):
        if picture == CHECK_PICTURE:
            found.append(check_embedding(space.dimension))
        else:
            found.extend(embedder.embed([picture], Form.CROP if crop else Form.PHOTOGRAPH))
    none = np.zeros(space.dimension, np.float32)
    values = (
        np.stack([none if one.template is None else one.template for one in found]),
        _texts([one.judgement for one in found]),
        np.array([[one.quality, one.face_width_px, one.sharpness] for one in found], dtype=np.float32),
        _texts([one.detail for one in found]),
        _texts([space_text(space)] * len(found)),
    )
    return dict(zip(TENSORS, values, strict=True))


def embeddings(template: Float32, judgement: np.ndarray, measures: Float32, detail: np.ndarray) -> list[Embedding]:
    """The answers that the first four tensors stand for; raises ValueError if they stand for none."""
    answers = []
    for row in range(len(template)):
        what = Judgement(judgement[row, 0].decode())
        given = np.array(template[row], dtype=np.float32) if what is Judgement.TEMPLATE else None
        quality, width, sharpness = (float(one) for one in measures[row])
        answers.append(Embedding(what, given, quality, width, sharpness, detail[row, 0].decode()))
    return answers


def space_text(space: SpaceId) -> str:
    return f"{space.name}/{space.version}/{space.dimension}"


def _texts(values: Sequence[str]) -> np.ndarray:
    texts = np.empty((len(values), 1), dtype=np.object_)
    texts[:, 0] = [one.encode() for one in values]
    return texts
