"""A gallery's threshold changes only with a reason, with what it does to the error rates, and by two persons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matcher_service import records
from matcher_service.errors import Conflict, InvalidInput, MatcherError, NotFound
from matcher_service.terms import ChangeThreshold, EntryKind, Outcome, RateChange
from tests.flow.test_evaluate import command
from tests.running_service import TESTER, whole_service

RATES = (RateChange("FPIR", "", 0.001, 0.02), RateChange("FNIR", "", 0.05, 0.01), RateChange("FPIR", "B", 0.002, 0.09))


def change(**other: Any) -> ChangeThreshold:
    wish = {
        "gallery_id": "custody",
        "threshold": 0.3,
        "reason": "the camera was replaced",
        "proposed_by": "Insp. Reed",
        "approved_by": "Supt. Gray",
        "rates": RATES,
    }
    return ChangeThreshold(**{**wish, **other})


async def test_a_changed_threshold_holds_for_the_next_search_and_after_a_restart_and_is_audited(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    references = rng.normal(size=(5, 16)).astype(np.float32)
    references /= np.linalg.norm(references, axis=1, keepdims=True)
    apart = rng.normal(size=16).astype(np.float32)
    apart -= (apart @ references[0]) * references[0]
    probe = (0.4 * references[0] + np.sqrt(1 - 0.16) * apart / np.linalg.norm(apart))[None]
    async with whole_service(tmp_path) as service:
        space = await service.space(16)
        await service.gallery("custody", space, threshold=0.5)
        await service.enrol("custody", space, references, [f"r{row}" for row in range(5)])
        await service.deployment("custody")
        assert (await service.ask(space, probe))["p0"].decision.outcome is Outcome.NO_CANDIDATE
        receipt = await service.running.service.change(change(), TESTER)
        answer = (await service.ask(space, probe, min_sequence=receipt.sequence))["p0"]
        assert answer.decision.outcome is Outcome.ALERT
        assert answer.thresholds == {"custody": pytest.approx(0.3)}
        log = service.running.service.log
        audited = [one for one in await log.audit(0, 100) if one["action"] == "threshold.changed"]
        assert [(one["actor"], one["subject"]) for one in audited] == [("tester", "custody")]
        detail: Any = audited[0]["detail"]
        assert (detail["threshold_before"], detail["threshold"]) == (0.5, 0.3)
        assert (detail["proposed_by"], detail["approved_by"]) == ("Insp. Reed", "Supt. Gray")
        assert [RateChange(**one) for one in detail["rates"]] == list(RATES)

    async with whole_service(tmp_path) as service:
        assert service.running.service.catalogue.galleries["custody"].threshold == 0.3
        assert (await service.ask(space, probe))["p0"].decision.outcome is Outcome.ALERT
        await service.running.service.change(change(threshold=0.6), TESTER)
        assert (await service.ask(space, probe))["p0"].decision.outcome is Outcome.NO_CANDIDATE


@pytest.mark.parametrize(
    ("other", "refusal", "field"),
    [
        ({"approved_by": " insp.  REED "}, InvalidInput, "approved_by"),
        ({"approved_by": ""}, InvalidInput, "approved_by"),
        ({"proposed_by": "  "}, InvalidInput, "proposed_by"),
        ({"reason": ""}, InvalidInput, "reason"),
        ({"threshold": 1.5}, InvalidInput, "threshold"),
        ({"threshold": float("nan")}, InvalidInput, "threshold"),
        ({"threshold": 0.5}, Conflict, "threshold"),
        ({"rates": ()}, InvalidInput, "rates"),
        ({"rates": RATES[:1]}, InvalidInput, "rates"),
        ({"rates": (*RATES, RateChange("FPIR", "C", 0.1, 1.5))}, InvalidInput, "rates[3]"),
        ({"gallery_id": "elsewhere"}, NotFound, "gallery_id"),
    ],
)
async def test_a_change_that_lacks_something_is_refused_and_changes_nothing(
    tmp_path: Path, other: dict[str, Any], refusal: type[MatcherError], field: str
) -> None:
    async with whole_service(tmp_path) as service:
        await service.gallery("custody", await service.space(16), threshold=0.5)
        with pytest.raises(refusal) as refused:
            await service.running.service.change(change(**other), TESTER)
        assert refused.value.field == field
        assert refused.value.hint
        assert service.running.service.catalogue.galleries["custody"].threshold == 0.5
        kinds = [EntryKind.THRESHOLD_CHANGED]
        assert await service.running.service.log.read(0, 10, kinds) == []


async def test_the_log_itself_refuses_one_person_alone_whoever_asks_it(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        await service.gallery("custody", await service.space(16), threshold=0.5)
        answer = (await service.running.service.log.append([change(approved_by="insp. reed")], TESTER))[0]
        assert isinstance(answer, InvalidInput)


async def test_the_command_takes_the_rates_from_two_reports_and_refuses_those_of_other_thresholds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(name: str, threshold: float, fpir: float, group_b: float) -> str:
        path = tmp_path / name
        groups = [{"measure": "FPIR", "groups": [{"group": "B", "rate": {"high": group_b}}]}]
        at = {"FPIR": {"high": fpir}, "FNIR": {"high": 0.04}}
        path.write_text(json.dumps({"plan": {"threshold": threshold}, "at_threshold": at, "groups": groups}))
        return str(path)

    before, after = report("before.json", 0.5, 0.001, 0.002), report("after.json", 0.4, 0.01, 0.05)
    persons = ["--proposed-by", "Insp. Reed", "--approved-by", "Supt. Gray", "--reason", "more was asked for"]
    async with whole_service(tmp_path / "data") as service:
        await service.gallery("custody", await service.space(16), threshold=0.5)
        arguments = ["galleries", "threshold", "custody", "0.4", *persons]
        assert await command(service, *arguments, "--before", before, "--after", before) == 1
        assert "judges threshold 0.5, not 0.4" in capsys.readouterr().err
        assert await command(service, *arguments, "--before", before, "--after", after) == 0
        assert service.running.service.catalogue.galleries["custody"].threshold == 0.4
        entry = (await service.running.service.log.read(0, 10, [EntryKind.THRESHOLD_CHANGED]))[0]
    stored = json.loads(entry.record)
    assert {"measure": "FPIR", "group": "B", "before": 0.002, "after": 0.05} in stored["rates"]
    assert stored["threshold_before"] == 0.5
    gallery_id, threshold, known = records.decode_threshold_change(entry.record)
    assert (gallery_id, threshold) == ("custody", 0.4)
    assert known is not None
    assert "not calibrated" in known.not_supported
