"""The rules are sound, tested both ways, explained, and name what exists."""

from __future__ import annotations

import re
from typing import Any

import pytest

from matcher_service.errors import DeadlineExceeded, ServiceFault
from matcher_service.terms import Cause
from tests.ops.tools import ROOT, RULES, assert_names_only_what_exists, rules, said, tool, yaml

TESTS = RULES.with_name("rules_test.yaml")
ALERTS = [rule for rule in rules() if "alert" in rule]
RUNBOOK = (ROOT / "docs/RUNBOOK.md").read_text()


def asserted(what: str) -> list[dict[str, Any]]:
    return [one for test in yaml.safe_load(TESTS.read_text())["tests"] for one in test.get(what, ())]


def test_prometheus_accepts_the_rules() -> None:
    said(tool("promtool", "prometheus"), "check", "rules", RULES)


def test_every_rule_fires_and_stays_silent_as_its_tests_say() -> None:
    said(tool("promtool", "prometheus"), "test", "rules", TESTS.name, cwd=TESTS.parent)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_has_a_test_in_which_it_yields_and_one_in_which_it_does_not(rule: dict[str, Any]) -> None:
    if "alert" in rule:
        outcomes = [bool(one["exp_alerts"]) for one in asserted("alert_rule_test") if one["alertname"] == rule["alert"]]
    else:
        named = re.compile(rf"(?<![\w:]){rule['record']}(?![\w:])")
        outcomes = [bool(one["exp_samples"]) for one in asserted("promql_expr_test") if named.search(one["expr"])]
    assert set(outcomes) == {True, False}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_names_only_series_and_labels_that_exist(rule: dict[str, Any]) -> None:
    assert_names_only_what_exists(rule["expr"])


def test_availability_counts_every_cause_that_is_the_services_and_no_other() -> None:
    def causes(error: type[ServiceFault]) -> set[str]:
        return {str(error.default_cause)}.union(*(causes(one) for one in error.__subclasses__()))

    ours = causes(ServiceFault) | {Cause.INTERNAL, DeadlineExceeded.default_cause}
    counted = [rule["expr"] for rule in rules() if rule.get("record", "").startswith("matcher:unavailable")]
    assert counted
    for expression in counted:
        found = re.search(r'result=~"([A-Z_|]+)"', expression)
        assert found is not None
        # What a client says of a service that it cannot reach is never counted by the service.
        assert set(found[1].split("|")) == ours - {Cause.UNREACHABLE}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_leads_to_a_page_that_says_what_it_means_how_to_look_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["runbook"] == f"docs/RUNBOOK.md#{rule['alert'].lower()}"
    sections = re.findall(rf"^### {rule['alert']}\n(.*?)(?=^##|\Z)", RUNBOOK, re.MULTILINE | re.DOTALL)
    assert len(sections) == 1
    assert re.findall(r"^\*\*(Means|Look|Do)\.\*\*", sections[0], re.MULTILINE) == ["Means", "Look", "Do"]


def test_the_runbook_explains_no_alert_that_does_not_exist() -> None:
    assert set(re.findall(r"^### (\w+)$", RUNBOOK, re.MULTILINE)) == {rule["alert"] for rule in ALERTS}
