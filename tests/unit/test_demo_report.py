"""What the demo prints says what is synthetic, what was promised, and what went wrong."""

from __future__ import annotations

import asyncio
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from matcher_service.demo.calibration import Calibration, calibrate
from matcher_service.demo.data import enrolment, load_faces
from matcher_service.demo.report import Report, Run, show
from matcher_service.demo.server import Server
from matcher_service.demo.tally import Latency, Tally

PLAIN = Run(
    name="real references",
    references=175,
    threshold=0.5593,
    fpir_limit=0.0346,
    tally=Tally(200, 175, 25, 176, 174, 1, 1, 0, 0),
    latency=Latency(2.0, 3.5, 4.25, 9.0),
    throughput_probes_per_s=4321.0,
    answers_that_differ=0,
)
FULL = replace(PLAIN, name="synthetic, raised threshold", references=20_000, threshold=0.7016, fpir_limit=0.05)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(enrolment(load_faces()), np.random.default_rng(3), lambda _: None, draws=8_000)


@pytest.fixture
async def report(calibration: Calibration) -> Report:
    async def ends() -> int:
        return 0

    exited = asyncio.create_task(ends())
    await exited
    server = Server(
        "http://127.0.0.1:1234", "127.0.0.1:1235", "secret-token", Path("/d/token"), Path("/d/server.log"), exited
    )
    return Report((PLAIN, replace(FULL, threshold=0.5593, fpir_limit=0.995), FULL), calibration, 0.05, 1, server, False)


def printed(report: Report, *, as_json: bool = False) -> str:
    console = Console(file=io.StringIO(), width=120)
    show(report, console, as_json=as_json)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    return text if as_json else " ".join(text.split())


def test_people_are_told_what_is_synthetic_and_what_the_data_cannot_support(report: Report) -> None:
    """The number of synthetic references, the limit that no longer holds, the raised threshold, and 1e-6."""
    text = printed(report)
    for words in (
        "19,825 SYNTHETIC references",
        "limit 100%",
        "raise it to 0.702",
        "14,875 impostor pairs",
        "support no rate near 1e-6",
        "174 of 175",
        "1 of 25",
        "4,321",
        "2.0/3.5/4.2",
        "credit to Olivetti Research Laboratory",
        "matcher demo --stay",
    ):
        assert words in text


def test_the_words_are_those_of_the_standard(report: Report) -> None:
    """Candidate and alert; never a match, never somebody identified, never a hit; and never the token."""
    for as_json in (False, True):
        text = printed(report, as_json=as_json)
        assert not re.search(r"\b(?<!false-)(match(es|ed)?|identified|hits?|suspects?)\b", text, re.IGNORECASE)
        assert "secret-token" not in text


def test_a_server_that_stays_is_told_with_its_pages(report: Report) -> None:
    """Docs, metrics, gRPC address, token file, and how to stop it."""
    text = printed(replace(report, stays=True))
    for words in (
        "http://127.0.0.1:1234/docs",
        "http://127.0.0.1:1234/metrics",
        "127.0.0.1:1235",
        "/d/token",
        "Ctrl-C",
    ):
        assert words in text


@pytest.mark.parametrize(
    "ill",
    [
        replace(PLAIN, tally=replace(PLAIN.tally, not_answered=3)),
        replace(PLAIN, answers_that_differ=3),
    ],
)
def test_a_run_that_was_not_answered_in_full_is_not_reported_as_healthy(report: Report, ill: Run) -> None:
    """Unanswered probes and answers that change are said in words and in JSON, and end in a failure."""
    assert report.healthy
    broken = replace(report, runs=(ill,))
    assert not broken.healthy
    assert "NOT HEALTHY" in printed(broken)
    assert json.loads(printed(broken, as_json=True))["healthy"] is False


def test_the_json_is_whole_and_wraps_nothing(report: Report) -> None:
    """Parses in a narrow terminal too, with every figure unrounded."""
    console = Console(file=io.StringIO(), width=20)
    show(report, console, as_json=True)
    assert isinstance(console.file, io.StringIO)
    found = json.loads(console.file.getvalue())
    assert found["runs"][2]["threshold"] == 0.7016
    assert found["runs"][0]["tally"]["alerts"] == 176
    assert found["impostor_scores"]["real"]["comparisons"] == 14_875
