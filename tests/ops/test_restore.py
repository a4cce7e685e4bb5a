"""`matcher backup` of a running service, `matcher restore`: nothing lost, nothing withdrawn back, nothing altered."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from matcher_service.client import ProbeAnswer
from matcher_service.errors import MatcherError
from tests.running_service import whole_service

DIMENSION = 16


def matcher(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "matcher_service", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


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
        enrolling = asyncio.create_task(service.enrol("g", space, -templates, [f"later{at}" for at in range(50)]))
        copied = await asyncio.to_thread(matcher, "backup", tmp_path / "first", tmp_path / "copy", "--json")
        assert copied.returncode == 0, copied.stderr
        await enrolling
        await service.client.withdraw("g", reference_ids=["r1"], reason="after the copy")
        shutil.copytree(tmp_path / "first/keys", restored / "keys")

    told = json.loads(copied.stdout)
    assert told == json.loads(matcher("restore", tmp_path / "copy", restored, "--json").stdout)
    assert (restored / "gallery.db").read_bytes() == (tmp_path / "copy/gallery.db").read_bytes()
    assert matcher("restore", tmp_path / "copy", restored).returncode == 1

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


async def test_a_copy_without_its_keys_opens_for_nobody_and_an_altered_one_is_refused(tmp_path: Path) -> None:
    async with whole_service(tmp_path / "first") as service:
        space = await service.space(DIMENSION)
        await service.gallery("g", space)
        await service.enrol("g", space, np.ones((1, DIMENSION), np.float32), ["r0"])
        assert (await asyncio.to_thread(matcher, "backup", tmp_path / "first", tmp_path / "copy")).returncode == 0
        again = await asyncio.to_thread(matcher, "backup", tmp_path / "first", tmp_path / "copy")
        assert again.returncode == 1
        assert "exists already" in again.stderr
    assert matcher("restore", tmp_path / "copy", tmp_path / "stolen").returncode == 0
    with pytest.raises(MatcherError):
        async with whole_service(tmp_path / "stolen"):
            pass
    held = bytearray((tmp_path / "copy/gallery.db").read_bytes())
    held[len(held) // 2] ^= 1
    (tmp_path / "copy/gallery.db").write_bytes(held)
    refused = matcher("restore", tmp_path / "copy", tmp_path / "third")
    assert refused.returncode == 1
    assert "is not what was backed up" in refused.stderr
    assert not (tmp_path / "third/gallery.db").exists()
