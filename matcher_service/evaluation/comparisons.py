"""All comparisons of a labelled set, streamed: histograms of every score and, exactly, the highest.

Scores are computed in blocks by matrix products and never held together. Subjects are dealt into clusters, and
comparisons are counted per pair of clusters, so that later every rate can be given the uncertainty that comes from
subjects recurring in many pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from matcher_service.errors import InvalidInput
from matcher_service.terms import Float32, Float64, Int64

BINS = 2000
CLUSTERS = 40
TAIL_KEPT = 20_000
_BLOCK_ROWS = 2048
_BLOCK_COLUMNS = 4096
_EDGES = np.linspace(-1.0, 1.0, BINS + 1)


@dataclass(frozen=True, slots=True)
class Tail:
    """The highest impostor scores, descending: all that are at or above the last. `first`, `second`: clusters."""

    scores: Float64
    first: Int64
    second: Int64


@dataclass(frozen=True, slots=True)
class Comparisons:
    """What was counted of all pairs.

    `counts` int64 [g, g, bins], symmetric: impostor comparisons between clusters with a score in a bin (a pair of
    clusters stands twice, a cluster with itself once); `histogram` int64 [bins]: all of them. `genuine` float64 [m]
    with `genuine_subject` int64 [m]. `cluster_label` [g]: the group of people that a cluster belongs to, "" if none
    were told.
    """

    counts: Int64
    histogram: Int64
    tail: Tail
    genuine: Float64
    genuine_subject: Int64
    subjects: int
    templates: int
    cluster_label: tuple[str, ...]

    @property
    def impostors(self) -> int:
        return int(self.histogram.sum())

    def between(self, which: NDArray[np.int64]) -> Int64:
        """int64 [bins]: impostor comparisons among the clusters chosen, each once."""
        part = self.counts[np.ix_(which, which)]
        return np.asarray((part.sum(axis=(0, 1)) + np.einsum("ggb->b", part)) // 2)


def edges() -> Float64:
    """The scores [bins + 1] between which comparisons are counted."""
    return _EDGES


def at_or_above(histogram: Int64) -> Int64:
    """From counts per bin [..., bins] to counts at or above each edge [..., bins + 1]."""
    reversed_sums = np.cumsum(histogram[..., ::-1], axis=-1)[..., ::-1]
    return np.concatenate([reversed_sums, np.zeros((*histogram.shape[:-1], 1), dtype=np.int64)], axis=-1)


def compare_all(
    units: Float32,
    subjects: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    rng: np.random.Generator,
    clusters: int = CLUSTERS,
    tail_kept: int = TAIL_KEPT,
    advance: Callable[[int], None] = lambda comparisons: None,
) -> Comparisons:
    """Every pair of unit rows [n, d], once. `subjects` [n]: any values. `labels` [n]: the group of people of each.

    `advance` is told how many comparisons were made since. Raises InvalidInput unless there are at least two subjects.
    """
    names, subject = np.unique(np.asarray(subjects), return_inverse=True)
    if len(names) < 2:
        raise InvalidInput("all templates are of one subject", field="subjects", hint="give many people's templates")
    if len(units) != len(subject):
        raise InvalidInput(f"{len(subject)} subjects for {len(units)} templates", field="subjects")
    label = np.zeros(len(units), dtype="U1") if labels is None else np.asarray(labels).astype(str)
    cluster_of, cluster_label = _deal(subject, label, len(names), clusters, rng)
    order = np.lexsort((subject, cluster_of[subject]))
    rows, subject = np.ascontiguousarray(units[order], dtype=np.float32), subject[order].astype(np.int64)
    cluster = cluster_of[subject]

    clusters = len(cluster_label)
    counts = np.zeros((clusters, clusters, BINS), dtype=np.int64)
    highest = _Highest(tail_kept)
    genuine: list[Float64] = []
    genuine_subject: list[Int64] = []
    offset = (cluster * BINS).astype(np.int32)
    for start, stop in _blocks(cluster):
        own = int(cluster[start])
        # The columns of a block begin with its own rows, of which each pair counts once.
        for left in range(start, len(rows), _BLOCK_COLUMNS):
            right = min(left + _BLOCK_COLUMNS, len(rows))
            scores = rows[start:stop] @ rows[left:right].T
            bins = _bin(scores) + offset[left:right]
            wanted = np.ones(scores.shape, dtype=bool)
            near = int(np.searchsorted(cluster[left:right], own, side="right"))
            if near:
                later = np.arange(left, left + near) > np.arange(start, stop)[:, None]
                same = subject[start:stop, None] == subject[left : left + near]
                genuine.append(scores[:, :near][same & later].astype(np.float64))
                genuine_subject.append(np.broadcast_to(subject[start:stop, None], same.shape)[same & later])
                wanted[:, :near] = later & ~same
                bins = bins[wanted]
            part = np.bincount(bins.ravel(), minlength=clusters * BINS).reshape(clusters, BINS)
            counts[own] += part
            highest.offer(scores, wanted if near else None, own, cluster[left:right])
            advance(int(part.sum()))
    histogram = counts.sum(axis=(0, 1))
    own_counts = np.einsum("ggb->gb", counts).copy()
    counts += counts.transpose(1, 0, 2).copy()
    np.einsum("ggb->gb", counts)[...] = own_counts
    return Comparisons(
        counts=counts,
        histogram=histogram,
        tail=highest.tail(),
        genuine=np.concatenate(genuine),
        genuine_subject=np.concatenate(genuine_subject),
        subjects=len(names),
        templates=len(rows),
        cluster_label=cluster_label,
    )


def _deal(
    subject: Int64, label: NDArray[np.str_], subjects: int, clusters: int, rng: np.random.Generator
) -> tuple[Int64, tuple[str, ...]]:
    """Subjects into clusters at random, each cluster within one group of people."""
    label_of = np.full(subjects, "", dtype=label.dtype)
    label_of[subject] = label
    if (label_of[subject] != label).any():
        raise InvalidInput("a subject stands in two groups", field="group", hint="give one group per subject")
    found = np.unique(label_of)
    cluster_of = np.empty(subjects, dtype=np.int64)
    cluster_label: list[str] = []
    for one in found:
        members = rng.permutation(np.flatnonzero(label_of == one))
        parts = min(len(members), max(clusters // len(found), 10))
        cluster_of[members] = len(cluster_label) + np.arange(len(members)) % parts
        cluster_label += [str(one)] * parts
    return cluster_of, tuple(cluster_label)


def _blocks(cluster: Int64) -> list[tuple[int, int]]:
    starts = np.flatnonzero(np.r_[True, np.diff(cluster) != 0])
    found = []
    for start, stop in zip(starts, np.r_[starts[1:], len(cluster)], strict=True):
        found += [(at, min(at + _BLOCK_ROWS, int(stop))) for at in range(int(start), int(stop), _BLOCK_ROWS)]
    return found


def _bin(scores: Float32) -> NDArray[np.int32]:
    at = ((scores + np.float32(1.0)) * np.float32(BINS / 2)).astype(np.int32)
    np.minimum(at, BINS - 1, out=at)
    return np.asarray(np.maximum(at, 0, out=at))


class _Highest:
    """Keeps the highest `kept` scores offered, and those tied with the last."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._floor = -np.inf
        self._parts: list[tuple[Float64, Int64, Int64]] = []
        self._held = 0

    def offer(self, scores: Float32, wanted: NDArray[np.bool_] | None, own: int, columns: Int64) -> None:
        """Scores [rows, columns], or those `wanted`, of rows of cluster `own`."""
        is_high = scores >= self._floor
        if wanted is not None:
            is_high &= wanted
        at = np.flatnonzero(is_high)
        high = scores.ravel()[at].astype(np.float64)
        if len(high) > 2 * self._kept:
            stay = high >= np.partition(high, -self._kept)[-self._kept]
            high, at = high[stay], at[stay]
        if len(high):
            self._parts.append((high, np.full(len(high), own), columns[at % len(columns)]))
            self._held += len(high)
        if self._held > 3 * self._kept:
            self._prune()

    def _prune(self) -> None:
        scores, first, second = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        self._floor = float(np.partition(scores, -self._kept)[-self._kept])
        stay = scores >= self._floor
        self._parts = [(scores[stay], first[stay], second[stay])]
        self._held = int(stay.sum())

    def tail(self) -> Tail:
        if not self._parts:
            raise InvalidInput("no two subjects to compare", field="subjects", hint="give many people's templates")
        if self._held > self._kept:
            self._prune()
        scores, first, second = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        order = np.argsort(-scores, kind="stable")
        return Tail(scores[order], first[order].astype(np.int64), second[order].astype(np.int64))
