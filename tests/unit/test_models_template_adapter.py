"""Laws of the template adapter's mathematics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from matcher_service.errors import InvalidInput
from matcher_service.models.template_adapter import adapt, check_space
from matcher_service.terms import Cause, Float32, SpaceId, SpaceMap, TemplateSpace


def space(dimension: int, *, name: str = "a", seed: int = 0, maps: tuple[SpaceMap, ...] = ()) -> TemplateSpace:
    centre = np.random.default_rng(seed).standard_normal(dimension).astype(np.float32)
    return TemplateSpace(SpaceId(name, 1, dimension), centre, maps)


def mapped_pair(source_dimension: int, target_dimension: int) -> tuple[TemplateSpace, TemplateSpace]:
    source = space(source_dimension, name="b", seed=1)
    matrix = np.random.default_rng(2).standard_normal((target_dimension, source_dimension)).astype(np.float32)
    return source, space(target_dimension, maps=(SpaceMap(source.id, matrix),))


ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.just(7)),
    elements=st.floats(-1e6, 1e6, width=32, allow_nan=False),
)


@given(ROWS)
def test_every_row_comes_back_as_the_unit_vector_of_its_distance_from_the_centre(rows: Float32) -> None:
    """An adapted row points from the centre to the template and has length 1, or is all zeros."""
    one = space(7)
    away = rows.astype(np.float64) - one.centre
    expected = away / np.linalg.norm(away, axis=1, keepdims=True)
    adapted = adapt(rows, one, one)
    assert adapted.dtype == np.float32
    assert adapted.flags.c_contiguous
    np.testing.assert_allclose(adapted, expected, atol=1e-6)


@pytest.mark.parametrize("dimension", [2, 3, 100, 128, 192, 512])
@pytest.mark.parametrize("through_map", [False, True])
def test_a_row_gives_the_same_bits_whatever_batch_it_stands_in(dimension: int, through_map: bool) -> None:
    """Adapting is a function of the row alone: batch size, place, memory layout and alignment leave no trace."""
    seed = 20240907
    print("seed", seed)
    rng = np.random.default_rng(seed)
    source, target = mapped_pair(dimension, 64) if through_map else (space(dimension), space(dimension))
    rows = (rng.standard_normal((300, dimension)) * 3 + source.centre).astype(np.float32)
    whole = adapt(rows, source, target)
    for first, last in ((0, 1), (17, 18), (1, 4), (120, 140), (127, 129), (5, 300)):
        assert adapt(rows[first:last].copy(), source, target).tobytes() == whole[first:last].tobytes()
    assert adapt(np.asfortranarray(rows), source, target).tobytes() == whole.tobytes()
    assert adapt(rows[::-3], source, target).tobytes() == np.ascontiguousarray(whole[::-3]).tobytes()
    shifted = np.frombuffer(b"\0" + rows.tobytes(), dtype=np.uint8)[1:].view(np.float32).reshape(rows.shape)
    assert adapt(shifted, source, target).tobytes() == whole.tobytes()


def test_the_map_acts_on_the_centred_unit_row_and_its_result_is_normalised() -> None:
    """A probe of another space: centre of its own space, normalise, map, normalise; the target's centre is not used."""
    seed = 7
    print("seed", seed)
    source, target = mapped_pair(24, 10)
    rows = np.random.default_rng(seed).standard_normal((200, 24)).astype(np.float32)
    away = rows.astype(np.float64) - source.centre
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    out = away @ target.maps[0].matrix.T.astype(np.float64)
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    np.testing.assert_allclose(adapt(rows, source, target), out, atol=1e-6)


def test_rows_that_cannot_be_normalised_come_back_as_zeros_and_spoil_no_neighbour() -> None:
    """The centre itself, and a row that the map sends to the origin, are zeros; the rows beside them are as alone."""
    one = space(16)
    good = np.random.default_rng(3).standard_normal((1, 16)).astype(np.float32)
    rows = np.concatenate([good, one.centre[None], np.full((1, 16), np.nan, np.float32), good])
    adapted = adapt(rows, one, one)
    assert not adapted[1].any()
    assert not adapted[2].any()
    assert adapted[0].tobytes() == adapted[3].tobytes() == adapt(good, one, one).tobytes()

    source = TemplateSpace(SpaceId("b", 1, 2), np.zeros(2, np.float32))
    blind = SpaceMap(source.id, np.asarray([[1, 0], [0, 0]], np.float32))
    target = TemplateSpace(SpaceId("a", 1, 2), np.zeros(2, np.float32), (blind,))
    assert adapt(np.asarray([[0, 5], [3, 4]], np.float32), source, target).tolist() == [[0, 0], [1, 0]]


def test_extreme_magnitudes_are_still_normalised() -> None:
    """float32 rows near the ends of the range neither overflow nor vanish on the way."""
    one = TemplateSpace(SpaceId("a", 1, 2), np.zeros(2, np.float32))
    rows = np.asarray([[3e38, 3e38], [1e-45, 0], [0, -1e-40]], np.float32)
    np.testing.assert_allclose(adapt(rows, one, one), [[0.5**0.5, 0.5**0.5], [1, 0], [0, -1]], atol=1e-6)


def test_no_rows_give_no_rows() -> None:
    """An empty batch comes back empty, in the target's dimension."""
    source, target = mapped_pair(6, 4)
    assert adapt(np.empty((0, 6), np.float32), source, target).shape == (0, 4)


def test_a_missing_map_and_a_wrong_dimension_are_the_callers_fault() -> None:
    """Spaces without a map are not comparable, whatever their dimensions; a wrong shape is named as such."""
    with pytest.raises(InvalidInput) as no_map:
        adapt(np.ones((1, 8), np.float32), space(8), space(8, name="other"))
    assert (no_map.value.cause, no_map.value.field) == (Cause.WRONG_SPACE, "space")
    assert no_map.value.hint
    for wrong in (np.ones((1, 9), np.float32), np.ones(8, np.float32)):
        with pytest.raises(InvalidInput) as dimension:
            adapt(wrong, space(8), space(8))
        assert dimension.value.cause is Cause.WRONG_DIMENSION


@pytest.mark.parametrize(
    ("bad", "field", "cause"),
    [
        (TemplateSpace(SpaceId("a", 1, 4), np.zeros(3, np.float32)), "centre", Cause.WRONG_DIMENSION),
        (TemplateSpace(SpaceId("a", 1, 2), np.asarray([0, np.inf], np.float32)), "centre", Cause.NOT_FINITE),
        (space(4, maps=(SpaceMap(SpaceId("b", 1, 3), np.ones((3, 4), np.float32)),)), "maps", Cause.WRONG_DIMENSION),
        (space(2, maps=(SpaceMap(SpaceId("b", 1, 1), np.full((2, 1), np.nan, np.float32)),)), "maps", Cause.NOT_FINITE),
        (space(4, maps=(SpaceMap(SpaceId("a", 1, 4), np.ones((4, 4), np.float32)),)), "maps", Cause.INVALID),
        (space(2, maps=(SpaceMap(SpaceId("b", 1, 2), np.ones((2, 2), np.float32)),) * 2), "maps", Cause.INVALID),
    ],
)
def test_a_space_that_makes_no_sense_is_refused_by_field(bad: TemplateSpace, field: str, cause: Cause) -> None:
    """Wrong shapes, values that are not finite, and two ways from one space are refused at registration."""
    with pytest.raises(InvalidInput) as refused:
        check_space(bad)
    assert (refused.value.field, refused.value.cause) == (field, cause)
    check_space(mapped_pair(6, 4)[1])
