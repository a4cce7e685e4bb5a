"""The repository as such: laws have tests, documents name what exists, nothing private is committed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from matcher_service.metrics import Metrics

ROOT = Path(__file__).parents[2]
TEXT = {".py", ".md", ".toml", ".txt", ".proto", ".pbtxt", ".yaml", ".yml", ""}


def committed() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def prose() -> dict[Path, str]:
    return {path: path.read_text(errors="replace") for path in committed() if path.suffix in TEXT}


@pytest.mark.parametrize("law", [1, 2, 3, 4, 5, 6, 7, 9, 10, 11])
def test_every_law_is_named_by_a_test(law: int) -> None:
    named = re.compile(rf"[Ll]aw[ _]{law}\b|laws?_{law}_")
    assert any(named.search(text) for path, text in prose().items() if path.name.startswith("test_")), law


def test_the_architecture_names_only_modules_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    layout = text.split("## Where things live")[1].split("```")[1]
    for name in re.findall(r"[a-z0-9_]+(?:/[a-z_]*)*\.(?:py|proto)|[a-z0-9_]+/", layout):
        held = [ROOT / "matcher_service" / name, ROOT / name, *ROOT.glob(f"matcher_service/*/{name}")]
        assert any(path.exists() for path in held), name


def test_the_readme_names_only_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for command, sub in sorted(set(re.findall(r"^    matcher ([a-z-]+)(?: ([a-z]+)(?= |$))?", text, re.MULTILINE))):
        words = [command, sub] if sub and command not in ("import", "edge", "serve") else [command]
        shown = subprocess.run(
            [sys.executable, "-m", "matcher_service", *words, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert shown.returncode == 0, (words, shown.stderr)


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", (ROOT / "README.md").read_text())) <= targets
    assert {"demo", "test", "bench", "lint"} <= targets


def test_no_metric_carries_a_label_that_could_name_a_person_or_a_camera() -> None:
    from prometheus_client import CollectorRegistry

    metrics = vars(Metrics(CollectorRegistry()))
    labels = {name for metric in metrics.values() for name in getattr(metric, "_labelnames", ())}
    assert labels <= {
        "gpu",
        "transport",
        "verb",
        "result",
        "outcome",
        "cause",
        "station",
        "flow",
        "gallery",
        "how",
        "kind",
        "replica",
        "verdict",
    }


def test_nothing_unfinished_or_private_is_committed() -> None:
    unfinished = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    private = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w|files\.pythonhosted|pypi\.org/simple")
    for path, text in prose().items():
        if path == Path(__file__) or "_pb2" in path.name:
            continue
        assert not unfinished.search(text), path
        assert not private.search(text), path


def test_every_file_is_small_enough_to_read() -> None:
    for path in committed():
        assert path.stat().st_size <= 1_000_000, path


def test_the_service_starts_with_the_core_install_alone() -> None:
    """What only an extra brings is imported where it is used."""
    extras = ["PIL", "dlib", "tritonclient", "matplotlib", "usearch", "locust", "lancedb", "psycopg"]
    blocked = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in extras)
    program = blocked + "import matcher_service.bootstrap, matcher_service.client, matcher_service.demo.run\n"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
