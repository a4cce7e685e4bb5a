"""Sealed files: named arrays and a few facts, encrypted in blocks that are authenticated as they are read.

    header      8 s magic, u16 format, u16 zero, u32 block_bytes, u32 blocks, u64 plain_bytes, 16 s file_id
    block       AES-256-GCM of the next block_bytes of the plain text (the last may be shorter), tag behind it
    ...

All integers are little-endian. The plain text is a u32 length, that many bytes of JSON (`facts`, and name, dtype and
shape of each array), and the arrays in that order, each at a multiple of 64 bytes.

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
    """What a sealed file holds: facts as JSON, and arrays by name."""

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
    places = [{"name": name, "dtype": array.dtype.str, "shape": array.shape} for name, array in arrays.items()]
    contents = orjson.dumps({"facts": dict(facts), "arrays": places})
    plain_bytes = _aligned(4 + len(contents)) + sum(_aligned(array.nbytes) for array in arrays.values())
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
    plain = _PlainText(file, path, raw, header, AESGCM(_file_key(key, header.file_id)))
    try:
        length = int.from_bytes(plain.take(4), "little")
        described = orjson.loads(plain.take(length))
        plain.skip(_aligned(4 + length) - 4 - length)
        # Each array has memory of its own, so that one can be let go while another stays.
        arrays = {place["name"]: _array(plain, place) for place in described["arrays"]}
        plain.skip(plain.left)
        return Contents(described["facts"], arrays)
    except (ValueError, KeyError, TypeError) as error:
        raise DataDamaged(f"{path} does not hold what a sealed file holds: {error}") from error


class _PlainText:
    """The plain text of a file from its beginning, block by block; nothing is given out unauthenticated."""

    def __init__(self, file: BinaryIO, path: Path, raw_header: bytes, header: _Header, cipher: AESGCM) -> None:
        self.left = header.plain_bytes
        self._file = file
        self._path = path
        self._raw_header = raw_header
        self._cipher = cipher
        self._number = 0
        size = min(header.block_bytes, header.plain_bytes)
        self._sealed = memoryview(bytearray(size + _TAG_BYTES))
        self._open = memoryview(bytearray(size))
        self._ready = self._open[:0]

    def fill(self, into: memoryview) -> None:
        """The next len(into) bytes. Raises DataDamaged, ValueError if there are not so many."""
        if len(into) > self.left:
            raise ValueError("an array lies outside the file")
        while len(into):
            if not len(self._ready):
                self._next_block()
            some = self._ready[: len(into)]
            into[: len(some)] = some
            into, self._ready = into[len(some) :], self._ready[len(some) :]
            self.left -= len(some)

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("the description lies outside the file")
        taken = bytearray(count)
        self.fill(memoryview(taken))
        return bytes(taken)

    def skip(self, count: int) -> None:
        while count:
            some = min(count, len(self._open))
            self.take(some)
            count -= some

    def _next_block(self) -> None:
        length = min(len(self._open), self.left)
        sealed_block = self._sealed[: length + _TAG_BYTES]
        if _read_fully(self._file, sealed_block) != len(sealed_block):
            raise DataDamaged(f"{self._path} ends within block {self._number}")
        self._ready = self._open[:length]
        associated = _associated(self._raw_header, self._number)
        try:
            self._cipher.decrypt_into(_nonce(self._number), sealed_block, associated, self._ready)
        except InvalidTag:
            raise DataDamaged(f"block {self._number} of {self._path} fails its authentication") from None
        self._number += 1


def _array(plain: _PlainText, place: Mapping[str, Any]) -> NDArray[Any]:
    dtype, shape = np.dtype(place["dtype"]), tuple(place["shape"])
    size = dtype.itemsize
    for length in shape:
        size *= length
    if dtype.hasobject or min((0, *shape)) < 0 or size > plain.left:
        raise ValueError(f"array {place['name']} lies outside the file")
    array = np.empty(shape, dtype)
    if size:
        plain.fill(array.reshape(-1).view(np.uint8).data)
    plain.skip(_aligned(size) - size)
    array.flags.writeable = False
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
