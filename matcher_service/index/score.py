"""The score, computed in one way on every path (law 2), and how far a float32 product may stray from it.

The score of a probe and a stored row is the float64 dot product of the float32 probe and the float16 row,
rounded to float32. Each product of a float32 and a float16 number is exact in float64 (24 + 11 significand
bits <= 53), so only the order of the additions could make two paths differ. It is fixed here: numpy's pairwise
summation along the contiguous last axis, whose order depends on the dimension alone. Hence a row has the same
score to the last bit whether it was scored alone or among a million, by the filter or by a full scan.

A float32 product (BLAS, in any order of summation, with or without fused multiply-add) differs from the true
dot product by at most gamma_d * sum |x_i q_i| <= gamma_d * ||x|| ||q||, gamma_d = d u / (1 - d u), u = 2^-24
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1). `float32_margin` is that bound,
with the roundings of the score itself and of flushed subnormal products added.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from matcher_service.halves import widen, widened
from matcher_service.terms import Float32, Float64, Int64

_BLOCK_ELEMENTS = 1 << 17  # float64 products held at once: 1 MiB, so that they stay in the cache


def exact_scores(stored: NDArray[np.float16], probe: Float32) -> Float32:
    """Scores float32 [m] of one probe, float32 [d], against `stored`, float16 [m, d] in C order."""
    count, dimension = stored.shape
    scores = np.empty(count, np.float32)
    wide = probe.astype(np.float64)
    step = max(1, _BLOCK_ELEMENTS // max(1, dimension))
    for start in range(0, count, step):
        products = widened(stored[start : start + step]).astype(np.float64)
        products *= wide
        scores[start : start + step] = np.add.reduce(products, axis=-1)
    return scores


def pair_scores(stored: NDArray[np.float16], rows: Int64, probes: Float32, which: Int64) -> Float32:
    """Scores float32 [m] of pairs: row `rows[i]`, of finite numbers, and probe `which[i]`, int64 [m] each."""
    scores = np.empty(rows.size, np.float32)
    step = max(1, _BLOCK_ELEMENTS // max(1, stored.shape[1]))
    for start in range(0, rows.size, step):
        here = slice(start, start + step)
        halves = np.take(stored, rows[here], axis=0)
        products = widen(halves, np.empty(halves.shape, np.float32)).astype(np.float64)
        products *= np.take(probes, which[here], axis=0)
        scores[here] = np.add.reduce(products, axis=-1)
    return scores


def norms(rows: NDArray[np.floating]) -> Float64:
    """Euclidean norms, float64 [n], of the rows of [n, d]; computed in blocks, so that little is held."""
    count, dimension = rows.shape
    found = np.empty(count, np.float64)
    step = max(1, _BLOCK_ELEMENTS // max(1, dimension))
    for start in range(0, count, step):
        block = rows[start : start + step].astype(np.float64)
        found[start : start + step] = np.sqrt(np.add.reduce(block * block, axis=-1))
    return found


def norm_bound(rows: Float32) -> float:
    """No less than the largest norm of rows, float32 [n, d], and hardly more: a float32 sum of d squares is off by at
    most gamma_d of it."""
    squares = np.einsum("ij,ij->i", rows, rows)
    longest = math.sqrt(float(squares.max(initial=0.0)))
    return longest * (1 + (int(rows.shape[1]) + 2) * 2.0**-24)


def float32_margin(dimension: int, row_norm_max: float, probe_norms: Float64) -> Float64:
    """Most by which a float32 product may differ from the score, float64 [n] for n probes.

    A row whose float32 product is below `floor - margin` has a score below `floor`.
    """
    unit = 2.0**-24
    gamma = dimension * unit / (1.0 - dimension * unit)
    reach = row_norm_max * probe_norms
    # 2^-23 of the reach covers rounding the score to float32, rounding `floor - margin` to float32 and the
    # float64 summation; d * 2^-126 covers products that a BLAS flushes to zero.
    return (gamma + 2.0**-22) * reach + dimension * 2.0**-125
