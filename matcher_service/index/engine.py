"""The index of one shard: a view of the gallery log that is searched while it changes.

One thread at a time applies entries; another may rewrite segments; any number search. They meet in one
attribute, the published view: a search takes it once and needs no lock. What a rewrite replaces goes on
serving the searches that hold it.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import DataDamaged, MemoryRefused
from matcher_service.index.compaction import CompactionBudget, SegmentSize, to_rewrite, worth_coding
from matcher_service.index.memory import ROW_BYTES
from matcher_service.index.rows import Float16, id_hashes, joined
from matcher_service.index.scanner import Ending, Growing, Scanner, ending_of
from matcher_service.index.search import GalleryView, View, search
from matcher_service.index.segment import LIVE, Segment, Tail
from matcher_service.terms import EnrolRun, EntryKind, Int64, LogEntry, SearchRequest, SearchResult, ShardStatus

# An open tail is scanned flat by every search; at this size it becomes a segment.
TAIL_ROWS_MAX = 8192
# Entries applied between two publications: bounds how long a block keeps its parts waiting.
_ENTRIES_AT_ONCE = 4096
# Rows whose references `end_rows` holds as objects at a time.
_ROWS_JUDGED_AT_ONCE = 16_384


class BuildScanner(Protocol):
    """See `scanners.Scanners.build`."""

    def __call__(self, stored: Float16) -> Scanner: ...


DimensionOf = Callable[[LogEntry], int]


def _no_device(dimension: int) -> Growing | None:
    return None


class Erased(NamedTuple):
    """Rows of a gallery that are gone from memory and from every file: how many, between which sequences."""

    gallery_id: str
    rows: int
    sequence_min: int
    sequence_max: int


@dataclass(eq=False, slots=True)
class GalleryState:
    """What the writer knows of a gallery. `held_sequence`: its files reached so far when they were opened, and
    entries up to there are in it already. `tail_rows`: how many its last open tail came to hold."""

    dimension: int
    segments: list[Segment] = field(default_factory=list)
    tail: Tail | None = None
    held_sequence: int = 0
    rebuilding: bool = False
    tail_rows: int = 0

    def open_tail(self, growing_of: Callable[[int], Growing | None]) -> Tail:
        if self.tail is None:
            self.tail = Tail(self.dimension, growing_of(self.dimension), self.tail_rows)
        return self.tail

    def view(self) -> GalleryView:
        parts = [*self.segments, *((self.tail.view(),) if self.tail and self.tail.rows else ())]
        parts.sort(key=lambda part: -part.rows)
        return GalleryView(self.dimension, tuple(parts), self.held_sequence, self.rebuilding)

    def bytes_in_memory(self) -> int:
        tail = self.tail.bytes_in_memory() if self.tail else 0
        return tail + sum(segment.bytes_in_memory() for segment in self.segments)


class Snapshot(NamedTuple):
    """What the files must hold so that replay can go on after `sequence`."""

    sequence: int
    galleries: Mapping[str, tuple[int, tuple[Segment, ...]]]
    erased: tuple[Erased, ...]
    erased_through: int


class Engine:
    """`build` makes the scanner of a segment from its stored rows; `dimension_of` reads a GALLERY_CREATED
    entry; `growing_of` gives a device for the rows of an open tail, by their dimension, or None. Sizes are in rows,
    the memory budget in bytes."""

    def __init__(
        self,
        *,
        build: BuildScanner,
        dimension_of: DimensionOf,
        segment_rows_max: int,
        memory_bytes_max: int,
        tail_rows_max: int = TAIL_ROWS_MAX,
        growing_of: Callable[[int], Growing | None] = _no_device,
    ) -> None:
        self._build = build
        self._dimension_of = dimension_of
        self._growing_of = growing_of
        self._segment_rows_max = segment_rows_max
        self._memory_bytes_max = memory_bytes_max
        self._tail_rows_max = min(tail_rows_max, segment_rows_max)
        # Held by whoever changes the states or publishes; never while searching or building a scanner.
        self._writing = threading.Lock()
        self._states: dict[str, GalleryState] = {}
        self._bytes: dict[str, int] = {}
        self._uncoded_rows = 0
        self._erased: list[Erased] = []
        self._restored_sequence = 0
        self._changed = False
        self._rows_added = 0
        self._view = View(0, {})
        # Rows ended since the last publication; earlier views that may still be looked at, with those that ended
        # when each was replaced.
        self._ended: list[tuple[Ending, int]] = []
        self._outdated: deque[tuple[weakref.ref[View], list[tuple[Ending, int]]]] = deque()

    def restore(self, sequence: int, galleries: Mapping[str, GalleryState], damaged: Mapping[str, int]) -> None:
        """Start from what files held as of `sequence`; once, before anything else.

        `damaged` gives the dimension of each gallery whose files were not good. If there are any, replay begins
        at 0 and only their entries count until `sequence` is reached again; searches name them as missing.
        """
        with self._writing:
            self._states = dict(galleries)
            for gallery_id, dimension in damaged.items():
                self._states[gallery_id] = GalleryState(dimension, rebuilding=True)
            self._restored_sequence = sequence
            self._publish(self._states, 0 if damaged else sequence)

    # --- reading -----------------------------------------------------------------------------------

    @property
    def changed(self) -> bool:
        """Whether a snapshot would differ from the last one taken."""
        return self._changed

    @property
    def rows_added(self) -> int:
        """Rows enrolled since the start."""
        return self._rows_added

    @property
    def uncoded_rows(self) -> int:
        """Rows in segments that are scanned in full though codes would serve them faster."""
        return self._uncoded_rows

    @property
    def sequence(self) -> int:
        return self._view.sequence

    @property
    def view(self) -> View:
        """The galleries as they stand now; what is applied later does not show in it."""
        return self._view

    def search(self, request: SearchRequest, view: View | None = None) -> SearchResult:
        """Answer from the view (None: as it stands now). Raises InvalidInput (WRONG_DIMENSION)."""
        return search(view or self._view, request)

    def status(self) -> ShardStatus:
        with self._writing:
            counts = {gallery_id: _counts(state) for gallery_id, state in self._states.items()}
            return ShardStatus(
                sequence=self._view.sequence,
                live={gallery_id: live for gallery_id, (live, _) in counts.items()},
                dead={gallery_id: dead for gallery_id, (_, dead) in counts.items()},
                bytes_in_memory=sum(self._bytes.values()),
                segments=sum(len(state.segments) for state in self._states.values()),
            )

    # --- applying ----------------------------------------------------------------------------------

    def apply(self, entries: Sequence[LogEntry], through: int = 0) -> None:
        """Apply committed entries in order; those at or below the sequence applied are skipped.

        `through`, if it is beyond the last entry, says that the log up to there has no more that this index is to
        hold. Raises MemoryRefused or DataDamaged before anything of the block is applied.
        """
        with self._writing:
            if isinstance(entries, EnrolRun) and self._takes(entries):
                self._apply_run(entries[max(0, self._view.sequence + 1 - entries.sequence) :])
                return
            fresh = [entry for entry in entries if entry.sequence > self._view.sequence]
            self._judge(fresh)
            for start in range(0, len(fresh), _ENTRIES_AT_ONCE):
                self._apply_some(fresh[start : start + _ENTRIES_AT_ONCE])
            if through > self._view.sequence:
                self._reach(through, set())

    def _judge(self, entries: Sequence[LogEntry]) -> None:
        dimensions = {gallery_id: state.dimension for gallery_id, state in self._states.items()}
        incoming = 0
        for entry in entries:
            if entry.kind == EntryKind.GALLERY_CREATED:
                dimensions[entry.gallery_id] = self._dimension_of(entry)
            elif entry.kind == EntryKind.ENROL and entry.template is not None and not self._is_held(entry):
                dimension = dimensions.get(entry.gallery_id)
                if dimension is None:
                    raise DataDamaged(f"entry {entry.sequence} enrols into {entry.gallery_id}, which was not created")
                if len(entry.template) != 2 * dimension:
                    raise DataDamaged(
                        f"the template of entry {entry.sequence} has {len(entry.template)} bytes, "
                        f"gallery {entry.gallery_id} takes {2 * dimension}"
                    )
                incoming += len(entry.template) + len(entry.reference_id) + len(entry.subject_id) + ROW_BYTES
        self._require_room(incoming)

    def _require_room(self, incoming: int) -> None:
        """Raises MemoryRefused unless so many bytes more are within the budget."""
        if not incoming:
            return
        used = sum(self._bytes.values())
        needed = used + incoming + self._rewrite_reserve(used)
        if needed > self._memory_bytes_max:
            raise MemoryRefused(
                f"the index would need {needed:,} bytes, of which {incoming:,} for new references; "
                f"its budget is {self._memory_bytes_max:,}",
                field="index.memory_bytes_max",
                hint="raise index.memory_bytes_max, add memory or shards, or withdraw references",
            )

    def _rewrite_reserve(self, used: int) -> int:
        """Room for the largest rewrite, which holds its rows twice until the old ones are let go."""
        rows = [segment.rows for state in self._states.values() for segment in state.segments]
        return min(used, int(used / sum(rows) * self._segment_rows_max)) if sum(rows) else 0

    def _is_held(self, entry: LogEntry) -> bool:
        """Whether the entry is in the files that were opened, though the replay began before it."""
        if entry.sequence > self._restored_sequence:
            return False
        state = self._states.get(entry.gallery_id)
        return state is None or not state.rebuilding

    def _takes(self, run: EnrolRun) -> bool:
        """Whether the rows can be appended as they are."""
        state = self._states.get(run.gallery_id)
        if state is None or run.templates.shape[1] != state.dimension:
            return False
        return run.sequence > self._restored_sequence

    def _apply_run(self, run: EnrolRun) -> None:
        """Append new references, which end nothing: what `_apply_some` does, without an object for each."""
        names = sum(map(len, run.reference_ids)) + sum(map(len, run.subject_ids))
        self._require_room(run.templates.nbytes + names + len(run) * ROW_BYTES)
        state = self._states[run.gallery_id]
        while len(run):
            tail = state.open_tail(self._growing_of)
            some = run[: min(self._tail_rows_max - tail.rows, _ENTRIES_AT_ONCE)]
            tail.append(
                some.templates,
                np.arange(some.sequence, some.last_sequence + 1),
                some.expires_at_ms,
                [reference_id.encode() for reference_id in some.reference_ids],
                [subject_id.encode() for subject_id in some.subject_ids],
            )
            self._rows_added += len(some)
            if tail.rows >= self._tail_rows_max:
                self._freeze(run.gallery_id, state)
            self._changed = True
            self._reach(some.last_sequence, {run.gallery_id})
            run = run[len(some) :]

    def _apply_some(self, entries: Sequence[LogEntry]) -> None:
        changes: dict[str, list[LogEntry]] = {}
        touched: set[str] = set()
        for entry in entries:
            gallery_id = entry.gallery_id
            if self._is_held(entry):
                continue
            if entry.kind == EntryKind.GALLERY_CREATED:
                self._states.setdefault(gallery_id, GalleryState(self._dimension_of(entry)))
                touched.add(gallery_id)
            elif entry.kind == EntryKind.GALLERY_DELETED:
                changes.pop(gallery_id, None)
                self._delete(gallery_id)
                touched.add(gallery_id)
            elif entry.kind in (EntryKind.ENROL, EntryKind.WITHDRAW) and gallery_id in self._states:
                changes.setdefault(gallery_id, []).append(entry)
                touched.add(gallery_id)
        for gallery_id, some in changes.items():
            self._change(gallery_id, self._states[gallery_id], some)
        self._reach(entries[-1].sequence, touched)

    def _reach(self, sequence: int, touched: set[str]) -> None:
        """Publish that everything up to `sequence` is applied."""
        if sequence >= self._restored_sequence:
            for gallery_id, state in self._states.items():
                if state.rebuilding:
                    state.rebuilding = False
                    touched.add(gallery_id)
        self._changed = True
        self._publish(touched, sequence)

    def _change(self, gallery_id: str, state: GalleryState, entries: Sequence[LogEntry]) -> None:
        # The first entry of a reference ends whatever was live before the block; the last one, if it is an
        # enrolment, is the row that stays. An erased enrolment still ended the row that it replaced.
        ended: dict[bytes, LogEntry] = {}
        enrolled: dict[bytes, LogEntry] = {}
        for entry in entries:
            reference = entry.reference_id.encode()
            ended.setdefault(reference, entry)
            enrolled.pop(reference, None)
            if entry.kind == EntryKind.ENROL and entry.template is not None:
                enrolled[reference] = entry
        tail = state.open_tail(self._growing_of)
        elsewhere: list[bytes] = []
        for reference, entry in ended.items():
            row = tail.row_of.get(reference)
            if row is None or tail.died_at[row] != LIVE:
                elsewhere.append(reference)
            else:
                tail.end(row, entry.sequence, entry.at_ms)
                self._note_end(tail.growing, row)
        if elsewhere and state.segments:
            hashes = id_hashes(elsewhere)
            for segment in state.segments:
                positions, rows = segment.content.by_reference.candidates(hashes)
                for position, row in zip(positions.tolist(), rows.tolist(), strict=True):
                    reference = elsewhere[position]
                    if segment.is_live(row) and segment.reference_id(row) == reference:
                        entry = ended[reference]
                        segment.end(row, entry.sequence, entry.at_ms)
                        self._note_end(segment.scanner, row)
        if enrolled:
            _append(tail, list(enrolled), list(enrolled.values()))
            self._rows_added += len(enrolled)
        if tail.rows >= self._tail_rows_max:
            self._freeze(gallery_id, state)

    def _delete(self, gallery_id: str) -> None:
        state = self._states.pop(gallery_id, None)
        if state is None:
            return
        parts = [*(segment.content.sequences.all() for segment in state.segments)]
        if state.tail:
            parts.append(state.tail.sequences[: state.tail.rows])
        for sequences in parts:
            self._note_erased(gallery_id, sequences)

    def _freeze(self, gallery_id: str, state: GalleryState) -> None:
        """Turn the open tail into a segment, without its dead rows."""
        tail, state.tail = state.tail, None
        if tail is None:
            return
        state.tail_rows = tail.rows
        self._note_erased(gallery_id, tail.dead_sequences())
        segment = tail.frozen()
        if segment.rows:
            state.segments.append(segment)

    def _note_erased(self, gallery_id: str, sequences: Int64) -> None:
        if len(sequences):
            self._erased.append(Erased(gallery_id, len(sequences), int(sequences.min()), int(sequences.max())))

    def _publish(self, touched: Iterable[str], sequence: int) -> None:
        galleries = dict(self._view.galleries)
        for gallery_id in touched:
            state = self._states.get(gallery_id)
            if state is None:
                galleries.pop(gallery_id, None)
                self._bytes.pop(gallery_id, None)
            else:
                galleries[gallery_id] = state.view()
                self._bytes[gallery_id] = state.bytes_in_memory()
        self._uncoded_rows = sum(one.rows for state in self._states.values() for one in state.segments if not one.coded)
        ended, self._ended = self._ended, []
        self._outdated.append((weakref.ref(self._view), ended))
        self._view = View(sequence, galleries)
        while self._outdated and not self._outdated[0][1] and self._outdated[0][0]() is None:
            self._outdated.popleft()

    def _note_end(self, holder: object, row: int) -> None:
        ending = ending_of(holder)
        if ending is not None:
            self._ended.append((ending, row))

    def erase_ended(self) -> None:
        """Have devices erase the codes of rows that have ended, as soon as no search can look at a view that shows
        them. Called by one thread at a time."""
        due: dict[int, tuple[Ending, list[int]]] = {}
        with self._writing:
            while self._outdated and self._outdated[0][0]() is None:
                for ending, row in self._outdated.popleft()[1]:
                    due.setdefault(id(ending), (ending, []))[1].append(row)
        for ending, rows in due.values():
            ending.end(np.array(rows, np.int64))

    # --- what is held, as a whole ------------------------------------------------------------------

    def adopt(self, other: Engine) -> None:
        """Hold what `other` holds as well, from one moment to the next, and leave it empty.

        Both have applied the log up to the same sequence and share no reference; nobody uses `other` meanwhile.
        """
        if other.sequence != self.sequence:
            raise ValueError(f"adopting at sequence {self.sequence} from an index at {other.sequence}")
        with self._writing:
            given = other._surrender()
            for gallery_id, state in given.items():
                mine = self._states.setdefault(gallery_id, GalleryState(state.dimension))
                for segment in state.segments:
                    segment.file = None
                mine.segments += state.segments
            self._outdated.extend(other._outdated)
            self._changed = True
            self._publish(given, self._view.sequence)

    def _surrender(self) -> dict[str, GalleryState]:
        with self._writing:
            for gallery_id, state in self._states.items():
                self._freeze(gallery_id, state)
            given, self._states = self._states, {}
            self._bytes.clear()
            self._view = View(self._view.sequence, {})
            # Files of an index that gave everything away would look complete, and be empty.
            self._changed = False
            return given

    def end_rows(self, chosen: Callable[[str, Sequence[bytes]], NDArray[np.bool_]], at_ms: int) -> int:
        """End the live rows whose references `chosen(gallery_id, references)` marks, as of the sequence applied;
        returns how many. Called by one thread at a time; searches and applying go on meanwhile, and no entry that
        is applied meanwhile brings a row that would be chosen. `at_ms` is when they ended.

        The log knows nothing of this: until a snapshot taken later is in the files, a restart brings the rows back.
        """
        with self._writing:
            for gallery_id in self._states:
                self._freeze(gallery_id, self._states[gallery_id])
            self._publish(self._states, self._view.sequence)
        ended = 0
        judged: list[Segment] = []
        while (left := self._not_in(judged)) is not None:
            gallery_id, segment = left
            rows = segment.live_rows()
            marks = [
                chosen(gallery_id, [segment.reference_id(row) for row in some.tolist()])
                for some in np.array_split(rows, max(1, len(rows) // _ROWS_JUDGED_AT_ONCE))
            ]
            gone = rows[np.concatenate(marks)]
            with self._writing:
                state = self._states.get(gallery_id)
                if state is None or segment not in state.segments:
                    continue  # rewritten meanwhile, or its gallery deleted
                if len(gone):
                    # Views that were published already, some of this very sequence, go on showing the rows.
                    kept = segment
                    segment = replace(segment, died_at=None if kept.died_at is None else kept.died_at.copy())
                    for row in gone.tolist():
                        segment.end(row, self._view.sequence, at_ms)
                    ended += segment.dead - kept.dead
                    state.segments = [segment if one is kept else one for one in state.segments]
                    self._changed = True
                    self._publish([gallery_id], self._view.sequence)
            judged.append(segment)
        return ended

    def _not_in(self, judged: Sequence[Segment]) -> tuple[str, Segment] | None:
        with self._writing:
            for gallery_id, state in self._states.items():
                for segment in state.segments:
                    if segment not in judged:
                        return gallery_id, segment
        return None

    # --- rewriting ---------------------------------------------------------------------------------

    def rewrite_one(self, budget: CompactionBudget, now_ms: int, *, quiet: bool) -> int:
        """Join or clean the segments that need it most, in one gallery; the rows gone through, 0 if none does.

        Called by one thread at a time; searches and applying go on meanwhile.
        """
        if quiet:
            self._freeze_worthwhile()
        chosen = self._choose(budget, now_ms, quiet=quiet)
        if chosen is None:
            return 0
        gallery_id, segments = chosen
        rows_read = sum(segment.rows for segment in segments)
        kept = [segment.live_rows() for segment in segments]
        fresh: Segment | None = None
        if any(len(rows) for rows in kept):
            content = joined([(segment.content, rows) for segment, rows in zip(segments, kept, strict=True)])
            fresh = Segment(content, self._build(content.stored))
        with self._writing:
            state = self._states.get(gallery_id)
            if state is None or any(segment not in state.segments for segment in segments):
                return rows_read  # the gallery was deleted meanwhile
            state.segments = [segment for segment in state.segments if segment not in segments]
            if fresh is not None:
                _carry_ends(segments, kept, fresh)
                state.segments.append(fresh)
            for segment, rows in zip(segments, kept, strict=True):
                self._note_erased(gallery_id, np.delete(segment.content.sequences.all(), rows))
            self._changed = True
            self._publish([gallery_id], self._view.sequence)
        return rows_read

    def _freeze_worthwhile(self) -> None:
        """Turn the open tails into segments whose rows codes would serve faster."""
        with self._writing:
            for gallery_id, state in self._states.items():
                tail = state.tail
                if tail is None or tail.growing is not None:
                    continue
                if worth_coding(tail.rows, [segment.rows for segment in state.segments], state.dimension):
                    self._freeze(gallery_id, state)
                    self._changed = True
                    self._publish([gallery_id], self._view.sequence)

    def _choose(self, budget: CompactionBudget, now_ms: int, *, quiet: bool) -> tuple[str, list[Segment]] | None:
        with self._writing:
            for gallery_id, state in self._states.items():
                sizes = [SegmentSize(one.live, one.dead, one.died_ms_min, not one.coded) for one in state.segments]
                positions = to_rewrite(sizes, budget, now_ms, quiet=quiet)
                if positions:
                    return gallery_id, [state.segments[i] for i in positions]
        return None

    # --- files -------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot | None:
        """Freeze every tail and say what the files must hold; None while galleries are being rebuilt, since
        what is held does not yet reach what the sequence says.

        The rows that `erased` names leave the files when those of the snapshot have replaced them.
        """
        with self._writing:
            if any(state.rebuilding for state in self._states.values()):
                return None
            if self._view.sequence < self._restored_sequence:
                return None
            touched = [gallery_id for gallery_id, state in self._states.items() if state.tail]
            for gallery_id in touched:
                self._freeze(gallery_id, self._states[gallery_id])
            self._publish(touched, self._view.sequence)
            erased, self._erased = tuple(self._erased), []
            self._changed = False
            galleries = {
                gallery_id: (state.dimension, tuple(state.segments)) for gallery_id, state in self._states.items()
            }
            return Snapshot(self._view.sequence, galleries, erased, self._erased_through())

    def erased_through(self) -> int:
        """The sequence through which no row that had ended is held. Of the files as well, if nothing was applied since
        they were read or written."""
        with self._writing:
            return self._erased_through()

    def _erased_through(self) -> int:
        if any(state.rebuilding for state in self._states.values()):
            return 0
        parts = [part for state in self._states.values() for part in (*state.segments, state.tail) if part]
        ends = [int(part.died_at[: part.rows].min()) - 1 for part in parts if part.dead and part.died_at is not None]
        return min((self._view.sequence, *ends))

    def snapshot_failed(self, snapshot: Snapshot) -> None:
        """The files could not be written: what was to be reported as erased is still in them."""
        with self._writing:
            self._erased[:0] = snapshot.erased
            self._changed = True


def _append(tail: Tail, references: list[bytes], entries: list[LogEntry]) -> None:
    count = len(entries)
    templates = b"".join([entry.template or b"" for entry in entries])
    tail.append(
        np.frombuffer(templates, "<f2").reshape(count, -1),
        np.fromiter((entry.sequence for entry in entries), np.int64, count),
        np.fromiter((entry.expires_at_ms for entry in entries), np.int64, count),
        references,
        [entry.subject_id.encode() for entry in entries],
    )


def _carry_ends(segments: Sequence[Segment], kept: Sequence[Int64], fresh: Segment) -> None:
    """What ended while the kept rows were copied ended in the old segments."""
    start = 0
    for segment, rows in zip(segments, kept, strict=True):
        if segment.died_at is not None:
            died_at = segment.died_at[rows]
            for place in np.flatnonzero(died_at != LIVE).tolist():
                fresh.end(start + place, int(died_at[place]), segment.died_ms_min)
        start += len(rows)


def _counts(state: GalleryState) -> tuple[int, int]:
    parts = [*state.segments, *((state.tail,) if state.tail else ())]
    dead = sum(part.dead for part in parts)
    return sum(part.rows for part in parts) - dead, dead
