"""Raw templates to unit rows of a template space.

A template's space has a centre, without which unrelated faces of a real model point the same way. Adapting is:
subtract the centre of the template's own space and normalise; where the wanted space is another, apply its linear
map from the first and normalise again. The scores of adapted templates are cosines.

The result of a row is the same to the last bit whatever batch it stands in, and on any machine: every sum is a
fixed tree of elementwise float64 operations, because BLAS and SIMD reductions choose their order by the shape.
"""

from __future__ import annotations

import numpy as np

from matcher_service.errors import InvalidInput
from matcher_service.terms import Cause, Float32, Float64, SpaceMap, TemplateSpace

# Values worked on at a time: the float64 temporaries of such a block stay in the processor's cache.
_BLOCK_VALUES = 1 << 15


def adapt(templates: Float32, source: TemplateSpace, target: TemplateSpace) -> Float32:
    """Raw `templates` float32 [n, source dimension], finite, to unit rows float32 [n, target dimension], C order.

    A row that cannot be normalised (it equals the centre, is not finite, or is sent to the origin by the map) comes
    back as zeros. Raises InvalidInput: WRONG_DIMENSION if the rows do not have the source's dimension, WRONG_SPACE if
    the spaces differ and the target has no map from the source.
    """
    check_templates(templates, source)
    matrix = (
        None if source.id == target.id else np.ascontiguousarray(map_between(source, target).matrix.T, dtype=np.float64)
    )
    centre = source.centre.astype(np.float64)
    adapted = np.empty((len(templates), target.id.dimension), dtype=np.float32)
    block_rows = max(1, _BLOCK_VALUES // max(source.id.dimension, target.id.dimension))
    for start in range(0, len(templates), block_rows):
        rows = templates[start : start + block_rows].astype(np.float64, order="C")
        rows -= centre
        _normalise(rows)
        if matrix is not None:
            rows = _mapped(rows, matrix)
            _normalise(rows)
        adapted[start : start + block_rows] = rows
    return adapted


def check_templates(templates: Float32, source: TemplateSpace) -> None:
    """Raises InvalidInput (WRONG_DIMENSION) unless `templates` is [n, source dimension]."""
    if templates.ndim != 2 or templates.shape[1] != source.id.dimension:
        raise InvalidInput(
            f"templates have shape {templates.shape}, the space {source.id} needs [n, {source.id.dimension}]",
            field="templates",
            hint="send templates of the space that the message names",
            cause=Cause.WRONG_DIMENSION,
        )


def check_space(space: TemplateSpace) -> None:
    """Raises InvalidInput, naming the field, unless the centre and the maps are finite and fit the dimensions."""
    dimension = space.id.dimension
    if dimension < 2 or space.centre.shape != (dimension,) or not np.isfinite(space.centre).all():
        raise InvalidInput(
            f"the centre has shape {space.centre.shape}; {space.id} needs {dimension} finite values",
            field="centre",
            hint="send the mean of representative raw templates of this model version",
            cause=Cause.WRONG_DIMENSION if space.centre.shape != (dimension,) else Cause.NOT_FINITE,
        )
    seen = set()
    for one in space.maps:
        wanted = (dimension, one.source.dimension)
        if one.source == space.id or one.source in seen:
            raise InvalidInput(
                f"more than one way from {one.source} to {space.id}",
                field="maps",
                hint="give one map for each other space, and none from the space to itself",
            )
        if one.matrix.shape != wanted or not np.isfinite(one.matrix).all():
            raise InvalidInput(
                f"the map from {one.source} has shape {one.matrix.shape}; it needs {list(wanted)} finite values",
                field="maps",
                hint="send the matrix as rows of the target's dimension",
                cause=Cause.WRONG_DIMENSION if one.matrix.shape != wanted else Cause.NOT_FINITE,
            )
        seen.add(one.source)


def map_between(source: TemplateSpace, target: TemplateSpace) -> SpaceMap:
    """The target's map from the source; raises InvalidInput (WRONG_SPACE) if it has none."""
    for one in target.maps:
        if one.source == source.id:
            return one
    raise InvalidInput(
        f"no map from {source.id} to {target.id}",
        field="space",
        hint="send templates of the galleries' own space, or register that space with a map",
        cause=Cause.WRONG_SPACE,
    )


def _mapped(unit: Float64, columns: Float64) -> Float64:
    """unit [n, ds] times columns [ds, dt], summed in the order of the source's coordinates."""
    total = np.zeros((len(unit), columns.shape[1]))
    term = np.empty_like(total)
    for coordinate, column in enumerate(columns):
        np.multiply(unit[:, coordinate, None], column, out=term)
        total += term
    return total


def _normalise(rows: Float64) -> None:
    """In place: each row divided by its length, or zeros where that is nought or not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        lengths = np.sqrt(_row_sums(rows * rows))
        rows /= lengths[:, None]
    rows[~(np.isfinite(lengths) & (lengths > 0))] = 0.0


def _row_sums(terms: Float64) -> Float64:
    """Sum of each row [n, d] by folding its second half onto its first until one column is left; spoils `terms`."""
    width = terms.shape[1]
    while width > 1:
        kept = (width + 1) // 2
        terms[:, : width - kept] += terms[:, kept:width]
        width = kept
    return terms[:, 0]
