"""What may stand in the log as a name."""

from __future__ import annotations

from collections.abc import Sequence

from matcher_service.errors import InvalidInput

NAME_BYTES_MAX = 1024


def storable(name: str) -> bool:
    """1 to NAME_BYTES_MAX bytes of valid UTF-8 without a zero byte, which not every database stores."""
    if not name or "\0" in name:
        return False
    if name.isascii():  # nearly all are, and every write is asked
        return len(name) <= NAME_BYTES_MAX
    try:
        return len(name.encode()) <= NAME_BYTES_MAX
    except UnicodeEncodeError:
        return False


def storable_all(names: Sequence[str]) -> bool:
    """Whether they all are, told without a look at each if they are ASCII; False may be wrong."""
    text = "".join(names)
    return text.isascii() and "\0" not in text and all(names) and max(map(len, names), default=0) <= NAME_BYTES_MAX


def check_name(name: str, field: str) -> None:
    """Raises InvalidInput naming the field if the name is not storable."""
    if not storable(name):
        raise InvalidInput(
            "an identifier is empty, too long or not valid text",
            field=field,
            hint=f"1 to {NAME_BYTES_MAX} bytes of UTF-8, none of them zero",
        )
