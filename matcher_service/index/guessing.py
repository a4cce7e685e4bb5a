"""How many rows are worth a look before a full scan without a floor: they give it one."""

from __future__ import annotations

_GUESS_ROWS_MIN = 8  # a guess goes through at least so many rows for each one wanted
_GUESS_WEIGHT = 6.0  # of the rows that a guess goes through: see `guess_rows`


def guess_rows(rows: int, count: int) -> int:
    """How many of `rows` rows a guess of the best `count` goes through.

    The floor that it gives lets rows / guessed times as many rows through as are wanted, each of which costs about as
    much to score as 144 products of a full scan: the sum is least at a multiple of the root of rows * count.
    """
    return min(rows, max(_GUESS_ROWS_MIN * count, int(_GUESS_WEIGHT * (rows * count) ** 0.5)))
