"""The law that makes the filter exact: how low the estimate of a row at or above the floor can be.

Let x be a stored row of norm n, q a probe, s = <x, q> / (n |q|), and R the segment's rotation. With y = R x / n,
the filter keeps a 4-bit code of y; let x' be the decoded code, a function of y alone. The estimate is <x', R q>.
Given y, the rotated probe is R q / |q| = s y + sqrt(1 - s^2) u, where u is uniform on the unit sphere of the
d - 1 dimensions orthogonal to y: this is what a Haar rotation that knows nothing of x and q gives. Hence

    <x', R q> / |q| = s a + sqrt(1 - s^2) b t,    a = <x', y>,  b = |x' - a y|,

and t is one coordinate of a random unit vector in d - 1 dimensions: (1 + t) / 2 has the Beta distribution with
both parameters (d - 2) / 2. With T such that P(t < -T) = `FAILURE`, a row whose score is at or above the floor
has, but for that probability, an estimate of at least |q| (s a - sqrt(1 - s^2) b T), which rises with s; so with
f the floor's cosine, its estimate is at least its cut-off |q| (f a - sqrt(1 - f^2) b T). The rows whose estimate
is below their cut-off are provably below the floor. The failure of a pair (probe, row) is the event t < -T of
that pair. It does not depend on the floor, so a floor that was itself found with the filter (the k-th best
score) is as safe as a threshold; nor on other rows or probes, so duplicates and repeated probes are too.

What real arithmetic adds:
- `FAILURE` is half of what is allowed (1e-9). The other half pays for rows of which a block of coordinates lies
  so near the border of two cells that rounding decides its code: given y, every outcome is one of 2^m codes, m
  blocks being undecided, and the law holds for each of them; E[2^m] is far below 2.
- Row and probe are rotated in float32. |fl(R v) - R v| <= gamma_d sqrt(d) |v|, gamma_d = d u / (1 - d u), u =
  2^-24 (Higham, Accuracy and Stability, section 3.5; |R| has Frobenius norm sqrt(d)), and the rotation itself,
  rounded to float32, is off by at most u sqrt(d). `rotation_error` is their sum; it lowers a, raises b, and
  lowers the cut-off by |x'| |q| times itself.
- <x', R x> of blocks of one or two coordinates is the float64 sum of float32 products (u of each). Of larger ones it is
  gathered from how close each block of R x is to its centroid c, <c, y> - |c|^2 / 2 in float32 (blocks of at most 8
  coordinates: 10 u of what it is made of), of which the last 4 bits are the centroid's number (2^-19 of it). Their
  float64 sum, and that of float32 |c|^2, is off by less than `ENCODING_ERROR` times |x'| |x| + |x'|^2 / 2.
- The fast-scan kernel replaces each look-up table by uint8 steps of the widest table's span / 255 (FAISS,
  utils/quantize_lut.cpp), so a table's entry is off by at most half a step, and the estimate by M / 2 steps. The
  sum of at most 256 tables, 256 * 255, fits its uint16 accumulator: it cannot saturate. `table_error` also
  covers the one step by which the range search's threshold is rounded, and the float32 arithmetic around it.
- Stored rows are float16 and so not exactly of norm one: a row's own norm defines its y, and f comes from the
  largest norm that the cut-off has to serve. Rows of unusual norm are re-scored always.
- A floor that is not above zero has no cut-off worth having: such probes are scanned in full.

Cut-offs differ from row to row. `support` keeps, for a set of rows, their least cut-off in each of `ANGLES`
directions (f, sqrt(1 - f^2)). A direction between two of them is a positive combination of the two, and the
least of sums is at least the sum of the leasts: so `cut_offs` is never above any row's own cut-off.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv

from matcher_service.terms import Float32, Float64

FAILURE = 5e-10
ENCODING_ERROR = 2.0**-18
ANGLES = 65
TABLES_MAX = 256
_UNIT = 2.0**-24
_DIRECTIONS = np.linspace(0.0, np.pi / 2, ANGLES)
_STEP = math.pi / 2 / (ANGLES - 1)


def tail(dimension: int, failure: float = FAILURE) -> float:
    """T with P(t < -T) <= failure, t one coordinate of a random unit vector in dimension - 1 dimensions."""
    if dimension < 4:
        return 1.0
    half = (dimension - 2) / 2
    low = float(betaincinv(half, half, failure))
    while betainc(half, half, low) > failure:
        low *= 1 - 1e-12
    return min(1.0, 1.0 - 2.0 * low + 1e-12)


def rotation_error(dimension: int) -> float:
    """Most by which a vector of norm one is off, in norm, after its rotation in float32."""
    gamma = dimension * _UNIT / (1 - dimension * _UNIT)
    return (gamma + 2 * _UNIT) * math.sqrt(dimension) * 1.0001


def factors(along: Float64, squared: Float64, row_norms: Float64, dimension: int) -> tuple[Float64, Float64, Float64]:
    """Per row: the least that a can be, the most that b can be, and |x'|; each float64 [n].

    `along` float64 [n] is <x', R x> as `codes.encode` computes it, `squared` |x'|^2; `row_norms` float64 [n] are the
    norms of x in `dimension` dimensions.
    """
    reach = np.sqrt(squared * (1 + 2.0**-22))
    error = reach * rotation_error(dimension) + (reach + squared / (2 * row_norms)) * ENCODING_ERROR
    low = along / row_norms - error
    across = np.sqrt(np.maximum(reach * reach - np.maximum(low, 0.0) ** 2, 0.0)) * (1 + 1e-9)
    return low, across, reach


def key(along: Float64, across: Float64, tail_: float, cosine: float = 0.4) -> Float64:
    """The cut-off of each row at a usual floor: the lower, the more the row widens the cut-off of its part."""
    return np.asarray(cosine * along - math.sqrt(1 - cosine * cosine) * across * tail_)


def support(along: Float64, across: Float64, tail_: float) -> Float64:
    """The least cut-off of a set of rows in each direction, float64 [ANGLES]; +inf where there is no row."""
    if along.size == 0:
        return np.full(ANGLES, np.inf)
    reach = across * tail_
    return np.array([np.min(np.sin(angle) * along - np.cos(angle) * reach) for angle in _DIRECTIONS])


def cut_offs(supports: Float64, cosines: Float64) -> Float64:
    """For parts with `supports`, float64 [p, ANGLES], and floors' cosines in [0, 1], float64 [n]: what the
    estimate of a unit probe reaches for every row of the part at or above the floor, float64 [p, n]."""
    angles = np.arcsin(np.minimum(cosines, 1.0))
    left = np.minimum((angles / _STEP).astype(np.int64), ANGLES - 2)
    beyond = angles - left * _STEP
    left_weight = np.sin(_STEP - beyond) / math.sin(_STEP)
    right_weight = np.sin(beyond) / math.sin(_STEP)
    found = left_weight * supports.take(left, axis=1) + right_weight * supports.take(left + 1, axis=1)
    return np.asarray(found - 1e-12)


def tables(rotated: Float32, centroids: Float32) -> tuple[Float64, Float64, Float64]:
    """Of the look-up tables of rotated probes, float32 [n, d]: the widest span, the sum of the least entries
    and the sum of the largest magnitudes; each float64 [n]. `centroids` float32 [16, block]."""
    count, dimension = rotated.shape
    block = centroids.shape[1]
    coded = np.ascontiguousarray(rotated[:, : dimension // block * block])
    entries = centroids @ coded.reshape(-1, block).T
    least = entries.min(axis=0).reshape(count, -1)
    most = entries.max(axis=0).reshape(count, -1)
    span = (most - least).max(axis=1).astype(np.float64)
    magnitude = np.maximum(most, -least).sum(axis=1, dtype=np.float64)
    return span, least.sum(axis=1, dtype=np.float64), magnitude


def table_error(span: Float64, magnitude: Float64, table_count: int) -> Float64:
    """Most by which a row's estimate, as the range search compares it, is below <x', R q>; float64 [n]."""
    steps = table_count / 2 + 1.25
    return np.asarray(steps * span / 255 * (1 + 1e-4) + (table_count + 8) * 2.0**-22 * magnitude)


def usable(floors: Float32, probe_norms: Float64) -> NDArray[np.bool_]:
    """Which probes the law can serve at all: finite, not tiny, with a finite floor above zero."""
    return np.asarray(np.isfinite(floors) & (floors > 0) & np.isfinite(probe_norms) & (probe_norms > 1e-3))
