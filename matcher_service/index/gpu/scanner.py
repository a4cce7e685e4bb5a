"""The Scanner over rows with codes on a GPU: the filter says which rows could reach the floor, exact scores decide.

What the filter cannot serve is scanned in full on the CPU: a probe whose floor is so low that its cut-off is not
positive, a probe without codes, and every probe while the rows have no place on a device. No case changes an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from matcher_service.errors import ServiceFault
from matcher_service.index.flat import NOTHING, FlatScanner, Found, gather, kept_of
from matcher_service.index.gpu.filter import Filter, Pairs
from matcher_service.index.gpu.slabs import Extent, Placed
from matcher_service.index.integer_bound import CODE_MAX, code_probes, cut_offs
from matcher_service.index.scanner import Guess, Hits, Scanner, unsure
from matcher_service.index.score import norms, pair_scores
from matcher_service.terms import Float32, Int64

_GUESS_PRODUCTS_MAX = 1 << 26
_GUESS_SHARE = 8  # a guess goes through one in so many rows: codes cost less than hits to re-score
_GUESS_ROWS_MIN = 8  # and through at least so many for each row wanted


class OnDevice(Protocol):
    """Who scans the segments of a gallery together, one launch per device."""

    def scan_all(self, scanners: Sequence[GpuScanner], probes: Float32, floors: Float32) -> list[Hits]:
        """The hits of each scanner; `floors` float32 [n, number of scanners]."""
        ...

    def lost(self, filter_: Filter, error: ServiceFault) -> None:
        """A device failed while it was used."""
        ...

    def settle(self, scanner: GpuScanner) -> GpuScanner:
        """Find a place for rows that have none, now or later; the scanner itself."""
        ...


class Place:
    """Where the codes of some rows are: an extent in a pool, and the odd rows, that have no codes, on the host."""

    def __init__(self, filter_: Filter, placed: Placed, extent: Extent, stored: NDArray[np.float16]) -> None:
        self.filter = filter_
        self.placed = placed
        self.extent = extent
        self.odd: FlatScanner | None = None
        if extent.odd.size:
            rows = stored[extent.odd]
            self.odd = FlatScanner(rows, kept=kept_of(rows))
        # |x| is at most |s c| + |e|, and of the odd rows what it is; the factor covers the addition.
        odd_max = float(norms(stored[extent.odd]).max(initial=0.0))
        self.norm_max = max(odd_max, (extent.law.reach + extent.law.error) * (1 + 2.0**-50))


class GpuScanner:
    """An exact scanner over `stored`, float16 [n, d] in C order, of finite numbers, kept on the host. `place`: where
    its codes are (None: nowhere at present); `whole` does the full scans (None: a FlatScanner, once it is needed).
    `fallback` answers in its stead for rows without a place, if it is set."""

    def __init__(
        self,
        stored: NDArray[np.float16],
        together: OnDevice,
        whole: Scanner | None = None,
        place: Place | None = None,
    ) -> None:
        self.rows = len(stored)
        self.stored = stored
        self.together = together
        self.place = place
        self.fallback: Scanner | None = None
        self._whole = whole

    def on_cpu(self) -> Scanner:
        """What answers where the device cannot."""
        if self.fallback is not None:
            return self.fallback
        if self._whole is None:
            self._whole = FlatScanner(self.stored, None, self.place.norm_max if self.place is not None else None)
        return self._whole

    def scan(self, probes: Float32, floors: Float32) -> Hits:
        return self.together.scan_all([self], probes, floors[:, None])[0]

    def guess(self, probes: Float32, count: int) -> Guess:
        """By the products of codes of the first rows, then by score."""
        place, wanted = self.place, min(count, self.rows)
        if place is None or wanted <= 0 or not len(probes):
            return self.on_cpu().guess(probes, count)
        try:
            rows = _best_codes(place, probes, max(_GUESS_ROWS_MIN * wanted, self.rows // _GUESS_SHARE), wanted)
        except ServiceFault as error:
            self.together.lost(place.filter, error)
            return self.on_cpu().guess(probes, count)
        if rows.shape[1] < wanted:
            return self.on_cpu().guess(probes, count)
        which = np.repeat(np.arange(len(probes)), wanted)
        scores = pair_scores(self.stored, rows.ravel(), probes, which)
        return unsure(gather([Found(which, rows.ravel(), scores)], np.zeros(len(probes), np.bool_)))

    def end(self, rows: Int64) -> None:
        """Rows that no search will be asked for again: their codes are erased."""
        place = self.place
        if place is None:
            return
        try:
            place.placed.end(rows)
        except ServiceFault as error:
            self.together.lost(place.filter, error)

    def bytes_in_memory(self) -> int:
        """On the host; the device has a budget of its own."""
        held = self.fallback or self._whole
        return int(self.stored.nbytes) if held is None else held.bytes_in_memory()


def scan_placed(
    filter_: Filter, scanners: Sequence[GpuScanner], places: Sequence[Place], probes: Float32, floors: Float32
) -> list[Hits]:
    """The hits of scanners that are all on one device; `floors` float32 [n, g]. Raises ShardUnavailable or
    MemoryRefused, having changed nothing."""
    coded = code_probes(probes)
    cuts = cut_offs(coded, floors, [place.extent.law for place in places])
    found: list[list[Found]] = [[] for _ in scanners]
    for pairs in filter_.pairs([place.extent for place in places], coded.codes, cuts):
        for group, some in _by_group(pairs):
            found[group].append(_reached(scanners[group].stored, some, probes, floors[:, group]))
    hits = []
    for group, (scanner, place) in enumerate(zip(scanners, places, strict=True)):
        served = cuts[group] > 0
        if place.odd is not None:
            found[group].append(_some(place.odd, probes, floors[:, group], np.flatnonzero(served), place.extent.odd))
        found[group].append(_some(scanner.on_cpu(), probes, floors[:, group], np.flatnonzero(~served), None))
        hits.append(gather(found[group], served))
    return hits


def _by_group(pairs: Pairs) -> list[tuple[int, Pairs]]:
    groups = np.unique(pairs.groups)
    if groups.size == 1:
        return [(int(groups[0]), pairs)]
    order = np.argsort(pairs.groups, kind="stable")
    bounds = np.searchsorted(pairs.groups[order], groups, side="right")
    parts = np.split(order, bounds[:-1])
    return [
        (int(group), Pairs(pairs.probes[part], pairs.groups[part], pairs.rows[part]))
        for group, part in zip(groups, parts, strict=True)
    ]


def _reached(stored: NDArray[np.float16], pairs: Pairs, probes: Float32, floors: Float32) -> Found:
    scores = pair_scores(stored, pairs.rows, probes, pairs.probes)
    kept = scores >= floors[pairs.probes]
    return Found(pairs.probes[kept], pairs.rows[kept], scores[kept])


def _some(scanner: Scanner, probes: Float32, floors: Float32, chosen: Int64, rows: Int64 | None) -> Found:
    """The hits of some of the probes; `rows` are the numbers of the scanner's rows, if others than its own."""
    if not chosen.size:
        return NOTHING
    hits = scanner.scan(np.ascontiguousarray(probes[chosen]), np.ascontiguousarray(floors[chosen]))
    which = np.repeat(chosen, np.diff(hits.offsets))
    return Found(which, hits.rows if rows is None else rows[hits.rows], hits.scores)


def _best_codes(place: Place, probes: Float32, sample: int, count: int) -> Int64:
    """The rows, int64 [n, count or fewer], with the largest products among the first `sample` or so."""
    coded = code_probes(probes)
    device, placed = place.placed.pool.device, place.placed
    # Float16 of a tensor core's product would overflow from 65,504 on: the probes are made small.
    kind = torch.float16 if device.torch.type == "cuda" else torch.float32
    best: list[Float32] = []
    rows: list[Int64] = []
    with device.work():
        wanted = torch.zeros((len(probes), placed.width), dtype=kind, device=device.torch)
        wanted[:, : probes.shape[1]] = torch.from_numpy(coded.codes).to(device.torch).to(kind) / CODE_MAX
        for first, codes in placed.first_slabs(min(sample, place.extent.rows)):
            wide = codes.to(kind)
            step = max(1, _GUESS_PRODUCTS_MAX // len(codes))
            for start in range(0, len(probes), step):
                top = torch.topk(wanted[start : start + step] @ wide.T, min(count, len(codes)), dim=1)
                best.append(top.values.float().cpu().numpy())
                rows.append(top.indices.cpu().numpy() + first)
    pieces = -(-len(probes) // step)
    products, places = (
        np.concatenate([np.concatenate(column[i : i + pieces]) for i in range(0, len(column), pieces)], axis=1)
        for column in (best, rows)
    )
    chosen = np.argsort(-products, axis=1, kind="stable")[:, :count]
    return np.asarray(np.take_along_axis(places, chosen, axis=1), np.int64)


class GpuTail:
    """Rows that keep coming, in the slabs of a device. Once the device failed they have no place there, and are
    scanned on the CPU until they become a segment."""

    def __init__(self, filter_: Filter, placed: Placed, together: OnDevice) -> None:
        self._filter = filter_
        self._placed: Placed | None = placed
        self._together = together

    def append(self, stored: NDArray[np.float16]) -> None:
        """Append m rows, float16 [m, d]."""
        if self._placed is None:
            return
        try:
            self._placed.append(stored)
        except ServiceFault as error:
            self._together.lost(self._filter, error)
            self._placed = None

    def view(self, stored: NDArray[np.float16], whole: Scanner) -> Scanner:
        """A scanner over the rows so far, `stored` float16 [n, d]; `whole` scans them in full."""
        placed = self._placed
        if placed is None or placed.extent.rows != len(stored):
            return whole
        return GpuScanner(stored, self._together, whole, Place(self._filter, placed, placed.extent, stored))

    def frozen(self, stored: NDArray[np.float16], whole: Scanner) -> Scanner:
        """The rows stay where they are, unless some of them have ended."""
        placed, place = self._placed, None
        if placed is not None and placed.extent.rows == len(stored):
            place = Place(self._filter, placed, placed.extent, stored)
        return self._together.settle(GpuScanner(stored, self._together, whole, place))

    def end(self, rows: Int64) -> None:
        """Rows that no search will be asked for again: their codes are erased."""
        if self._placed is None:
            return
        try:
            self._placed.end(rows)
        except ServiceFault as error:
            self._together.lost(self._filter, error)
            self._placed = None
