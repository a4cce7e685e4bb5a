"""The 256 partitions of references, by which a cluster shares out the galleries. Pure.

A partition is a property of a reference and never changes, so that the number of shards can. A set of partitions is
a frozenset of numbers; as text it is a bitmap of 64 hexadecimal digits, read as one number whose bit i stands for
partition i.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import InvalidInput

PARTITION_COUNT = 256
_DIGITS = PARTITION_COUNT // 4

Partitions = frozenset[int]

ALL_PARTITIONS: Partitions = frozenset(range(PARTITION_COUNT))
NO_PARTITIONS: Partitions = frozenset()


def partition_of(gallery_id: str, reference_id: str) -> int:
    """The partition of a reference: the first byte of SHA-256 over gallery_id, a zero byte, reference_id, in UTF-8."""
    return hashlib.sha256(f"{gallery_id}\0{reference_id}".encode()).digest()[0]


def partitions_of(gallery_id: str, references: Iterable[bytes]) -> NDArray[np.uint8]:
    """The partition of each reference of a gallery, uint8 [n]; the ids are UTF-8."""
    sha256, prefix = hashlib.sha256, f"{gallery_id}\0".encode()
    return np.frombuffer(bytes([sha256(prefix + one).digest()[0] for one in references]), np.uint8)


def mask_of(partitions: Collection[int]) -> NDArray[np.bool_]:
    """bool [256]: whether each partition is in the set."""
    mask = np.zeros(PARTITION_COUNT, np.bool_)
    mask[list(partitions)] = True
    return mask


def share(number: int, count: int) -> Partitions:
    """The partitions of shard `number` of `count` equal shards: a range, and together they are all."""
    if not 0 <= number < count <= PARTITION_COUNT:
        raise ValueError(f"there is no shard {number} of {count}")
    return frozenset(range(number * PARTITION_COUNT // count, (number + 1) * PARTITION_COUNT // count))


@functools.lru_cache(256)
def to_hex(partitions: Partitions) -> str:
    """The bitmap of a set: 64 hexadecimal digits, partition 0 in the last one."""
    bits = sum(1 << one for one in partitions)
    if bits >> PARTITION_COUNT:
        raise ValueError("a partition is a number from 0 to 255")
    return f"{bits:0{_DIGITS}x}"


@functools.lru_cache(256)
def from_hex(text: str) -> Partitions:
    """The set of a bitmap. Raises InvalidInput if it is not 64 hexadecimal digits."""
    if len(text) != _DIGITS or not all(one in "0123456789abcdefABCDEF" for one in text):
        raise InvalidInput(
            f"a bitmap of partitions has {_DIGITS} hexadecimal digits", field="partitions", hint="bit i: partition i"
        )
    bits = int(text, 16)
    return frozenset(one for one in range(PARTITION_COUNT) if bits >> one & 1)


def parse(text: str) -> Partitions:
    """The set that an operator writes: numbers and ranges ("0-63, 70"), "all", "none" (or nothing), or a bitmap.

    Raises InvalidInput.
    """
    stripped = text.strip()
    if stripped == "all":
        return ALL_PARTITIONS
    if stripped == "none":
        return NO_PARTITIONS
    if len(stripped) == _DIGITS and "-" not in stripped and "," not in stripped:
        return from_hex(stripped)
    chosen: set[int] = set()
    for part in filter(None, (one.strip() for one in stripped.split(","))):
        first, _, last = part.partition("-")
        try:
            low, high = int(first), int(last or first)
        except ValueError:
            low, high = -1, -1
        if not 0 <= low <= high < PARTITION_COUNT:
            raise InvalidInput(
                f"{part!r} is neither a partition nor a range of them",
                field="partitions",
                hint="partitions are 0 to 255; write for example 0-63, 70",
            )
        chosen.update(range(low, high + 1))
    return frozenset(chosen)


def ranges(partitions: Collection[int]) -> str:
    """The set as an operator reads it, shortest form: "0-63, 70"."""
    return ", ".join(str(one[0]) if len(one) == 1 else f"{one[0]}-{one[-1]}" for one in _runs(sorted(partitions)))


def named(partitions: Collection[int]) -> str:
    """What a reply names as missing: "partitions 0-63, 70"; of nothing, ""."""
    if not partitions:
        return ""
    return f"partition{'s' if len(partitions) > 1 else ''} {ranges(partitions)}"


def _runs(ascending: Sequence[int]) -> list[list[int]]:
    grouped = itertools.groupby(enumerate(ascending), key=lambda pair: pair[1] - pair[0])
    return [[number for _, number in run] for _, run in grouped]
