"""Tools that are not Python packages, the files under test, and what metrics exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.metrics import MetricWrapperBase

from matcher_service.metrics import Metrics, sample_name

if os.environ.get("CI") != "true":
    for package in ("yaml", "promql_parser", "kubernetes_validate"):
        pytest.importorskip(package, reason=f"{package} is not installed: make test-ops installs it")
import promql_parser
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "ops/prometheus/rules.yaml"
DASHBOARDS = sorted((ROOT / "ops/grafana").glob("*.json"))
OVERLAYS = sorted((ROOT / "k8s/overlays").iterdir())


def tool(name: str, package: str) -> str:
    """The path of a command, first choice the one beside this Python: kubectl and hadolint come with the extra `ops`,
    and a kubectl of the system may be too old to build the manifests. Without it the test is skipped, or fails where
    CI=true."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        why = f"{name} is not installed ({package})"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return found


def said(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command printed; the test fails with it if the command did."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@cache
def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@cache
def series() -> dict[str, set[str]]:
    """Every name that a query may use, with its labels besides those of the scrape."""
    registry = CollectorRegistry()
    held: dict[str, set[str]] = {"up": set(), "ALERTS": {"alertname", "alertstate", "severity"}}
    for metric in vars(Metrics(registry)).values():
        if isinstance(metric, Histogram):
            for suffix, more in (("_bucket", {"le"}), ("_sum", set()), ("_count", set())):
                held[metric._name + suffix] = set(metric._labelnames) | more
        elif isinstance(metric, MetricWrapperBase):
            held[sample_name(metric)] = set(metric._labelnames)
    held["matcher_build_info"] = {"version", "policy", "python", "form"}
    held |= {one.name: set() for family in ProcessCollector(registry=None).collect() for one in family.samples}
    return held | {rule["record"]: set() for rule in rules() if "record" in rule}


def selectors(query: str) -> Iterator[tuple[str, set[str]]]:
    """The name and the matched labels of every series that a query selects; fails if it does not parse."""
    yield from _selected(promql_parser.parse(query.replace("$__rate_interval", "1m")))


def _selected(node: Any) -> Iterator[tuple[str, set[str]]]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name, {one.name for one in node.matchers.matchers}
    for part in ("expr", "lhs", "rhs", "vector_selector"):
        if (inner := getattr(node, part, None)) is not None:
            yield from _selected(inner)
    for argument in getattr(node, "args", None) or ():
        yield from _selected(argument)


def assert_names_only_what_exists(query: str) -> None:
    held = series()
    named = list(selectors(query))
    assert named or re.fullmatch(r"vector\(\d+\)", query), query
    for name, labels in named:
        assert name in held, f"{name} does not exist: {query}"
        assert labels <= held[name] | {"job", "instance"}, f"{name} has no label {labels - held[name]}: {query}"


def dashboard_queries() -> list[tuple[str, str]]:
    """(dashboard and panel, query) of every target."""
    import json

    return [
        (f"{path.stem}: {panel['title']}", target["expr"])
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    ]
