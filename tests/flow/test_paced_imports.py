"""An import keeps to the pace at which its references get codes, while somebody searches; nothing else waits for it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matcher_service import enrol
from matcher_service.client import ReceiptOutcome, References
from matcher_service.index.engine import TAIL_ROWS_MAX, Engine
from matcher_service.shards import local
from matcher_service.terms import SpaceId
from tests.log_writer import unit_rows
from tests.running_service import whole_service

DIMENSION = 64


async def test_law_3_an_import_waits_for_the_index_and_a_clerk_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite, coding = Engine.rewrite_one, False

    def rewrite_one(self: Engine, *args: Any, **named: Any) -> int:
        return rewrite(self, *args, **named) if coding else 0

    monkeypatch.setattr(Engine, "rewrite_one", rewrite_one)
    monkeypatch.setattr(enrol, "UNCODED_ROWS_MAX", TAIL_ROWS_MAX // 2)
    monkeypatch.setattr(enrol, "PACED_S_MAX", 1.0)
    monkeypatch.setattr(local, "SEARCHED_S", 3600.0)
    rows = unit_rows(np.random.default_rng(4), TAIL_ROWS_MAX + 1000, DIMENSION)
    async with whole_service(tmp_path) as service:
        space: SpaceId = await service.space(DIMENSION)
        await service.gallery("custody", space)
        await service.deployment("custody")

        async def message(name: str, count: int, deadline_s: float) -> set[tuple[ReceiptOutcome, str]]:
            ids = [f"{name}{at}" for at in range(count)]
            receipts = await service.client.enrol(
                References(
                    gallery_id="custody",
                    space=space,
                    reference_ids=ids,
                    subject_ids=ids,
                    templates=rows[TAIL_ROWS_MAX : TAIL_ROWS_MAX + count],
                    deadline_s=deadline_s,
                )
            )
            return {(one.outcome, one.cause) for one in receipts}

        # Nobody has searched yet: an import goes as fast as it can.
        await service.enrol("custody", space, rows[:TAIL_ROWS_MAX], [f"r{at}" for at in range(TAIL_ROWS_MAX)])
        assert await message("fast", 500, 30.0) == {(ReceiptOutcome.ENROLLED, "")}
        answers = await service.ask(space, rows[:1])
        assert [one.reference_id for one in answers["p0"].decision.candidates][:1] == ["r0"]
        assert await message("clerk", 1, 30.0) == {(ReceiptOutcome.ENROLLED, "")}
        # It waits, and is not refused for it.
        began = time.monotonic()
        assert await message("slow", 500, 30.0) == {(ReceiptOutcome.ENROLLED, "")}
        assert time.monotonic() - began > 0.9
        monkeypatch.setattr(enrol, "PACED_S_MAX", 60.0)
        waiting = asyncio.create_task(message("patient", 500, 60.0))
        done, _ = await asyncio.wait({waiting}, timeout=0.5)
        assert not done
        coding = True
        assert await waiting == {(ReceiptOutcome.ENROLLED, "")}
