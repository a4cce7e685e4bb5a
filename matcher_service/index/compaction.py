"""Which segments to write anew, decided from their sizes and their dead. Pure functions.

Sizes are kept roughly geometric, so that a gallery has few segments and each row is rewritten few times:
segments are joined with the next larger one only if together they outweigh it. While entries stream in, they
must be seven times as heavy, and what has no codes yet is coded as soon as it would hold up a search: coding is the
dearest of what is done for a new row, so that nothing is coded twice that can wait. In quiet moments what
has no codes comes first too, since a larger join would keep searches waiting for it, and then an eighth is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matcher_service.index.choose import worth_codes

DEAD_SHARE_MAX = 0.2
# Rows without codes are scanned in full: about 5 ms of a search, for each probe on one core, at 512 dimensions.
PLAIN_ROWS_MAX = 32_768
_STREAMING_WEIGHT = 7.0
_QUIET_WEIGHT = 1 / 8


@dataclass(frozen=True, slots=True)
class CompactionBudget:
    """What one round of background work may do, and how soon dead rows are gone.

    `rows_max` rows are rewritten at most in one round; rows that ended are erased from memory and files
    `erase_after_ms` after the log said so, plus the time of a round for each gallery that is due.
    """

    rows_max: int
    erase_after_ms: int


class SegmentSize(NamedTuple):
    """`live` and `dead` rows, the log time at which the first of the dead ended, and whether the rows are `plain`:
    without codes that would pay."""

    live: int
    dead: int
    died_ms_min: int
    plain: bool = False


def to_rewrite(sizes: Sequence[SegmentSize], budget: CompactionBudget, now_ms: int, *, quiet: bool) -> list[int]:
    """Positions of the segments to join into one next; [] if all is well.

    First what must be erased by now, then what carries too many dead rows, then what has no codes or is too small.
    """
    overdue = [i for i, size in enumerate(sizes) if size.dead and now_ms - size.died_ms_min >= budget.erase_after_ms]
    if overdue:
        return _up_to(sizes, overdue, budget.rows_max)
    wasteful = [i for i, size in enumerate(sizes) if size.dead > DEAD_SHARE_MAX * (size.live + size.dead)]
    if wasteful:
        return _up_to(sizes, wasteful, budget.rows_max)
    every = list(range(len(sizes)))
    plain = [i for i in every if sizes[i].plain]
    if sum(sizes[i].live for i in plain) >= (1 if quiet else PLAIN_ROWS_MAX):
        return _up_to(sizes, plain, budget.rows_max)
    if quiet:
        return _too_small(sizes, every, budget.rows_max, _QUIET_WEIGHT)
    return _too_small(sizes, [i for i in every if not sizes[i].plain], budget.rows_max, _STREAMING_WEIGHT)


def worth_coding(tail_rows: int, segment_rows: Sequence[int], dimension: int) -> bool:
    """Whether an open tail should get codes in a quiet moment: by itself, or joined with the smallest segment."""
    if worth_codes(tail_rows, dimension):
        return True
    smallest = min(segment_rows, default=0)
    return tail_rows >= _QUIET_WEIGHT * smallest > 0 and worth_codes(tail_rows + smallest, dimension)


def _up_to(sizes: Sequence[SegmentSize], chosen: Sequence[int], rows_max: int) -> list[int]:
    """The smallest of the chosen that together stay within rows_max; at least one."""
    ordered = sorted(chosen, key=lambda i: sizes[i].live)
    taken, rows = ordered[:1], sizes[ordered[0]].live
    for i in ordered[1:]:
        rows += sizes[i].live
        if rows > rows_max:
            break
        taken.append(i)
    return taken


def _too_small(sizes: Sequence[SegmentSize], among: Sequence[int], rows_max: int, weight_min: float) -> list[int]:
    ordered = sorted(among, key=lambda i: sizes[i].live)
    best: list[int] = []
    smaller = 0
    for place, i in enumerate(ordered):
        size = sizes[i].live
        if smaller + size > rows_max:
            break
        if place and smaller >= weight_min * size:
            best = ordered[: place + 1]
        smaller += size
    return best
