"""The order of candidates, and the joining of partial results. Pure functions.

Candidates of a probe are ordered by score descending, then (gallery_id, reference_id) as UTF-8 bytes; a
subject appears once per gallery, with its best reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from matcher_service.terms import Float32, Int64, SearchResult


def merge(results: Sequence[SearchResult], gallery_ids: Sequence[str], rank_max: Int64) -> SearchResult:
    """One result from those of several shards to the same request.

    `gallery_ids` and `rank_max`, int64 [n], are the request's. A reference found by several shards is as
    the one says that has applied most; a subject of a gallery found by several is kept once; `sequence` is
    the least, `missing` the union in order of first mention. With no results at all the sequence is 0.
    """
    probe_count = len(rank_max)
    missing = tuple(dict.fromkeys(part for one in results for part in one.missing))
    results = sorted(results, key=lambda one: -one.sequence)
    probes = np.concatenate([np.repeat(np.arange(probe_count), np.diff(one.offsets)) for one in results] or [_NONE])
    gallery = np.concatenate([one.gallery for one in results] or [_NONE])
    scores = np.concatenate([one.scores for one in results] or [_NONE.astype(np.float32)])
    reference_ids = [text for one in results for text in one.reference_ids]
    subject_ids = [text for one in results for text in one.subject_ids]
    # From the newest shard to the oldest, in which order the first mention of a reference is the one that counts.
    each = np.arange(len(probes))
    once = each[_first_of_each(each, probes, gallery, _hashes(reference_ids), lambda i: reference_ids[i].encode())]
    best = best_candidates(
        probes[once],
        gallery[once],
        scores[once],
        _hashes(subject_ids)[once],
        reference_of=lambda i: reference_ids[once[i]].encode(),
        subject_of=lambda i: subject_ids[once[i]].encode(),
        gallery_order=order_of(gallery_ids),
        rank_max=rank_max,
    )
    kept = once[best]
    return SearchResult(
        offsets=offsets_of(probes[kept], probe_count),
        gallery=gallery[kept],
        scores=scores[kept],
        reference_ids=[reference_ids[i] for i in kept],
        subject_ids=[subject_ids[i] for i in kept],
        sequence=min((one.sequence for one in results), default=0),
        missing=missing,
        certified=sum(one.certified for one in results),
        scanned=sum(one.scanned for one in results),
    )


def best_candidates(
    probes: Int64,
    gallery: Int64,
    scores: Float32,
    subject_hashes: NDArray[np.integer],
    reference_of: Callable[[int], bytes],
    subject_of: Callable[[int], bytes],
    gallery_order: Int64,
    rank_max: Int64,
) -> Int64:
    """Which of m hits are the candidates, as positions in order of probe and rank.

    `probes`, `gallery`, `scores`, `subject_hashes` have one value per hit; `rank_max` int64 [n] one per
    probe; `gallery_order` int64 [g] ranks the galleries by name. `reference_of` and `subject_of` give the
    ids of a hit as UTF-8 and are asked only where hits tie or share a subject hash.
    """
    if not len(probes):
        return _NONE
    order = np.lexsort((gallery_order[gallery], -scores, probes))
    _sort_ties(order, probes, gallery, scores, reference_of)
    first = _first_of_each(order, probes, gallery, subject_hashes, subject_of)
    kept = order[first]
    owners = probes[kept]
    rank = np.arange(len(kept)) - np.searchsorted(owners, owners)
    return kept[rank < rank_max[owners]]


def kth_best_scores(
    probes: Int64, gallery: Int64, scores: Float32, subject_hashes: NDArray[np.integer], rank_max: Int64
) -> Float32:
    """Per probe, float32 [n], the score of the rank_max-th best subject among m hits; -inf where fewer.

    Subjects are told apart by their hashes: two that collide count as one, which only lowers the result.
    """
    kth = np.full(len(rank_max), -np.inf, np.float32)
    if not len(probes):
        return kth
    order = np.lexsort((-scores, subject_hashes, gallery, probes))
    same = np.zeros(len(order), np.bool_)
    same[1:] = _equal_to_previous(order, probes, gallery, subject_hashes)
    order = order[~same]
    order = order[np.lexsort((-scores[order], probes[order]))]
    owners = probes[order]
    rank = np.arange(len(order)) - np.searchsorted(owners, owners)
    last = rank == rank_max[owners] - 1
    kth[owners[last]] = scores[order[last]]
    return kth


def order_of(gallery_ids: Sequence[str]) -> Int64:
    """The rank of each gallery_id among them by UTF-8 bytes, int64 [g]."""
    order = np.empty(len(gallery_ids), np.int64)
    order[sorted(range(len(gallery_ids)), key=lambda i: gallery_ids[i].encode())] = np.arange(len(gallery_ids))
    return order


def offsets_of(probes: Int64, probe_count: int) -> Int64:
    """Offsets int64 [probe_count + 1] of hits that stand in order of their probes."""
    offsets = np.zeros(probe_count + 1, np.int64)
    np.cumsum(np.bincount(probes, minlength=probe_count), out=offsets[1:])
    return offsets


_NONE = np.empty(0, np.int64)


def _equal_to_previous(order: Int64, *columns: NDArray[np.generic]) -> NDArray[np.bool_]:
    """bool [m-1]: whether the next in order has the same values in all columns."""
    equal = np.ones(len(order) - 1, np.bool_)
    for column in columns:
        ordered = column[order]
        equal &= ordered[1:] == ordered[:-1]
    return equal


def _sort_ties(
    order: Int64, probes: Int64, gallery: Int64, scores: Float32, reference_of: Callable[[int], bytes]
) -> None:
    """Put hits of equal probe, score and gallery in order of their references, in place."""
    tied = np.concatenate(([False], _equal_to_previous(order, scores, probes, gallery), [False]))
    edges = np.flatnonzero(tied[1:] != tied[:-1])
    for start, stop in edges.reshape(-1, 2):
        run = order[start : stop + 1]
        order[start : stop + 1] = sorted(run.tolist(), key=reference_of)


def _hashes(ids: Sequence[str]) -> Int64:
    return np.fromiter(map(hash, ids), np.int64, len(ids))


def _first_of_each(
    order: Int64,
    probes: Int64,
    gallery: Int64,
    hashes: NDArray[np.integer],
    name_of: Callable[[int], bytes],
) -> NDArray[np.bool_]:
    """bool [m] along `order`: the first hit of its probe, gallery and name. `hashes` are those of the names."""
    first = np.ones(len(order), np.bool_)
    if not len(order):
        return first
    by_name = np.lexsort((np.arange(len(order)), hashes[order], gallery[order], probes[order]))
    same = _equal_to_previous(order[by_name], probes, gallery, hashes)
    if not same.any():
        return first
    first[by_name[1:][same]] = False
    previous, later = order[by_name[:-1][same]], order[by_name[1:][same]]
    if all(name_of(a) == name_of(b) for a, b in zip(previous.tolist(), later.tolist(), strict=True)):
        return first
    # Two names share a hash: tell them apart by themselves.
    seen: set[tuple[int, int, bytes]] = set()
    for place, hit in enumerate(order.tolist()):
        name = (int(probes[hit]), int(gallery[hit]), name_of(hit))
        first[place] = name not in seen
        seen.add(name)
    return first
