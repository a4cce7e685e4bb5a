"""The manifest: which files make up the index, and up to which sequence of the log they reach.

One line of JSON and one line with its SHA-256, so that a torn or altered manifest is told from a good one. What
it says of a gallery is said again, sealed under the gallery's key, in that gallery's state file; the two must
agree. A file names the generation of its gallery's key ("key"), unless that is the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from matcher_service.errors import DataDamaged, StartRefused
from matcher_service.index.segment import SealedFile

FORMAT = 1
NAME = "manifest.json"


@dataclass(frozen=True, slots=True)
class GalleryFiles:
    """The files of a gallery: the sealed state, which lists the ends of rows, and one file per segment."""

    dimension: int
    state: SealedFile
    segments: tuple[SealedFile, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """`sequence`: every entry of the log up to it is in the files."""

    sequence: int
    galleries: Mapping[str, GalleryFiles]

    def file_names(self) -> set[str]:
        return {
            file.name for gallery in self.galleries.values() for file in (gallery.state, *gallery.segments)
        }  # fmt: skip


def encode(manifest: Manifest) -> bytes:
    body = orjson.dumps(
        {
            "format": FORMAT,
            "sequence": manifest.sequence,
            "galleries": {
                gallery_id: {
                    "dimension": files.dimension,
                    "state": _file_data(files.state),
                    "segments": [_file_data(segment) for segment in files.segments],
                }
                for gallery_id, files in manifest.galleries.items()
            },
        }
    )
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def decode(content: bytes) -> Manifest:
    """Raises DataDamaged if it is not what `encode` wrote, StartRefused if a newer release wrote it."""
    body, _, rest = content.partition(b"\n")
    if rest != hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise DataDamaged("the manifest of the index fails its checksum")
    try:
        data = orjson.loads(body)
        if data["format"] > FORMAT:
            raise StartRefused(
                f"the index has format {data['format']}, this release reads up to {FORMAT}",
                hint="run the release that wrote it, or move the index directory away: it is rebuilt from the log",
            )
        return Manifest(
            data["sequence"],
            {
                gallery_id: GalleryFiles(
                    one["dimension"], _read_file(one["state"]), tuple(_read_file(file) for file in one["segments"])
                )
                for gallery_id, one in data["galleries"].items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataDamaged(f"the manifest of the index makes no sense: {error}") from error


def _file_data(file: SealedFile) -> dict[str, Any]:
    told = {"name": file.name, "file_id": file.file_id, "size": file.size, "sha256": file.sha256}
    return told if file.generation == 1 else {**told, "key": file.generation}


def _read_file(data: Mapping[str, Any]) -> SealedFile:
    return SealedFile(
        str(data["name"]), str(data["file_id"]), int(data["size"]), str(data["sha256"]), int(data.get("key", 1))
    )
