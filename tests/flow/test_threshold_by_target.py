"""A gallery may ask for few false alerts: its threshold comes from the calibration, for a size it cannot outgrow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from matcher_service.client import ReceiptOutcome
from matcher_service.models.promise import threshold_for
from matcher_service.models.score_calibrator import measure_table
from matcher_service.terms import RegisterSpace, SpaceId, TemplateSpace
from tests.running_service import DAY_MS, TESTER, whole_service

DIMENSION = 32
SPACE = SpaceId("calibrated", 1, DIMENSION)


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


async def test_the_threshold_is_computed_for_the_size_and_the_gallery_refuses_to_outgrow_it(tmp_path: Path) -> None:
    source = np.random.default_rng(5)
    people = unit(source.standard_normal((2000, DIMENSION)))
    table = measure_table((people[:1000] @ people[1000:].T).ravel(), source="drawn")
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
        promised = threshold_for(table, 1 / 20, 50)
        assert {name: made[name] for name in dataclasses.asdict(promised)} == dataclasses.asdict(promised)
        assert service.running.service.catalogue.galleries["custody"].threshold == promised.threshold
        receipts = await service.enrol("custody", SPACE, people[:51], [f"r{row}" for row in range(51)])
        outcomes = [one.outcome for one in receipts]
        assert outcomes.count(ReceiptOutcome.ENROLLED) == 50
        assert {one.cause for one in receipts if one.outcome is not ReceiptOutcome.ENROLLED} == {"GALLERY_FULL"}
        # What was promised of strangers holds: 5% of 1,000 and four standard deviations are 78.
        await service.deployment("custody")
        answers = await service.ask(SPACE, people[1000:], size=500)
        assert sum(bool(one.decision.candidates) for one in answers.values()) <= 78


@pytest.mark.parametrize("kind", ["galleries", "watchlists"])
def test_the_commands_offer_it(kind: str) -> None:
    from typer.main import get_command

    from matcher_service.__main__ import app

    group = get_command(app).commands[kind]  # type: ignore[attr-defined]
    assert any("--one-false-alert-in" in one.opts for one in group.commands["create"].params)
