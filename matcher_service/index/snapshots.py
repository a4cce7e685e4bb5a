"""The index on disk: segments once sealed are never changed; the manifest says which of them count.

    manifest.json                    see manifest.py
    <gallery>-<file_id>.rows         one segment: its columns, and what its scanner needs not to compute again
    <gallery>-<file_id>.state        one gallery: its segments, and which of their rows have ended
    *.unfinished                     left by a crash; removed when opening, like every file the manifest lacks

<gallery> is the beginning of a digest. The order of a write is: new files, each written aside, synced and
renamed; the directory synced; the manifest likewise; only then are old files removed. So at every moment the
manifest on disk names files that are complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from matcher_service.errors import DataDamaged, NotFound
from matcher_service.index import manifest as manifests
from matcher_service.index.disk import Disk
from matcher_service.index.engine import GalleryState, Snapshot
from matcher_service.index.manifest import GalleryFiles, Manifest
from matcher_service.index.rows import Rows
from matcher_service.index.scanners import Scanners
from matcher_service.index.segment import LIVE, SealedFile, Segment, lacks_codes
from matcher_service.index.segment_file import new_file_id, read_sealed, sealed
from matcher_service.terms import DataKey

_LOADS_AT_ONCE = 2
_SCANNER_PREFIX = "scanner."


class Key(Protocol):
    """The keys that files are sealed under."""

    def __call__(self, gallery_id: str, generation: int = 0) -> DataKey | None:
        """A generation of a gallery's key; 0: the newest, which new files are sealed under. None, or NotFound raised:
        it was destroyed; of the newest: with the gallery."""
        ...


_log = structlog.get_logger(__name__)


class Ended(NamedTuple):
    """The rows of a segment that have ended: `rows` int64 [m], `died_at` int64 [m]."""

    rows: NDArray[np.int64]
    died_at: NDArray[np.int64]
    died_ms_min: int


class SegmentContents(NamedTuple):
    """What a segment's file holds."""

    rows: Rows
    scanner_arrays: dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Restored:
    """What the files hold. `damaged` names galleries, with their dimension, that must come from the log anew."""

    sequence: int
    galleries: Mapping[str, GalleryState]
    damaged: Mapping[str, int]


class Snapshots:
    """The directory of one index. Used by one thread at a time."""

    def __init__(self, disk: Disk, key: Key, scanners: Scanners) -> None:
        self._disk = disk
        self._key = key
        self._scanners = scanners
        # What the manifest on disk says, and of which files and ends each state file was written. Files, not segments:
        # those that a rewrite has replaced must not be kept in memory.
        self._manifest = Manifest(0, {})
        self._written: dict[str, list[tuple[SealedFile, int]]] = {}

    def restore(self, log_head: int | None = None) -> Restored:
        """Open the directory and read every file that counts; remove the others.

        None counts if they reach beyond `log_head`, the newest sequence of the log (None: not asked): the log was
        restored from before, and what they hold may never have been. Raises StartRefused if a newer release wrote them.
        """
        self._disk.open()
        self._manifest = self._read_manifest()
        if log_head is not None and self._manifest.sequence > log_head:
            _log.warning(
                "index_beyond_log",
                index_sequence=self._manifest.sequence,
                log_head=log_head,
                hint="an older log was restored: the index is built anew from it",
            )
            self._manifest = Manifest(0, {})
        galleries: dict[str, GalleryState] = {}
        damaged: dict[str, int] = {}
        kept: dict[str, GalleryFiles] = {}
        for gallery_id, files in self._manifest.galleries.items():
            if newest_key(self._key, gallery_id) is None:
                _log.info("index_gallery_dropped", gallery=gallery_id, reason="its key was destroyed")
                continue
            try:
                state = self._load(gallery_id, files)
            except DataDamaged as damage:
                _log.error("index_gallery_damaged", gallery=gallery_id, detail=damage.detail)
                damaged[gallery_id] = files.dimension
                continue
            galleries[gallery_id] = state
            kept[gallery_id] = files
            ends = [segment.dead for segment in state.segments]
            self._written[gallery_id] = list(zip(files.segments, ends, strict=True))
        # The names of damaged files stay in the manifest until the next one is written; a crash before that
        # finds them missing, which is damage all the same.
        self._remove_all_but(Manifest(self._manifest.sequence, kept))
        return Restored(self._manifest.sequence, galleries, damaged)

    def write(self, snapshot: Snapshot) -> None:
        """Make the directory hold the snapshot; durable on return, and nothing else is left in it."""
        galleries: dict[str, GalleryFiles] = {}
        written: dict[str, list[tuple[SealedFile, int]]] = {}
        for gallery_id, (dimension, segments) in snapshot.galleries.items():
            key = newest_key(self._key, gallery_id)
            if key is None:
                continue  # deleted in the log; the entry that says so is on its way
            self._let_reseal(segments, key.generation)
            files = tuple(segment.file or self._seal(gallery_id, segment, key) for segment in segments)
            ended = [_ended(segment, snapshot.sequence) for segment in segments]
            counts = [(file, len(one.rows)) for file, one in zip(files, ended, strict=True)]
            before = self._manifest.galleries.get(gallery_id)
            if (
                before is not None
                and before.state.generation == key.generation
                and self._written.get(gallery_id) == counts
            ):
                state = before.state
            else:
                state = self._seal_state(gallery_id, dimension, snapshot.sequence, files, ended, key)
            galleries[gallery_id] = GalleryFiles(dimension, state, files)
            written[gallery_id] = counts
        self._disk.sync()
        manifest = Manifest(snapshot.sequence, galleries)
        self._disk.write(manifests.NAME, [manifests.encode(manifest)])
        self._disk.sync()
        self._manifest, self._written = manifest, written
        self._remove_all_but(manifest)

    @property
    def outdated(self) -> bool:
        """Whether something is sealed under another generation of its gallery's key than the newest."""
        newest = {gallery_id: newest_key(self._key, gallery_id) for gallery_id in self._manifest.galleries}
        return any(key is not None and self.generations[name] != key.generation for name, key in newest.items())

    @property
    def generations(self) -> dict[str, int]:
        """Of each gallery the oldest generation of its key that something here is sealed under."""
        return {
            gallery_id: min(file.generation for file in (files.state, *files.segments))
            for gallery_id, files in self._manifest.galleries.items()
        }

    # --- reading -----------------------------------------------------------------------------------

    def _read_manifest(self) -> Manifest:
        path = self._disk.directory / manifests.NAME
        if not path.exists():
            return Manifest(0, {})
        try:
            return manifests.decode(path.read_bytes())
        except DataDamaged as damage:
            _log.error("index_manifest_damaged", detail=damage.detail, hint="the index is rebuilt from the log")
            return Manifest(0, {})

    def _load(self, gallery_id: str, files: GalleryFiles) -> GalleryState:
        ends = read_state(self._disk.directory, gallery_id, files, self._key)

        def load(place: int) -> Segment:
            file = files.segments[place]
            content, scanner_arrays = read_rows(self._disk.directory, gallery_id, file, self._key)
            if content.dimension != files.dimension:
                raise DataDamaged(f"{file.name} holds {content.dimension}-d templates, not {files.dimension}-d")
            scanner = self._scanners.load(content.stored, scanner_arrays)
            segment = Segment(content, scanner, coded=not lacks_codes(content.stored, scanner))
            one = ends[place]
            if len(one.rows) and not 0 <= int(one.rows.min()) <= int(one.rows.max()) < len(content):
                raise DataDamaged(f"{files.state.name} ends rows that {file.name} does not have")
            for row, died_at in zip(one.rows.tolist(), one.died_at.tolist(), strict=True):
                segment.end(row, died_at, one.died_ms_min)
            segment.file = file
            return segment

        with ThreadPoolExecutor(_LOADS_AT_ONCE, "load") as pool:
            segments = list(pool.map(load, range(len(files.segments))))
        return GalleryState(files.dimension, segments, held_sequence=self._manifest.sequence)

    # --- writing -----------------------------------------------------------------------------------

    def _let_reseal(self, segments: Sequence[Segment], generation: int) -> None:
        """Let go of the first file that is sealed under another generation, so that its segment is sealed anew. One at
        a time: so the directory never holds more than one segment of a gallery twice."""
        for segment in segments:
            if segment.file is not None and segment.file.generation != generation:
                segment.file = None
                return

    def _seal(self, gallery_id: str, segment: Segment, key: DataKey) -> SealedFile:
        arrays: dict[str, NDArray[Any]] = segment.content.arrays()
        for name, array in self._scanners.arrays(segment.scanner).items():
            arrays[_SCANNER_PREFIX + name] = array
        facts = {"gallery_id": gallery_id}
        segment.file = self._write_sealed(gallery_id, "rows", facts, arrays, key)
        return segment.file

    def _seal_state(
        self,
        gallery_id: str,
        dimension: int,
        sequence: int,
        files: tuple[SealedFile, ...],
        ended: list[Ended],
        key: DataKey,
    ) -> SealedFile:
        arrays: dict[str, NDArray[Any]] = {}
        for place, one in enumerate(ended):
            arrays[f"rows.{place}"] = one.rows
            arrays[f"died_at.{place}"] = one.died_at
        facts = {
            "gallery_id": gallery_id,
            "dimension": dimension,
            "sequence": sequence,
            "segments": [file.file_id for file in files],
            "died_ms_min": [one.died_ms_min for one in ended],
        }
        return self._write_sealed(gallery_id, "state", facts, arrays, key)

    def _write_sealed(
        self, gallery_id: str, kind: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], key: DataKey
    ) -> SealedFile:
        file_id = new_file_id()
        name = f"{hashlib.sha256(gallery_id.encode()).hexdigest()[:16]}-{file_id}.{kind}"
        size, sha256 = self._disk.write(name, sealed(key.key, file_id, facts, arrays))
        return SealedFile(name, file_id, size, sha256, key.generation)

    def _remove_all_but(self, manifest: Manifest) -> None:
        kept = manifest.file_names() | {manifests.NAME}
        gone = [name for name in self._disk.names() if name not in kept]
        for name in gone:
            self._disk.remove(name)
        if gone:
            self._disk.sync()


def newest_key(key: Key, gallery_id: str) -> DataKey | None:
    """The newest key of a gallery, or None where it was destroyed."""
    try:
        return key(gallery_id)
    except NotFound:
        return None


def _key_of(key: Key, gallery_id: str, file: SealedFile) -> bytes:
    """The key that a file is sealed under. Raises DataDamaged if it is gone: what the file held is in the log."""
    try:
        found = key(gallery_id, file.generation)
    except NotFound:
        found = None
    if found is None:
        raise DataDamaged(f"{file.name} is sealed under generation {file.generation} of its key, which is gone")
    return found.key


def read_state(directory: Path, gallery_id: str, files: GalleryFiles, key: Key) -> list[Ended]:
    """The ends of rows per segment. Raises DataDamaged, also if the manifest says otherwise than the state."""
    facts, arrays = read_sealed(
        directory / files.state.name, _key_of(key, gallery_id, files.state), files.state.file_id
    )
    said = (facts.get("gallery_id"), facts.get("dimension"), facts.get("segments"))
    if said != (gallery_id, files.dimension, [file.file_id for file in files.segments]):
        raise DataDamaged(f"{files.state.name} and the manifest disagree about gallery {gallery_id}")
    try:
        return [
            Ended(arrays[f"rows.{place}"], arrays[f"died_at.{place}"], int(facts["died_ms_min"][place]))
            for place in range(len(files.segments))
        ]
    except (KeyError, IndexError) as error:
        raise DataDamaged(f"{files.state.name} lacks the ends of a segment") from error


def read_rows(directory: Path, gallery_id: str, file: SealedFile, key: Key) -> SegmentContents:
    """The rows of a segment and the arrays of its scanner. Raises DataDamaged."""
    contents = read_sealed(directory / file.name, _key_of(key, gallery_id, file), file.file_id)
    if contents.facts.get("gallery_id") != gallery_id:
        raise DataDamaged(f"{file.name} does not belong to gallery {gallery_id}")
    scanner_arrays = {
        name.removeprefix(_SCANNER_PREFIX): array
        for name, array in contents.arrays.items()
        if name.startswith(_SCANNER_PREFIX)
    }
    return SegmentContents(Rows.from_arrays(contents.arrays), scanner_arrays)


def _ended(segment: Segment, sequence: int) -> Ended:
    """What had ended by `sequence`; later ends are in the log behind it."""
    none = np.empty(0, np.int64)
    died_at = none if segment.died_at is None else segment.died_at.copy()
    rows = np.flatnonzero((died_at != LIVE) & (died_at <= sequence))
    return Ended(rows, died_at[rows], segment.died_ms_min)
