"""The exact search over a view: every part of every gallery, live rows only, best subjects first.

For a thresholded probe each part is scanned once at its floor. A probe whose floor would let many rows
through is cut as a top-k query: the score of the rank_max-th best subject found so far is a floor that loses
nothing, so a part's guess gives a first floor and every later part is scanned at the best floor so far. A guess
outside which nothing reaches that floor is the part's whole answer. The comparison stays >=, so candidates that
tie with the last one survive and are cut by the order of ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import InvalidInput
from matcher_service.index import scanner
from matcher_service.index.rows import UInt32
from matcher_service.index.scanner import Hits, Together, TooManyHits, together_of
from matcher_service.index.segment import Part
from matcher_service.merge import best_candidates, kth_best_scores, offsets_of, order_of
from matcher_service.terms import Cause, Float32, Int64, SearchRequest, SearchResult

# Impostor scores of real spaces spread wider than the 1/sqrt(d) of independent directions.
_SPREAD = 1.5
# Expected hits per wanted candidate above which a guess pays for itself.
_HITS_PER_CANDIDATE = 4
# Rows that a guess is asked for: some are another's of the same subject, or ended.
_GUESSED_PER_CANDIDATE = 1.5
_GUESSED_MORE = 4


@dataclass(frozen=True, slots=True)
class GalleryView:
    """A gallery at one moment: its parts, largest first. `held_sequence` is what its files reached when they
    were opened; while `rebuilding`, it is being filled again from the log and its answers are incomplete."""

    dimension: int
    parts: tuple[Part, ...]
    held_sequence: int = 0
    rebuilding: bool = False


@dataclass(frozen=True, slots=True, weakref_slot=True)
class View:
    """All galleries as of `sequence`."""

    sequence: int
    galleries: Mapping[str, GalleryView]


class _Table(NamedTuple):
    """m live hits in columns; `part` indexes the parts of the search."""

    probes: Int64
    gallery: Int64
    part: Int64
    rows: Int64
    scores: Float32
    subjects: UInt32


def search(view: View, request: SearchRequest) -> SearchResult:
    """Answer a request from a view. Raises InvalidInput (WRONG_DIMENSION)."""
    return _Search(view, request).run()


class _Search:
    def __init__(self, view: View, request: SearchRequest) -> None:
        self._view = view
        self._request = request
        self._parts: list[Part] = []
        self._tables: list[_Table] = []
        self._certified = 0
        self._scanned = 0
        probe_count = len(request.probes)
        # The score of the rank_max-th best subject found so far: nothing below it can be a candidate.
        self._kth = np.full(probe_count, -np.inf, np.float32)

    def run(self) -> SearchResult:
        request, view = self._request, self._view
        held = [view.galleries.get(gallery_id) for gallery_id in request.gallery_ids]
        dimension = request.probes.shape[1]
        for gallery_id, gallery in zip(request.gallery_ids, held, strict=True):
            if gallery is not None and gallery.dimension != dimension:
                raise InvalidInput(
                    f"gallery {gallery_id} holds {gallery.dimension}-d templates, the probes are {dimension}-d",
                    field="probes",
                    cause=Cause.WRONG_DIMENSION,
                )
        if len(request.probes):
            self._scan_all(held)
        missing = tuple(
            f"gallery/{gallery_id}"
            for gallery_id, gallery in zip(request.gallery_ids, held, strict=True)
            if gallery is not None and gallery.rebuilding
        )
        return self._result(missing)

    def _scan_all(self, held: Sequence[GalleryView | None]) -> None:
        request = self._request
        plan = [
            (part, number, max(gallery.held_sequence, self._view.sequence))
            for number, gallery in enumerate(held)
            if gallery is not None
            for part in gallery.parts
            if part.rows
        ]
        plan.sort(key=lambda one: -one[0].rows)
        loose = self._loose_floor(sum(part.rows for part, _, _ in plan))
        if bool((request.floors[:, [number for _, number, _ in plan]] >= loose).all()):
            plan = self._scan_together(plan)
        for part, number, sequence in plan:
            floors = np.ascontiguousarray(request.floors[:, number], np.float32)
            self._scan(part, number, sequence, floors, floors < loose)

    def _scan_together(self, plan: list[tuple[Part, int, int]]) -> list[tuple[Part, int, int]]:
        """Scan the parts that share a device in one go; the others are left to do."""
        left: list[tuple[Part, int, int]] = []
        shared: dict[int, tuple[Together, list[tuple[Part, int, int]]]] = {}
        for one in plan:
            together = together_of(one[0].scanner)
            if together is None:
                left.append(one)
            else:
                shared.setdefault(id(together), (together, []))[1].append(one)
        everyone = np.arange(len(self._request.probes))
        for together, some in shared.values():
            floors = np.ascontiguousarray(self._request.floors[:, [number for _, number, _ in some]], np.float32)
            found = together.scan_all([part.scanner for part, _, _ in some], self._request.probes, floors)
            for (part, number, sequence), hits in zip(some, found, strict=True):
                self._take(part, number, sequence, hits, everyone)
        return left

    def _loose_floor(self, rows: int) -> float:
        """The floor below which many more rows than wanted would come back, were the rows independent."""
        wanted = _HITS_PER_CANDIDATE * int(self._request.rank_max.max())
        if rows <= wanted:
            return -np.inf
        return -NormalDist(0.0, _SPREAD / self._request.probes.shape[1] ** 0.5).inv_cdf(wanted / rows)

    def _scan(self, part: Part, number: int, sequence: int, floors: Float32, loose: NDArray[np.bool_]) -> None:
        any_loose = bool(loose.any())
        chunks = [np.arange(len(floors))]
        if any_loose:
            answered = self._raise_floors(part, number, sequence, floors, loose & ~np.isfinite(self._kth))
            # Without a floor every row is a hit: few such probes at a time.
            boundless = loose & ~np.isfinite(self._kth)
            chunks = [np.flatnonzero(~boundless & ~answered)]
            at_once = max(1, scanner.HITS_MAX // part.rows)
            rest = np.flatnonzero(boundless & ~answered)
            chunks += [rest[start : start + at_once] for start in range(0, len(rest), at_once)]
        floors = np.maximum(floors, self._kth)
        for chosen in chunks:
            if len(chosen):
                self._scan_some(part, number, sequence, floors, chosen)
        if any_loose:
            self._tighten()

    def _scan_some(self, part: Part, number: int, sequence: int, floors: Float32, chosen: Int64) -> None:
        """Scan for the probes numbered `chosen`, in halves where they meet a crowd."""
        whole = len(chosen) == len(floors)
        probes = self._request.probes if whole else self._request.probes[chosen]
        try:
            hits = part.scanner.scan(probes, floors if whole else floors[chosen])
        except TooManyHits:
            half = len(chosen) // 2
            for some in (chosen[:half], chosen[half:]):
                self._scan_some(part, number, sequence, floors, some)
            return
        self._take(part, number, sequence, hits, chosen)
        if sum(len(table.rows) for table in self._tables) > scanner.HITS_MAX:
            self._cut()

    def _cut(self) -> None:
        """Let go of all hits but the candidates so far: no other can become one."""
        found = _joined(self._tables)
        self._tables = [_taken(found, self._candidates(found))]

    def _take(self, part: Part, number: int, sequence: int, hits: Hits, chosen: Int64) -> None:
        certified = int(np.count_nonzero(hits.certified))
        self._certified += certified
        self._scanned += len(chosen) - certified
        self._keep(part, self._live(part, number, sequence, hits, chosen))

    def _keep(self, part: Part, table: _Table) -> None:
        """Keep what `_live` gave of the part."""
        if len(table.rows):
            self._parts.append(part)
            self._tables.append(table)

    def _live(self, part: Part, number: int, sequence: int, hits: Hits, chosen: Int64) -> _Table:
        """The hits that are neither ended nor expired."""
        rows = hits.rows
        if not len(rows):
            return _table(chosen[:0], 0, 0, rows, hits.scores, rows.astype(np.uint32))
        live = part.expires_at_ms[rows] > self._request.at_ms
        died_at = part.died_at
        if died_at is not None:
            live &= died_at[rows] > sequence
        probes = np.repeat(chosen, np.diff(hits.offsets))[live]
        rows = rows[live]
        return _table(probes, number, len(self._parts), rows, hits.scores[live], part.subject_hashes[rows])

    def _raise_floors(
        self, part: Part, number: int, sequence: int, floors: Float32, lacking: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Guess until each lacking probe has rank_max subjects, has come below its floor, or the part has no more
        rows. Says of which probes a guess was the whole answer of the part: nothing outside it reaches their floor."""
        count = int(_GUESSED_PER_CANDIDATE * int(self._request.rank_max.max())) + _GUESSED_MORE
        chosen = np.flatnonzero(lacking)
        answered = np.zeros(len(floors), np.bool_)
        while len(chosen) and count < part.rows:
            at_once = max(1, scanner.HITS_MAX // count)
            done = np.zeros(len(floors), np.bool_)
            for start in range(0, len(chosen), at_once):
                some = chosen[start : start + at_once]
                guess = part.scanner.guess(self._request.probes[some], count)
                guessed = self._live(part, number, sequence, guess.hits, some)
                # What is below the floor of this gallery is no candidate, though another's floor may be lower.
                reached = guessed.scores >= floors[guessed.probes]
                done[guessed.probes[~reached]] = True
                guessed = _taken(guessed, reached)
                self._raise_by(guessed)
                whole = np.maximum(floors[some], self._kth[some]) > guess.beyond
                answered[some[whole]] = True
                certified = int(np.count_nonzero(guess.hits.certified[whole]))
                self._certified += certified
                self._scanned += int(np.count_nonzero(whole)) - certified
                self._keep(part, _taken(guessed, answered[guessed.probes]))
            chosen = chosen[~done[chosen] & ~answered[chosen] & ~np.isfinite(self._kth[chosen])]
            count *= 4
        return answered

    def _raise_by(self, guessed: _Table) -> None:
        tables = [*self._tables, guessed]
        joined = _joined(tables)
        self._kth = np.maximum(
            self._kth,
            kth_best_scores(joined.probes, joined.gallery, joined.scores, joined.subjects, self._request.rank_max),
        )

    def _tighten(self) -> None:
        """Raise the floors by what is found so far and let go of what fell below them."""
        if not self._tables:
            return
        joined = _joined(self._tables)
        kth = kth_best_scores(joined.probes, joined.gallery, joined.scores, joined.subjects, self._request.rank_max)
        self._kth = np.maximum(self._kth, kth)
        kept = joined.scores >= self._kth[joined.probes]
        self._tables = [_taken(joined, kept)]

    def _result(self, missing: tuple[str, ...]) -> SearchResult:
        found = _joined(self._tables)
        kept = self._candidates(found)
        return SearchResult(
            offsets=offsets_of(found.probes[kept], len(self._request.probes)),
            gallery=found.gallery[kept],
            scores=found.scores[kept],
            reference_ids=[self._reference_of(found, hit).decode() for hit in kept.tolist()],
            subject_ids=[self._subject_of(found, hit).decode() for hit in kept.tolist()],
            sequence=self._view.sequence,
            missing=missing,
            certified=self._certified,
            scanned=self._scanned,
        )

    def _candidates(self, found: _Table) -> Int64:
        """Which of the hits are the candidates, as positions in order of probe and rank."""
        return best_candidates(
            found.probes,
            found.gallery,
            found.scores,
            found.subjects,
            lambda hit: self._reference_of(found, hit),
            lambda hit: self._subject_of(found, hit),
            order_of(self._request.gallery_ids),
            self._request.rank_max,
        )

    def _reference_of(self, found: _Table, hit: int) -> bytes:
        return self._parts[int(found.part[hit])].reference_id(int(found.rows[hit]))

    def _subject_of(self, found: _Table, hit: int) -> bytes:
        return self._parts[int(found.part[hit])].subject_id(int(found.rows[hit]))


def _table(probes: Int64, number: int, part: int, rows: Int64, scores: Float32, subjects: UInt32) -> _Table:
    count = len(rows)
    return _Table(probes, np.full(count, number), np.full(count, part), rows, scores, subjects)


def _taken(table: _Table, kept: NDArray[np.bool_] | Int64) -> _Table:
    probes, gallery, part, rows, scores, subjects = table
    return _Table(probes[kept], gallery[kept], part[kept], rows[kept], scores[kept], subjects[kept])


def _joined(tables: Sequence[_Table]) -> _Table:
    if len(tables) == 1:
        return tables[0]
    if not tables:
        none = np.empty(0, np.int64)
        return _Table(none, none, none, none, none.astype(np.float32), none.astype(np.uint32))
    return _Table(*(np.concatenate(columns) for columns in zip(*tables, strict=True)))
