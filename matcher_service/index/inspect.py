"""What an index directory holds, and whether every byte of it is as it was written. Reads only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from matcher_service.errors import DataDamaged
from matcher_service.index import manifest as manifests
from matcher_service.index.manifest import GalleryFiles
from matcher_service.index.segment import SealedFile
from matcher_service.index.snapshots import Ended, Key, newest_key, read_rows, read_state

_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One segment file. `code_bytes` is the part of `bytes` that the filter's codes take."""

    file: str
    rows: int
    dead: int
    dimension: int
    bytes: int
    code_bytes: int
    sequence_min: int
    sequence_max: int


@dataclass(frozen=True, slots=True)
class GalleryReport:
    """`live` and `dead` rows over all segments that could be read."""

    gallery_id: str
    dimension: int
    live: int
    dead: int
    bytes: int
    segments: tuple[SegmentReport, ...]


@dataclass(frozen=True, slots=True)
class IndexReport:
    """`sequence`: the files hold every entry of the log up to it. `problems` is empty if every checksum and every
    block was verified; what is damaged is rebuilt from the log at the next start."""

    directory: Path
    format: int
    sequence: int
    live: int
    dead: int
    bytes: int
    galleries: tuple[GalleryReport, ...]
    problems: tuple[str, ...]


def inspect(data_dir: Path, key: Key) -> IndexReport:
    """Verify the index under `data_dir` (or in it, if the manifest lies there).

    `key` gives a gallery's key; None, or NotFound raised, where it was destroyed. Raises StartRefused if a newer
    release wrote the index.
    """
    directory = data_dir if (data_dir / manifests.NAME).exists() else data_dir / "index"
    problems: list[str] = []
    galleries: list[GalleryReport] = []
    sequence = 0
    names: set[str] = set()
    path = directory / manifests.NAME
    if path.exists():
        try:
            manifest = manifests.decode(path.read_bytes())
            sequence, names = manifest.sequence, manifest.file_names()
            galleries = [
                _gallery(directory, gallery_id, files, key, problems)
                for gallery_id, files in manifest.galleries.items()
            ]
        except DataDamaged as damage:
            problems.append(damage.detail)
    elif directory.exists() and any(directory.iterdir()):
        problems.append(f"{directory} has files but no manifest")
    if directory.exists():
        strays = {file.name for file in directory.iterdir()} - names - {manifests.NAME}
        problems += [f"{name} is not in the manifest; it is removed at the next start" for name in sorted(strays)]
    return IndexReport(
        directory,
        manifests.FORMAT,
        sequence,
        sum(one.live for one in galleries),
        sum(one.dead for one in galleries),
        sum(one.bytes for one in galleries),
        tuple(galleries),
        tuple(problems),
    )


def _gallery(directory: Path, gallery_id: str, files: GalleryFiles, key: Key, problems: list[str]) -> GalleryReport:
    segments: list[SegmentReport] = []
    if newest_key(key, gallery_id) is None:
        problems.append(f"the key of gallery {gallery_id} is gone: its files cannot be read")
    else:
        for file in (files.state, *files.segments):
            problems += _checksum_problems(directory, file)
        ends: list[Ended | None] = [None] * len(files.segments)
        try:
            ends = list(read_state(directory, gallery_id, files, key))
        except DataDamaged as damage:
            problems.append(damage.detail)
        for file, ended in zip(files.segments, ends, strict=True):
            try:
                segments.append(_segment(directory, gallery_id, file, ended, key))
            except DataDamaged as damage:
                problems.append(damage.detail)
    dead = sum(segment.dead for segment in segments)
    return GalleryReport(
        gallery_id,
        files.dimension,
        sum(segment.rows for segment in segments) - dead,
        dead,
        files.state.size + sum(file.size for file in files.segments),
        tuple(segments),
    )


def _segment(directory: Path, gallery_id: str, file: SealedFile, ended: Ended | None, key: Key) -> SegmentReport:
    rows, scanner_arrays = read_rows(directory, gallery_id, file, key)
    return SegmentReport(
        file.name,
        len(rows),
        0 if ended is None else len(ended.rows),
        rows.dimension,
        file.size,
        sum(array.nbytes for array in scanner_arrays.values()),
        int(rows.sequences.all().min()) if len(rows) else 0,
        int(rows.sequences.all().max()) if len(rows) else 0,
    )


def _checksum_problems(directory: Path, file: SealedFile) -> list[str]:
    digest = hashlib.sha256()
    size = 0
    try:
        with open(directory / file.name, "rb") as opened:
            while chunk := opened.read(_READ_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        return [f"{file.name} cannot be read: {error.strerror}"]
    if size != file.size:
        return [f"{file.name} has {size} bytes, the manifest says {file.size}"]
    if digest.hexdigest() != file.sha256:
        return [f"{file.name} fails its checksum"]
    return []
