"""`matcher serve` and `matcher settings`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matcher_service.commands.options import AsJson
from matcher_service.commands.output import print_json

if TYPE_CHECKING:
    from matcher_service.settings import Settings

Config = Annotated[Path | None, typer.Option("--config", help="Settings file (TOML).")]


def serve(
    config: Config = None,
    data_dir: Annotated[Path | None, typer.Option(help="Directory of this process alone.")] = None,
    host: Annotated[
        str | None, typer.Option(help="Address of both listeners; beyond loopback TLS is required.")
    ] = None,
    http_port: Annotated[int | None, typer.Option(help="HTTP port; 0 takes a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port; 0 takes a free one.")] = None,
) -> None:
    """Run the service until it is told to stop (SIGTERM or Ctrl-C).

    Options win over the environment (MATCHER_SERVER__HTTP_PORT=8090), which wins over the file.
    """
    import os

    # Before numpy is loaded. The scans share their work among threads of their own; OpenBLAS's are one pool for the
    # whole process, in which searches and coding would wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from matcher_service import bootstrap
    from matcher_service.settings import load

    given: dict[str, dict[str, Any]] = {
        "server": {"host": host, "http_port": http_port, "grpc_port": grpc_port},
        "storage": {"data_dir": data_dir},
    }
    overrides = {
        section: {name: value for name, value in values.items() if value is not None}
        for section, values in given.items()
    }
    settings = load(config, **{section: values for section, values in overrides.items() if values})
    raise typer.Exit(bootstrap.serve(settings))


def settings(config: Config = None, as_json: AsJson = False) -> None:
    """Every setting: its default, its value here, its meaning, and the variable that sets it."""
    from matcher_service.settings import load

    rows = list(described(load(config)))
    if as_json:
        print_json(rows)
        return
    section = None
    for row in rows:
        if row["section"] != section:
            section = row["section"]
            typer.echo(f"\n[{section}]" if section else "")
        changed = "" if row["value"] == row["default"] else f" (here: {_toml(row['value'])})"
        typer.echo(f"{row['name']} = {_toml(row['default'])}{changed}")
        typer.echo(f"    {row['meaning']}  {row['variable']}")


def described(settings: Settings) -> Iterator[dict[str, Any]]:
    """Each setting with its section, default, value, meaning and environment variable; plain JSON values."""
    from pydantic import BaseModel

    defaults = type(settings).model_fields
    for section, declared in defaults.items():
        value = getattr(settings, section)
        if not isinstance(value, BaseModel):
            yield _row("", section, declared, value)
            continue
        for name, field in type(value).model_fields.items():
            yield _row(section, name, field, getattr(value, name))


def _row(section: str, name: str, field: Any, value: Any) -> dict[str, Any]:
    variable = f"MATCHER_{section}__{name}" if section else f"MATCHER_{name}"
    return {
        "section": section,
        "name": name,
        "default": _plain(field.default),
        "value": _plain(value),
        "meaning": field.description or "",
        "variable": variable.upper(),
    }


def _plain(value: Any) -> Any:
    # Paths, and secrets, which show as asterisks.
    return value if value is None or isinstance(value, str | int | float | tuple) else str(value)


def _toml(value: Any) -> str:
    import json

    return "(none)" if value is None else json.dumps(value)
