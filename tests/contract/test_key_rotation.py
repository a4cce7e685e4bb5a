"""A gallery's key is rotated: all is sealed anew while writes go on, and the old key goes when it is free."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from matcher_service.errors import Conflict, LogUnavailable, NotFound
from matcher_service.gallery import resealing, seal
from matcher_service.gallery.log import SqlGalleryLog
from matcher_service.gallery.resealing import SqlKeyRotations
from matcher_service.gallery.schema import entry
from matcher_service.terms import DeleteGallery, Withdraw, WriteOutcome
from tests.contract.test_gallery_log import (
    CLERK,
    DAY_MS,
    World,
    enrol,
    stocked,  # noqa: F401
    template,
    world,  # noqa: F401
)

NAMES = [f"r{number:02}" for number in range(20)]
NOBODY: dict[str, dict[str, int] | None] = {}


def log_of(made: World) -> SqlGalleryLog:
    assert isinstance(made.log, SqlGalleryLog)
    return made.log


async def generations(made: World, gallery_id: str = "custody") -> list[int]:
    """Of each template in the tables, in order, the generation that it is sealed under."""
    wanted = select(entry.c.sealed).where(entry.c.gallery_id == gallery_id, entry.c.sealed.is_not(None))
    ordered = wanted.order_by(entry.c.sequence)
    found = await log_of(made).query(lambda connection: list(connection.execute(ordered).scalars()))
    return [seal.generation_of(one) for one in found]


async def templates(made: World) -> dict[str, bytes | None]:
    return {one.reference_id: one.template for one in await made.log.read(3, 1000) if one.template is not None}


async def reseal(rotations: SqlKeyRotations) -> int:
    steps = 0
    while await rotations.reseal_some():
        steps += 1
    return steps


async def actions(made: World) -> list[str]:
    return [str(one["action"]) for one in await made.audited() if str(one["action"]).startswith("key")]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resealing, "ENTRIES_AT_ONCE", 5)
    monkeypatch.setattr(resealing, "TEMPLATES_AT_ONCE", 3)


async def test_everything_is_sealed_anew_while_writes_go_on_and_the_old_key_is_destroyed(stocked: World) -> None:  # noqa: F811
    rotations = SqlKeyRotations(log_of(stocked))
    await stocked.do(*(enrol(name, at) for at, name in enumerate(NAMES)))
    held = await templates(stocked)
    begun = await rotations.rotate("custody", "a test", True, CLERK)
    assert (begun.generation, begun.resealed, begun.resealed_at_ms) == (2, 0, None)
    with pytest.raises(Conflict, match="is being rotated"):
        await rotations.rotate("custody", "a test", True, CLERK)
    with pytest.raises(NotFound):
        await rotations.rotate("nowhere", "a test", True, CLERK)

    # What comes in from now on is under the new key; what is there, until its turn, under the old.
    await stocked.do(enrol("new", 50, idempotency_key="k"))
    assert await generations(stocked) == [1] * 20 + [2]
    assert await rotations.reseal_some()
    assert set(await generations(stocked)) == {1, 2}
    assert (await templates(stocked)) == {**held, "new": template(50)}
    # Its first use is compared with what was sealed anew, and a withdrawn one is erased as ever.
    await stocked.do(Withdraw("custody", "r19", "a test"))
    assert await stocked.log.erase(stocked.clock.wall_ms()) == 1
    assert await reseal(rotations) > 5
    assert await generations(stocked) == [2] * 20
    (again,) = await stocked.log.append([enrol("new", 50, idempotency_key="k")], CLERK)
    assert getattr(again, "outcome", None) is WriteOutcome.REPEATED
    (other,) = await stocked.log.append([enrol("new", 51, idempotency_key="k")], CLERK)
    assert isinstance(other, Conflict)
    (told,) = await rotations.keys()
    assert (told.resealed, told.share, told.retired_at_ms) == (19, 1.0, None)
    assert told.resealed_at_ms is not None

    keyring = log_of(stocked).keyring
    assert keyring.cipher("custody", 1) is not None
    assert await rotations.retire(NOBODY, stocked.clock.wall_ms()) == ["custody"]
    assert keyring.cipher("custody", 1) is None
    assert await rotations.retire(NOBODY, stocked.clock.wall_ms()) == []
    held.pop("r19")
    for _ in range(2):
        assert await templates(stocked) == {**held, "new": template(50)}
        assert await generations(stocked, "immigration") == []
        await stocked.reopen()
    assert await actions(stocked) == ["key.rotated", "key.resealed", "key.retired"]
    # And once more, from the second to the third.
    rotations = SqlKeyRotations(log_of(stocked))
    assert (await rotations.rotate("custody", "a test", True, CLERK)).generation == 3
    await reseal(rotations)
    assert await rotations.retire(NOBODY, stocked.clock.wall_ms()) == ["custody"]
    assert set(await generations(stocked)) == {3}
    assert await templates(stocked) == {**held, "new": template(50)}


async def test_a_rotation_that_broke_off_goes_on_where_it_was(stocked: World) -> None:  # noqa: F811
    await stocked.do(*(enrol(name, at) for at, name in enumerate(NAMES)))
    rotations = SqlKeyRotations(log_of(stocked))
    await rotations.rotate("custody", "a test", True, CLERK)
    await rotations.reseal_some()
    await rotations.reseal_some()
    some = await generations(stocked)
    assert set(some) == {1, 2}
    # A generation that is still needed is not destroyed, whatever is asked for.
    assert await rotations.retire(NOBODY, stocked.clock.wall_ms()) == []
    await stocked.reopen()
    assert await generations(stocked) == some
    assert await templates(stocked) == {name: template(at) for at, name in enumerate(NAMES)}
    await reseal(SqlKeyRotations(log_of(stocked)))
    assert set(await generations(stocked)) == {2}


async def test_the_old_key_waits_for_backups_and_for_every_index(stocked: World) -> None:  # noqa: F811
    rotations, clock = SqlKeyRotations(log_of(stocked)), stocked.clock
    await stocked.do(*(enrol(name, at) for at, name in enumerate(NAMES)))
    await rotations.rotate("custody", "a test", False, CLERK)
    await reseal(rotations)
    # Backups that are older than the rotation are destroyed after 92 days.
    clock.advance(91 * DAY_MS / 1000)
    assert await rotations.retire(NOBODY, clock.wall_ms()) == []
    clock.advance(DAY_MS / 1000)
    for index in (None, {"custody": 1}, {"custody": 1, "immigration": 1}):
        assert await rotations.retire({"near": {"custody": 2}, "far": index}, clock.wall_ms()) == []
        (told,) = await rotations.keys()
        assert told.waits_for == ("far",)
    # An index without a file of the gallery has nothing under the old key either.
    assert await rotations.retire({"near": {"custody": 2}, "far": {"immigration": 1}}, clock.wall_ms()) == ["custody"]


async def test_a_gallery_that_is_deleted_meanwhile_holds_nothing_up(stocked: World) -> None:  # noqa: F811
    rotations = SqlKeyRotations(log_of(stocked))
    await stocked.do(*(enrol(name, at) for at, name in enumerate(NAMES)))
    await stocked.do(enrol("other", 1)._replace(gallery_id="immigration"))
    await rotations.rotate("custody", "a test", True, CLERK)
    await rotations.rotate("immigration", "a test", True, CLERK)
    await rotations.reseal_some()
    await stocked.do(DeleteGallery("custody", "a test"))
    assert log_of(stocked).keyring.newest("custody") == 0
    await reseal(rotations)
    assert await generations(stocked, "immigration") == [2]
    await stocked.reopen()


async def test_without_a_new_key_there_is_no_rotation(stocked: World, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    log = log_of(stocked)

    def away(gallery_id: str, generation: int = 1) -> None:
        raise LogUnavailable("the key service is away")

    monkeypatch.setattr(log.keyring, "create", away)
    with pytest.raises(LogUnavailable):
        await SqlKeyRotations(log).rotate("custody", "a test", True, CLERK)
    assert await SqlKeyRotations(log).keys() == []
    await stocked.do(enrol("a", 1))
    assert await generations(stocked) == [1]
