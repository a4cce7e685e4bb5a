"""Reading templates from .npz and .parquet: the same blocks from every layout, and every bad row told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matcher_service.errors import InvalidInput
from matcher_service.template_files import TemplateFile, open_template_file

TEXTS = ("reference_id", "subject_id")
D = 4


def templates_of(rows: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, D)).astype(dtype)


def save_npz(path: Path, templates: np.ndarray, **columns: Any) -> Path:
    np.savez(path, templates=templates, **columns)
    return path


def save_parquet(path: Path, template: pa.Array, group: int = 7, **columns: Any) -> Path:
    pq.write_table(pa.table({"template": template, **columns}), path, row_group_size=group)
    return path


def fixed_lists(templates: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(templates.ravel()), D)


def lists(templates: np.ndarray) -> pa.Array:
    return pa.array(templates.tolist(), pa.list_(pa.float32()))


def binaries(templates: np.ndarray) -> pa.Array:
    return pa.array([row.tobytes() for row in templates], pa.binary())


def read_all(file: TemplateFile, size: int, first_row: int = 0) -> tuple[np.ndarray, list[str], list[str], list[int]]:
    templates, references, subjects, sizes = [np.zeros((0, D), np.float32)], [], [], []
    for rows in file.blocks(size, D, TEXTS, (), first_row):
        assert rows.first_row == first_row + sum(sizes)
        assert not rows.faults
        templates.append(rows.templates)
        references += rows.texts["reference_id"]
        subjects += rows.texts["subject_id"]
        sizes.append(len(rows))
    assert all(one == size for one in sizes[:-1])
    return np.concatenate(templates), references, subjects, sizes


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 60), size=st.integers(1, 25), group=st.integers(1, 30), first=st.integers(0, 60))
def test_every_layout_gives_the_same_blocks_from_any_row_on(
    tmp_path_factory: pytest.TempPathFactory, rows: int, size: int, group: int, first: int
) -> None:
    """npz, lists, fixed-size lists and bytes, whatever the row groups: equal rows in equal blocks, and one digest."""
    folder = tmp_path_factory.mktemp("files")
    first = min(first, rows)
    templates = templates_of(rows)
    ids = [f"r{row}-é" for row in range(rows)]
    subjects = [f"s{row // 2}" for row in range(rows)]
    columns = {"reference_id": ids, "subject_id": subjects}
    files = [
        save_npz(folder / "a.npz", templates, reference_ids=np.array(ids), subject_ids=np.array(subjects)),
        save_parquet(folder / "b.parquet", fixed_lists(templates), group, **columns),
        save_parquet(folder / "c.parquet", lists(templates), group, **columns),
        save_parquet(folder / "d.parquet", binaries(templates), group, **columns),
    ]
    digests = set()
    for path in files:
        file = open_template_file(path)
        assert file.rows == rows
        read, references, owners, _ = read_all(file, size, first)
        np.testing.assert_array_equal(read, templates[first:])
        assert (references, owners) == (ids[first:], subjects[first:])
        digests.add(file.texts_digest(TEXTS))
    assert len(digests) == 1


@pytest.mark.parametrize("layout", ["npz", "fixed", "list", "binary"])
def test_half_precision_stays_half_precision(tmp_path: Path, layout: str) -> None:
    """float16 is neither widened nor changed on its way in."""
    templates = templates_of(9, np.float16)
    ids = [f"r{row}" for row in range(9)]
    columns = {"reference_id": ids, "subject_id": ids}
    if layout == "npz":
        path = save_npz(tmp_path / "a.npz", templates, reference_ids=np.array(ids), subject_ids=np.array(ids))
    else:
        array = {
            "fixed": lambda: fixed_lists(templates),
            "list": lambda: pa.ListArray.from_arrays(np.arange(0, 9 * D + 1, D), pa.array(templates.ravel())),
            "binary": lambda: binaries(templates),
        }[layout]()
        path = save_parquet(tmp_path / "a.parquet", array, **columns)
    (rows,) = open_template_file(path).blocks(100, D, TEXTS, ())
    assert rows.templates.dtype == np.float16
    np.testing.assert_array_equal(rows.templates, templates)


def test_a_changed_identifier_or_order_changes_the_digest_and_a_template_does_not(tmp_path: Path) -> None:
    """The digest stands for the identifiers and their order, and says nothing of the templates."""

    def digest(references: list[str], subjects: list[str], seed: int) -> str:
        path = save_npz(
            tmp_path / "a.npz",
            np.random.default_rng(seed).normal(size=(3, D)),
            reference_ids=np.array(references),
            subject_ids=np.array(subjects),
        )
        return open_template_file(path).texts_digest(TEXTS)

    first = digest(["a", "b", "c"], ["x", "y", "z"], 1)
    assert digest(["a", "b", "c"], ["x", "y", "z"], 2) == first
    others = [
        digest(["b", "a", "c"], ["x", "y", "z"], 1),
        digest(["a", "b", "c"], ["x", "z", "y"], 1),
        digest(["ab", "", "c"], ["x", "y", "z"], 1),
        digest(["x", "y", "z"], ["a", "b", "c"], 1),
    ]
    assert len({first, *others}) == 5


def faults_of(path: Path, numbers: tuple[str, ...] = ()) -> dict[int, tuple[str, str]]:
    found = {}
    for rows in open_template_file(path).blocks(2, D, TEXTS, numbers):
        for offset, fault in rows.faults.items():
            found[rows.first_row + offset] = (fault.field, fault.cause.value)
            assert fault.detail
    return found


def test_each_bad_row_of_parquet_is_told_and_the_good_ones_are_read(tmp_path: Path) -> None:
    """A missing or short template, a missing, long or unprintable id, a bad expiry: told by row; the rest intact."""
    good = [1.0, 2.0, 3.0, 4.0]
    template = pa.array([good, None, good[:3], good, good, good, good, good], pa.list_(pa.float32()))
    path = save_parquet(
        tmp_path / "a.parquet",
        template,
        3,
        reference_id=["r0", "r1", "r2", None, "r" * 129, "r\n5", "r6", "r7"],
        subject_id=["s"] * 7 + [""],
        expires_at_ms=pa.array([5, 5, 5, 5, 5, 5, None, 5], pa.int64()),
    )
    assert faults_of(path, ("expires_at_ms",)) == {
        1: ("template", "WRONG_DIMENSION"),
        2: ("template", "WRONG_DIMENSION"),
        3: ("reference_id", "INVALID"),
        4: ("reference_id", "INVALID"),
        5: ("reference_id", "INVALID"),
        6: ("expires_at_ms", "INVALID"),
        7: ("subject_id", "INVALID"),
    }
    (rows,) = open_template_file(path).blocks(100, D, TEXTS, ())
    np.testing.assert_array_equal(rows.templates[[0, 3, 4, 5, 6, 7]], np.array([good] * 6, np.float32))


def test_each_bad_row_of_bytes_and_of_fixed_lists_is_told(tmp_path: Path) -> None:
    """Bytes of another length, and a missing fixed-size list, spoil only their own row."""
    row = np.ones(D, "<f4").tobytes()
    ids = {"reference_id": ["a", "b", "c"], "subject_id": ["a", "b", "c"]}
    path = save_parquet(tmp_path / "a.parquet", pa.array([row, row[:-1], None], pa.binary()), **ids)
    assert set(faults_of(path)) == {1, 2}
    array = pa.array([[1, 2, 3, 4], None, [5, 6, 7, 8]], pa.list_(pa.float32(), D))
    path = save_parquet(tmp_path / "b.parquet", array, **ids)
    assert set(faults_of(path)) == {1}
    (rows,) = open_template_file(path).blocks(100, D, TEXTS, ())
    np.testing.assert_array_equal(rows.templates[[0, 2]], [[1, 2, 3, 4], [5, 6, 7, 8]])


def test_mixed_widths_of_bytes_are_told_apart_row_by_row(tmp_path: Path) -> None:
    """A block with float16 and float32 bytes is read as float32, each row by its own width."""
    cells = [np.array([1, 2, 3, 4], "<f2").tobytes(), np.array([5, 6, 7, 8], "<f4").tobytes()]
    path = save_parquet(
        tmp_path / "a.parquet", pa.array(cells, pa.binary()), reference_id=["a", "b"], subject_id=["a", "b"]
    )
    (rows,) = open_template_file(path).blocks(100, D, TEXTS, ())
    np.testing.assert_array_equal(rows.templates, [[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.mark.parametrize(
    ("name", "columns", "field"),
    [
        ("a.npz", {"template_ids": np.arange(3)}, "templates"),
        ("a.npz", {"templates": np.zeros((3, D), np.int64)}, "templates"),
        ("a.npz", {"templates": np.zeros(3)}, "templates"),
        ("a.npz", {"templates": np.zeros((3, D + 1), np.float32), "reference_ids": np.arange(3)}, "template"),
        ("a.npz", {"templates": np.asfortranarray(np.ones((3, D), np.float32))}, "templates"),
        ("a.npz", {"templates": np.ones((3, D)), "reference_ids": np.arange(2)}, "reference_id"),
        ("a.npz", {"templates": np.ones((3, D)), "reference_ids": np.array([{}, {}, {}])}, "file"),
        ("a.npz", {"templates": np.ones((3, D)), "subject_ids": np.arange(3)}, "reference_id"),
        ("a.txt", {}, "file"),
        ("missing.npz", None, "file"),
    ],
)
def test_a_file_that_cannot_be_used_says_which_part_and_what_to_do(
    tmp_path: Path, name: str, columns: dict[str, Any] | None, field: str
) -> None:
    """Wrong shape, type, length, suffix or no file at all: InvalidInput with the field and a hint."""
    path = tmp_path / name
    if columns is not None:
        with path.open("wb") as file:
            np.savez(file, **columns)
    with pytest.raises(InvalidInput) as refused:
        list(open_template_file(path).blocks(10, D, TEXTS, ()))
    assert refused.value.field == field
    assert refused.value.hint


def test_a_broken_file_is_refused_and_not_half_read(tmp_path: Path) -> None:
    """Bytes that are no archive and no Parquet are the file's fault, whatever its name says."""
    for name in ("a.npz", "a.parquet"):
        (tmp_path / name).write_bytes(b"not what it says")
        with pytest.raises(InvalidInput, match="cannot read"):
            open_template_file(tmp_path / name)
