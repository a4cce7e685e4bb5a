"""The log of a process: JSON lines on standard error, each with the request, the deployment and the trace it belongs
to, and none with a template.

Levels: critical, the process or its data is lost; error, somebody must look; warning, it was got over and may come
again; info, something changed that explains what comes later; debug, for whoever changes the code.

What may stand in a line is judged when it is written: plain values and short texts do, arrays, bytes, sequences of
numbers and texts that look like them do not, whoever wrote the call (law 6). Of an exception its kind and its places
are told and not its text, which may hold values of a probe.
"""

from __future__ import annotations

import logging
import re
import secrets
import sys
import traceback
from collections.abc import Collection, Mapping, MutableMapping
from contextvars import ContextVar
from pathlib import PurePath
from types import TracebackType
from typing import Any, TextIO

import structlog

from matcher_service.traces import name_trace

# More numbers than these in one value are taken for a template's.
NUMBERS_MAX = 6
ITEMS_MAX = 64
TEXT_MAX = 2000
_INTEGER_MAX = 2**64

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBERS = re.compile(rf"(?:{_NUMBER}[\s,;:\[\](){{}}]+){{{NUMBERS_MAX},}}{_NUMBER}")
# Any encoding of bytes as text, also in lines of 76; a digest of 64 characters is shorter.
_DENSE = re.compile(r"\S{72,}|(?:[0-9a-fA-F]{2}[\s:,]){16,}")
_ESCAPES_MAX = 6

# Of the request under way, request_id and deployment_id; shared by all tasks that answer it.
_about: ContextVar[dict[str, str] | None] = ContextVar("about", default=None)

Event = MutableMapping[str, Any]


def request_begins() -> None:
    """What the current task answers from now on has an id, which is in each of its lines."""
    _about.set({"request_id": secrets.token_hex(8)})


def message_begins() -> None:
    """What the current task answers from now on is one of several messages of its request."""
    _about.set(dict(_about.get() or {}))


def request_id() -> str:
    """Of the request that the current task answers; "": none."""
    return (_about.get() or {}).get("request_id", "")


def deployment(deployment_id: str) -> None:
    """Whose probes are being answered, from now on in each line on this request."""
    about = _about.get()
    if about is not None and deployment_id:
        about["deployment_id"] = deployment_id


def configure(level: str, file: TextIO | None = None) -> None:
    """For this process, what other libraries write included; `file` is standard error if it is not given."""
    structlog.configure(
        processors=[
            name_request,
            name_trace,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            place_exception,
            without_templates,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file or sys.stderr),
    )
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _Foreign):
            root.removeHandler(handler)
    root.addHandler(_Foreign(logging.WARNING))


class _Foreign(logging.Handler):
    """Lines of libraries that know only Python's own logging."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger()
        logger.log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info or None)


def name_request(_logger: object, _method: str, event: Event) -> Event:
    """A structlog processor: the ids of what the current task answers."""
    return {**(_about.get() or {}), **event}


def place_exception(_logger: object, _method: str, event: Event) -> Event:
    """A structlog processor: of `exc_info` the kind and the places, never the text."""
    given = event.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else given[1] if isinstance(given, tuple) else given
    if isinstance(error, BaseException):
        event["kind"], event["at"] = type(error).__name__, places(error.__traceback__)
    return event


def places(trace: TracebackType | None) -> list[str]:
    """Where in the code, outermost first."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)[-ITEMS_MAX:]]


def without_templates(_logger: object, _method: str, event: Event) -> Event:
    """A structlog processor: what may be part of a template is replaced by a word on what it was."""
    return {name: _harmless(value) for name, value in event.items()}


def _harmless(value: Any) -> Any:
    if _numbers_in(value) > NUMBERS_MAX:
        return f"<{type(value).__name__} withheld>"
    return _plain(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if type(value) in (int, float):
        return "<number withheld>" if isinstance(value, int) and abs(value) >= _INTEGER_MAX else value
    if isinstance(value, str):
        return _text(str(value))
    if isinstance(value, PurePath):
        return _text(str(value))
    if isinstance(value, Mapping) and len(value) <= ITEMS_MAX:
        return {_text(str(name)): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and len(value) <= ITEMS_MAX:
        return [_plain(one) for one in value]
    # Arrays, bytes, and whatever might print what it holds.
    return f"<{type(value).__name__} withheld>"


def _numbers_in(value: Any) -> int:
    """How many numbers a value holds, at any depth, and in texts that are nothing else."""
    if isinstance(value, Mapping):
        return _numbers_in(value.values())
    if isinstance(value, str):
        return 1 if re.fullmatch(rf"\s*{_NUMBER}\s*", value) else 0
    if isinstance(value, Collection) and not isinstance(value, bytes | bytearray | memoryview):
        return sum(map(_numbers_in, value)) if len(value) <= ITEMS_MAX else 0
    return 1 if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _text(value: str) -> str:
    value = value[:TEXT_MAX]
    if value.count("\\x") > _ESCAPES_MAX or sum(not (one.isprintable() or one in "\n\t") for one in value) > 2:
        return "<text withheld>"
    value = _NUMBERS.sub("<numbers withheld>", value)
    return _DENSE.sub(lambda found: found[0] if _is_path(found[0]) else "<text withheld>", value)


def _is_path(run: str) -> bool:
    """Whether a long run is a path of short names, which base64 is not: two fifths of that are capitals."""
    return "/" in run and max(map(len, re.split(r"[/.]", run))) <= 40 and sum(map(str.isupper, run)) < len(run) / 4
