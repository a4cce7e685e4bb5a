"""Writes log entries as the gallery log would commit them, and requests as the flow would make them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from matcher_service.records import encode_gallery
from matcher_service.terms import EntryKind, Gallery, GalleryKind, LogEntry, SearchRequest, SpaceId

NOW_MS = 1_800_000_000_000
FAR_MS = NOW_MS + 10**10


class LogWriter:
    """Numbers entries from 1, one a millisecond from `began_ms` on, and remembers them all, so that a shard can be
    replayed from any place."""

    def __init__(self, began_ms: int = NOW_MS) -> None:
        self._began_ms = began_ms
        self.entries: list[LogEntry] = []

    def create(self, gallery_id: str, dimension: int) -> LogEntry:
        gallery = Gallery(
            gallery_id, GalleryKind.CUSTODY, "controller", "basis", "purpose", 10**12, SpaceId("s", 1, dimension), 0.3
        )
        return self._add(EntryKind.GALLERY_CREATED, gallery_id, record=encode_gallery(gallery))

    def delete(self, gallery_id: str) -> LogEntry:
        return self._add(EntryKind.GALLERY_DELETED, gallery_id)

    def enrol(
        self,
        gallery_id: str,
        reference_id: str,
        template: np.ndarray | None,
        subject_id: str = "",
        expires_at_ms: int = FAR_MS,
    ) -> LogEntry:
        stored = None if template is None else np.asarray(template).astype("<f2").tobytes()
        return self._add(
            EntryKind.ENROL, gallery_id, reference_id, subject_id or f"s-{reference_id}", expires_at_ms, stored
        )

    def withdraw(self, gallery_id: str, reference_id: str) -> LogEntry:
        return self._add(EntryKind.WITHDRAW, gallery_id, reference_id)

    def _add(
        self,
        kind: EntryKind,
        gallery_id: str,
        reference_id: str = "",
        subject_id: str = "",
        expires_at_ms: int = 0,
        template: bytes | None = None,
        record: bytes = b"",
    ) -> LogEntry:
        sequence = len(self.entries) + 1
        entry = LogEntry(
            sequence,
            kind,
            self._began_ms + sequence,
            gallery_id,
            reference_id,
            subject_id,
            expires_at_ms,
            template,
            record,
        )
        self.entries.append(entry)
        return entry


def unit_rows(rng: np.random.Generator, count: int, dimension: int) -> np.ndarray:
    rows = rng.standard_normal((count, dimension))
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def asking(
    probes: np.ndarray,
    gallery_ids: Sequence[str] = ("g",),
    floor: float = -np.inf,
    rank_max: int = 10,
    at_ms: int = NOW_MS,
) -> SearchRequest:
    return SearchRequest(
        tuple(gallery_ids),
        np.ascontiguousarray(probes, np.float32),
        np.full((len(probes), len(gallery_ids)), floor, np.float32),
        np.full(len(probes), rank_max, np.int64),
        at_ms,
    )
