"""Calibration and evaluation through the running service: what is stored, what is reported, what is left behind."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from matcher_service.__main__ import run
from matcher_service.demo.data import ENROLLED_SHOTS, load_faces
from matcher_service.terms import SpaceId
from tests.running_service import WholeService, whole_service

SPACE = SpaceId("dlib-resnet29", 1, 128)
NAME = "dlib-resnet29/1/128"


async def command(service: WholeService, *arguments: str) -> int:
    """A command line against the service, in a thread of its own as it runs an event loop of its own."""
    running = service.running
    places = ["--token-file", str(running.token_file)]
    if arguments[0] != "canary":
        places += ["--http", f"http://127.0.0.1:{running.http_port}"]
    if arguments[0] in ("evaluate", "canary"):
        places += ["--server", f"127.0.0.1:{running.grpc_port}"]
    return await asyncio.to_thread(run, [*arguments, *places])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Shots 1-5 of all as references, 6-10 as probes, as labelled sets."""
    faces = load_faces()
    is_enrolled = np.isin(faces.shots, ENROLLED_SHOTS)
    subjects = np.asarray(faces.subject_ids)
    paths = {}
    for name, rows in (("enrolled", is_enrolled), ("probes", ~is_enrolled)):
        paths[name] = tmp_path / f"{name}.npz"
        np.savez(paths[name], templates=faces.templates[rows], subject=subjects[rows])
    return paths


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


async def test_a_calibration_is_stored_with_its_space_in_the_log_and_the_audit_chain(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    async with whole_service(tmp_path / "data") as service:
        out = tmp_path / "calibration.json"
        arguments = ["calibrate", NAME, str(files["enrolled"]), "--source", "ORL, shots 1 to 5", "--out", str(out)]
        assert await command(service, *arguments, "--new", "--dry-run") == 0
        assert SPACE not in service.running.service.catalogue.spaces

        assert await command(service, *arguments, "--new") == 0
        table = service.running.service.catalogue.spaces[SPACE].score_table
        assert table is not None
        told = json.loads(out.read_text())
        assert list(table.rates) == told["table"]["rates"]
        assert list(table.low_rates) == told["table"]["low_rates"]
        assert table.confidence == 0.95
        assert "ORL, shots 1 to 5: 19,500 impostor comparisons of 40 subjects" in table.method
        records = await service.running.service.log.audit(0, 100)
        assert [(one["action"], one["subject"]) for one in records] == [("space.registered", str(SPACE))]
        assert str(told["registered_at_sequence"]) in json.dumps(records[0]["facts"])

        # Again, with the centre that is registered now: the same space gets a new table.
        assert await command(service, *arguments, "--confidence", "0.9") == 0
        assert service.running.service.catalogue.spaces[SPACE].score_table.confidence == 0.9  # type: ignore[union-attr]
        capsys.readouterr()


async def test_a_calibration_tells_a_change_of_scores_from_none(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Shots 6 to 10 are of the same people and model as 1 to 5; templates that lean together are of a worn camera."""
    with np.load(files["probes"]) as searched:
        worn = tmp_path / "worn.npz"
        common = searched["templates"].mean(axis=0)
        np.savez(
            worn,
            templates=searched["templates"] + 0.6 * searched["templates"][0] - 0.6 * common,
            subject=searched["subject"],
        )
    first, told = tmp_path / "first.json", tmp_path / "told.json"
    async with whole_service(tmp_path / "data") as service:
        common_options = ["--source", "ORL", "--out"]
        assert (
            await command(service, "calibrate", NAME, str(files["enrolled"]), "--new", *common_options, str(first)) == 0
        )
        again = ["--dry-run", *common_options, str(told), "--against", str(first)]
        assert await command(service, "calibrate", NAME, str(files["probes"]), *again) == 0
        assert json.loads(told.read_text())["drift"]["is_measured"]
        assert await command(service, "calibrate", NAME, str(worn), *again) == 1
        assert json.loads(told.read_text())["drift"]["is_drift"]
        assert await command(service, "calibrate", NAME, str(worn), *again[:-1], str(worn)) == 1
    assert "against" in capsys.readouterr().err


async def test_synthetic_templates_calibrate_nothing(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    async with whole_service(tmp_path / "data") as service:
        made = tmp_path / "made.npz"
        await asyncio.to_thread(run, ["synthesise", str(made), "--people", "50", "--like", str(files["enrolled"])])
        assert await command(service, "calibrate", NAME, str(made), "--new", "--source", "nobody") == 1
        assert "synthetic" in capsys.readouterr().err
        assert not service.running.service.catalogue.spaces


async def test_an_evaluation_reports_what_a_flat_scan_finds_and_leaves_nothing_searchable(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    threshold = 0.5
    async with whole_service(tmp_path / "data") as service:
        calibrated = ["calibrate", NAME, str(files["enrolled"]), "--new", "--source", "ORL"]
        assert await command(service, *calibrated) == 0
        out = tmp_path / "report"
        code = await command(
            service,
            *["evaluate", "test-gallery", str(files["probes"]), "--requested-by", "PC Ash"],
            *["--references", str(files["enrolled"]), "--space", NAME, "--threshold", str(threshold)],
            *["--fpir", "0.001", "--rank-max", "40", "--compare-approximate", "--out", str(out)],
        )
        catalogue = service.running.service.catalogue
        assert "test-gallery" in catalogue.deleted_galleries
        assert all(case.ended_at_ms for case in catalogue.cases.values())
        assert [case.requested_by for case in catalogue.cases.values()] == ["PC Ash"]
        centre = catalogue.spaces[SPACE].centre.astype(np.float64)
    capsys.readouterr()

    with np.load(files["enrolled"]) as held, np.load(files["probes"]) as searched:
        rows = unit(held["templates"] - centre).astype(np.float32).astype(np.float16).astype(np.float64)
        scores = unit(searched["templates"] - centre) @ rows.T
        same = searched["subject"][:, None] == held["subject"][None, :]
    mates, others = np.where(same, scores, -2).max(axis=1), np.where(same, -2, scores).max(axis=1)
    told = json.loads((out / "report.json").read_text())
    assert told["at_threshold"]["FPIR"]["events"] == int((others >= threshold).sum())
    assert told["at_threshold"]["FPIR"]["trials"] == 200
    assert told["at_threshold"]["FNIR"]["events"] == int((mates < threshold).sum())
    assert told["cmc"]["estimates"][0] == pytest.approx((mates > others).mean())
    assert told["cmc"]["estimates"][0] == 1.0
    assert told["at_threshold"]["failure_to_process"]["events"] == 0
    assert {one["setting"].split(",")[0] for one in told["approximate"]} == {"HNSW", "IVF"}
    # 200 searches of 40 people show nothing at one in a thousand, or show that it is exceeded.
    assert told["verdict"]["answer"] in ("No", "Not shown")
    assert code == (1 if told["verdict"]["answer"] == "No" else 0)

    page = (out / "index.html").read_text()
    assert told["verdict"]["headline"] in page
    assert page.index(told["verdict"]["headline"]) < page.index("<svg")
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    for plot in ("errors-by-threshold", "det", "cmc", "scores", "fpir-by-size", "approximate"):
        assert (out / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (out / f"{plot}.svg").read_text()
        assert f'id="{plot}"' in page


async def test_an_existing_gallery_is_judged_at_its_own_threshold_and_shows_nothing_below(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    async with whole_service(tmp_path / "data") as service:
        calibrated = ["calibrate", NAME, str(files["enrolled"]), "--new", "--source", "ORL"]
        assert await command(service, *calibrated) == 0
        await service.gallery("custody", SPACE, threshold=0.45)
        with np.load(files["enrolled"]) as held:
            chosen = held["subject"] < "orl-s31"
            ids = [f"ref-{row}" for row in range(int(chosen.sum()))]
            await service.enrol("custody", SPACE, held["templates"][chosen], ids, held["subject"][chosen].tolist())
        capsys.readouterr()
        asked = ["evaluate", "custody", str(files["probes"]), "--requested-by", "PC Ash", "--fpir", "0.3", "--json"]
        await command(service, *asked)
        told = json.loads(capsys.readouterr().out)
        assert told["answered_from_score"] == 0.45
        assert told["plan"]["threshold"] == 0.45
        assert (told["enrolled_people"], told["mated_probes"]) == (30, 150)
        assert told["at_threshold"]["FPIR_of_people_never_enrolled"]["trials"] == 50
        assert min(told["curves"]["threshold"]) >= 0.45
        assert await command(service, *asked, "--threshold", "0.3") == 1
        assert "nothing there was answered" in capsys.readouterr().err
        assert "custody" in service.running.service.catalogue.galleries
