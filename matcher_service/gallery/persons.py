"""Whether two names stand for one person."""

from __future__ import annotations


def same_person(one: str, other: str) -> bool:
    """Whether two names are one, however they are spaced or capitalised. An empty name is nobody's."""
    first, second = (" ".join(name.split()).casefold() for name in (one, other))
    return not first or not second or first == second
