"""Laws 1, 2, 5 and 9: through any history of writes, upkeep, power cuts, damage and restarts the index answers
like a flat list of the live rows, and what was withdrawn leaves its files."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import structlog.testing
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from matcher_service.index import manifest as manifests
from matcher_service.index.compaction import CompactionBudget
from matcher_service.index.engine import Engine
from matcher_service.index.scanners import BySize
from matcher_service.index.snapshots import Snapshots, read_rows
from matcher_service.records import decode_gallery
from matcher_service.terms import DataKey, EnrolRun, EntryKind, LogEntry, SearchRequest
from tests.faulty_disk import FaultyDisk, PowerLost
from tests.log_writer import NOW_MS, LogWriter
from tests.one_key import one_key
from tests.oracle import FlatOracle, same

DIMENSION = 3
GALLERIES = ("custody", "watch", "wätch")
KEYS = {gallery_id: bytes([number]) * 32 for number, gallery_id in enumerate(GALLERIES, 1)}
BUDGET = CompactionBudget(rows_max=40, erase_after_ms=1)
# Few directions, so that scores tie, and subjects with several references.
DIRECTIONS = [(x, y, z) for x in (-1.0, 0.0, 0.5, 1.0) for y in (-0.5, 0.0, 1.0) for z in (0.0, 1.0)]
DIRECTIONS.remove((0.0, 0.0, 0.0))

galleries = st.sampled_from(GALLERIES)
references = st.sampled_from([f"r{number}" for number in range(12)] + ["ř", "é"])
subjects = st.sampled_from([f"s{number}" for number in range(5)])
directions = st.sampled_from(DIRECTIONS)
moments = st.integers(NOW_MS - 1, NOW_MS + 5)


class IndexHistory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="index-history-"))
        self.log = LogWriter()
        self.oracle = FlatOracle()
        self.created: set[str] = set()
        self.ever: set[str] = set()

    @initialize(seed=st.integers(0, 2**32 - 1))
    def begin(self, seed: int) -> None:
        note(f"seed {seed}")
        self.chance = random.Random(seed)
        self.open()
        self.create("custody")
        self.create("watch")

    def teardown(self) -> None:
        shutil.rmtree(self.directory)

    def open(self) -> None:
        self.disk = FaultyDisk(self.directory / "index", self.chance.randrange(2**32))
        self.snapshots = Snapshots(self.disk, self.key, BySize())
        self.engine = Engine(
            build=BySize().build,
            dimension_of=lambda entry: decode_gallery(entry.record).space.dimension,
            segment_rows_max=40,
            memory_bytes_max=10**9,
            tail_rows_max=5,
        )
        restored = self.snapshots.restore()
        self.engine.restore(restored.sequence, restored.galleries, restored.damaged)
        self.catch_up()

    def key(self, gallery_id: str, generation: int = 0) -> DataKey | None:
        return DataKey(1, KEYS[gallery_id]) if gallery_id in self.created else None

    def catch_up(self) -> None:
        """Replay from where the index stands, in blocks of any size."""
        while behind := self.log.entries[self.engine.sequence :]:
            self.engine.apply(behind[: self.chance.choice((1, 3, 100))])
        self.oracle.apply_now(self.log.entries)

    def apply(self, entries: Sequence[LogEntry]) -> None:
        self.engine.apply(entries)
        self.oracle.apply_now(entries)

    # --- writes ------------------------------------------------------------------------------------

    def create(self, gallery_id: str) -> None:
        self.created.add(gallery_id)
        self.ever.add(gallery_id)
        self.apply([self.log.create(gallery_id, DIMENSION)])

    @precondition(lambda self: len(self.ever) < len(GALLERIES))
    @rule()
    def create_another(self) -> None:
        self.create(next(one for one in GALLERIES if one not in self.ever))

    @precondition(lambda self: len(self.created) > 1)
    @rule(gallery_id=galleries)
    def delete(self, gallery_id: str) -> None:
        if gallery_id in self.created:
            self.created.discard(gallery_id)  # its key goes first
            for number, entry in enumerate(self.log.entries):
                if entry.gallery_id == gallery_id and entry.template:
                    self.log.entries[number] = entry._replace(template=None)
            self.apply([self.log.delete(gallery_id)])

    @rule(
        gallery_id=galleries,
        rows=st.lists(st.tuples(references, directions, subjects, moments), min_size=1, max_size=8),
        withdrawn=st.lists(references, max_size=2),
    )
    def enrol(
        self,
        gallery_id: str,
        rows: list[tuple[str, tuple[float, float, float], str, int]],
        withdrawn: list[str],
    ) -> None:
        if gallery_id not in self.created:
            return
        entries = [self.log.enrol(gallery_id, row[0], np.array(row[1]), row[2], row[3]) for row in rows]
        entries += [self.log.withdraw(gallery_id, reference_id) for reference_id in withdrawn]
        self.apply(entries)

    @rule(
        gallery_id=galleries,
        rows=st.lists(
            st.tuples(references, directions, subjects, moments), min_size=1, max_size=12, unique_by=lambda row: row[0]
        ),
        repeated=st.integers(0, 4),
    )
    def enrol_in_columns(
        self, gallery_id: str, rows: list[tuple[str, tuple[float, float, float], str, int]], repeated: int
    ) -> None:
        """References that are live nowhere, as one run; replay may give some of it again."""
        latest = {(one.gallery_id, one.reference_id): one.kind for one in self.log.entries}
        fresh = [row for row in rows if latest.get((gallery_id, row[0])) is not EntryKind.ENROL]
        if gallery_id not in self.created or not fresh:
            return
        entries = [self.log.enrol(gallery_id, row[0], np.array(row[1]), row[2], row[3]) for row in fresh]
        run = EnrolRun(
            entries[0].sequence,
            entries[0].at_ms,
            gallery_id,
            [row[0] for row in fresh],
            [row[2] for row in fresh],
            np.array([row[1] for row in fresh], np.float16),
            np.array([row[3] for row in fresh], np.int64),
        )
        self.engine.apply(run[:repeated])
        self.engine.apply(run)
        self.oracle.apply_now(entries)

    @rule(gallery_id=galleries, reference_id=references)
    def withdraw(self, gallery_id: str, reference_id: str) -> None:
        if gallery_id in self.created:
            self.apply([self.log.withdraw(gallery_id, reference_id)])

    @rule()
    def erase_in_the_log(self) -> None:
        """The log forgets the templates of rows that are no longer live."""
        latest = {(one.gallery_id, one.reference_id): one.sequence for one in self.log.entries}
        for number, entry in enumerate(self.log.entries):
            if entry.template and entry.sequence < latest[entry.gallery_id, entry.reference_id]:
                self.log.entries[number] = entry._replace(template=None)

    @rule()
    def replay_again(self) -> None:
        self.apply(self.log.entries[-7:])

    # --- upkeep ------------------------------------------------------------------------------------

    @rule(quiet=st.booleans(), later_ms=st.sampled_from((0, 10_000)))
    def rewrite(self, quiet: bool, later_ms: int) -> None:
        self.engine.rewrite_one(BUDGET, NOW_MS + later_ms, quiet=quiet)

    @rule()
    def write_files(self) -> None:
        snapshot = self.engine.snapshot()
        assert snapshot is not None
        self.snapshots.write(snapshot)

    @rule()
    def erase(self) -> None:
        """Law 9: after upkeep with time enough, no file and no segment holds a row that ended."""
        while self.engine.rewrite_one(BUDGET, NOW_MS + 10**9, quiet=False):
            pass
        self.write_files()
        status = self.engine.status()
        assert not any(status.dead.values())
        manifest = manifests.decode((self.disk.directory / manifests.NAME).read_bytes())
        held = {
            gallery_id: sum(
                len(read_rows(self.disk.directory, gallery_id, file, one_key(KEYS[gallery_id])).rows)
                for file in files.segments
            )
            for gallery_id, files in manifest.galleries.items()
        }
        assert held == {gallery_id: len(rows) for gallery_id, rows in self.oracle.galleries.items()}
        assert set(self.disk.names()) == manifest.file_names() | {manifests.NAME}

    # --- accidents ---------------------------------------------------------------------------------

    @rule()
    def restart(self) -> None:
        self.open()

    @rule(steps=st.integers(0, 12))
    def lose_power_while_writing(self, steps: int) -> None:
        snapshot = self.engine.snapshot()
        assert snapshot is not None
        self.disk.steps_left = steps
        try:
            self.snapshots.write(snapshot)
        except PowerLost:
            self.engine.snapshot_failed(snapshot)
        self.open()

    @rule(place=st.floats(0, 1, exclude_max=True), cut=st.booleans())
    def damage_a_file(self, place: float, cut: bool) -> None:
        paths = [self.disk.directory / name for name in self.disk.names()]
        if not paths:
            return
        path = paths[self.chance.randrange(len(paths))]
        content = bytearray(path.read_bytes() or b" ")
        where = int(place * len(content))
        if cut:
            del content[where:]
        else:
            content[where] ^= 1 << self.chance.randrange(8)
        path.write_bytes(content)
        self.open()

    # --- searches ----------------------------------------------------------------------------------

    @rule(
        probes=st.lists(directions, min_size=1, max_size=3),
        gallery_ids=st.lists(galleries, min_size=1, max_size=3, unique=True),
        floors=st.lists(st.sampled_from((-np.inf, -0.5, 0.0, 0.5, 0.9, 1.0)), min_size=9, max_size=9),
        rank_max=st.lists(st.integers(1, 6), min_size=3, max_size=3),
        at_ms=moments,
    )
    def search(
        self,
        probes: list[tuple[float, float, float]],
        gallery_ids: list[str],
        floors: list[float],
        rank_max: list[int],
        at_ms: int,
    ) -> None:
        rows = np.array(probes, np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        count = len(rows)
        request = SearchRequest(
            tuple(gallery_ids),
            np.ascontiguousarray(rows),
            np.array(floors, np.float32)[: count * len(gallery_ids)].reshape(count, -1),
            np.array(rank_max[:count], np.int64),
            at_ms,
        )
        found, expected = self.engine.search(request), self.oracle.search_now(request)
        assert same(found, expected), (found, expected)
        assert found.sequence == expected.sequence
        assert found.missing == ()
        status = self.engine.status()
        assert dict(status.live) == {gallery_id: len(held) for gallery_id, held in self.oracle.galleries.items()}


def _run(examples: int, steps: int, seed: int) -> None:
    print(f"index history: seed {seed}")

    with structlog.testing.capture_logs():  # damage is logged thousands of times
        run_state_machine_as_test(
            hypothesis.seed(seed)(type("Seeded", (IndexHistory,), {})),
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_the_index_answers_like_a_flat_list_through_any_history() -> None:
    """Laws 1, 2, 5, 9."""
    _run(200, 50, random.SystemRandom().randrange(2**32))


@pytest.mark.slow
def test_the_index_answers_like_a_flat_list_through_long_histories() -> None:
    """Laws 1, 2, 5, 9, at length."""
    _run(3000, 120, random.SystemRandom().randrange(2**32))
