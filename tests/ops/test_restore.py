"""The hand-made backup of docs/OPERATIONS.md: SQLite's online copy of the log, and the keys."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from matcher_service.client import ProbeAnswer
from matcher_service.errors import MatcherError
from tests.running_service import whole_service

DIMENSION = 16


def online_copy(source: Path, target: Path) -> None:
    """What `sqlite3 gallery.db ".backup copy.db"` does."""
    target.parent.mkdir(mode=0o700, parents=True)
    with closing(sqlite3.connect(source)) as held, closing(sqlite3.connect(target)) as copy:
        held.backup(copy)


def found(answers: dict[str, ProbeAnswer]) -> dict[str, list[tuple[str, float]]]:
    return {
        probe: [(one.reference_id, one.score) for one in answer.decision.candidates]
        for probe, answer in answers.items()
    }


async def test_a_log_copied_under_way_and_its_keys_answer_as_before_without_the_index(tmp_path: Path) -> None:
    templates = np.random.default_rng(5).normal(size=(50, DIMENSION)).astype(np.float32)
    names = [f"r{at}" for at in range(50)]
    restored = tmp_path / "restored"
    async with whole_service(tmp_path / "first") as service:
        space = await service.space(DIMENSION)
        await service.gallery("g", space, threshold=0.9)
        await service.deployment("g")
        await service.enrol("g", space, templates, names)
        await service.client.withdraw("g", reference_ids=["r0"], reason="before the copy")
        before = await service.ask(space, templates)
        await asyncio.to_thread(online_copy, tmp_path / "first/gallery.db", restored / "gallery.db")
        await service.client.withdraw("g", reference_ids=["r1"], reason="after the copy")
        shutil.copytree(tmp_path / "first/keys", restored / "keys")

    async with whole_service(restored) as service:
        after = await service.ask(space, templates)
        command = [sys.executable, "-m", "matcher_service", "audit", "verify"]
        where = [f"--http=http://127.0.0.1:{service.running.http_port}", f"--token-file={restored / 'token'}"]
        verified = await asyncio.to_thread(subprocess.run, command + where, capture_output=True, text=True)
        assert verified.returncode == 0, verified.stderr

    # r0 stays withdrawn, and so does r1, which the copy had forgotten: it stands in the erasure ledger beside the keys.
    assert found(after) == found(before) | {"p1": found(after)["p1"]}
    assert before["p1"].decision.candidates
    assert not before["p0"].decision.candidates
    assert not after["p1"].decision.candidates


async def test_a_copy_without_its_keys_opens_for_nobody(tmp_path: Path) -> None:
    async with whole_service(tmp_path / "first") as service:
        space = await service.space(DIMENSION)
        await service.gallery("g", space)
        await service.enrol("g", space, np.ones((1, DIMENSION), np.float32), ["r0"])
        await asyncio.to_thread(online_copy, tmp_path / "first/gallery.db", tmp_path / "stolen/gallery.db")
    with pytest.raises(MatcherError):
        async with whole_service(tmp_path / "stolen"):
            pass
