"""4-bit fast-scan codes of rotated rows at one rate, searched by range; no decision is taken here.

FAISS' flat fast-scan index has no range search, its inverted-file form has: with a single list it scans the same
packed codes. What was found in FAISS 1.15 and is relied on (each has a test):
- the range handler keeps an accumulator above `int(a * (radius - b))`, a truncated number that is then cast to
  uint16: a radius below b, the sum of the tables' least entries, would wrap round and lose rows;
- one radius serves all probes of a call, so the probes are divided by theirs and the radius is one;
- `implem` 110 is the kernel that goes through the codes probe by probe, without threads of its own.
Rows are laid out in parts that fit the cache, the rows with the lowest cut-offs together, so that each part has a
cut-off of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from matcher_service.index import certificate
from matcher_service.index.rotation import CENTROIDS, codebook
from matcher_service.terms import Float32, Float64, Int64

PART_ROWS_MAX = 65_536  # their finest codes take 8 MiB: two threads' parts stay in the last cache
_BLOCK = 64  # rows of one kernel step: the fastest of 32, 64, 96, 128 and 160 at 64 to 256 tables
_UNPACKED = np.arange(16).reshape(2, 8).T.ravel()  # 0, 8, 1, 9, ...
# Whose closeness to 16 centroids, 2 MiB, stays in the last cache. With fewer, coding waits for the interpreter
# after each piece of arithmetic while references stream in, and falls ten times behind.
_ENCODE_BLOCKS = 32_768
# The cells of the grid in which the codes of blocks of one and of two coordinates are looked up: the number of a cell
# along each coordinate. Those of a block, read as one uint16, are its place in the table.
_CELLS: Mapping[int, type[np.unsignedinteger]] = {1: np.uint16, 2: np.uint8}
_GRID_REACH = 1.5  # times the farthest coordinate of a centroid; beyond it a block counts as at the edge
_PARALLEL_ROWS = 32_768  # from here on at least two parts, for two threads


class Codes:
    """The codes of n rows with `block` coordinates in each 4-bit code, in parts. Of a dimension that the block does
    not divide, the last rotated coordinates are not coded.

    `order` uint32 [n] numbers the rows as they lie in the parts, `bounds` int64 [p + 1] says where the parts
    begin, `packed` uint8 are their codes as the kernel reads them, `supports` float64 [p, ANGLES] is their law,
    `typical` float64 [3]: the mean of the rows' a and b, and the largest norm of a decoded row.
    """

    def __init__(
        self,
        dimension: int,
        block: int,
        order: NDArray[np.uint32],
        bounds: Int64,
        packed: NDArray[np.uint8],
        supports: Float64,
        typical: Float64,
    ) -> None:
        self.block = block
        self.tables = dimension // block
        self.coded = self.tables * block
        self.centroids = codebook(dimension, block)
        self.bounds = bounds
        self.supports = supports
        self.typical = typical
        self._quantizer = one_list(self.coded)
        self.indexes = []
        start = 0
        for first, last in pairwise(bounds):
            part, size = self._part(int(last - first))
            _bytes_of(part, size)[:] = packed[start : start + size]
            _ids_of(part, int(last - first))[:] = order[first:last]
            self.indexes.append(part)
            start += size

    def _part(self, rows: int) -> tuple[Any, int]:
        """An empty index for `rows` rows, and the size of its packed codes."""
        part = empty_index(self._quantizer, self.centroids)
        lists = faiss.downcast_InvertedLists(part.invlists)
        lists.resize(0, rows)
        part.ntotal = rows
        return part, -(-rows // _BLOCK) * _BLOCK * ((self.tables + 1) // 2)

    @property
    def parts(self) -> int:
        return len(self.indexes)

    def near(self, part: int, scaled: Float32) -> tuple[Int64, Int64]:
        """Offsets int64 [n + 1] and row numbers of every row of the part whose estimate, but for the table
        error, is at least one. `scaled` float32 [n, coded]: rotated probes, their coded coordinates, over their
        cut-offs."""
        lims, _, rows = self.indexes[part].range_search(scaled, 1.0)
        return lims.astype(np.int64), rows

    def state(self) -> dict[str, NDArray[Any]]:
        """What `from_state` needs; the codes are biometric data."""
        sizes = np.diff(self.bounds)
        return {
            "order": np.concatenate(
                [_ids_of(part, int(size)).astype(np.uint32) for part, size in zip(self.indexes, sizes, strict=True)]
                or [np.empty(0, np.uint32)]
            ),
            "packed": np.concatenate(
                [
                    _bytes_of(part, -(-int(size) // _BLOCK) * _BLOCK * ((self.tables + 1) // 2))
                    for part, size in zip(self.indexes, sizes, strict=True)
                ]
                or [np.empty(0, np.uint8)]
            ),
            "bounds": self.bounds,
            "supports": self.supports,
            "typical": self.typical,
        }

    @classmethod
    def from_state(cls, dimension: int, block: int, state: Mapping[str, NDArray[Any]]) -> Codes:
        return cls(dimension, block, *(state[name] for name in ("order", "bounds", "packed", "supports", "typical")))

    def bytes_in_memory(self) -> int:
        rows = int(self.bounds[-1])
        return rows * (8 + (self.tables + 1) // 2) + self.parts * _BLOCK * self.tables // 2


def one_list(coded: int) -> Any:
    """The coarse quantiser of an index with a single list."""
    quantizer = faiss.IndexFlatIP(coded)
    quantizer.add(np.zeros((1, coded), np.float32))
    return quantizer


def empty_index(quantizer: Any, centroids: Float32) -> Any:
    """A fast-scan index over one list, for inner products of coded coordinates, without any training."""
    coded = quantizer.d
    tables = coded // centroids.shape[1]
    index = faiss.IndexIVFPQFastScan(quantizer, coded, 1, tables, 4, faiss.METRIC_INNER_PRODUCT, _BLOCK)
    index.by_residual = False
    faiss.copy_array_to_vector(np.tile(centroids.ravel(), tables), index.pq.centroids)
    index.is_trained = True
    index.nprobe = 1
    index.implem = 110
    return index


class Encoded(NamedTuple):
    """Rotated rows as codes.

    `plain` uint8 [n, bytes]: the code of an even table in the low half of a byte and that of the next one in the high
    half; of each row, float64 [n], the product of its decoded code with itself as it was coded, and that with itself.
    """

    plain: NDArray[np.uint8]
    along: Float64
    squared: Float64


def encode(coded: Float32, dimension: int, block: int) -> Encoded:
    """The codes of rotated rows, float32 [n, tables * block], their coded coordinates, by the codebook of the
    dimension and the block.

    A code depends on its rotated row alone, but where rounding can tell between two: see `certificate.py`, which also
    knows how far `along` may be off. FAISS' encoder takes four times as long, at least, as either way here.
    """
    return _looked_up(coded, dimension, block) if block in _CELLS else _compared(coded, codebook(dimension, block))


@lru_cache(maxsize=64)
def _grid(dimension: int, block: int) -> tuple[NDArray[np.uint8], np.float32]:
    """Which centroid is nearest to the middle of each cell, uint8 [65,536], and cells to a unit of length."""
    centroids = codebook(dimension, block).astype(np.float64)
    cell = _CELLS[block]
    steps = np.arange(np.iinfo(cell).max + 1)
    cells = np.stack(np.meshgrid(*[steps] * block, indexing="ij"), axis=-1).reshape(-1, block)
    scale = steps.size / (2 * _GRID_REACH * np.abs(centroids).max())
    middles = (cells + 0.5 - steps.size / 2) / scale
    closeness = middles @ centroids.T - 0.5 * np.einsum("ij,ij->i", centroids, centroids)
    nearest = np.empty(len(cells), np.uint8)
    nearest[cells.astype(cell).view(np.uint16).ravel()] = closeness.argmax(axis=1)
    return nearest, np.float32(scale)


def _looked_up(coded: Float32, dimension: int, block: int) -> Encoded:
    """Blocks of one or two coordinates: the centroid of the cell of a fine grid. It is the nearest one to all but a
    hundredth of the blocks, which lie in a cell that a border crosses; codes by it are as good within a thousandth."""
    nearest, scale = _grid(dimension, block)
    cell = _CELLS[block]
    last = np.iinfo(cell).max
    work = coded * scale
    work += np.float32((last + 1) // 2)
    np.clip(work, 0, last, out=work)
    numbers = np.take(nearest, work.astype(cell).view(np.uint16))
    # A whole centroid at a time.
    whole = codebook(dimension, block).view(np.uint32 if block == 1 else np.uint64).ravel()
    decoded = np.take(whole, numbers).view(np.float32)
    along = np.add.reduce(np.multiply(decoded, coded, out=work), axis=1, dtype=np.float64)
    squared = np.add.reduce(np.multiply(decoded, decoded, out=work), axis=1, dtype=np.float64)
    return Encoded(_plain(numbers), along, squared)


def _compared(coded: Float32, centroids: Float32) -> Encoded:
    """Larger blocks: the nearest centroid c by its closeness <c, y> - |c|^2 / 2, which also tells what
    `certificate.factors` needs."""
    blocks = coded.reshape(-1, centroids.shape[1])
    nearest = np.empty(len(blocks), np.uint8)
    closest = np.empty(len(blocks), np.float32)
    squares = np.einsum("ij,ij->i", centroids, centroids, dtype=np.float64)
    half = (0.5 * squares).astype(np.float32)[:, None]
    for start in range(0, len(blocks), _ENCODE_BLOCKS):
        some = slice(start, start + _ENCODE_BLOCKS)
        closeness = centroids @ blocks[some].T
        closeness -= half
        # The number of each centroid, in the last bits of its closeness: the greatest of 16 then tells whose it is.
        bits = closeness.view(np.int32)
        bits &= ~np.int32(CENTROIDS - 1)
        bits |= np.arange(CENTROIDS, dtype=np.int32)[:, None]
        np.maximum.reduce(closeness, axis=0, out=closest[some])
        nearest[some] = closest[some].view(np.int32) & (CENTROIDS - 1)
    numbers = nearest.reshape(len(coded), -1)
    squared = np.add.reduce(squares.astype(np.float32)[numbers], axis=1, dtype=np.float64)
    along = np.add.reduce(closest.reshape(numbers.shape), axis=1, dtype=np.float64) + squared / 2
    return Encoded(_plain(numbers), along, squared)


def _plain(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Numbers of centroids, uint8 [n, tables], two to a byte."""
    plain = numbers[:, 0::2].copy()
    plain[:, : numbers.shape[1] // 2] |= numbers[:, 1::2] << 4
    return plain


def pack(plain: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Plain codes, uint8 [n, bytes], in the order of bytes that the fast-scan kernel reads, uint8 [size].

    As in FAISS, impl/pq4_fast_scan.cpp, `pq4_pack_codes`: of 32 rows, the low nibbles of one byte of the code
    and then the high ones, rows j and j + 16 sharing a byte, in the order that `unpack` instructions undo.
    FAISS 1.15 writes its lists so in `add`, but not in `add_entries`, whose codes come out scrambled.
    """
    rows, width = plain.shape
    groups = _BLOCK // 32
    padded = np.zeros((-(-rows // _BLOCK) * _BLOCK, width), np.uint8)
    padded[:rows] = plain
    halves = padded.reshape(-1, groups, 2, 16, width)[:, :, :, _UNPACKED]
    first, second = halves[:, :, 0], halves[:, :, 1]
    packed = np.empty((halves.shape[0], width, groups, 2, 16), np.uint8)
    packed[:, :, :, 0] = ((first & 15) | (second << 4)).transpose(0, 3, 1, 2)
    packed[:, :, :, 1] = ((first >> 4) | (second & 0xF0)).transpose(0, 3, 1, 2)
    return packed.reshape(-1)


def _bytes_of(index: Any, size: int) -> NDArray[np.uint8]:
    return np.asarray(faiss.rev_swig_ptr(index.invlists.get_codes(0), size))


def _ids_of(index: Any, rows: int) -> Int64:
    return np.asarray(faiss.rev_swig_ptr(index.invlists.get_ids(0), rows))


class CodesBuilder:
    """Encodes the rows of a segment block by block, then lays them out in parts."""

    def __init__(self, dimension: int, block: int) -> None:
        self.dimension = dimension
        self.block = block
        self.coded = (dimension // block) * block
        self._plain: list[NDArray[np.uint8]] = []
        self._along: list[Float64] = []
        self._across: list[Float64] = []
        self._reach = 0.0

    def add(self, rotated: Float32, row_norms: Float64) -> None:
        """`rotated` float32 [n, d]: R x of the next rows, `row_norms` float64 [n] their norms."""
        encoded = encode(np.ascontiguousarray(rotated[:, : self.coded]), self.dimension, self.block)
        along, across, reach = certificate.factors(encoded.along, encoded.squared, row_norms, self.dimension)
        self._plain.append(encoded.plain)
        self._along.append(along)
        self._across.append(across)
        self._reach = max(self._reach, float(reach.max(initial=0.0)))

    def finish(self, always: Int64) -> dict[str, NDArray[Any]]:
        """The state of codes for all rows but those of `always`, which are re-scored for every probe."""
        tail = certificate.tail(self.dimension)
        along = np.concatenate(self._along)
        across = np.concatenate(self._across)
        plain = np.concatenate(self._plain)
        self._plain.clear()
        kept = np.ones(along.size, np.bool_)
        kept[always] = False
        rows = np.flatnonzero(kept)
        order = rows[np.argsort(certificate.key(along[rows], across[rows], tail), kind="stable")]
        bounds = part_bounds(order.size)
        supports = np.empty((bounds.size - 1, certificate.ANGLES))
        packed = []
        for number, (first, last) in enumerate(pairwise(bounds)):
            mine = order[first:last]
            supports[number] = certificate.support(along[mine], across[mine], tail)
            packed.append(pack(plain[mine]))
        typical = np.array([along.mean(), across.mean(), self._reach]) if along.size else np.zeros(3)
        return {
            "order": order.astype(np.uint32),
            "packed": np.concatenate(packed) if packed else np.empty(0, np.uint8),
            "bounds": bounds,
            "supports": supports,
            "typical": typical,
        }

    def worst(self, count: int) -> Int64:
        """The rows, at most `count`, with the lowest cut-offs so far."""
        keys = certificate.key(
            np.concatenate(self._along), np.concatenate(self._across), certificate.tail(self.dimension)
        )
        if count >= keys.size:
            return np.arange(keys.size)
        return np.sort(np.argpartition(keys, count)[:count]) if count else np.empty(0, np.int64)


def packed_size(bounds: Int64, tables: int) -> int:
    """Bytes of the packed codes of parts with these bounds."""
    return int((-(-np.diff(bounds) // _BLOCK) * _BLOCK * ((tables + 1) // 2)).sum())


def part_bounds(rows: int) -> Int64:
    """Where the parts of `rows` rows begin: equal parts, at most `PART_ROWS_MAX` rows each."""
    if rows == 0:
        return np.zeros(1, np.int64)
    parts = max(-(-rows // PART_ROWS_MAX), 2 if rows >= _PARALLEL_ROWS else 1)
    return np.linspace(0, rows, parts + 1).round().astype(np.int64)


def blocks_for(dimension: int) -> tuple[int, ...]:
    """The rates that a dimension allows, coarsest first, as coordinates for each 4-bit code."""
    return tuple(
        block
        for block in (8, 5, 4, 2, 1)
        if CENTROIDS <= dimension // block <= certificate.TABLES_MAX and (dimension % block == 0 or block == 5)
    )
