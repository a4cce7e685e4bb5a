"""What exact and approximate search others would pick today, at their best settings, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from usearch.index import MetricKind
from usearch.index import search as usearch_search

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]
Rows = list[NDArray[np.int64]]
"""Per probe the rows found, best first."""

# `find(probes, threshold, count)`: rows scoring at least `threshold`; if that is None, the best `count`.
Find = Callable[[Float32, float | None, int], Rows]
_USEARCH_MOST = 100


@dataclass(frozen=True, slots=True)
class Rival:
    """One way to search at one setting."""

    name: str
    setting: str
    exact: bool
    find: Find
    # Runs what it is given in the surroundings in which `find` is to be called.
    within: Callable[[Callable[[], Any]], Any] = lambda work: work()


def wide(stored: Float16) -> Float32:
    """The rows as float32, made block by block."""
    rows = np.empty(stored.shape, np.float32)
    for start in range(0, len(stored), 65_536):
        rows[start : start + 65_536] = stored[start : start + 65_536]
    return rows


def exact_rivals(stored: Float16, threads: int, *, quick: bool = False) -> Iterator[Rival]:
    """FAISS IndexFlatIP (default and other settings), BLAS product and selection in numpy, USearch exact, FAISS
    scalar quantiser float16; `quick`: only those that tend to be best. Each is built when asked for."""
    rows = wide(stored)
    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(rows)
    for setting, (blas, query_block, base_block) in FLAT_SETTINGS.items():
        if quick and setting not in QUICK_SETTINGS:
            continue
        yield Rival("faiss IndexFlatIP", setting, True, _flat(flat, blas, query_block, base_block))
    for block in (16_384, 131_072):
        yield Rival("numpy BLAS product + selection", f"blocks of {block} rows", True, _blas(rows, block))
    if quick:
        yield Rival("usearch exact float16", f"{threads} threads", True, _usearch(stored, np.float16, threads))
        return
    yield Rival("usearch exact float32", f"{threads} threads", True, _usearch(rows, np.float32, threads))
    yield Rival("usearch exact float16", f"{threads} threads", True, _usearch(stored, np.float16, threads))
    halves = faiss.IndexScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    halves.add(rows)
    yield Rival("faiss IndexScalarQuantizer fp16", "default", True, _index(halves))


# distance_compute_blas_threshold, distance_compute_blas_query_bs, distance_compute_blas_database_bs
FLAT_SETTINGS = {
    "default": (20, 4096, 1024),
    "BLAS from 1 probe": (1, 4096, 1024),
    "BLAS from 4 probes, database blocks of 16384": (4, 4096, 16_384),
    "BLAS from 20 probes, database blocks of 16384": (20, 4096, 16_384),
    "BLAS from 20 probes, database blocks of 65536": (20, 256, 65_536),
    "BLAS never": (1_000_000, 4096, 1024),
}
QUICK_SETTINGS = ("default", "BLAS from 4 probes, database blocks of 16384", "BLAS never")


def approximate_rivals(stored: Float16) -> Iterator[Rival]:
    """FAISS HNSW and IVF at settings that users choose. Building them takes long."""
    rows = wide(stored)
    graph = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 100
    graph.add(rows)
    for ef in (64, 256):
        yield Rival("faiss IndexHNSWFlat M=32", f"efSearch {ef}", False, _hnsw(graph, ef))
    del graph
    lists = 1024 if len(rows) >= 40_000 else max(16, len(rows) // 40)
    quantizer = faiss.IndexFlatIP(rows.shape[1])
    inverted = faiss.IndexIVFFlat(quantizer, rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    inverted.train(rows[: 40 * lists])
    inverted.add(rows)
    for probed in (8, 64):
        yield Rival(f"faiss IndexIVFFlat {lists} lists", f"nprobe {probed}", False, _ivf(inverted, probed))


def _index(index: Any) -> Find:
    def find(probes: Float32, threshold: float | None, count: int) -> Rows:
        if threshold is None:
            return list(index.search(probes, count)[1])
        limits, scores, rows = index.range_search(probes, float(np.nextafter(np.float32(threshold), np.float32(-1))))
        return [_best(scores[a:b], rows[a:b]) for a, b in pairwise(limits)]

    return find


def _flat(index: Any, blas: int, query_block: int, base_block: int) -> Find:
    plain = _index(index)

    def find(probes: Float32, threshold: float | None, count: int) -> Rows:
        with _settings(blas, query_block, base_block):
            if threshold is None or len(probes) >= blas:
                return plain(probes, threshold, count)
            # For few probes only the k-nearest search shares the rows among threads: take more of them until
            # all at or above the threshold are among them.
            most = 16
            while True:
                scores, rows = index.search(probes, most)
                if most >= index.ntotal or (scores[:, -1] < threshold).all():
                    return [mine[score >= threshold] for score, mine in zip(scores, rows, strict=True)]
                most *= 8

    return find


@contextmanager
def _settings(blas: int, query_block: int, base_block: int) -> Iterator[None]:
    names = ("threshold", "query_bs", "database_bs")
    before = [getattr(faiss.cvar, f"distance_compute_blas_{name}") for name in names]
    for name, value in zip(names, (blas, query_block, base_block), strict=True):
        setattr(faiss.cvar, f"distance_compute_blas_{name}", value)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(faiss.cvar, f"distance_compute_blas_{name}", value)


def _blas(rows: Float32, block: int) -> Find:
    def find(probes: Float32, threshold: float | None, count: int) -> Rows:
        found: list[list[tuple[NDArray[np.float32], NDArray[np.int64]]]] = [[] for _ in probes]
        for start in range(0, len(rows), block):
            scores = probes @ rows[start : start + block].T
            if threshold is not None:
                which, row = np.nonzero(scores >= np.float32(threshold))
                for probe in np.unique(which):
                    mine = row[which == probe]
                    found[probe].append((scores[probe, mine], mine + start))
                continue
            kept = min(count, scores.shape[1])
            best = np.argpartition(scores, scores.shape[1] - kept, axis=1)[:, scores.shape[1] - kept :]
            for probe, mine in enumerate(best):
                found[probe].append((scores[probe, mine], mine + start))
        joined = [
            _best(np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]))
            if parts
            else np.empty(0, np.int64)
            for parts in found
        ]
        return joined if threshold is not None else [mine[:count] for mine in joined]

    return find


def _usearch(rows: NDArray[np.floating], dtype: type[np.floating], threads: int) -> Find:
    def find(probes: Float32, threshold: float | None, count: int) -> Rows:
        wanted = count if threshold is None else _USEARCH_MOST
        found = usearch_search(
            rows, probes.astype(dtype), min(wanted, len(rows)), MetricKind.IP, exact=True, threads=threads
        )
        keys = np.atleast_2d(found.keys).astype(np.int64)
        scores = 1 - np.atleast_2d(found.distances)
        if threshold is None:
            return list(keys)
        return [mine[score >= threshold] for mine, score in zip(keys, scores, strict=True)]

    return find


def _hnsw(graph: Any, ef: int) -> Find:
    def find(probes: Float32, threshold: float | None, count: int) -> Rows:
        graph.hnsw.efSearch = ef
        scores, rows = graph.search(probes, min(count, ef))
        return [mine[score >= (threshold or -1)] for score, mine in zip(scores, rows, strict=True)]

    return find


def _ivf(inverted: Any, probed: int) -> Find:
    def find(probes: Float32, threshold: float | None, count: int) -> Rows:
        inverted.nprobe = probed
        scores, rows = inverted.search(probes, count)
        return [mine[(score >= (threshold or -1)) & (mine >= 0)] for score, mine in zip(scores, rows, strict=True)]

    return find


def _best(scores: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.lexsort((rows, -scores))]
