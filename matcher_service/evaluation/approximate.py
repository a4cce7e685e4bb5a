"""What approximate search would have cost: the mates that HNSW and IVF indexes lose on the same data.

The service itself is exact. This runs beside it, on the same adapted templates, as evidence for why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import StartRefused
from matcher_service.evaluation.intervals import Rate, clustered_rate
from matcher_service.terms import Float32, Int64

HNSW_LINKS = 32
HNSW_BUILD = 200
HNSW_SEARCH = (16, 64, 256)
IVF_PROBED = (1, 8, 32)
_SEED = 1234


class Lost(NamedTuple):
    """`setting` in words; of the mates that an exact search finds, the share lost, resampled by subject."""

    setting: str
    rate: Rate


def mates_lost(
    references: Float32,
    reference_subjects: NDArray[np.str_],
    probes: Float32,
    probe_subjects: NDArray[np.str_],
    *,
    threshold: float,
    rank_max: int,
    confidence: float,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Lost, ...]:
    """Adapted unit rows of references [n, d] and probes [q, d]. A mate is found when one of its subject's references
    is among the best `rank_max` rows at or above the threshold. Raises StartRefused without faiss."""
    try:
        import faiss
    except ImportError as error:
        raise StartRefused(
            "the approximate indexes need faiss", hint="install the extra: pip install 'matcher-service[cpu]'"
        ) from error
    count, dimension = references.shape
    depth = min(rank_max, count)
    exact = faiss.IndexFlatIP(dimension)
    exact.add(references)
    found = _found(exact.search(probes, depth), reference_subjects, probe_subjects, threshold)
    rows = np.flatnonzero(found)
    if not len(rows):
        return ()
    subjects, code = np.unique(probe_subjects[rows], return_inverse=True)
    trials = np.bincount(code, minlength=len(subjects))

    def lost(setting: str, answers: tuple[Float32, Int64]) -> Lost:
        missed = ~_found(answers, reference_subjects, probe_subjects[rows], threshold)
        return Lost(setting, clustered_rate(np.bincount(code, missed, len(subjects)), trials, confidence))

    searched = np.ascontiguousarray(probes[rows])
    lists = int(max(1, min(4 * np.sqrt(count), count // 39)))
    probed = [one for one in IVF_PROBED if one <= lists]
    results = []

    graph = faiss.IndexHNSWFlat(dimension, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = HNSW_BUILD
    graph.add(references)
    for width in HNSW_SEARCH:
        graph.hnsw.efSearch = width
        results.append(lost(f"HNSW, {HNSW_LINKS} links, efSearch {width}", graph.search(searched, depth)))
        advance(len(results), len(HNSW_SEARCH) + len(probed))
    quantiser = faiss.IndexFlatIP(dimension)
    inverted = faiss.IndexIVFFlat(quantiser, dimension, lists, faiss.METRIC_INNER_PRODUCT)
    inverted.cp.seed = _SEED
    inverted.train(references)
    inverted.add(references)
    for one in probed:
        inverted.nprobe = one
        results.append(lost(f"IVF, {lists} lists, nprobe {one}", inverted.search(searched, depth)))
        advance(len(results), len(HNSW_SEARCH) + len(probed))
    return tuple(results)


def _found(
    answers: tuple[Float32, Int64],
    reference_subjects: NDArray[np.str_],
    probe_subjects: NDArray[np.str_],
    threshold: float,
) -> NDArray[np.bool_]:
    scores, rows = answers
    names = reference_subjects[np.maximum(rows, 0)]
    return np.asarray(((names == probe_subjects[:, None]) & (rows >= 0) & (scores >= threshold)).any(axis=1))
