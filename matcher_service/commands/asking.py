"""The shape of a command that asks the service over HTTP: where that is, one or more calls, and an answer printed as
JSON or as people read it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import typer

from matcher_service.commands.http_api import HttpApi, api_to, path_of
from matcher_service.commands.options import HTTP_URL, AsJson, CaFile, Http, TokenFile
from matcher_service.commands.output import Document, print_fields, print_json, print_rows


class Answer(NamedTuple):
    """What came of a command, and how people read it: a text, or what prints it."""

    document: Any
    shown: str | Callable[[], None]


Command = Callable[..., None]


def asking(ask: Callable[..., Answer]) -> Command:
    """A command of all parameters of `ask` but its first, the service's API, and the options that say where it is."""

    @functools.wraps(ask)
    def command(
        *given: Any, http: str, token_file: Path | None, ca_file: Path | None, as_json: bool, **named: Any
    ) -> None:
        with api_to(http, token_file, ca_file) as api:
            answer = ask(api, *given, **named)
        if as_json:
            print_json(answer.document)
        elif isinstance(answer.shown, str):
            typer.echo(answer.shown)
        else:
            answer.shown()

    hints = get_type_hints(ask, include_extras=True)
    own = list(inspect.signature(ask).parameters.values())[1:]
    return _of_parameters(command, [one.replace(annotation=hints[one.name]) for one in own])


def lists(path: str, columns: Sequence[str], none: str, words: str) -> Command:
    """A command that lists what is at a path; `none` is said when there is nothing, `words` are its help."""

    def ask(api: HttpApi) -> Answer:
        found = api.get(path_of(path))
        return Answer(found, lambda: print_rows(found[path], columns, none))

    ask.__doc__ = words
    return asking(ask)


def shows(path: str, named: str, words: str, shown: Callable[[Document], None] = print_fields) -> Command:
    """A command that describes one of what is at a path, by its name; `words` are its help."""

    def ask(api: HttpApi, **name: str) -> Answer:
        found = api.get(path_of(path, name[named]))
        return Answer(found, lambda: shown(found))

    ask.__doc__ = words
    return _of_parameters(asking(ask), [inspect.Parameter(named, inspect.Parameter.KEYWORD_ONLY, annotation=str)])


def _of_parameters(command: Command, own: Sequence[inspect.Parameter]) -> Command:
    """The command as typer is to see it."""
    where = {"http": (Http, HTTP_URL), "token_file": (TokenFile, None), "ca_file": (CaFile, None)}
    options = where | {"as_json": (AsJson, False)}
    everything = [
        *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ),
    ]
    command.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in everything}
    return command
