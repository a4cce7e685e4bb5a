"""A gallery may ask for few false alerts: its threshold comes from the calibration, for a size it cannot outgrow."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from matcher_service import records
from matcher_service.__main__ import run
from matcher_service.client import ReceiptOutcome
from matcher_service.demo.data import load_faces
from matcher_service.evidence_in_words import in_words
from matcher_service.models.promise import threshold_for
from matcher_service.models.score_calibrator import measure_table
from matcher_service.terms import GenuineTable, RegisterSpace, SpaceId, TemplateSpace
from tests.running_service import DAY_MS, TESTER, whole_service

DIMENSION = 32
SPACE = SpaceId("calibrated", 1, DIMENSION)


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


async def test_the_threshold_is_computed_for_the_size_and_the_gallery_refuses_to_outgrow_it(tmp_path: Path) -> None:
    source = np.random.default_rng(5)
    people = unit(source.standard_normal((2000, DIMENSION)))
    table = dataclasses.replace(
        measure_table((people[:1000] @ people[1000:].T).ravel(), source="drawn"),
        genuine=GenuineTable((0.5, 0.9), (0.0, 0.5), (0.0, 0.4), (0.1, 0.6), 0.95, 100, 50),
    )
    body: dict[str, Any] = {
        "gallery_id": "custody",
        "kind": "custody",
        "controller": "a force",
        "lawful_basis": "PACE 1984 s.64A",
        "purpose": "a test",
        "retention_ms": DAY_MS,
        "space": SPACE._asdict(),
        "one_false_alert_in": 20,
        "size_max": 50,
    }
    async with whole_service(tmp_path) as service:
        change = service.running.service.change
        await change(RegisterSpace(TemplateSpace(SPACE, np.zeros(DIMENSION, np.float32), (), table)), TESTER)
        headers = {"Authorization": f"Bearer {service.running.token}"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.running.http_port}", headers=headers) as http:
            for wrong, field in (
                ({"size_max": 0}, "size_max"),
                ({"one_false_alert_in": 10**9}, "rate"),
                ({"one_false_alert_in": 1}, "one_false_alert_in"),
                ({"threshold": 0.5}, "threshold"),
                ({"space": {"name": "other", "version": 1, "dimension": 4}}, "one_false_alert_in"),
            ):
                refused = await http.post("/v1/galleries", json=body | wrong)
                assert refused.status_code == 400
                assert refused.json()["field"] == field
            made = (await http.post("/v1/galleries", json=body)).raise_for_status().json()
            shown = (await http.get("/v1/galleries/custody")).raise_for_status().json()
        promised = threshold_for(table, 1 / 20, 50)
        assert made["threshold"] == promised.threshold
        known = made["evidence"]
        assert known["fpir"] == {
            "estimate": promised.fpir_estimate,
            "low": promised.fpir_low,
            "high": promised.fpir_high,
        }
        assert known["fnir"] == promised.fnir._asdict()  # type: ignore[union-attr]
        assert (known["one_false_alert_in"], known["references"]) == (20, 50)
        assert known["calibration_sequence"] == 1
        assert (shown["evidence"], shown["evidence_now"]) == (known, None)
        assert service.running.service.catalogue.galleries["custody"].threshold == promised.threshold
        receipts = await service.enrol("custody", SPACE, people[:51], [f"r{row}" for row in range(51)])
        outcomes = [one.outcome for one in receipts]
        assert outcomes.count(ReceiptOutcome.ENROLLED) == 50
        assert {one.cause for one in receipts if one.outcome is not ReceiptOutcome.ENROLLED} == {"GALLERY_FULL"}
        # What was promised of strangers holds: 5% of 1,000 and four standard deviations are 78.
        await service.deployment("custody")
        answers = await service.ask(SPACE, people[1000:], size=500)
        assert sum(bool(one.decision.candidates) for one in answers.values()) <= 78


async def test_the_commands_say_what_is_known_of_a_threshold_and_an_officer_sees_it_with_the_approval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A calibration by the command, a gallery by target, one with a threshold by hand, another calibration."""
    faces = load_faces()
    files = {}
    for name, shots in (("first", (1, 2, 3, 4, 5)), ("second", (6, 7, 8))):
        rows = np.isin(faces.shots, shots)
        files[name] = tmp_path / f"{name}.npz"
        np.savez(files[name], templates=faces.templates[rows], subject=np.asarray(faces.subject_ids)[rows])
    terms = [
        *["--controller", "a force", "--lawful-basis", "PACE 1984 s.64A", "--purpose", "a test"],
        *["--retention", "1d", "--space", "dlib-resnet29/1/128"],
    ]

    async def said(*arguments: str) -> str:
        places = ["--http", f"http://127.0.0.1:{running.http_port}", "--token-file", str(running.token_file)]
        assert await asyncio.to_thread(run, [*arguments, *places]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    async with whole_service(tmp_path / "data") as service:
        running = service.running
        calibrate = ["calibrate", "dlib-resnet29/1/128", "--source", "ORL", "--new"]
        await said(*calibrate, str(files["first"]))
        made = await said(
            *["galleries", "create", "custody", "--kind", "custody", *terms],
            *["--one-false-alert-in", "5", "--size-max", "50"],
        )
        held = running.service.catalogue.galleries["custody"]
        known = held.evidence
        assert known is not None
        assert known.fnir is not None
        assert f"Threshold {held.threshold:.4f}." in made
        assert "at most one false alert in 5, with 50 references" in made
        assert f"{known.fnir.estimate:.2%} are missed ({known.fnir.low:.2%} to {known.fnir.high:.2%})" in made
        assert "NOT SUPPORTED" not in made
        listed = ["watchlists", "create", "tonight", "--deployment", "op", "--category", "wanted_on_warrant"]
        built = await said(*listed, "--author", "DC Hall", *terms, "--threshold", "0.9", "--size-max", "50")
        assert "NOT SUPPORTED BY EVIDENCE: The calibration ends at a score of" in built
        approval = ["watchlists", "approve", "tonight", "--approved-by", "Supt. Gray", "--reason", "checked"]
        assert "NOT SUPPORTED BY EVIDENCE" in await said(*approval)
        audited = [one for one in await running.service.log.audit(0, 100) if one["action"] == "gallery.created"]
        assert audited[0]["detail"]["evidence"]["one_false_alert_in"] == 5
        assert "calibrated anew" not in await said("galleries", "show", "custody")
        await said(*calibrate[:-1], str(files["second"]))
        shown = await said("galleries", "show", "custody")
        assert "The template space has been calibrated anew since. By calibration" in shown
        assert running.service.catalogue.galleries["custody"] == held
        told = json.loads(await said("galleries", "show", "custody", "--json"))
        assert told["evidence_now"]["calibration_sequence"] > told["evidence"]["calibration_sequence"]
        assert told["evidence_now"]["threshold"] == held.threshold

        # A test of the gallery judges it by what was asked of it, and says what is on record.
        with np.load(files["first"]) as first:
            rows = [f"r{row}" for row in range(10)]
            await service.enrol("custody", held.space, first["templates"][:10], rows, first["subject"][:10].tolist())
        server = f"127.0.0.1:{running.grpc_port}"
        asked = ["evaluate", "custody", str(files["second"]), "--requested-by", "PC Ash", "--server", server]
        judged = json.loads(await said(*asked, "--json"))
        assert judged["plan"]["fpir_wanted"] == 0.2
        assert judged["plan"]["on_record"] == in_words(records.evidence_dict(known))
        assert judged["promised_by_calibration"]["fnir"]["high"] > 0
    async with whole_service(tmp_path / "data") as service:
        assert service.running.service.catalogue.galleries["custody"] == held


@pytest.mark.parametrize("kind", ["galleries", "watchlists"])
def test_the_commands_offer_it(kind: str) -> None:
    from typer.main import get_command

    from matcher_service.__main__ import app

    group = get_command(app).commands[kind]  # type: ignore[attr-defined]
    assert any("--one-false-alert-in" in one.opts for one in group.commands["create"].params)
