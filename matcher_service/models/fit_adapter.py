"""Learning the linear map from one template space to another, from pairs of templates of the same pictures.

The closed forms start from what `template_adapter` does: rows are centred and normalised before the map and
normalised again after it. With U [n, ds] and V [n, dt] the unit rows of the two spaces:

- ridge: the M that minimises |U Mt - V|^2 + strength * trace(Ut U) / ds * |M|^2; for spaces that differ in more than a
  turn, and for dimensions that differ.
- near: the same, but the penalty is on |M - I|^2: for two versions or croppings of one model, of one dimension, whose
  spaces nearly agree as they are. A map fitted afresh on few pairs would be worse than none.
- procrustes: the M with orthonormal rows or columns that minimises |U Mt - V|^2 (P. Schoenemann, 1966): a turn, which
  cannot learn what is not there, for few pairs.

What is reported is measured on pairs of subjects that the map was not fitted on: each fold of subjects in turn is
held out, the method and strength are chosen within the others alone. The map that is returned is fitted on all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import InvalidInput
from matcher_service.models.template_adapter import adapt, check_space
from matcher_service.terms import Float32, Float64, Int64, SpaceId, SpaceMap, TemplateSpace

Method = Literal["ridge", "near", "procrustes", "best"]

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
FOLDS = 5

# Rank-1 is measured on samples of at most this many, drawn with a fixed seed.
PROBES_MAX = 2_000
GALLERY_MAX = 20_000
_SEED = 20_250_101


@dataclass(frozen=True)
class Pairs:
    """Raw templates of the same pictures in two spaces: `source` float32 [n, ds], `target` float32 [n, dt]; who they
    show, int64 [n], if that is known, and the centres of the spaces."""

    source: Float32
    target: Float32
    source_centre: Float32
    target_centre: Float32
    subjects: Int64 | None = None

    def __len__(self) -> int:
        return len(self.source)


class Choice(NamedTuple):
    """How a map is fitted; `strength` serves ridge and near."""

    method: str
    strength: float = 0.0

    def __str__(self) -> str:
        return self.method if self.method == "procrustes" else f"{self.method}, strength {self.strength:g}"


@dataclass(frozen=True)
class Fit:
    """The map, fitted on all pairs, and what was measured on held-out ones.

    `cosine` is that of a mapped template with its own pair in the target space; `error_rms` the distance of the two
    unit vectors, root mean square. `rank_1` is the share of probes whose nearest other reference is of their own
    subject: `native` when probe and references are of the target space, `mapped` when the probe is mapped into it
    from the source space; both NaN unless some subject has two pairs. `own_pair_rank_1` is the share of mapped
    probes whose nearest reference is their own pair.
    """

    matrix: Float32
    choice: Choice
    pairs: int
    held_out_by_subject: bool
    cosine_median: float
    cosine_low_1pct: float
    error_rms: float
    rank_1_native: float
    rank_1_mapped: float
    own_pair_rank_1: float
    probes: int
    references: int

    @property
    def rank_1_loss(self) -> float:
        """The part of native rank-1 identification that the map costs."""
        return self.rank_1_native - self.rank_1_mapped


def read_pairs(file: Path, source_centre: Float32 | None = None, target_centre: Float32 | None = None) -> Pairs:
    """Pairs of an .npz file with `source` [n, ds], `target` [n, dt] and, if known, `subject` [n]. A centre that is
    not given is the mean of its side. Raises InvalidInput, naming the array that will not do."""
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files if name in ("source", "target", "subject")}
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read {file}: {error}", field="pairs", hint="give an .npz file") from error
    for name in ("source", "target"):
        rows = arrays.get(name)
        if rows is None or rows.ndim != 2 or rows.dtype.kind != "f" or not np.isfinite(rows).all():
            raise InvalidInput(
                f"{file} has no {name} of finite rows",
                field=name,
                hint="store `source` and `target`, row i of both from the same picture, and `subject` if known",
            )
    source, target = arrays["source"].astype(np.float32), arrays["target"].astype(np.float32)
    who = arrays.get("subject")
    if len(source) != len(target) or (who is not None and who.shape != (len(source),)):
        raise InvalidInput("source, target and subject have different lengths", field="pairs", hint="one row per pair")
    return Pairs(
        source,
        target,
        _mean(source) if source_centre is None else source_centre,
        _mean(target) if target_centre is None else target_centre,
        None if who is None else np.unique(who, return_inverse=True)[1].reshape(-1).astype(np.int64),
    )


def fit(pairs: Pairs, method: Method = "best") -> Fit:
    """Raises InvalidInput if there are too few pairs, or subjects, to hold any out."""
    subjects = np.arange(len(pairs)) if pairs.subjects is None else pairs.subjects
    if len(np.unique(subjects)) < 2 * FOLDS:
        raise InvalidInput(
            f"{len(pairs)} pairs of {len(np.unique(subjects))} subjects are too few",
            field="pairs",
            hint=f"give pairs of at least {2 * FOLDS} subjects; some thousand pairs make a good map",
        )
    source_unit, target_unit = _unit(pairs.source, pairs.source_centre), _unit(pairs.target, pairs.target_centre)
    usable = source_unit.any(axis=1) & target_unit.any(axis=1)
    source_unit, target_unit, subjects = source_unit[usable], target_unit[usable], subjects[usable]
    folds = _folds(subjects)
    sums = [_Sums.of(source_unit[rows], target_unit[rows]) for rows in folds]
    choices = _choices(method, source_unit.shape[1] == target_unit.shape[1])

    mapped = np.empty_like(target_unit)
    for number, rows in enumerate(folds):
        others = [one for one in range(FOLDS) if one != number]
        choice = _best(choices, others, folds, sums, source_unit, target_unit)
        mapped[rows] = _normalised(source_unit[rows] @ _solved(_Sums.total(sums[one] for one in others), choice).T)

    choice = _best(choices, list(range(FOLDS)), folds, sums, source_unit, target_unit)
    matrix = _solved(_Sums.total(sums), choice).astype(np.float32)
    cosines = np.einsum("ij,ij->i", mapped, target_unit)
    native, with_map, own_pair, probes, references = _rank_1(mapped, target_unit, subjects)
    return Fit(
        matrix=matrix,
        choice=choice,
        pairs=len(cosines),
        held_out_by_subject=pairs.subjects is not None,
        cosine_median=float(np.median(cosines)),
        cosine_low_1pct=float(np.quantile(cosines, 0.01)),
        error_rms=float(np.sqrt(np.mean(((mapped - target_unit) ** 2).sum(axis=1)))),
        rank_1_native=native,
        rank_1_mapped=with_map,
        own_pair_rank_1=own_pair,
        probes=probes,
        references=references,
    )


def mapped_space(target: TemplateSpace, source: SpaceId, matrix: Float32) -> TemplateSpace:
    """The target space with this map from `source`, in the place of one that it had. Raises InvalidInput if the
    matrix does not fit."""
    maps = (*(one for one in target.maps if one.source != source), SpaceMap(source, matrix))
    space = TemplateSpace(target.id, target.centre, maps, target.score_table)
    check_space(space)
    return space


class _Sums(NamedTuple):
    """What the closed forms need of some rows: Ut U [ds, ds] and Vt U [dt, ds]."""

    source: Float64
    cross: Float64

    @classmethod
    def of(cls, source_unit: Float64, target_unit: Float64) -> _Sums:
        return cls(source_unit.T @ source_unit, target_unit.T @ source_unit)

    @classmethod
    def total(cls, parts: Iterable[_Sums]) -> _Sums:
        listed = list(parts)
        return cls(
            np.sum([one.source for one in listed], axis=0),
            np.sum([one.cross for one in listed], axis=0),
        )


def _solved(sums: _Sums, choice: Choice) -> Float64:
    if choice.method == "procrustes":
        left, _, right = np.linalg.svd(sums.cross, full_matrices=False)
        return np.asarray(left @ right)
    dimension = len(sums.source)
    penalty = choice.strength * np.trace(sums.source) / dimension * np.eye(dimension)
    cross = sums.cross + penalty if choice.method == "near" else sums.cross
    return np.asarray(np.linalg.solve(sums.source + penalty, cross.T).T)


def _choices(method: Method, same_dimension: bool) -> list[Choice]:
    wanted: tuple[str, ...] = {"best": ("procrustes", "near", "ridge")}.get(method, (method,))
    if not same_dimension:
        wanted = tuple(one for one in wanted if one != "near")
    if not wanted:
        raise InvalidInput("`near` needs spaces of one dimension", field="method", hint="use ridge or best")
    return [Choice(one, strength) for one in wanted for strength in ((0.0,) if one == "procrustes" else STRENGTHS)]


def _best(
    choices: Sequence[Choice],
    numbers: Sequence[int],
    folds: Sequence[Int64],
    sums: Sequence[_Sums],
    source_unit: Float64,
    target_unit: Float64,
) -> Choice:
    """The choice with the highest mean cosine when each of these folds in turn is left out of the others."""
    if len(choices) == 1:
        return choices[0]

    def mean_cosine(choice: Choice) -> float:
        total, rows_in_all = 0.0, 0
        for left_out in numbers:
            matrix = _solved(_Sums.total(sums[one] for one in numbers if one != left_out), choice)
            rows = folds[left_out]
            mapped = _normalised(source_unit[rows] @ matrix.T)
            total += float(np.einsum("ij,ij->", mapped, target_unit[rows]))
            rows_in_all += len(rows)
        return total / rows_in_all

    return max(choices, key=mean_cosine)


def _folds(subjects: Int64) -> list[Int64]:
    """Rows of each fold; the pairs of a subject are all in one."""
    who = np.unique(subjects)
    fold_of = np.empty(int(subjects.max()) + 1, dtype=np.int64)
    fold_of[np.random.default_rng(_SEED).permutation(who)] = np.arange(len(who)) % FOLDS
    return [np.flatnonzero(fold_of[subjects] == number) for number in range(FOLDS)]


def _rank_1(mapped: Float64, target_unit: Float64, subjects: Int64) -> tuple[float, float, float, int, int]:
    rng = np.random.default_rng(_SEED)
    count = len(subjects)
    probes = np.sort(rng.permutation(count)[:PROBES_MAX])
    # The references hold every probe's own pair, so that each experiment is of one size.
    others = rng.permutation(np.setdiff1d(np.arange(count), probes))
    references = np.sort(np.concatenate([probes, others[: max(0, GALLERY_MAX - len(probes))]]))
    gallery, who = target_unit[references], subjects[references]
    per_subject = np.bincount(who, minlength=int(subjects.max()) + 1)
    mated = per_subject[subjects[probes]] > 1

    def nearest(rows: Float64, places: NDArray[np.int64] | None) -> Int64:
        scores = rows @ gallery.T
        if places is not None:
            scores[np.arange(len(rows)), places] = -np.inf
        return np.asarray(scores.argmax(axis=1), dtype=np.int64)

    own = np.searchsorted(references, probes)
    own_pair = float(np.mean(nearest(mapped[probes], None) == own))
    if not mated.any():
        return float("nan"), float("nan"), own_pair, len(probes), len(references)
    chosen, own = probes[mated], own[mated]
    native = float(np.mean(who[nearest(target_unit[chosen], own)] == subjects[chosen]))
    with_map = float(np.mean(who[nearest(mapped[chosen], own)] == subjects[chosen]))
    return native, with_map, own_pair, len(chosen), len(references)


def _unit(templates: Float32, centre: Float32) -> Float64:
    space = TemplateSpace(SpaceId("", 0, templates.shape[1]), centre)
    check_space(space)
    return adapt(templates, space, space).astype(np.float64)


def _normalised(rows: Float64) -> Float64:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0))


def _mean(templates: Float32) -> Float32:
    return np.asarray(templates.mean(axis=0, dtype=np.float64), dtype=np.float32)
