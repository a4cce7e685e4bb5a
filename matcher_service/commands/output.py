"""What commands print: a JSON document, or tables and lines for people. Results go to standard output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from matcher_service.commands.times import duration_in_words, in_words

Document = Mapping[str, Any]
PIPE_WIDTH = 500


def print_json(document: Any) -> None:
    """One line, so that several can be told apart."""
    typer.echo(json.dumps(document, ensure_ascii=False))


def print_rows(rows: Sequence[Document], columns: Sequence[str], none: str) -> None:
    """A table of these columns; `none` is said when there are no rows."""
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        typer.echo(none)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(_title(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(column, row.get(column))) for column in columns))
    # A file or a pipe has no width; folding there would cut what the next program looks for.
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def print_fields(document: Document) -> None:
    """One line per field."""
    width = max(map(len, map(_title, document)), default=0)
    for name, value in document.items():
        typer.echo(f"{_title(name):<{width}}  {shown(name, value)}")


def shown(name: str, value: Any) -> str:
    """A value as people read it, by the unit in its name."""
    if value is None:
        return "-"
    if (name == "at_ms" or name.endswith("_at_ms")) and isinstance(value, int):
        return in_words(value) if value else "-"
    if name.endswith("_ms") and isinstance(value, int):
        return duration_in_words(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if name == "space" and isinstance(value, Mapping):
        return f"{value['name']}/{value['version']}/{value['dimension']}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={shown(key, one)}" for key, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(shown("", one) for one in value)
    return str(value)


def _title(name: str) -> str:
    return name.removesuffix("_ms").removesuffix("_at").replace("_", " ")
