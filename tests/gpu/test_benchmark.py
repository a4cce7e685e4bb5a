"""The GPU benchmark walks its whole path without a GPU: checks, ceilings, each size and batch, rivals, enrolling."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.chips import REAL


def test_a_dry_run_says_what_it_is_and_every_answer_is_true(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["--dry-run", "--references", "300", "700", "--batch", "1", "18", "--json", str(out)]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], capture_output=True, text=True, check=False, timeout=240
    )
    assert ran.returncode == 0, ran.stderr
    assert "dry run: NOT A MEASUREMENT" in ran.stdout
    report = json.loads(out.read_text())
    assert report["dry_run"]
    ours = [row for row in report["rows"] if row["scanner"] == "int8 filter"]
    assert [(row["references"], row["batch"], row["wanted"]) for row in ours] == [
        (references, batch, wanted)
        for references in (300, 700)
        for batch in (1, 18)
        for wanted in ("threshold 0.4", "best 10")
    ]
    assert all(row["agrees"] == 1.0 for row in report["rows"])
    assert {row["scanner"] for row in report["rows"]} >= {"int8 filter", "torch float16 product + top-k in tiles"}
    assert [one["references"] for one in report["enrolling"]] == [300, 700]
    assert all(one["rows_enrolled_per_second"] > 0 for one in report["enrolling"])
    if not REAL:
        assert any("FAISS" in note for note in report["notes"]), "a rival that cannot run must say why"


@pytest.mark.skipif(REAL, reason="this machine has a GPU")
def test_without_a_gpu_nothing_but_a_dry_run_starts() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 2
    assert "only --dry-run" in ran.stderr
