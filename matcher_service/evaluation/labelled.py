"""Labelled sets: templates whose subjects are known. Read here, used for evidence, stored nowhere by the service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import InvalidInput
from matcher_service.terms import Float32

_SUBJECT = ("subject", "subject_id", "subject_ids", "subjects")
_GROUP = ("group", "groups")
_SYNTHETIC = ("synthetic",)


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """Parallel rows: raw `templates` float32 [n, d], `subjects` str [n], `groups` str [n] ("" where none was told),
    `synthetic` bool [n]: made up by a generator, of nobody."""

    templates: Float32
    subjects: NDArray[np.str_]
    groups: NDArray[np.str_]
    synthetic: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.templates)

    def where(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> LabelledSet:
        return LabelledSet(self.templates[rows], self.subjects[rows], self.groups[rows], self.synthetic[rows])

    @property
    def has_groups(self) -> bool:
        return bool((self.groups != "").any())


def labelled(
    templates: NDArray[Any], subjects: Any, groups: Any | None = None, synthetic: Any | None = None
) -> LabelledSet:
    """Checked: raises InvalidInput, naming the column, for lengths that disagree or rows that are not templates."""
    rows = np.ascontiguousarray(templates, dtype=np.float32)
    if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] < 2:
        raise InvalidInput(f"templates have shape {rows.shape}", field="templates", hint="give rows of numbers [n, d]")
    if not np.isfinite(rows).all():
        raise InvalidInput("a template holds NaN or infinity", field="templates", hint="leave failed captures out")
    names = np.asarray(subjects).astype(str)
    label = np.full(len(rows), "") if groups is None else np.asarray(groups).astype(str)
    made_up = np.zeros(len(rows), dtype=bool) if synthetic is None else np.asarray(synthetic).astype(bool)
    for field, column in (("subject", names), ("group", label), ("synthetic", made_up)):
        if column.shape != (len(rows),):
            raise InvalidInput(f"{column.shape} values for {len(rows)} templates", field=field, hint="give one per row")
    return LabelledSet(rows, names, label, made_up)


def load_labelled(path: Path) -> LabelledSet:
    """From .npz with arrays `templates` and `subject`, and optionally `group` and `synthetic`. Raises InvalidInput."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInput(
            f"{path} cannot be read: {error}", field="file", hint="save it with numpy.savez, without objects"
        ) from error
    subject = _column(found, _SUBJECT)
    if "templates" not in found or subject is None:
        raise InvalidInput(
            f"{path} holds {', '.join(sorted(found)) or 'nothing'}",
            field="file",
            hint="it needs the arrays templates [n, d] and subject [n]; group and synthetic [n] may be added",
        )
    return labelled(found["templates"], subject, _column(found, _GROUP), _column(found, _SYNTHETIC))


def _column(found: dict[str, NDArray[Any]], names: tuple[str, ...]) -> NDArray[Any] | None:
    return next((found[name] for name in names if name in found), None)
