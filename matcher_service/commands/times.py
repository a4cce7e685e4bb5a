"""Durations and times of day as people type them, and back."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 7 * 86_400_000}
_DURATION = re.compile(r"(\d+)(ms|s|m|h|d|w)", re.ASCII)


def duration_ms(text: str, field: str) -> int:
    """`90s`, `15m`, `12h`, `30d`, `52w` or `500ms`; raises InvalidInput."""
    from matcher_service.errors import InvalidInput

    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise InvalidInput(f"{text!r} is not a duration", field=field, hint="write 500ms, 90s, 15m, 12h, 30d or 52w")
    return int(found[1]) * _UNITS_MS[found[2]]


def time_ms(text: str, field: str, now_ms: int) -> int:
    """`now`, `+12h` from now, or ISO 8601 with its offset, as milliseconds since 1970; raises InvalidInput."""
    from matcher_service.errors import InvalidInput

    text = text.strip()
    if text == "now":
        return now_ms
    if text.startswith("+"):
        return now_ms + duration_ms(text[1:], field)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise InvalidInput(
            f"{text!r} is not a time of day",
            field=field,
            hint="write 2026-03-01T08:00:00Z (with Z or an offset), +12h from now, or now",
        )
    return round(at.timestamp() * 1000)


def now_ms() -> int:
    """The time of day, as milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def in_words(at_ms: int) -> str:
    """UTC, to the second; beyond what a calendar holds, the number."""
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return str(at_ms)


def duration_in_words(ms: int) -> str:
    """The largest unit that leaves no remainder."""
    for unit in ("w", "d", "h", "m", "s"):
        if ms and ms % _UNITS_MS[unit] == 0:
            return f"{ms // _UNITS_MS[unit]}{unit}"
    return f"{ms}ms"
