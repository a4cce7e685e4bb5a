"""The demo in a short form, as a user runs it, against a flat scan by this test over the rows that the log holds."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from matcher_service.clock import SystemClock
from matcher_service.gallery.log import open_sqlite_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import EntryKind

DEMO = [sys.executable, "-m", "matcher_service", "demo"]
REFERENCES = 1500


@dataclass(frozen=True)
class Shown:
    data_dir: Path
    figures: dict[str, Any]
    progress: str


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    data_dir = tmp_path_factory.mktemp("demo") / "data"
    done = subprocess.run(
        [*DEMO, "--json", "--references", str(REFERENCES), "--data-dir", str(data_dir)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Shown(data_dir, json.loads(done.stdout), done.stderr)


@dataclass(frozen=True)
class Stored:
    """Live rows as the log holds them: float16 templates, decoded to float64."""

    reference_ids: list[str]
    subject_ids: list[str]
    gallery_ids: list[str]
    rows: np.ndarray


@pytest.fixture
async def stored(shown: Shown) -> Stored:
    log = await open_sqlite_log(shown.data_dir, shown.data_dir / "keys", StorageSettings(), SystemClock())
    try:
        entries = []
        after = 0
        while block := await log.read(after, 10_000):
            entries += [one for one in block if one.kind is EntryKind.ENROL and one.template is not None]
            after = block[-1].sequence
    finally:
        await log.close()
    rows = np.stack([np.frombuffer(one.template or b"", "<f2") for one in entries]).astype(np.float64)
    return Stored(
        [one.reference_id for one in entries],
        [one.subject_id for one in entries],
        [one.gallery_id for one in entries],
        rows,
    )


@dataclass(frozen=True)
class Truth:
    centre: np.ndarray
    enrolled: np.ndarray
    probes: np.ndarray
    probe_subjects: np.ndarray


@pytest.fixture(scope="module")
def truth() -> Truth:
    """The split and the adapted rows, worked out here from the shipped file and the words of the demo."""
    with files("matcher_service.demo").joinpath("orl_templates_dlib128.npz").open("rb") as stream:
        arrays = dict(np.load(stream))
    subject, shot, raw = arrays["subject"], arrays["shot"], arrays["templates"].astype(np.float64)
    is_enrolled = (subject <= 35) & (shot <= 5)
    centre = raw[is_enrolled].mean(axis=0).astype(np.float32)
    units = raw - centre
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    is_probe = shot > 5
    return Truth(centre, units[is_enrolled], units[is_probe].astype(np.float32), subject[is_probe])


def expected_figures(truth: Truth, stored: Stored, usable: np.ndarray, threshold: float) -> dict[str, int]:
    """The figures of one run from a full scan: the best five subjects of a gallery at or above the threshold."""
    scores = (truth.probes.astype(np.float64) @ stored.rows[usable].T).astype(np.float32)
    threshold32 = np.float32(threshold)
    assert np.abs(scores - threshold32).min() > 1e-6, "a score too near the threshold to be told from outside"
    subjects = np.asarray(stored.subject_ids)[usable]
    counted = dict.fromkeys(("alerts", "rank_1_right", "missed_mates", "false_alerts_unmated", "false_alerts_wrong"), 0)
    for probe, number in zip(scores, truth.probe_subjects.tolist(), strict=True):
        reached = [at for at in np.argsort(-probe) if probe[at] >= threshold32]
        ranked = list(dict.fromkeys(subjects[at] for at in reached))[:5]
        mate = f"orl-s{number:02d}"
        counted["alerts"] += bool(ranked)
        if number > 35:
            counted["false_alerts_unmated"] += bool(ranked)
            continue
        counted["rank_1_right"] += ranked[:1] == [mate]
        counted["false_alerts_wrong"] += bool(ranked) and ranked[0] != mate
        counted["missed_mates"] += mate not in ranked
    return counted


def test_the_figures_are_those_of_a_flat_scan_over_the_stored_rows(shown: Shown, stored: Stored, truth: Truth) -> None:
    """Law 2, through the whole service: alerts, rank-1 hits, missed mates and false alerts of every run are what a
    scan of the log's own float16 rows gives, with and without synthetic references."""
    is_real = np.asarray([one.startswith("orl-") for one in stored.reference_ids])
    runs = shown.figures["runs"]
    assert [run["references"] for run in runs] == [175, REFERENCES, REFERENCES]
    for run, usable in zip(runs, (is_real, np.full(len(is_real), True), np.full(len(is_real), True)), strict=True):
        expected = expected_figures(truth, stored, usable, run["threshold"])
        assert {name: run["tally"][name] for name in expected} == expected
        assert (run["tally"]["probes"], run["tally"]["mated"], run["tally"]["unmated"]) == (200, 175, 25)
        assert run["tally"]["not_answered"] == 0
        assert run["answers_that_differ"] == 0
        latency = run["latency"]
        assert 0 < latency["p50_ms"] <= latency["p95_ms"] <= latency["p99_ms"] <= latency["most_ms"]
        assert run["throughput_probes_per_s"] > 0


def test_the_log_holds_the_adapted_real_templates_and_what_is_said_to_be_synthetic(
    shown: Shown, stored: Stored, truth: Truth
) -> None:
    """175 real rows under their galleries, centred by shots 1 to 5 of subjects 1 to 35; every other row is named
    synthetic, is a subject of its own, and has unit length."""
    real = [at for at, one in enumerate(stored.reference_ids) if one.startswith("orl-")]
    names = [stored.reference_ids[at] for at in real]
    assert sorted(names) == [f"orl-s{subject:02d}-{shot:02d}" for subject in range(1, 36) for shot in range(1, 6)]
    for at in real:
        subject = int(stored.subject_ids[at].removeprefix("orl-s"))
        assert stored.gallery_ids[at] == ("custody" if subject <= 30 else "immigration")
    by_name = stored.rows[[real[at] for at in np.argsort(names)]]
    np.testing.assert_allclose(by_name, truth.enrolled, atol=2**-11)

    others = [at for at in range(len(stored.rows)) if at not in set(real)]
    assert len(others) == REFERENCES - 175
    assert all(stored.subject_ids[at] == stored.reference_ids[at] for at in others)
    assert all(stored.reference_ids[at].startswith("synthetic-") for at in others)
    assert len({stored.subject_ids[at] for at in others}) == len(others)
    np.testing.assert_allclose(np.linalg.norm(stored.rows[others], axis=1), 1, atol=2e-3)
    shares = {one: sum(stored.gallery_ids[at] == one for at in others) for one in ("custody", "immigration")}
    assert shares["custody"] == len(others) * 30 // 35


def test_the_thresholds_come_from_enrolled_shots_and_promise_what_they_support(shown: Shown, truth: Truth) -> None:
    """Without distractors: just above the highest impostor pair, with the 95% limit of 0 in 14,875 over 175
    references. With them: the unchanged threshold promises less, the raised one what was wanted again."""
    subjects = np.repeat(np.arange(35), 5)
    held = truth.enrolled.astype(np.float16).astype(np.float64)
    impostors = (held @ held.T)[subjects[:, None] < subjects[None, :]]
    assert len(impostors) == 14_875
    plain, same, raised = shown.figures["runs"]
    assert plain["threshold"] == pytest.approx(impostors.max(), abs=1e-3)
    rate = 1 - 0.05 ** (1 / len(impostors))
    assert plain["fpir_limit"] == pytest.approx(1 - (1 - rate) ** 175, rel=1e-6)
    assert plain["fpir_limit"] <= shown.figures["fpir_wanted"]
    assert same["threshold"] == plain["threshold"]
    assert same["fpir_limit"] > shown.figures["fpir_wanted"]
    assert raised["threshold"] > plain["threshold"]
    assert raised["fpir_limit"] <= shown.figures["fpir_wanted"]
    assert "14,875" in shown.figures["score_table_method"]


def test_progress_is_shown_and_results_stand_alone(shown: Shown) -> None:
    """Bars go to standard error, so that the JSON on standard output can be piped; the credit is in it."""
    for words in ("Learning", "Server ready", "Enrolling real", "Enrolling synthetic", "At 100/s"):
        assert words in shown.progress
    assert "Olivetti Research Laboratory" in shown.figures["credit"]


def servers_of(data_dir: Path) -> list[int]:
    found = []
    for process in psutil.process_iter(["pid"]):
        try:
            if process.environ().get("MATCHER_STORAGE__DATA_DIR") == str(data_dir):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_nothing_is_left_running(shown: Shown) -> None:
    """After the demo no server over its data directory is alive, and its ports are closed."""
    assert servers_of(shown.data_dir) == []
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(shown.figures["server"]["docs"], timeout=2)


def test_a_directory_with_something_in_it_is_refused(shown: Shown) -> None:
    """The demo never adds to data that is there; it says so and changes nothing."""
    before = sorted(shown.data_dir.rglob("*"))
    done = subprocess.run(
        [*DEMO, "--data-dir", str(shown.data_dir)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "not empty" in " ".join(done.stderr.split())
    assert sorted(shown.data_dir.rglob("*")) == before


def test_with_stay_the_server_is_up_until_the_demo_is_told_to_end() -> None:
    """`--stay` prints where docs and metrics are and what to try; all of it works; SIGTERM to the demo stops the server
    in order and removes the temporary directory."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*DEMO, "--stay", "--json", "--references", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as demo:
        try:
            assert demo.stdout is not None
            lines = []
            for line in demo.stdout:
                lines.append(line)
                if line.startswith("}"):
                    break
            figures = json.loads("".join(lines))
            assert len(figures["runs"]) == 1
            for page in ("docs", "metrics"):
                with urllib.request.urlopen(figures["server"][page], timeout=10) as answer:
                    assert answer.status == 200
            data_dir = Path(figures["server"]["token_file"]).parent
            assert servers_of(data_dir) != []
            printed = [_printed_by(command) for command in figures["server"]["commands"]]
            assert "custody" in printed[0]
            assert "orl-s" in printed[1]
            demo.send_signal(signal.SIGTERM)
            assert demo.wait(timeout=60) == 0
            assert servers_of(data_dir) == []
            assert not data_dir.exists()
        finally:
            if demo.poll() is None:
                demo.send_signal(signal.SIGINT)
                demo.wait(timeout=60)


def _printed_by(command: str) -> str:
    program, *arguments = shlex.split(command)
    assert program == "matcher"
    done = subprocess.run(
        [sys.executable, "-m", "matcher_service", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_interrupted_demo_stops_its_server(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the work: exit code 130, and no server is left behind."""
    data_dir = tmp_path / "data"
    with subprocess.Popen(
        [*DEMO, "--data-dir", str(data_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if "Enrolling real" in line:
                break
        assert servers_of(data_dir) != []
        demo.send_signal(signal.SIGINT)
        rest = demo.stderr.read()
        assert demo.wait(timeout=60) == 130
    assert "server is stopped" in rest
    assert servers_of(data_dir) == []
