"""Rows of references in columns: compact arrays instead of objects, 10 million of them in one process.

Ids stand one after another in an arena with offsets. Subjects and references are also known by a 32-bit hash,
which finds candidates for equality; the arena decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import DataDamaged
from matcher_service.terms import Int64

UInt8 = NDArray[np.uint8]
UInt32 = NDArray[np.uint32]
Float16 = NDArray[np.float16]
Bool = NDArray[np.bool_]


def id_hashes(names: Iterable[bytes]) -> UInt32:
    """A 32-bit hash of each id, uint32 [n]; the same in every process, since it is kept in files."""
    blake2b = hashlib.blake2b
    digests = b"".join([blake2b(name, digest_size=4).digest() for name in names])
    return np.frombuffer(digests, "<u4").astype(np.uint32, copy=False)


@dataclass(frozen=True, slots=True)
class Narrow:
    """n whole numbers: `least` plus `above`, uint32 [n] where that is wide enough, else int64."""

    least: int
    above: UInt32 | Int64

    @classmethod
    def of(cls, values: Int64) -> Narrow:
        least = int(values.min()) if len(values) else 0
        if len(values) and int(values.max()) - least >= 2**32:
            return cls(0, values)
        return cls(least, (values - least).astype(np.uint32))

    def __getitem__(self, rows: Int64 | slice) -> Int64:
        return self.above[rows].astype(np.int64) + self.least

    def __len__(self) -> int:
        return len(self.above)

    def all(self) -> Int64:
        return self[:]


@dataclass(frozen=True, slots=True)
class Names:
    """n ids as UTF-8. Id i starts in `arena`, uint8, at starts[i // group] + after[i], uint32 and uint16."""

    starts: UInt32
    after: NDArray[np.uint16]
    group: int
    arena: UInt8

    @classmethod
    def of(cls, names: Sequence[bytes]) -> Names:
        offsets = np.zeros(len(names) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, names), np.int64, len(names)), out=offsets[1:])
        return cls.at(offsets, np.frombuffer(b"".join(names), np.uint8))

    @classmethod
    def at(cls, offsets: NDArray[np.integer], arena: UInt8) -> Names:
        """Id i is arena[offsets[i] : offsets[i + 1]]. Raises DataDamaged if they exceed 4 GiB, or one 64 KiB."""
        if int(offsets[-1]) >= 2**32:
            raise DataDamaged("the ids of one segment exceed 4 GiB")
        for group in (256, 16, 1):
            starts = offsets[::group]
            after = offsets - np.repeat(starts, group)[: len(offsets)]
            if after.max(initial=0) < 2**16:
                return cls(starts.astype(np.uint32), after.astype(np.uint16), group, arena)
        raise AssertionError("a group of one starts at its id")

    @property
    def offsets(self) -> UInt32:
        """Where each id starts, and the last one ends: uint32 [n + 1]."""
        return np.repeat(self.starts, self.group)[: len(self.after)] + self.after

    def __getitem__(self, row: int) -> bytes:
        return self.arena[self._start(row) : self._start(row + 1)].tobytes()

    def _start(self, row: int) -> int:
        return int(self.starts[row // self.group]) + int(self.after[row])

    def __len__(self) -> int:
        return len(self.after) - 1

    def bytes_in_memory(self) -> int:
        return int(self.starts.nbytes + self.after.nbytes + self.arena.nbytes)


def joined_names(parts: Sequence[tuple[Names, Int64]]) -> Names:
    """The chosen rows (int64, ascending) of several parts, one part after another."""
    lengths = np.concatenate([np.diff(names.offsets.astype(np.int64))[rows] for names, rows in parts])
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Names.at(offsets, np.concatenate([_taken(names, rows) for names, rows in parts]))


def _taken(names: Names, rows: Int64) -> UInt8:
    if len(rows) == len(names):
        return names.arena
    kept = np.zeros(len(names), np.bool_)
    kept[rows] = True
    lengths: Int64 = np.diff(names.offsets).astype(np.int64)
    return names.arena[np.repeat(kept, lengths)]


@dataclass(frozen=True, slots=True)
class HashIndex:
    """Finds rows by the hash of their reference: `hashes` uint32 [n] ascending, `rows` uint32 [n] beside."""

    hashes: UInt32
    rows: UInt32

    @classmethod
    def of(cls, hashes: UInt32) -> HashIndex:
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], order.astype(np.uint32))

    def by_row(self) -> UInt32:
        """The hashes in order of the rows."""
        hashes = np.empty_like(self.hashes)
        hashes[self.rows] = self.hashes
        return hashes

    def candidates(self, wanted: UInt32) -> tuple[Int64, Int64]:
        """(positions in `wanted`, rows) of every row with one of the hashes wanted, int64 [m] each."""
        places = np.searchsorted(self.hashes, wanted)
        positions = np.arange(len(wanted))
        found: list[tuple[Int64, Int64]] = []
        while True:
            within = places < len(self.hashes)
            places, positions = places[within], positions[within]
            equal = self.hashes[places] == wanted[positions]
            places, positions = places[equal], positions[equal]
            if not len(places):
                break
            found.append((positions, self.rows[places].astype(np.int64)))
            places = places + 1
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate([one for one, _ in found]), np.concatenate([rows for _, rows in found])


@dataclass(frozen=True, slots=True)
class Rows:
    """n immutable rows of one gallery.

    `stored` float16 [n, d] C order, `subject_hashes` uint32 [n].
    """

    stored: Float16
    sequences: Narrow
    expires_at_ms: Narrow
    subject_hashes: UInt32
    by_reference: HashIndex
    references: Names
    subjects: Names

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def dimension(self) -> int:
        return int(self.stored.shape[1])

    def bytes_in_memory(self) -> int:
        columns = (self.stored, self.sequences.above, self.expires_at_ms.above, self.subject_hashes)
        found = (self.by_reference.hashes, self.by_reference.rows)
        names = self.references.bytes_in_memory() + self.subjects.bytes_in_memory()
        return sum(array.nbytes for array in (*columns, *found)) + names

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every column by name, as `from_arrays` takes them."""
        return {
            "stored": self.stored,
            "sequences": self.sequences.all(),
            "expires_at_ms": self.expires_at_ms.all(),
            "subject_hashes": self.subject_hashes,
            "reference_hashes_sorted": self.by_reference.hashes,
            "reference_rows_sorted": self.by_reference.rows,
            "reference_offsets": self.references.offsets,
            "reference_arena": self.references.arena,
            "subject_offsets": self.subjects.offsets,
            "subject_arena": self.subjects.arena,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Rows:
        """Raises DataDamaged if a column is missing or the columns do not fit together."""

        def column(name: str, dtype: type[np.generic], axes: int = 1) -> NDArray[Any]:
            found = arrays.get(name)
            if found is None or found.dtype != dtype or found.ndim != axes:
                raise DataDamaged(f"the rows have no proper column {name}")
            return found

        rows = cls(
            stored=column("stored", np.float16, 2),
            sequences=Narrow.of(column("sequences", np.int64)),
            expires_at_ms=Narrow.of(column("expires_at_ms", np.int64)),
            subject_hashes=column("subject_hashes", np.uint32),
            by_reference=HashIndex(
                column("reference_hashes_sorted", np.uint32), column("reference_rows_sorted", np.uint32)
            ),
            references=_names(column("reference_offsets", np.uint32), column("reference_arena", np.uint8)),
            subjects=_names(column("subject_offsets", np.uint32), column("subject_arena", np.uint8)),
        )
        lengths = {len(one) for one in (rows.stored, rows.expires_at_ms, rows.subject_hashes)}
        lengths |= {len(rows.by_reference.hashes), len(rows.by_reference.rows)}
        lengths |= {len(rows.references), len(rows.subjects)}
        if lengths != {len(rows.sequences)}:
            raise DataDamaged(f"the columns of {len(rows.sequences)} rows differ in length")
        return rows


def _names(offsets: UInt32, arena: UInt8) -> Names:
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(arena) or (offsets[1:] < offsets[:-1]).any():
        raise DataDamaged("the ids do not stand one after another")
    return Names.at(offsets.astype(np.int64), arena)


def joined(parts: Sequence[tuple[Rows, Int64]]) -> Rows:
    """The chosen rows (int64, ascending) of several parts, one part after another."""
    by_row = [(rows.by_reference.by_row(), chosen) for rows, chosen in parts]
    return Rows(
        stored=_joined_column([(rows.stored, chosen) for rows, chosen in parts]),
        sequences=Narrow.of(np.concatenate([rows.sequences[chosen] for rows, chosen in parts])),
        expires_at_ms=Narrow.of(np.concatenate([rows.expires_at_ms[chosen] for rows, chosen in parts])),
        subject_hashes=_joined_column([(rows.subject_hashes, chosen) for rows, chosen in parts]),
        by_reference=HashIndex.of(_joined_column(by_row)),
        references=joined_names([(rows.references, chosen) for rows, chosen in parts]),
        subjects=joined_names([(rows.subjects, chosen) for rows, chosen in parts]),
    )


def _joined_column(parts: Sequence[tuple[NDArray[Any], Int64]]) -> NDArray[Any]:
    first = parts[0][0]
    count = sum(len(chosen) for _, chosen in parts)
    out = np.empty((count, *first.shape[1:]), first.dtype)
    start = 0
    for column, chosen in parts:
        # Straight into place: a second copy of a million templates would need a gigabyte more.
        np.take(column, chosen, axis=0, out=out[start : start + len(chosen)], mode="clip")
        start += len(chosen)
    return out
