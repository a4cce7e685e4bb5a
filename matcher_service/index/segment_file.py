"""Sealed files: named arrays and a few facts, encrypted in blocks that are authenticated as they are read.

    header      8 s magic, u16 format, u16 zero, u32 block_bytes, u32 blocks, u64 plain_bytes, 16 s file_id
    block       AES-256-GCM of the next block_bytes of the plain text (the last may be shorter), tag behind it
    ...

All integers are little-endian. The plain text is a u32 length, that many bytes of JSON (`facts`, and name, dtype,
shape and offset of each array), and the arrays, each at a multiple of 64 bytes.

Each file has its own key, derived from the gallery's (HKDF-SHA-256, the file_id as salt), so that the block
number can be the nonce and no two blocks under one key share it. The associated data of each block is the
header and the block number: blocks cannot be left out, doubled, exchanged or taken from another file or format.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from matcher_service.errors import DataDamaged

FORMAT = 1
BLOCK_BYTES = 4 << 20

_MAGIC = b"MTCHRIDX"
_HEADER = struct.Struct("<8sHHIIQ16s")
_TAG_BYTES = 16
_ALIGNMENT = 64

Arrays = Mapping[str, NDArray[Any]]


class Contents(NamedTuple):
    """What a sealed file holds: facts as JSON, and arrays that share one buffer."""

    facts: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


class _Header(NamedTuple):
    magic: bytes
    format: int
    zero: int
    block_bytes: int
    blocks: int
    plain_bytes: int
    file_id: bytes


def new_file_id() -> str:
    return os.urandom(16).hex()


def sealed(
    key: bytes, file_id: str, facts: Mapping[str, Any], arrays: Arrays, block_bytes: int = BLOCK_BYTES
) -> Iterator[bytes | memoryview]:
    """The bytes of a file, in chunks that are good until the next is asked for: the header, then block after
    block. `key` has 32 bytes; `file_id` must be fresh from `new_file_id`."""
    places: list[dict[str, Any]] = []
    offset = 0
    for name, array in arrays.items():
        places.append({"name": name, "dtype": array.dtype.str, "shape": array.shape, "offset": offset})
        offset = _aligned(offset + array.nbytes)
    contents = orjson.dumps({"facts": dict(facts), "arrays": places})
    first = _aligned(4 + len(contents))
    plain_bytes = first + offset
    blocks = -(-plain_bytes // block_bytes)
    header = _HEADER.pack(_MAGIC, FORMAT, 0, block_bytes, blocks, plain_bytes, bytes.fromhex(file_id))
    cipher = AESGCM(_file_key(key, bytes.fromhex(file_id)))
    yield header
    pieces = _pieces(struct.pack("<I", len(contents)) + contents, arrays)
    number = 0
    block = bytearray(min(block_bytes, plain_bytes))
    out = memoryview(bytearray(len(block) + _TAG_BYTES))
    filled = 0
    for piece in pieces:
        while len(piece):
            some = piece[: block_bytes - filled]
            block[filled : filled + len(some)] = some
            filled += len(some)
            piece = piece[len(some) :]
            if filled == block_bytes:
                cipher.encrypt_into(_nonce(number), block, _associated(header, number), out)
                yield out
                number, filled = number + 1, 0
    if filled:
        last = out[: filled + _TAG_BYTES]
        cipher.encrypt_into(_nonce(number), memoryview(block)[:filled], _associated(header, number), last)
        yield last


def read_sealed(path: Path, key: bytes, file_id: str) -> Contents:
    """Read and authenticate a whole file.

    Raises DataDamaged if anything in it is not as it was written, or if it is not the file named `file_id`.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return _read(file, path, key, file_id)
    except OSError as error:
        raise DataDamaged(f"{path} cannot be read: {error.strerror}") from error


def _read(file: BinaryIO, path: Path, key: bytes, file_id: str) -> Contents:
    raw = file.read(_HEADER.size)
    if len(raw) != _HEADER.size:
        raise DataDamaged(f"{path} is shorter than its header")
    header = _Header(*_HEADER.unpack(raw))
    if header.magic != _MAGIC or header.zero or header.format != FORMAT or header.file_id.hex() != file_id:
        raise DataDamaged(f"{path} is not the sealed file {file_id} of format {FORMAT}")
    size = os.fstat(file.fileno()).st_size
    if (
        not header.block_bytes
        or header.blocks != -(-header.plain_bytes // header.block_bytes)
        or size != _HEADER.size + header.plain_bytes + header.blocks * _TAG_BYTES
    ):
        raise DataDamaged(f"{path} has {size} bytes, which is not what its header says")
    cipher = AESGCM(_file_key(key, header.file_id))
    plain = np.empty(header.plain_bytes, np.uint8)
    into = plain.data
    block = bytearray(min(header.block_bytes, header.plain_bytes) + _TAG_BYTES)
    for number in range(header.blocks):
        start = number * header.block_bytes
        length = min(header.block_bytes, header.plain_bytes - start)
        sealed_block = memoryview(block)[: length + _TAG_BYTES]
        if _read_fully(file, sealed_block) != len(sealed_block):
            raise DataDamaged(f"{path} ends within block {number}")
        try:
            cipher.decrypt_into(_nonce(number), sealed_block, _associated(raw, number), into[start : start + length])
        except InvalidTag:
            raise DataDamaged(f"block {number} of {path} fails its authentication") from None
    plain.flags.writeable = False
    return _contents(path, plain)


def _contents(path: Path, plain: NDArray[np.uint8]) -> Contents:
    """The facts and arrays in an authenticated plain text, whose form is checked none the less."""
    try:
        length = int(plain[:4].view("<u4")[0])
        described = orjson.loads(plain[4 : 4 + length].tobytes())
        first = _aligned(4 + length)
        arrays = {one["name"]: _array(plain, first, one) for one in described["arrays"]}
        return Contents(described["facts"], arrays)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataDamaged(f"{path} does not hold what a sealed file holds: {error}") from error


def _array(plain: NDArray[np.uint8], first: int, place: Mapping[str, Any]) -> NDArray[Any]:
    dtype, shape = np.dtype(place["dtype"]), tuple(place["shape"])
    size = dtype.itemsize
    for length in shape:
        size *= length
    start = first + place["offset"]
    if dtype.hasobject or min((0, *shape)) < 0 or not 0 <= start <= start + size <= len(plain):
        raise ValueError(f"array {place['name']} lies outside the file")
    array: NDArray[Any] = plain[start : start + size].view(dtype).reshape(shape)
    return array


def _pieces(contents: bytes, arrays: Arrays) -> Iterator[memoryview]:
    yield memoryview(contents + bytes(_aligned(len(contents)) - len(contents)))
    for array in arrays.values():
        if array.size:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        yield memoryview(bytes(_aligned(array.nbytes) - array.nbytes))


def _read_fully(file: BinaryIO, into: memoryview) -> int:
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


def _associated(header: bytes, number: int) -> bytes:
    return header + number.to_bytes(8, "little")


def _file_key(key: bytes, file_id: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=file_id, info=b"matcher-service index file 1").derive(key)
