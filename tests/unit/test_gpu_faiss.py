"""The FAISS GPU scanner owes what every Scanner owes. Here FAISS's CPU index stands in, behind the same two calls;
`make test-gpu` uses the GPU's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest

from matcher_service.errors import StartRefused
from matcher_service.index.gpu.flat_faiss import (
    RESULTS_MAX,
    Card,
    FaissFlatScanner,
    FaissScanners,
    gpu_card,
    open_faiss_scanners,
)
from matcher_service.index.scanner import Scanner
from matcher_service.index.scanners import BySize
from tests.contract import test_scanners as contract

ON_GPU = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


class Rounded:
    """A flat index as a GPU's in float16: probes are rounded before the product."""

    def __init__(self, dimension: int) -> None:
        self._index = faiss.IndexFlatIP(dimension)

    def add(self, rows: np.ndarray) -> None:
        self._index.add(rows)

    def search(self, probes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        assert count <= RESULTS_MAX, "a GPU gives no more"
        with np.errstate(over="ignore"):
            halves = probes.astype(np.float16).astype(np.float32)
        found: tuple[np.ndarray, np.ndarray] = self._index.search(halves, count)
        return found


@pytest.fixture(scope="module")
def card() -> Iterator[Card]:
    one = gpu_card(0) if ON_GPU else Card(ThreadPoolExecutor(1), Rounded)
    yield one
    one.thread.shutdown()


@pytest.fixture
def make(card: Card) -> Callable[[np.ndarray], Scanner]:
    return lambda stored: FaissFlatScanner(stored, card)


globals().update(
    {
        name: test
        for name, test in vars(contract).items()
        if name.startswith("test_") and "make" in inspect.signature(test).parameters
    }
)


def test_law_2_a_probe_with_more_results_than_faiss_gives_is_scanned_in_full(card: Card) -> None:
    stored = contract.gallery(21, 6000, 128)
    stored[::2] = stored[0]
    probes = np.concatenate([stored[:1].astype(np.float32), contract.probes_of(21, stored[1::2], 3, 0.5)])
    floors = np.full(4, 0.6, np.float32)
    hits = FaissFlatScanner(stored, card).scan(probes, floors)
    assert hits.certified.tolist() == [False, True, True, True]
    contract.agrees(hits, stored, probes, floors)


def test_law_2_the_margin_covers_the_rounding_of_the_probe(card: Card) -> None:
    """Floors at the very scores, with probes that float16 holds badly."""
    stored = contract.gallery(22, 3000, 512)
    probes = contract.probes_of(22, stored, 20, 1.5)
    floors = np.array([contract.exact_scores(stored, probe).max() for probe in probes], np.float32)
    contract.agrees(FaissFlatScanner(stored, card).scan(probes, floors), stored, probes, floors)


def test_segments_take_turns_on_the_cards_and_a_failing_one_leaves_them_to_the_cpu() -> None:
    class Full(Rounded):
        def add(self, rows: np.ndarray) -> None:
            raise RuntimeError("cudaMalloc failed")

    cards = [Card(ThreadPoolExecutor(1), kind) for kind in (Rounded, Full)]
    scanners = FaissScanners(cards, BySize())
    stored = contract.gallery(23, 500, 64)
    built = [scanners.build(stored) for _ in range(3)]
    assert [isinstance(one, FaissFlatScanner) for one in built] == [True, False, True]
    probes = contract.probes_of(23, stored, 5, 1.0)
    floors = np.full(5, 0.4, np.float32)
    for scanner in built:
        contract.agrees(scanner.scan(probes, floors), stored, probes, floors)
    scanners.close()


@pytest.mark.skipif(ON_GPU, reason="this machine has a GPU that FAISS sees")
def test_without_a_gpu_the_start_is_refused_with_what_to_do() -> None:
    with pytest.raises(StartRefused, match="faiss-gpu"):
        open_faiss_scanners(BySize())
