"""Canaries see that the whole path answers as it should, and that it no longer does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from matcher_service.evaluation.canaries import Seen, judge_round
from matcher_service.terms import Candidate, Decision, Outcome
from tests.flow.test_evaluate import command
from tests.running_service import whole_service


async def test_canaries_are_well_until_a_mate_is_withdrawn_and_their_alerts_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(5)
    templates = rng.normal(size=(6, 32)).astype(np.float32)
    file = tmp_path / "canaries.npz"
    np.savez(file, templates=templates, subject=np.array(["ada", "bob", "cyd", "", "", ""]))
    async with whole_service(tmp_path / "data") as service:
        space = await service.space(32)
        await service.gallery("canaries", space, threshold=0.9)
        await service.enrol("canaries", space, templates[:3], ["r1", "r2", "r3"], ["ada", "bob", "cyd"])
        await service.deployment("canaries")
        arguments = ["canary", str(file), "--space", "test/1/32", "--deployment", "op", "--rounds", "1"]
        assert await command(service, *arguments) == 0
        assert "well: 3 found, 3 quiet" in capsys.readouterr().out
        alerts = await service.running.service.log.alerts("op", "", 10)
        assert sorted(one.probe_id for one in alerts) == ["canary-000000", "canary-000001", "canary-000002"]
        await service.client.withdraw("canaries", reference_ids=["r2"], reason="a test")
        assert await command(service, *arguments) == 1
        assert "NOT WELL: 2 found, 1 missed, 3 quiet" in capsys.readouterr().out
        assert await command(service, *arguments[:-4], "--deployment", "none", "--rounds", "1") == 1
        assert "6 unanswered" in capsys.readouterr().out


def test_a_stranger_who_alerts_a_mate_whose_score_moved_and_silence_are_not_well() -> None:
    def alert(name: str, score: float) -> Decision:
        return Decision("p", Outcome.ALERT, (Candidate(name, "r", "g", score, 1, 0.0),))

    ids, mates = ["m", "s"], ["ada", ""]
    quiet = Decision("s", Outcome.NO_CANDIDATE)
    first = judge_round({"m": alert("ada", 0.95), "s": quiet}, ids, mates)
    assert first.is_well
    assert not judge_round({"m": alert("ada", 0.93), "s": quiet}, ids, mates, first.scores).is_well
    assert judge_round({"m": alert("ada", 0.95), "s": alert("ada", 0.9)}, ids, mates).seen == (
        Seen.FOUND,
        Seen.FALSE_ALERT,
    )
    assert judge_round({"m": alert("bob", 0.99)}, ids, mates).seen == (Seen.MISSED, Seen.UNANSWERED)
    assert not judge_round({"m": Decision("m", Outcome.INCOMPLETE), "s": quiet}, ids, mates).is_well
