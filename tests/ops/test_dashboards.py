"""Every query of a dashboard parses and names what exists; panels do not cover one another."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from ops import generate
from tests.ops.tools import DASHBOARDS, assert_names_only_what_exists, dashboard_queries, said, tool


@pytest.mark.parametrize(("panel", "query"), dashboard_queries(), ids=lambda value: value[:60])
def test_a_query_names_only_series_and_labels_that_exist(panel: str, query: str) -> None:
    assert_names_only_what_exists(query)


def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    queries = [query.replace("$__rate_interval", "1m") for _, query in dashboard_queries()]
    assert len(queries) > 30
    held = {"groups": [{"name": "q", "rules": [{"record": f"q:{at}", "expr": one} for at, one in enumerate(queries)]}]}
    (tmp_path / "queries.json").write_text(json.dumps(held))
    assert f"{len(queries)} rules found" in said(
        tool("promtool", "prometheus"), "check", "rules", tmp_path / "queries.json"
    )


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_ids_of_their_own_and_do_not_overlap(path: Path) -> None:
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
        assert one["x"] + one["w"] <= 24


@pytest.mark.parametrize("path", generate.generated(), ids=lambda path: path.name)
def test_a_generated_file_is_current(path: Path) -> None:
    assert path.read_text() == generate.generated()[path], "run make ops-files"
