"""What every implementation of the Models seam owes its callers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from matcher_service.errors import Conflict, InvalidInput
from matcher_service.models.local import LocalModels
from matcher_service.models.score_calibrator import false_match_rates
from matcher_service.models.template_adapter import adapt
from matcher_service.seams import Models
from matcher_service.terms import Cause, ScoreTable, SpaceId, SpaceMap, TemplateSpace


@asynccontextmanager
async def local(request: pytest.FixtureRequest) -> AsyncIterator[Models]:
    yield LocalModels()


@asynccontextmanager
async def on_triton(request: pytest.FixtureRequest) -> AsyncIterator[Models]:
    served = request.getfixturevalue("served_models")
    # Imported only where there is a server: the default tests run without the client.
    from matcher_service.models.triton import TritonModels
    from matcher_service.triton_endpoints import TritonAddress, TritonEndpoints

    endpoints = TritonEndpoints(TritonAddress((served.grpc_endpoint,), call_s_max=20.0, attempt_s_max=20.0))
    try:
        yield await TritonModels.open(endpoints)
    finally:
        await endpoints.close()


IMPLEMENTATIONS = [pytest.param(local, id="local"), pytest.param(on_triton, id="triton", marks=pytest.mark.cluster)]

TABLE = ScoreTable((0.1, 0.3, 0.6), (1.0, 1e-2, 1e-5), "made up")


def make_space(name: str, dimension: int, *, version: int = 1, table: ScoreTable | None = TABLE) -> TemplateSpace:
    centre = np.random.default_rng(dimension + version).standard_normal(dimension).astype(np.float32)
    return TemplateSpace(SpaceId(name, version, dimension), centre, score_table=table)


OTHER = make_space("other", 96, table=None)
MAIN = TemplateSpace(
    SpaceId("main", 1, 128),
    make_space("main", 128).centre,
    (SpaceMap(OTHER.id, np.random.default_rng(9).standard_normal((128, 96)).astype(np.float32)),),
    TABLE,
)


@pytest.fixture(params=IMPLEMENTATIONS)
async def models(request: pytest.FixtureRequest) -> AsyncIterator[Models]:
    async with request.param(request) as made:
        await made.register(OTHER)
        await made.register(MAIN)
        yield made


@pytest.mark.parametrize("rows", [1, 3, 64, 257, 5000])
@pytest.mark.parametrize("source", [MAIN, OTHER], ids=["own-space", "through-map"])
async def test_adapt_gives_the_bits_of_the_one_mathematics(models: Models, rows: int, source: TemplateSpace) -> None:
    """Wherever it is computed and however large the batch, the result is `template_adapter.adapt`, bit for bit."""
    seed = rows
    print("seed", seed)
    templates = np.random.default_rng(seed).standard_normal((rows, source.id.dimension)).astype(np.float32)
    adapted = await models.adapt(source.id, MAIN.id, templates)
    assert adapted.dtype == np.float32
    assert adapted.shape == (rows, MAIN.id.dimension)
    assert adapted.flags.c_contiguous
    assert adapted.tobytes() == adapt(templates, source, MAIN).tobytes()


async def test_adapt_gives_unit_rows_and_zeros_for_the_centre(models: Models) -> None:
    """A row equal to the centre cannot be normalised and comes back as zeros; the others have length 1."""
    templates = np.stack([MAIN.centre, MAIN.centre + 1, -MAIN.centre])
    adapted = await models.adapt(MAIN.id, MAIN.id, templates)
    np.testing.assert_allclose(np.linalg.norm(adapted.astype(np.float64), axis=1), [0, 1, 1], atol=1e-6)


async def test_an_empty_batch_is_answered_empty(models: Models) -> None:
    """No rows in, no rows out, in the target's dimension."""
    assert (await models.adapt(OTHER.id, MAIN.id, np.empty((0, 96), np.float32))).shape == (0, 128)
    assert (await models.false_match_rates(MAIN.id, np.empty(0, np.float32))).shape == (0,)


async def test_without_a_map_the_spaces_are_not_comparable(models: Models) -> None:
    """No map from source to target, or an unknown space on either side: InvalidInput, WRONG_SPACE."""
    unknown = SpaceId("unknown", 1, 128)
    for source, target in ((MAIN.id, OTHER.id), (unknown, MAIN.id), (MAIN.id, unknown), (unknown, unknown)):
        with pytest.raises(InvalidInput) as refused:
            await models.adapt(source, target, np.ones((1, source.dimension), np.float32))
        assert refused.value.cause is Cause.WRONG_SPACE


async def test_rows_of_another_dimension_are_refused(models: Models) -> None:
    """The rows must have the source's dimension: InvalidInput, WRONG_DIMENSION."""
    with pytest.raises(InvalidInput) as refused:
        await models.adapt(MAIN.id, MAIN.id, np.ones((1, 127), np.float32))
    assert refused.value.cause is Cause.WRONG_DIMENSION


async def test_rates_come_from_the_spaces_table_and_never_fall_below_it(models: Models) -> None:
    """The calibrated rate is that of the table; beyond its end it stays at the last supported rate."""
    scores = np.linspace(-1, 1, 201, dtype=np.float32)
    rates = await models.false_match_rates(MAIN.id, scores)
    assert rates.dtype == np.float64
    np.testing.assert_allclose(rates, false_match_rates(TABLE, scores), rtol=1e-12)
    assert rates.min() == TABLE.rates[-1]
    assert rates.max() == 1.0


async def test_a_space_without_a_table_has_no_rates(models: Models) -> None:
    """Uncalibrated is said as NaN, not as a number."""
    assert np.isnan(await models.false_match_rates(OTHER.id, np.asarray([0.1, 0.9], np.float32))).all()
    with pytest.raises(InvalidInput) as refused:
        await models.false_match_rates(SpaceId("unknown", 1, 2), np.asarray([0.1], np.float32))
    assert refused.value.cause is Cause.WRONG_SPACE


async def test_registering_the_same_space_again_changes_nothing(models: Models) -> None:
    """The answer after a repeated registration is the one before it."""
    templates = np.random.default_rng(4).standard_normal((5, 128)).astype(np.float32)
    before = await models.adapt(MAIN.id, MAIN.id, templates)
    await models.register(MAIN)
    assert (await models.adapt(MAIN.id, MAIN.id, templates)).tobytes() == before.tobytes()


async def test_another_centre_is_another_version(models: Models) -> None:
    """The centre belongs to the version: the same id with another centre is a Conflict, and nothing changes."""
    templates = np.random.default_rng(4).standard_normal((5, 128)).astype(np.float32)
    before = await models.adapt(MAIN.id, MAIN.id, templates)
    with pytest.raises(Conflict):
        await models.register(TemplateSpace(MAIN.id, MAIN.centre + 1, MAIN.maps, TABLE))
    assert (await models.adapt(MAIN.id, MAIN.id, templates)).tobytes() == before.tobytes()
    newer = make_space("main", 128, version=2)
    await models.register(newer)
    assert (await models.adapt(newer.id, newer.id, templates)).tobytes() != before.tobytes()


async def test_a_space_that_makes_no_sense_is_not_registered(models: Models) -> None:
    """A centre or a table that does not fit is refused, and the space stays unknown."""
    wrong_centre = TemplateSpace(SpaceId("wrong", 1, 4), np.zeros(5, np.float32))
    wrong_table = make_space("wrong", 4, table=ScoreTable((0.1,), (0.0,), ""))
    for wrong in (wrong_centre, wrong_table):
        with pytest.raises(InvalidInput):
            await models.register(wrong)
        with pytest.raises(InvalidInput):
            await models.adapt(wrong.id, wrong.id, np.ones((1, 4), np.float32))
