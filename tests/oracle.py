"""A small flat oracle: a shard that holds its rows as they came and compares every probe with each of them.

Nothing is clever here, so that it can be believed: one dictionary, float64 products rounded to float32, and
Python's own sorting. It is a full implementation of the Shard seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from matcher_service.errors import InvalidInput
from matcher_service.records import decode_gallery
from matcher_service.terms import Cause, EntryKind, LogEntry, SearchRequest, SearchResult, ShardStatus


class Held(NamedTuple):
    subject_id: str
    stored: np.ndarray
    expires_at_ms: int


class FlatOracle:
    """A ReplayedShard of plain Python."""

    def __init__(self) -> None:
        self.sequence = 0
        self.galleries: dict[str, dict[str, Held]] = {}
        self.dimensions: dict[str, int] = {}

    @property
    def applied_sequence(self) -> int:
        return self.sequence

    def apply_now(self, entries: Sequence[LogEntry]) -> None:
        for entry in entries:
            if entry.sequence <= self.sequence:
                continue
            self.sequence = entry.sequence
            rows = self.galleries.get(entry.gallery_id, {})
            if entry.kind == EntryKind.GALLERY_CREATED:
                self.galleries[entry.gallery_id] = {}
                self.dimensions[entry.gallery_id] = decode_gallery(entry.record).space.dimension
            elif entry.kind == EntryKind.GALLERY_DELETED:
                self.galleries.pop(entry.gallery_id, None)
                self.dimensions.pop(entry.gallery_id, None)
            elif entry.kind == EntryKind.WITHDRAW:
                rows.pop(entry.reference_id, None)
            elif entry.kind == EntryKind.ENROL:
                rows.pop(entry.reference_id, None)
                if entry.template is not None:
                    stored = np.frombuffer(entry.template, "<f2")
                    rows[entry.reference_id] = Held(entry.subject_id, stored, entry.expires_at_ms)

    def search_now(self, request: SearchRequest) -> SearchResult:
        for gallery_id in request.gallery_ids:
            dimension = self.dimensions.get(gallery_id, request.probes.shape[1])
            if dimension != request.probes.shape[1]:
                raise InvalidInput("not the gallery's dimension", cause=Cause.WRONG_DIMENSION)
        offsets, gallery, scores, references, subjects = [0], [], [], [], []
        for probe, floors, rank_max in zip(request.probes, request.floors, request.rank_max, strict=True):
            found = sorted(
                (-score, gallery_id.encode(), reference_id.encode(), number, reference_id, held.subject_id)
                for number, gallery_id in enumerate(request.gallery_ids)
                for reference_id, held in self.galleries.get(gallery_id, {}).items()
                if held.expires_at_ms > request.at_ms and (score := score_of(probe, held.stored)) >= floors[number]
            )
            seen: set[tuple[int, str]] = set()
            for score, _, _, number, reference_id, subject_id in found:
                if (number, subject_id) in seen or len(seen) == rank_max:
                    continue
                seen.add((number, subject_id))
                gallery.append(number)
                scores.append(-score)
                references.append(reference_id)
                subjects.append(subject_id)
            offsets.append(len(gallery))
        return SearchResult(
            np.array(offsets, np.int64),
            np.array(gallery, np.int64),
            np.array(scores, np.float32),
            references,
            subjects,
            self.sequence,
        )

    async def apply(self, entries: Sequence[LogEntry]) -> None:
        self.apply_now(entries)

    async def search(self, request: SearchRequest) -> SearchResult:
        return self.search_now(request)

    @property
    def uncoded_rows(self) -> int:
        return 0

    async def status(self) -> ShardStatus:
        live = {gallery_id: len(rows) for gallery_id, rows in self.galleries.items()}
        return ShardStatus(self.sequence, live, dict.fromkeys(live, 0), 0, 0)

    async def close(self) -> None:
        pass


def score_of(probe: np.ndarray, stored: np.ndarray) -> np.float32:
    """Law 2: the float64 dot product of the float32 probe and the float16 row, rounded to float32."""
    return np.float32(np.add.reduce(probe.astype(np.float64) * stored.astype(np.float64)))


def same(one: SearchResult, other: SearchResult) -> bool:
    """Whether two results name the same candidates with the same scores in the same order."""
    return (
        np.array_equal(one.offsets, other.offsets)
        and np.array_equal(one.gallery, other.gallery)
        and np.array_equal(one.scores, other.scores)
        and list(one.reference_ids) == list(other.reference_ids)
        and list(one.subject_ids) == list(other.subject_ids)
    )
