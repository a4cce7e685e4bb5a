"""The parts of a gallery that a search goes through: segments, whose rows are fixed, and the open tail.

A row that is withdrawn or replaced is not removed: the sequence of the entry that ended it is written beside
it. A search holds the sequence up to which its view reaches and takes a row for live if it ended later than
that. So an entry becomes visible in all its effects by publishing one number, and a search that began before
still sees what was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from matcher_service.halves import largest_magnitude, widen
from matcher_service.index.choose import worth_codes
from matcher_service.index.flat import FlatScanner, Kept
from matcher_service.index.integer_bound import law_within
from matcher_service.index.rows import Float16, HashIndex, Names, Narrow, Rows, UInt32, id_hashes, joined
from matcher_service.index.scanner import Growing, Scanner
from matcher_service.index.score import norm_bound
from matcher_service.terms import Float32, Int64

LIVE = np.iinfo(np.int64).max
NEVER_MS = np.iinfo(np.int64).max

_TAIL_ROWS_FIRST = 64
# died, hash and offset columns of a row in the tail, and its entries in Python lists and the dictionary.
_TAIL_ROW_OVERHEAD = 400


class Part(Protocol):
    """What a search needs of a part. `died_at` int64 [>= rows] or None (no row has ended), `expires_at_ms`
    int64 and `subject_hashes` uint32 [>= rows]."""

    @property
    def rows(self) -> int: ...
    @property
    def died_at(self) -> Int64 | None: ...
    @property
    def expires_at_ms(self) -> Int64 | Narrow: ...
    @property
    def subject_hashes(self) -> UInt32: ...
    @property
    def scanner(self) -> Scanner: ...
    def reference_id(self, row: int) -> bytes: ...
    def subject_id(self, row: int) -> bytes: ...


def lacks_codes(stored: Float16, scanner: Scanner) -> bool:
    """Whether rows are scanned in full that codes would serve faster."""
    return worth_codes(*stored.shape) and isinstance(scanner, FlatScanner)


@dataclass(frozen=True, slots=True)
class SealedFile:
    """The file that holds a segment: its name in the directory, identity, size in bytes, SHA-256, and the generation of
    its gallery's key that it is sealed under."""

    name: str
    file_id: str
    size: int
    sha256: str
    generation: int = 1


@dataclass(eq=False, slots=True)
class Segment:
    """Fixed rows with a scanner over them. `died_at` int64 [n] holds the sequence that ended each row, LIVE
    where none has, and is None until the first row ends; it is written by the one who applies entries. `dead`
    counts the rows ended, `died_ms_min` is the log time of the first of these. One whose scanner is not
    `coded` scans in full what codes would serve faster."""

    content: Rows
    scanner: Scanner
    coded: bool = True
    died_at: Int64 | None = None
    dead: int = 0
    died_ms_min: int = NEVER_MS
    file: SealedFile | None = None

    @property
    def rows(self) -> int:
        return len(self.content)

    @property
    def live(self) -> int:
        return self.rows - self.dead

    @property
    def expires_at_ms(self) -> Int64 | Narrow:
        return self.content.expires_at_ms

    @property
    def subject_hashes(self) -> UInt32:
        return self.content.subject_hashes

    def reference_id(self, row: int) -> bytes:
        return self.content.references[row]

    def subject_id(self, row: int) -> bytes:
        return self.content.subjects[row]

    def end(self, row: int, sequence: int, at_ms: int) -> None:
        """Note the end of a row, unless it has ended."""
        if not self.is_live(row):
            return
        if self.died_at is None:
            self.died_at = np.full(self.rows, LIVE, np.int64)
        self.died_at[row] = sequence
        self.dead += 1
        self.died_ms_min = min(self.died_ms_min, at_ms)

    def is_live(self, row: int) -> bool:
        return self.died_at is None or bool(self.died_at[row] == LIVE)

    def live_rows(self) -> Int64:
        """The rows that have not ended, int64, ascending."""
        return np.arange(self.rows) if self.died_at is None else np.flatnonzero(self.died_at == LIVE)

    def code_bytes(self) -> int:
        """Bytes that the scanner holds beyond the stored rows."""
        return max(0, self.scanner.bytes_in_memory() - self.content.stored.nbytes)

    def bytes_in_memory(self) -> int:
        ends = 0 if self.died_at is None else self.died_at.nbytes
        return self.content.bytes_in_memory() + ends + self.code_bytes()


@dataclass(frozen=True, eq=False, slots=True)
class TailView:
    """The first `rows` rows of a tail, as a search sees them."""

    rows: int
    died_at: Int64
    expires_at_ms: Int64
    subject_hashes: UInt32
    scanner: Scanner
    references: list[bytes]
    subjects: list[bytes]

    def reference_id(self, row: int) -> bytes:
        return self.references[row]

    def subject_id(self, row: int) -> bytes:
        return self.subjects[row]


class Tail:
    """The open rows of a gallery. One writer appends and ends rows; views of it stay as they were, for the
    arrays are replaced when they are full and rows behind a view's count are not looked at. `room`: the rows that it
    will probably come to hold."""

    def __init__(self, dimension: int, growing: Growing | None = None, room: int = 0) -> None:
        self.rows = 0
        self._room = max(room, _TAIL_ROWS_FIRST)
        self.growing = growing
        self.dead = 0
        self.died_ms_min = NEVER_MS
        self.stored: Float16 = np.empty((0, dimension), np.float16)
        self.wide: Float32 = np.empty((0, dimension), np.float32)
        self.sequences: Int64 = np.empty(0, np.int64)
        self.expires_at_ms: Int64 = np.empty(0, np.int64)
        self.subject_hashes: UInt32 = np.empty(0, np.uint32)
        self.died_at: Int64 = np.empty(0, np.int64)
        self.references: list[bytes] = []
        self.subjects: list[bytes] = []
        # The newest row of each reference, live or not.
        self.row_of: dict[bytes, int] = {}
        self._row_norm_max = 0.0
        self._largest = 0.0

    def append(
        self, stored: Float16, sequences: Int64, expires_at_ms: Int64, references: list[bytes], subjects: list[bytes]
    ) -> None:
        """Append m live rows; seen by no view made before."""
        count = len(references)
        start, stop = self.rows, self.rows + count
        self._reserve(stop)
        self.stored[start:stop] = stored
        widen(stored, self.wide[start:stop])
        self.sequences[start:stop] = sequences
        self.expires_at_ms[start:stop] = expires_at_ms
        self.subject_hashes[start:stop] = id_hashes(subjects)
        self.died_at[start:stop] = LIVE
        self.references.extend(references)
        self.subjects.extend(subjects)
        self.row_of.update(zip(references, range(start, stop), strict=True))
        self._row_norm_max = max(self._row_norm_max, norm_bound(self.wide[start:stop]))
        self._largest = max(self._largest, largest_magnitude(self.stored[start:stop]))
        self.rows = stop
        if self.growing is not None:
            self.growing.append(self.stored[start:stop])

    def _reserve(self, rows: int) -> None:
        held = len(self.stored)
        if rows <= held:
            return
        # Far more than is needed: what is never written takes no memory, but what is copied takes it twice.
        room = max(rows, 4 * held, self._room)
        for name in ("stored", "wide", "sequences", "expires_at_ms", "subject_hashes", "died_at"):
            old = getattr(self, name)
            new = np.empty((room, *old.shape[1:]), old.dtype)
            new[: self.rows] = old[: self.rows]
            setattr(self, name, new)

    def end(self, row: int, sequence: int, at_ms: int) -> None:
        self.died_at[row] = sequence
        self.dead += 1
        self.died_ms_min = min(self.died_ms_min, at_ms)

    def view(self) -> TailView:
        scanner: Scanner = self._whole(self.stored[: self.rows], self.wide[: self.rows])
        if self.growing is not None:
            scanner = self.growing.view(self.stored[: self.rows], scanner)
        return TailView(
            rows=self.rows,
            died_at=self.died_at,
            expires_at_ms=self.expires_at_ms,
            subject_hashes=self.subject_hashes,
            scanner=scanner,
            references=self.references,
            subjects=self.subjects,
        )

    def frozen(self) -> Segment:
        """The live rows as a segment with a full scan, for now: a quiet moment gives it codes if they pay."""
        content, wide = self._content(), self.wide[: self.rows]
        if self.dead:
            live = np.flatnonzero(self.died_at[: self.rows] == LIVE)
            content, wide = joined([(content, live)]), wide[live]
        whole = self._whole(content.stored, wide)
        if self.growing is None:
            return Segment(content, whole, coded=not lacks_codes(content.stored, whole))
        return Segment(content, self.growing.frozen(content.stored, whole))

    def _whole(self, stored: Float16, wide: Float32) -> FlatScanner:
        law = law_within(self._largest, self._row_norm_max, stored.shape[1])
        return FlatScanner(stored, None, self._row_norm_max, Kept(wide, None, law))

    def dead_sequences(self) -> Int64:
        """Sequences of the rows that have ended."""
        return self.sequences[np.flatnonzero(self.died_at[: self.rows] != LIVE)]

    def _content(self) -> Rows:
        kept = slice(0, self.rows)
        return Rows(
            stored=self.stored[kept],
            sequences=Narrow.of(self.sequences[kept]),
            expires_at_ms=Narrow.of(self.expires_at_ms[kept]),
            subject_hashes=self.subject_hashes[kept],
            by_reference=HashIndex.of(id_hashes(self.references)),
            references=Names.of(self.references),
            subjects=Names.of(self.subjects),
        )

    def bytes_in_memory(self) -> int:
        return self.rows * ((2 + 4) * int(self.stored.shape[1]) + _TAIL_ROW_OVERHEAD)
