"""What finds the candidates among the stored rows of one segment.

A Scanner is built once over immutable rows and knows nothing of liveness, expiry, subjects or ids: those
are the engine's. Its `scan` is exact; its `guess` is a good start, and says what it may have missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from matcher_service.terms import Float32, Int64


class Hits(NamedTuple):
    """Rows found for a batch of n probes, in columns: those of probe i stand at offsets[i]:offsets[i+1], in
    no particular order. `scores` are final scores (float64 product rounded to float32). `certified` bool [n]:
    answered through the certificate of a filter, of codes or of integers; else every row was multiplied in float32."""

    offsets: Int64
    rows: Int64
    scores: Float32
    certified: NDArray[np.bool_]


class Guess(NamedTuple):
    """A good start for a search of the best rows. No row that is not among the hits has a score above `beyond`,
    float32 [n]: +inf where nothing is known of them."""

    hits: Hits
    beyond: Float32


HITS_MAX = 4_000_000


class TooManyHits(Exception):
    """A scan of several probes came upon more rows than are held at once: ask for fewer probes."""


class Tally:
    """Counts what a scan of `probes` probes finds, from all its threads, and ends it when it is too much."""

    def __init__(self, probes: int) -> None:
        self._left = HITS_MAX
        self._bounded = probes > 1

    def add(self, hits: int) -> None:
        """Raises TooManyHits, but never where there is one probe."""
        self._left -= hits
        if self._bounded and self._left < 0:
            raise TooManyHits


class Scanner(Protocol):
    rows: int

    def scan(self, probes: Float32, floors: Float32) -> Hits:
        """Every row whose score is >= the probe's floor. `probes` float32 [n, d] unit rows, C order;
        `floors` float32 [n], -inf for all rows. Raises TooManyHits for several probes in a crowd."""
        ...

    def guess(self, probes: Float32, count: int) -> Guess:
        """About `count` rows per probe that are likely to be its best, with final scores."""
        ...

    def bytes_in_memory(self) -> int: ...


class Together(Protocol):
    """What scans many segments for little more than one: a device that holds them all. Its scanners name it as
    their attribute `together`."""

    def scan_all(self, scanners: Sequence[Any], probes: Float32, floors: Float32) -> list[Hits]:
        """What each of its scanners would give by itself; `floors` float32 [n, number of scanners]."""
        ...


def unsure(hits: Hits) -> Guess:
    """A guess that may have missed anything."""
    return Guess(hits, np.full(len(hits.certified), np.inf, np.float32))


def together_of(scanner: Scanner) -> Together | None:
    """What scans the scanner's rows together with others', if anything does."""
    return getattr(scanner, "together", None)


class Growing(Protocol):
    """A device that takes rows as they come in and scans them without their being copied again."""

    def append(self, stored: NDArray[np.float16]) -> None:
        """Append m rows, float16 [m, d]; seen by no scanner given before."""
        ...

    def view(self, stored: NDArray[np.float16], whole: Scanner) -> Scanner:
        """A scanner of the rows so far, `stored` float16 [n, d]; `whole` scans them in full."""
        ...

    def frozen(self, stored: NDArray[np.float16], whole: Scanner) -> Scanner:
        """A scanner of `stored`, float16 [n, d]: the rows appended, in order, or some of them. No more are to come."""
        ...


class Ending(Protocol):
    """A scanner, or a Growing, that erases what it holds of rows which no view shows any more."""

    def end(self, rows: Int64) -> None: ...


def ending_of(holder: object) -> Ending | None:
    """The holder, if it is one of these."""
    return holder if callable(getattr(holder, "end", None)) else None  # type: ignore[return-value]
