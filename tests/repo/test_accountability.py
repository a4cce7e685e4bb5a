"""docs/ACCOUNTABILITY.md names tests that exist, and tests that notice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.repo.mutations import MUTATIONS, ROOT, Mutation, noticed

TABLE = (ROOT / "docs" / "ACCOUNTABILITY.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TABLE)))


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[test for _, test in NAMED])
def test_every_row_of_the_table_has_a_test(file: str, test: str) -> None:
    assert re.search(rf"^(async )?def {test}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_every_rule_of_the_table_names_one() -> None:
    rows = [
        line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith(("| rule", "| refusal"))
    ]
    assert len(rows) > 25
    assert [row for row in rows if "::" not in row] == []


def test_every_module_that_the_table_names_exists() -> None:
    for row in TABLE.splitlines():
        for name in re.findall(r"`([\w/]+\.py)`(?! ::)", row):
            places = [ROOT / name, Path(ROOT, "matcher_service", name)]
            assert any(place.is_file() for place in places), name


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_every_mutation_fits_the_code_and_names_a_test_of_the_table(mutation: Mutation) -> None:
    assert (ROOT / "matcher_service" / mutation.file).read_text().count(mutation.old) == 1
    assert tuple(mutation.test.split("::")) in NAMED


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_without_its_enforcement_the_test_of_a_row_fails(mutation: Mutation) -> None:
    assert noticed(mutation)
