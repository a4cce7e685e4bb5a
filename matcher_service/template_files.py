"""Templates with their columns, read from .npz and .parquet in blocks, without holding a file in memory.

Columns are named in the singular (`template`, `reference_id`, `expires_at_ms` …); `templates`, `reference_ids`
do as well. A template is a row of a float array (.npz), or a list or fixed-size list of floats, or the
little-endian float32 or float16 bytes (.parquet). A row that cannot be used is reported in its block and
spoils no other. Rows are numbered from 0 in the order of the file.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import InvalidInput
from matcher_service.terms import Cause, Int64

ID_BYTES_MAX = 128
QUALITY = "quality"
"""A column of numbers from 0 to 1, read as whole QUALITY_PARTS like the other columns of numbers."""
QUALITY_PARTS = 10_000
_DIGEST_ROWS = 65_536
_FLOATS: dict[str, np.dtype[Any]] = {"e": np.dtype("<f2"), "f": np.dtype("<f4"), "d": np.dtype("<f4")}


@dataclass(frozen=True, slots=True)
class RowFault:
    """Why a row cannot be used."""

    cause: Cause
    field: str
    detail: str


@dataclass(slots=True)
class Rows:
    """One block. `templates` [n, d] float16 or float32 with zeros in faulty rows; `texts` and `numbers` hold the
    columns asked for that the file has; `faults` is by offset within the block."""

    first_row: int
    templates: NDArray[Any]
    texts: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, Int64] = field(default_factory=dict)
    faults: dict[int, RowFault] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.templates)


class TemplateFile(Protocol):
    path: Path
    rows: int

    def has(self, column: str) -> bool: ...

    def blocks(
        self, size: int, dimension: int, texts: Sequence[str], numbers: Sequence[str], first_row: int = 0
    ) -> Iterator[Rows]:
        """Blocks of exactly `size` rows, the last one shorter, from `first_row` on."""
        ...

    def texts_digest(self, texts: Sequence[str]) -> str:
        """Hex digest of these columns over all rows, independent of the format's own layout."""
        ...


def open_template_file(path: Path) -> TemplateFile:
    """Raises InvalidInput if there is no such file, or it is neither .npz nor .parquet, or has no templates."""
    if not path.is_file():
        raise InvalidInput(f"no file at {path}", field="file", hint="check the path")
    match path.suffix.lower():
        case ".npz":
            return NpzTemplates(path)
        case ".parquet" | ".pq":
            return ParquetTemplates(path)
        case other:
            raise InvalidInput(f"{other or 'no'} suffix", field="file", hint="give an .npz or a .parquet file")


def id_fault(value: str | None, column: str) -> RowFault | None:
    """An identifier that the service would refuse together with its whole message."""
    if not value:
        return RowFault(Cause.INVALID, column, "is missing")
    if len(value.encode("utf-8", "replace")) > ID_BYTES_MAX or not value.isprintable():
        return RowFault(Cause.INVALID, column, f"is longer than {ID_BYTES_MAX} bytes or not printable")
    return None


def _text_column(rows: Rows, column: str, values: list[str | None]) -> None:
    for offset, value in enumerate(values):
        fault = id_fault(value, column)
        if fault is not None:
            rows.faults.setdefault(offset, fault)
    rows.texts[column] = [value or "" for value in values]


def in_parts(qualities: NDArray[Any]) -> Int64:
    """Qualities, from 0 to 1, as whole numbers of QUALITY_PARTS; unknown ones become 0."""
    return np.round(np.nan_to_num(qualities.astype(np.float64)) * QUALITY_PARTS).astype(np.int64)


def _number_column(rows: Rows, column: str, values: Int64, missing: NDArray[np.bool_]) -> None:
    for offset in np.flatnonzero(missing | (values < 0)):
        rows.faults.setdefault(int(offset), RowFault(Cause.INVALID, column, "is negative, or not a whole number"))
    rows.numbers[column] = np.where(missing, 0, values)


def _missing_column(path: Path, column: str, have: Sequence[str]) -> InvalidInput:
    return InvalidInput(
        f"{path.name} has no column {column}",
        field=column,
        hint=f"it has: {', '.join(sorted(have)) or 'none'}",
    )


def _wrong_dimension(path: Path, found: int, dimension: int) -> InvalidInput:
    return InvalidInput(
        f"the templates of {path.name} have {found} values, the space has {dimension}",
        field="template",
        cause=Cause.WRONG_DIMENSION,
        hint="give the file's own space, or another gallery",
    )


class _Digest:
    """Over blocks of a fixed number of rows, whatever the blocks in which they come."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, columns: Sequence[Sequence[str | None]]) -> None:
        for column in columns:
            encoded = [(value or "").encode("utf-8", "surrogatepass") for value in column]
            self._hash.update(struct.pack("<q", len(encoded)))
            self._hash.update(np.fromiter(map(len, encoded), "<i4", len(encoded)).tobytes())
            self._hash.update(b"".join(encoded))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


# --- .npz ------------------------------------------------------------------------------------------------


class NpzTemplates:
    """The arrays of an .npz. Identifier and number columns are held; templates are read row by row from the
    archive, since they are what is large. Pickled objects are refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise _unreadable(path, error) from error
        self._columns: dict[str, NDArray[Any]] = {}
        member = self._members.get("template") or self._members.get("templates")
        if member is None:
            raise _missing_column(path, "templates", list(self._members))
        self._member = member
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            shape, _, dtype = _npy_header(stream, path)
        if len(shape) != 2 or dtype.char not in _FLOATS:
            raise InvalidInput(
                f"templates is {dtype} {shape}", field="templates", hint="save float16 or float32 [rows, dimension]"
            )
        self.rows, self.dimension = shape

    def has(self, column: str) -> bool:
        return column in self._members or column + "s" in self._members

    def _column(self, column: str) -> NDArray[Any]:
        if column not in self._columns:
            name = next((one for one in (column, column + "s") if one in self._members), None)
            if name is None:
                raise _missing_column(self.path, column, list(self._members))
            try:
                with np.load(self.path, allow_pickle=False) as arrays:
                    self._columns[column] = arrays[name]
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise _unreadable(self.path, error) from error
        values = self._columns[column]
        if values.shape != (self.rows,):
            raise InvalidInput(
                f"{column} has shape {values.shape}, templates have {self.rows} rows",
                field=column,
                cause=Cause.WRONG_LENGTH,
                hint="save one value per template",
            )
        return values

    def _texts(self, column: str, begin: int, end: int) -> list[str | None]:
        values = self._column(column)[begin:end]
        if values.dtype.kind == "S":
            return [value.decode("utf-8", "replace") for value in values.tolist()]
        if values.dtype.kind in "Uiu":
            return [str(value) for value in values.tolist()]
        raise InvalidInput(f"{column} is {values.dtype}", field=column, hint="save text")

    def blocks(
        self, size: int, dimension: int, texts: Sequence[str], numbers: Sequence[str], first_row: int = 0
    ) -> Iterator[Rows]:
        if self.dimension != dimension:
            raise _wrong_dimension(self.path, self.dimension, dimension)
        with zipfile.ZipFile(self.path) as archive, archive.open(self._member) as stream:
            shape, fortran, dtype = _npy_header(stream, self.path)
            if fortran:
                raise InvalidInput(
                    "templates stand column after column", field="templates", hint="save numpy.ascontiguousarray of it"
                )
            width = dimension * dtype.itemsize
            # A stored or deflated member can only be read forward, from where its header ends.
            _skip(stream, first_row * width)
            for begin in range(first_row, shape[0], size):
                end = min(begin + size, shape[0])
                data = stream.read((end - begin) * width)
                if len(data) != (end - begin) * width:
                    raise InvalidInput(f"{self.path.name} ends in row {begin}", field="file", hint="save it again")
                templates = np.frombuffer(data, dtype).reshape(end - begin, dimension)
                with np.errstate(over="ignore"):
                    rows = Rows(begin, templates.astype(_FLOATS[dtype.char], copy=False))
                for column in texts:
                    _text_column(rows, column, self._texts(column, begin, end))
                for column in numbers:
                    values = self._column(column)[begin:end]
                    if column == QUALITY and values.dtype.kind == "f":
                        values = in_parts(values)
                    if values.dtype.kind not in "iu":
                        raise InvalidInput(f"{column} is {values.dtype}", field=column, hint="save whole numbers")
                    _number_column(rows, column, values.astype(np.int64), np.zeros(end - begin, np.bool_))
                yield rows

    def texts_digest(self, texts: Sequence[str]) -> str:
        digest = _Digest()
        for begin in range(0, self.rows, _DIGEST_ROWS):
            digest.add([self._texts(column, begin, min(begin + _DIGEST_ROWS, self.rows)) for column in texts])
        return digest.hexdigest()


def _npy_header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return reader(stream)
    except ValueError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InvalidInput:
    return InvalidInput(
        f"cannot read {path.name}: {error}", field="file", hint="save it with numpy.savez, without objects"
    )


def _skip(stream: IO[bytes], count: int) -> None:
    while count > 0:
        count -= len(stream.read(min(count, 1 << 20))) or count


# --- .parquet --------------------------------------------------------------------------------------------


class ParquetTemplates:
    """A Parquet file, read row group by row group."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self.path = path
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self.rows = file.metadata.num_rows
                self._groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                self._names = list(file.schema_arrow.names)
        except (OSError, pyarrow.ArrowException) as error:
            raise InvalidInput(f"cannot read {path.name}: {error}", field="file", hint="give a Parquet file") from error
        self._named("template")

    def has(self, column: str) -> bool:
        return column in self._names or column + "s" in self._names

    def _named(self, column: str) -> str:
        for name in (column, column + "s"):
            if name in self._names:
                return name
        raise _missing_column(self.path, column, self._names)

    def _tables(self, size: int, columns: Sequence[str], first_row: int = 0) -> Iterator[tuple[int, Any]]:
        """(first row, table of exactly `size` rows, the last one shorter), from `first_row` on."""
        import pyarrow
        import pyarrow.parquet

        group, begin = 0, 0
        while group < len(self._groups) and begin + self._groups[group] <= first_row:
            begin += self._groups[group]
            group += 1
        skip = first_row - begin
        with pyarrow.parquet.ParquetFile(self.path) as file:
            held: list[Any] = []
            held_rows = 0
            at = first_row
            batches = file.iter_batches(
                size, row_groups=list(range(group, len(self._groups))), columns=columns, use_threads=False
            )
            for batch in batches:
                if skip:
                    dropped = min(skip, batch.num_rows)
                    batch, skip = batch.slice(dropped), skip - dropped
                held.append(batch)
                held_rows += batch.num_rows
                while held_rows >= size:
                    table = pyarrow.Table.from_batches(held)
                    yield at, table.slice(0, size)
                    rest = table.slice(size)
                    held, held_rows, at = rest.to_batches(), rest.num_rows, at + size
            if held_rows:
                yield at, pyarrow.Table.from_batches(held)

    def blocks(
        self, size: int, dimension: int, texts: Sequence[str], numbers: Sequence[str], first_row: int = 0
    ) -> Iterator[Rows]:
        names = {column: self._named(column) for column in ("template", *texts, *numbers)}
        for begin, table in self._tables(size, list(names.values()), first_row):
            rows = _parquet_templates(begin, table.column(names["template"]).combine_chunks(), dimension, self.path)
            for column in texts:
                _text_column(rows, column, _parquet_texts(table.column(names[column]), column))
            for column in numbers:
                values, missing = _parquet_numbers(table.column(names[column]), column)
                _number_column(rows, column, values, missing)
            yield rows

    def texts_digest(self, texts: Sequence[str]) -> str:
        digest = _Digest()
        names = [self._named(column) for column in texts]
        for _, table in self._tables(_DIGEST_ROWS, names):
            digest.add([_parquet_texts(table.column(name), column) for name, column in zip(names, texts, strict=True)])
        return digest.hexdigest()


def _parquet_texts(column: Any, name: str) -> list[str | None]:
    import pyarrow.types as kinds

    kind = column.type.value_type if kinds.is_dictionary(column.type) else column.type
    if kinds.is_string(kind) or kinds.is_large_string(kind):
        texts: list[str | None] = column.to_pylist()
        return texts
    if kinds.is_integer(kind):
        return [None if value is None else str(value) for value in column.to_pylist()]
    raise InvalidInput(f"{name} is {column.type}", field=name, hint="write it as text")


def _parquet_numbers(column: Any, name: str) -> tuple[Int64, NDArray[np.bool_]]:
    import pyarrow
    import pyarrow.types as kinds

    kind = column.type
    if kinds.is_timestamp(kind):
        column = column.cast(pyarrow.timestamp("ms", tz=kind.tz), safe=False).cast(pyarrow.int64())
    elif name == QUALITY and kinds.is_floating(kind):
        values = column.cast(pyarrow.float64()).to_numpy()
        return in_parts(values), np.isnan(values)
    elif not kinds.is_integer(kind):
        raise InvalidInput(f"{name} is {kind}", field=name, hint="write whole milliseconds since 1970, or a timestamp")
    missing = column.is_null().to_numpy()
    return column.cast(pyarrow.int64()).fill_null(0).to_numpy(), missing


def _parquet_templates(first_row: int, column: Any, dimension: int, path: Path) -> Rows:
    import pyarrow.types as kinds

    kind = column.type
    count = len(column)
    if kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_fixed_size_binary(kind):
        return _binary_templates(first_row, column.to_pylist(), dimension)
    if not (kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)):
        raise InvalidInput(
            f"template is {kind}", field="template", hint="write a list of floats, or the little-endian bytes"
        )
    if not kinds.is_floating(kind.value_type):
        raise InvalidInput(f"template holds {kind.value_type}", field="template", hint="write float32 or float16")
    if kinds.is_fixed_size_list(kind) and kind.list_size != dimension:
        raise _wrong_dimension(path, kind.list_size, dimension)
    half = kinds.is_float16(kind.value_type)
    dtype = np.dtype("<f2") if half else np.dtype("<f4")
    missing = column.is_null().to_numpy(zero_copy_only=False)
    lengths = np.asarray(column.value_lengths().fill_null(0)) if not kinds.is_fixed_size_list(kind) else None
    # flatten() drops the values of missing lists, whatever stands in their place.
    flat = column.flatten()
    holes = flat.is_null().to_numpy(zero_copy_only=False)
    values = flat.fill_null(float("nan")) if holes.any() else flat
    with np.errstate(over="ignore"):
        numbers = values.to_numpy(zero_copy_only=False).astype(dtype)
    good = ~missing if lengths is None else (~missing & (lengths == dimension))
    rows = Rows(first_row, np.zeros((count, dimension), dtype))
    if lengths is None:
        rows.templates[good] = numbers.reshape(-1, dimension)
    else:
        kept = np.repeat(good, np.where(missing, 0, lengths))
        rows.templates[good] = numbers[kept].reshape(-1, dimension)
    for offset in np.flatnonzero(~good):
        found = "no template" if missing[offset] else f"{int(lengths[offset])} values" if lengths is not None else ""
        rows.faults[int(offset)] = _template_fault(found, dimension)
    return rows


def _binary_templates(first_row: int, cells: Sequence[bytes | None], dimension: int) -> Rows:
    """float16 if every cell of the block has that many bytes, else float32, into which float16 goes unchanged."""
    halves = all(cell is None or len(cell) == 2 * dimension for cell in cells)
    rows = Rows(first_row, np.zeros((len(cells), dimension), "<f2" if halves else "<f4"))
    for offset, cell in enumerate(cells):
        if cell is not None and len(cell) in (2 * dimension, 4 * dimension):
            rows.templates[offset] = np.frombuffer(cell, "<f2" if len(cell) == 2 * dimension else "<f4")
        else:
            found = "no template" if cell is None else f"{len(cell)} bytes"
            rows.faults[offset] = _template_fault(found, dimension)
    return rows


def _template_fault(found: str, dimension: int) -> RowFault:
    return RowFault(
        Cause.WRONG_DIMENSION, "template", f"{found}; the space has {dimension} values (float32 or float16)"
    )
