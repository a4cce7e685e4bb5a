"""Law 10 and the files of the index: whatever happens to their bytes, they are read as written or not at all."""

from __future__ import annotations

import gc
import random
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog.testing

from matcher_service.errors import DataDamaged, StartRefused
from matcher_service.index import manifest as manifests
from matcher_service.index.compaction import CompactionBudget
from matcher_service.index.disk import Disk
from matcher_service.index.engine import Engine
from matcher_service.index.inspect import inspect
from matcher_service.index.manifest import GalleryFiles, Manifest
from matcher_service.index.scanners import BySize
from matcher_service.index.segment import SealedFile, Segment
from matcher_service.index.segment_file import new_file_id, read_sealed, sealed
from matcher_service.index.snapshots import Key, Snapshots
from matcher_service.records import decode_gallery
from matcher_service.terms import DataKey
from tests.faulty_disk import FaultyDisk
from tests.log_writer import NOW_MS, LogWriter, asking
from tests.one_key import one_key
from tests.oracle import FlatOracle, same

KEY = bytes(range(32))
FORMAT_1 = Path(__file__).parent.parent / "data" / "index_format_1"


def write(path: Path, arrays: dict[str, np.ndarray], block_bytes: int = 100, key: bytes = KEY) -> str:
    file_id = new_file_id()
    path.write_bytes(b"".join(bytes(chunk) for chunk in sealed(key, file_id, {"name": "é"}, arrays, block_bytes)))
    return file_id


ARRAYS = {
    "rows": np.arange(12, dtype=np.float16).reshape(3, 4),
    "none": np.empty((0, 7), np.uint32),
    "ends": np.array([1, -2, 3], np.int64),
}


@pytest.mark.parametrize("block_bytes", [64, 100, 1 << 20])
def test_a_sealed_file_gives_back_its_facts_and_arrays(tmp_path: Path, block_bytes: int) -> None:
    """Whatever the size of its blocks."""
    file_id = write(tmp_path / "f", ARRAYS, block_bytes)
    facts, arrays = read_sealed(tmp_path / "f", KEY, file_id)
    assert facts == {"name": "é"}
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_nothing_of_a_template_stands_in_a_sealed_file(tmp_path: Path) -> None:
    """Law 10."""
    rows = np.random.default_rng(1).standard_normal((50, 8)).astype(np.float16)
    write(tmp_path / "f", {"stored": rows})
    content = (tmp_path / "f").read_bytes()
    assert all(row.tobytes() not in content for row in rows)
    assert b"stored" not in content


def test_a_flip_of_any_byte_is_detected(tmp_path: Path) -> None:
    """Every byte, one bit each."""
    path = tmp_path / "f"
    file_id = write(path, ARRAYS)
    whole = path.read_bytes()
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1 << (place % 8)
        path.write_bytes(altered)
        with pytest.raises(DataDamaged):
            read_sealed(path, KEY, file_id)


def test_truncation_at_any_byte_and_anything_added_is_detected(tmp_path: Path) -> None:
    """Also at the ends of blocks."""
    path = tmp_path / "f"
    file_id = write(path, ARRAYS)
    whole = path.read_bytes()
    for altered in (*(whole[:length] for length in range(len(whole))), whole + b"\0", whole + whole):
        path.write_bytes(altered)
        with pytest.raises(DataDamaged):
            read_sealed(path, KEY, file_id)


def test_blocks_cannot_change_places_or_files(tmp_path: Path) -> None:
    """Though each is authentic where it belongs."""
    one, other = tmp_path / "one", tmp_path / "other"
    file_id, other_id = write(one, ARRAYS, 64), write(other, ARRAYS, 64)
    header, block = 44, 64 + 16
    whole, foreign = one.read_bytes(), other.read_bytes()
    exchanged = whole[:header] + whole[header + block : header + 2 * block] + whole[header : header + block]
    one.write_bytes(exchanged + whole[header + 2 * block :])
    with pytest.raises(DataDamaged):
        read_sealed(one, KEY, file_id)
    one.write_bytes(whole[:header] + foreign[header:])
    with pytest.raises(DataDamaged):
        read_sealed(one, KEY, file_id)
    with pytest.raises(DataDamaged):
        read_sealed(other, KEY, file_id)
    with pytest.raises(DataDamaged):
        read_sealed(other, bytes(32), other_id)


def test_no_damage_to_a_manifest_is_taken_for_a_manifest() -> None:
    """Truncation at every byte, a flip of every bit of every byte."""
    file = SealedFile("a.rows", "00" * 16, 10, "ff" * 32)
    manifest = Manifest(7, {"gälleri": GalleryFiles(4, file, (file,))})
    content = manifests.encode(manifest)
    assert manifests.decode(content) == manifest
    for place in range(len(content)):
        with pytest.raises(DataDamaged):
            manifests.decode(content[:place])
        for bit in range(8):
            altered = bytearray(content)
            altered[place] ^= 1 << bit
            with pytest.raises(DataDamaged):
                manifests.decode(bytes(altered))


def test_a_manifest_of_a_newer_release_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of it is removed."""
    monkeypatch.setattr(manifests, "FORMAT", 2)
    content = manifests.encode(Manifest(7, {}))
    monkeypatch.undo()
    (tmp_path / manifests.NAME).write_bytes(content)
    (tmp_path / "future.rows").write_bytes(b"precious")
    with pytest.raises(StartRefused):
        Snapshots(Disk(tmp_path), one_key(KEY), BySize()).restore()
    assert (tmp_path / "future.rows").read_bytes() == b"precious"


# --- a whole directory -----------------------------------------------------------------------------


def history() -> LogWriter:
    log = LogWriter()
    log.create("g", 2)
    log.enrol("g", "a", np.array([1.0, 0.0]))
    log.enrol("g", "b", np.array([0.6, 0.8]))
    log.enrol("g", "c", np.array([0.0, 1.0]))
    log.withdraw("g", "b")
    log.enrol("g", "c", np.array([-0.6, 0.8]))
    return log


def opened(directory: Path, key: Key | None = None) -> tuple[Engine, Snapshots]:
    engine = Engine(
        build=BySize().build,
        dimension_of=lambda entry: decode_gallery(entry.record).space.dimension,
        segment_rows_max=1000,
        memory_bytes_max=10**9,
        tail_rows_max=3,
    )
    snapshots = Snapshots(FaultyDisk(directory), key or one_key(KEY), BySize())
    restored = snapshots.restore()
    engine.restore(restored.sequence, restored.galleries, restored.damaged)
    return engine, snapshots


def written(directory: Path, log: LogWriter) -> None:
    """A directory with two segments, one of them with a dead row."""
    engine, snapshots = opened(directory)
    for count in (4, len(log.entries)):
        engine.apply(log.entries[:count])
        snapshot = engine.snapshot()
        assert snapshot is not None
        snapshots.write(snapshot)
    assert sum(engine.status().dead.values()) == 2


def test_what_a_rewrite_replaced_is_not_kept_in_memory_for_the_files_sake(tmp_path: Path) -> None:
    """A machine that holds as much as fits must be able to join its segments."""
    engine, snapshots = opened(tmp_path)
    log = history()
    for count in (4, len(log.entries)):
        engine.apply(log.entries[:count])
        snapshot = engine.snapshot()
        assert snapshot is not None
        snapshots.write(snapshot)
    del snapshot
    held = [weakref.ref(part.content.stored) for part in engine.view.galleries["g"].parts if isinstance(part, Segment)]
    assert len(held) == 2
    while engine.rewrite_one(CompactionBudget(1000, 0), NOW_MS + 10**9, quiet=True):
        pass
    gc.collect()
    assert all(one() is None for one in held)
    # And what is on disk then is told from what is held, though no row ended in between.
    snapshot = engine.snapshot()
    assert snapshot is not None
    snapshots.write(snapshot)
    again, _ = opened(tmp_path)
    assert again.status() == engine.status()


def test_a_rotation_goes_through_the_files_one_by_one_and_each_directory_between_is_good(tmp_path: Path) -> None:
    """Law 10: a restart at any moment of it finds nothing damaged."""
    log, generation = history(), 1

    def key(gallery_id: str, wanted: int = 0) -> DataKey:
        which = wanted or generation
        return DataKey(which, bytes([which]) * 32)

    engine, snapshots = opened(tmp_path, key)
    for count in (4, len(log.entries)):
        engine.apply(log.entries[:count])
        snapshot = engine.snapshot()
        assert snapshot is not None
        snapshots.write(snapshot)
    assert len(engine.view.galleries["g"].parts) == 2
    generation = 2
    # What the open rows kept is less than what a file's rows keep.
    before = replace(engine.status(), bytes_in_memory=0)
    rounds = 0
    while snapshots.outdated:
        snapshot = engine.snapshot()
        assert snapshot is not None
        snapshots.write(snapshot)
        again, files = opened(tmp_path, key)
        assert replace(again.status(), bytes_in_memory=0) == before
        assert files.generations == snapshots.generations
        rounds += 1
    assert rounds == 2


def answers_after(directory: Path, log: LogWriter, alter: Callable[[Path], None]) -> bool:
    """Whether the files, altered, were good as they are; the answers must be right in any case."""
    alter(directory)
    engine, _ = opened(directory)
    good = engine.sequence == log.entries[-1].sequence
    engine.apply(log.entries)
    oracle = FlatOracle()
    oracle.apply_now(log.entries)
    request = asking(np.array([[1.0, 0.0], [-0.6, 0.8]]), ("g",), rank_max=5)
    assert same(engine.search(request), oracle.search_now(request))
    return good


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << (place % 8)
    path.write_bytes(content)


def cut(path: Path, place: int) -> None:
    path.write_bytes(path.read_bytes()[:place])


def harm_every(step: int, start: int, tmp_path: Path) -> None:
    log = history()
    sound = tmp_path / "sound"
    written(sound, log)
    with structlog.testing.capture_logs():
        assert answers_after(shutil.copytree(sound, tmp_path / "same"), log, lambda _: None)
        for file in sorted(sound.iterdir()):
            for place in range(start, file.stat().st_size, step):
                for harm in (flip, cut):
                    directory = shutil.copytree(sound, tmp_path / "harmed")
                    assert not answers_after(directory, log, lambda at, f=file, p=place, h=harm: h(at / f.name, p))
                    shutil.rmtree(directory)


def test_damage_to_the_files_is_repaired_from_the_log(tmp_path: Path) -> None:
    """A flip and a truncation at every 13th byte of every file: rebuilt, and the answers are right."""
    start = random.SystemRandom().randrange(13)
    print(f"from byte {start}")
    harm_every(13, start, tmp_path)


@pytest.mark.slow
def test_damage_to_any_byte_is_repaired_from_the_log(tmp_path: Path) -> None:
    """The same at every byte."""
    harm_every(1, 0, tmp_path)


@pytest.mark.parametrize("lost", ["manifest.json", "*.rows", "*.state"])
def test_a_lost_file_is_rebuilt_from_the_log(tmp_path: Path, lost: str) -> None:
    """Whichever it is."""
    log = history()
    written(tmp_path, log)

    def lose(directory: Path) -> None:
        next(directory.glob(lost)).unlink()

    with structlog.testing.capture_logs():
        assert not answers_after(tmp_path, log, lose)


def test_inspection_counts_and_verifies(tmp_path: Path) -> None:
    """Every block, and every checksum; and says what is wrong without touching it."""
    log = history()
    written(tmp_path / "index", log)
    report = inspect(tmp_path, one_key(KEY))
    assert report.problems == ()
    assert (report.sequence, report.live, report.dead) == (log.entries[-1].sequence, 2, 2)
    assert [segment.rows for gallery in report.galleries for segment in gallery.segments] == [3, 1]
    path = next((tmp_path / "index").glob("*.rows"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = {file: file.read_bytes() for file in (tmp_path / "index").iterdir()}
    problems = inspect(tmp_path, one_key(KEY)).problems
    assert any("checksum" in problem for problem in problems)
    assert any("authentication" in problem for problem in problems)
    assert {file: file.read_bytes() for file in (tmp_path / "index").iterdir()} == before
    assert any("key" in problem for problem in inspect(tmp_path, lambda gallery_id, generation=0: None).problems)


def test_a_directory_of_format_1_opens(tmp_path: Path) -> None:
    """Written once and kept: what this release reads, later ones must."""
    directory = shutil.copytree(FORMAT_1, tmp_path / "index")
    engine, _ = opened(directory)
    log = history()
    assert engine.sequence == log.entries[-1].sequence
    found = engine.search(asking(np.array([[1.0, 0.0]]), ("g",), rank_max=5, at_ms=NOW_MS))
    assert list(found.reference_ids) == ["a", "c"]


def test_files_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    """Sealed or not."""
    log = history()
    written(tmp_path / "index", log)
    assert (tmp_path / "index").stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "index").iterdir())
