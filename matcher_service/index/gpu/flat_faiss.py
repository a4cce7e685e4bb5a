"""FAISS on a GPU as the filter, where the int8 kernel cannot run: a flat index of float16 rows, re-scored exactly.

What FAISS on GPUs does not do, and what is done about it (FAISS 1.15, https://github.com/facebookresearch/faiss/wiki):

- No range search and at most 2,048 results: the search is asked for more until the last result lies below the cut;
  a probe with more results than that is scanned in full on the CPU.
- No removal, and every `add` copies the index: rows are added once, and a segment is rebuilt to lose some.
- An IDSelector is ignored without a word: none is used, liveness is the engine's.
- One resource object must not serve two threads: each device has one, and one thread that uses it.

The index holds the stored float16 values as they are. The probe is rounded to float16 too, and sums are float32 of
some order: a product strays from the score by at most (2^-11 + gamma) |q| |x| + 2^-24 sqrt(d) |x|, the first for
rounding the probe's normal, the last for its subnormal values (half of the spacing 2^-24, for each of d values).
Tensor cores may cut off where float32 would round: gamma is taken fourfold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import StartRefused
from matcher_service.index.flat import FlatScanner, Found, gather
from matcher_service.index.scanner import Growing, Guess, Hits, Scanner, unsure
from matcher_service.index.scanners import Scanners
from matcher_service.index.score import float32_margin, norms, pair_scores
from matcher_service.terms import Float32, Float64

RESULTS_MAX = 2048
_RESULTS_FIRST = 16
_TEMP_BYTES = 256 << 20
_ADD_ROWS = 1 << 16


class FlatIndex(Protocol):
    """The part of a FAISS index that is used."""

    def add(self, rows: Float32) -> None: ...
    def search(self, probes: Float32, count: int) -> tuple[Float32, NDArray[np.int64]]: ...


class Card(NamedTuple):
    """A device, as the one thread that uses it, and what makes an empty index of a dimension on it."""

    thread: ThreadPoolExecutor
    index_of: Callable[[int], FlatIndex]


class FaissFlatScanner:
    """An exact scanner over `stored`, float16 [n, d] in C order, of finite numbers, kept on the host too."""

    def __init__(self, stored: NDArray[np.float16], card: Card) -> None:
        self.rows, self._dimension = int(stored.shape[0]), int(stored.shape[1])
        self._stored = stored
        self._card = card
        self._norm_max = float(norms(stored).max(initial=0.0))
        self._whole = FlatScanner(stored)
        self._index = card.thread.submit(self._filled).result()

    def _filled(self) -> FlatIndex:
        index = self._card.index_of(self._dimension)
        for start in range(0, self.rows, _ADD_ROWS):
            index.add(self._stored[start : start + _ADD_ROWS].astype(np.float32))
        return index

    def scan(self, probes: Float32, floors: Float32) -> Hits:
        lengths = norms(probes)
        cuts = (floors.astype(np.float64) - self._margin(lengths)).astype(np.float32)
        count = min(_RESULTS_FIRST, self.rows)
        found: list[Found] = []
        served = np.zeros(len(probes), np.bool_)
        open_ = np.flatnonzero(np.isfinite(lengths) & np.isfinite(cuts)) if self.rows else np.empty(0, np.int64)
        while open_.size and count <= RESULTS_MAX:
            products, rows = self._search(np.ascontiguousarray(probes[open_]), count)
            # Of what is below the cut, nothing reaches the floor: no more results are needed.
            done = (products[:, -1] < cuts[open_]) if count < self.rows else np.ones(open_.size, np.bool_)
            near = (products >= cuts[open_, None]) & (rows >= 0) & done[:, None]
            which = open_[np.nonzero(near)[0]]
            found.append(self._exact(probes, floors, which, rows[near]))
            served[open_[done]] = True
            open_ = open_[~done]
            count = min(8 * count, max(RESULTS_MAX, count + 1), self.rows) if count < self.rows else RESULTS_MAX + 1
        rest = np.flatnonzero(~served)
        if rest.size:
            flat = self._whole.scan(np.ascontiguousarray(probes[rest]), np.ascontiguousarray(floors[rest]))
            found.append(Found(np.repeat(rest, np.diff(flat.offsets)), flat.rows, flat.scores))
        return gather(found, served)

    def guess(self, probes: Float32, count: int) -> Guess:
        wanted = min(count, self.rows, RESULTS_MAX)
        if wanted <= 0 or wanted < min(count, self.rows) or not len(probes):
            return self._whole.guess(probes, count)
        rows = self._search(np.ascontiguousarray(probes), wanted)[1].ravel()
        which = np.repeat(np.arange(len(probes)), wanted)
        which, rows = which[rows >= 0], rows[rows >= 0]
        found = Found(which, rows, pair_scores(self._stored, rows, probes, which))
        return unsure(gather([found], np.zeros(len(probes), np.bool_)))

    def bytes_in_memory(self) -> int:
        """On the host."""
        return int(self._stored.nbytes)

    def _search(self, probes: Float32, count: int) -> tuple[Float32, NDArray[np.int64]]:
        return self._card.thread.submit(self._index.search, probes, count).result()

    def _margin(self, lengths: Float64) -> Float64:
        rounding = 4 * float32_margin(self._dimension, self._norm_max, lengths)
        probe = 2.0**-11 * lengths + 2.0**-24 * self._dimension**0.5
        return np.asarray(rounding + probe * self._norm_max * (1 + 2.0**-20))

    def _exact(self, probes: Float32, floors: Float32, which: NDArray[np.int64], rows: NDArray[np.int64]) -> Found:
        scores = pair_scores(self._stored, rows, probes, which)
        kept = scores >= floors[which]
        return Found(which[kept], rows[kept], scores[kept])


class FaissScanners:
    """Segments on FAISS devices, one after another in turn. Open tails and what cannot be on a device are searched
    by `cpu`."""

    def __init__(self, cards: Sequence[Card], cpu: Scanners) -> None:
        self._cards = list(cards)
        self._cpu = cpu
        self._made = 0

    def build(self, stored: NDArray[np.float16]) -> Scanner:
        card = self._cards[self._made % len(self._cards)]
        self._made += 1
        try:
            return FaissFlatScanner(stored, card)
        except RuntimeError:  # what FAISS raises for every failure of a device, out of memory too
            return self._cpu.build(stored)

    def arrays(self, scanner: Scanner) -> Mapping[str, NDArray[Any]]:
        return self._cpu.arrays(scanner)

    def load(self, stored: NDArray[np.float16], arrays: Mapping[str, NDArray[Any]]) -> Scanner:
        return self._cpu.load(stored, arrays) if arrays else self.build(stored)

    def growing(self, dimension: int) -> Growing | None:
        return None

    def tend(self) -> bool:
        return False

    def condition(self) -> Mapping[str, str]:
        return {}

    def memory(self) -> Mapping[str, tuple[int, int]]:
        return {}  # FAISS takes what it needs and does not say how much

    def close(self) -> None:
        for card in self._cards:
            card.thread.shutdown()
        self._cpu.close()


def open_faiss_scanners(cpu: Scanners) -> FaissScanners:
    """One card for each GPU that FAISS sees. Raises StartRefused if this FAISS was built without GPUs or sees none."""
    count = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if not count:
        raise StartRefused(
            "this FAISS sees no GPU",
            field="index.scanner",
            hint="install faiss-gpu in place of faiss-cpu on a machine with a GPU, or set it to cpu",
        )
    return FaissScanners([gpu_card(number) for number in range(count)], cpu)


def gpu_card(number: int) -> Card:
    """The card of a GPU, with the one resource object that its thread uses."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_TEMP_BYTES)
    config = faiss.GpuIndexFlatConfig()
    config.device = number
    config.useFloat16 = True

    def index_of(dimension: int) -> FlatIndex:
        index: FlatIndex = faiss.GpuIndexFlatIP(resources, dimension, config)
        return index

    return Card(ThreadPoolExecutor(1, f"faiss-gpu-{number}"), index_of)
