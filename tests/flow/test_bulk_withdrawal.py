"""Few references are one person's business, many are two persons'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from matcher_service import policy
from matcher_service.errors import Forbidden, NotFound
from matcher_service.terms import Actor, Scope
from tests.running_service import TESTER, whole_service

CLERK = Actor("person-clerk", frozenset((Scope.GALLERY_MANAGER,)), person="clerk", galleries=frozenset(("custody",)))


async def test_one_person_withdraws_few_references_and_two_withdraw_many(tmp_path: Path) -> None:
    """`tests/flow/test_access_commands.py` withdraws many by two."""
    many = policy.BULK_WITHDRAWAL_REFERENCES
    names = [f"r{row}" for row in range(3 * many)]
    async with whole_service(tmp_path) as service:
        space = await service.space(8)
        rows = np.random.default_rng(2).normal(size=(3 * many, 8)).astype(np.float32)
        for gallery_id in ("custody", "other"):
            await service.gallery(gallery_id, space)
        await service.enrol("custody", space, rows, names)
        await service.enrol("other", space, rows[:1], ["x"], ["s"])
        withdraw = service.running.service.withdraw
        with pytest.raises(Forbidden, match="two persons"):
            await withdraw("custody", names[: many + 1], "a test", CLERK)
        await withdraw("custody", names[: many // 2], "a test", CLERK)
        with pytest.raises(Forbidden, match="two persons"):
            await withdraw("custody", names[many // 2 : many + 1], "a test", CLERK)
        await withdraw("custody", names[many // 2 : many], "a test", CLERK)
        assert len(await service.running.service.log.references("custody", "", 1000)) == 2 * many
        # Another person has a share of their own, and the loopback token, which is nobody's, is not held to it.
        await withdraw("custody", names[many : many + 1], "a test", Actor("person-other", person="other"))
        await withdraw("custody", names[many + 1 :], "a test", TESTER)


async def test_a_subjects_references_are_withdrawn_where_one_has_rights(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await service.space(8)
        for gallery_id in ("custody", "other"):
            await service.gallery(gallery_id, space)
            await service.enrol(gallery_id, space, np.eye(8, dtype=np.float32)[:1], ["r"], ["s"])
        withdraw = service.running.service.withdraw_subject
        receipt = await withdraw("", "s", "a test", CLERK)
        assert receipt.reference_ids == (("custody", "r"),)
        assert [one.gallery_id for one in await service.running.service.log.subject("s")] == ["other"]
        for gallery_id in ("other", "nowhere"):
            with pytest.raises(NotFound) as refused:
                await withdraw(gallery_id, "s", "a test", CLERK)
            assert refused.value.detail == f"no gallery {gallery_id!r}"
        with pytest.raises(NotFound):
            await withdraw("", "s", "a test", CLERK)
