"""The real templates of the demo, and who is enrolled, who is searched for, and who is known nowhere.

Shots 1 to 5 of subjects 1 to 35 are enrolled, and they alone set the centre of the space and the thresholds. Shots 6
to 10 of all 40 subjects are the probes: those of subjects 36 to 40 have no mate in any gallery.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from matcher_service.terms import Float32, SpaceId

SPACE = SpaceId("dlib-resnet29", 1, 128)
GALLERY_SUBJECTS: Mapping[str, range] = {"custody": range(1, 31), "immigration": range(31, 36)}
ENROLLED_SHOTS = range(1, 6)
CREDIT = (
    "Templates computed from the ORL face photographs, 1992-1994: credit to Olivetti Research Laboratory "
    "(F. Samaria and A. Harter, 1994)."
)


@dataclass(frozen=True, slots=True)
class Faces:
    """Parallel rows: raw `templates` float32 [n, 128], `subjects` and `shots` int16 [n], both from 1."""

    templates: Float32
    subjects: NDArray[np.int16]
    shots: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.templates)

    def where(self, rows: NDArray[np.bool_]) -> Faces:
        return Faces(self.templates[rows], self.subjects[rows], self.shots[rows])

    @property
    def subject_ids(self) -> list[str]:
        return [f"orl-s{subject:02d}" for subject in self.subjects]

    @property
    def row_ids(self) -> list[str]:
        """One id per template: of the reference if it is enrolled, of the probe if it is searched for."""
        return [f"orl-s{subject:02d}-{shot:02d}" for subject, shot in zip(self.subjects, self.shots, strict=True)]


def load_faces() -> Faces:
    """All 400 templates as shipped."""
    packed = files("matcher_service.demo").joinpath("orl_templates_dlib128.npz").read_bytes()
    with np.load(io.BytesIO(packed)) as arrays:
        return Faces(arrays["templates"], arrays["subject"], arrays["shot"])


def enrolment(faces: Faces, gallery_id: str | None = None) -> Faces:
    """What is enrolled into a gallery; None: into all of them."""
    wanted = [gallery_id] if gallery_id else list(GALLERY_SUBJECTS)
    subjects = [subject for one in wanted for subject in GALLERY_SUBJECTS[one]]
    return faces.where(np.isin(faces.subjects, subjects) & np.isin(faces.shots, ENROLLED_SHOTS))


def probes(faces: Faces) -> Faces:
    """What is searched for: every shot that is enrolled for nobody, in order of shot and then subject, so that
    neighbours in the stream are different people."""
    found = faces.where(~np.isin(faces.shots, ENROLLED_SHOTS))
    order = np.lexsort((found.subjects, found.shots))
    return Faces(found.templates[order], found.subjects[order], found.shots[order])


def is_mated(faces: Faces) -> NDArray[np.bool_]:
    """Whether a row's subject is enrolled somewhere."""
    return np.isin(faces.subjects, [subject for subjects in GALLERY_SUBJECTS.values() for subject in subjects])
