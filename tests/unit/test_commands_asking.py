"""What the commands that ask the service have in common is seen by who reads their help; the rest needs a service."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from matcher_service.commands.asking import Answer, asking, lists, shows
from matcher_service.commands.http_api import HttpApi


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setenv("COLUMNS", "200")
    commands = typer.Typer()
    commands.command("list")(lists("things", ("name", "size"), "There is nothing.", "List the things."))
    commands.command("show")(shows("things", "name", "Describe a thing."))

    @commands.command("change")
    @asking
    def change(api: HttpApi, name: str, by: Annotated[int, typer.Option(help="How much.")] = 1) -> Answer:
        """Change a thing."""
        done = api.post(f"/v1/things/{name}", {"by": by})
        return Answer(done, f"Changed {done['name']} by {by}.")

    return commands


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("list", set()), ("show", {"name"}), ("change", {"name", "by"})],
    # In order: workers that collect the tests by themselves must give them the same names.
    ids=lambda one: one if isinstance(one, str) else "-".join(sorted(one)),
)
def test_such_a_command_says_where_the_service_is_and_hides_how_it_is_asked(
    app: typer.Typer, command: str, arguments: set[str]
) -> None:
    told = CliRunner().invoke(app, [command, "--help"])
    assert told.exit_code == 0, told.output
    for option in ("--http", "--token-file", "--ca-file", "--json"):
        assert option in told.output
    assert "thing" in told.output
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    assert {one.name for one in found.params} == arguments | {"http", "token_file", "ca_file", "as_json"}
