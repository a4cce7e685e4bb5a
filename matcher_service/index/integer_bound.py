"""How far a product of int8 codes may stray from the score, and the integer cut-off that loses no row.

A row x is held as int8 codes c with one scale s: x = s c + e. A probe q is coded alike, with a scale of its own:
q = r p + f. Both codes are integers in [-127, 127]. As <q, x> = <q, e> + <f, s c> + r s <p, c>, Cauchy and Schwarz give

    |<q, x> - r s <p, c>|  <=  |q| |e| + |f| |s c|.

The sum <p, c> of d products is at most 127^2 d in magnitude, below 2^31 for d < 133,000: exact in int32, in
whatever order the products are added. So the only errors are the two of coding, which are measured, or of rows bounded
by half a step for each value (`law_within`), and the roundings of what is computed here and of the score itself:

- A score is fl32(fl64(<q, x>)), see `score.py`. With |x| <= |s c| + |e|, u = 2^-24 and d 2^-53 <= 2^-39 for d <= 2^14,
  a score of at least t means  <q, x>  >=  t - (u + 2^-38) |q| (|s c| + |e|) - 2^-149 ; the last term is half of the
  smallest float32 number, for scores that round up from below it.
- The lengths |q|, |f|, |e|, |s c| are float64 square roots of sums of d squares, in any order: each is too small
  by a factor of at most 1 - d 2^-53 - 3 * 2^-53. s and r are float32 numbers, so s c and r p (31 bits) are exact
  in float64; x and q have at most 24 bits, and each difference is rounded once, by 2^-53 of itself. Multiplying
  each length by `_UP` = 1 + 2^-36 makes it an upper bound.
- The cut-off is the least integer k for which a row with <p, c> < k cannot have a score of t or more. It is
  ceil((t - b) / (r s)), b the sum of the bounds above, in float64 with four roundings of 2^-53 relative to
  (|t| + b) / (r s); 2^-40 of that is taken off before rounding up.

On a GPU a withdrawn row has the codes 0 and the sum 0: it is below every cut-off of 1 and more. A probe with a cut-off
below 1 in some group of rows is not served by the filter there; it is scanned in full. On the CPU every cut-off serves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service.halves import largest_magnitude
from matcher_service.terms import Float32, Float64

CODE_MAX = 127
MIDDLE = 128  # as uint8 what stands for 0
DIMENSION_MAX = 1 << 14
CUT_OFF_MAX = 2**31 - 1
CUT_OFF_MIN = -(2**31)
_UP = 1 + 2.0**-36
_TINY = 2.0**-149
_SCORE = 2.0**-24 + 2.0**-38
_SLACK = 2.0**-40
_AT_ONCE = 64  # 256 KiB of float64 at 512 dimensions: they stay in the cache


class Law(NamedTuple):
    """What is known of the codes of a group of rows: their `scale` (a float32 number), the largest length of an
    `error` e and of a decoded row s c (`reach`), both rounded up."""

    scale: float
    error: float
    reach: float


NO_ROWS = Law(1.0, 0.0, 0.0)

# A value over its scale, at most 127, is computed in float32 and rounded to an integer: off by a half, and by less than
# 2^-12 for the arithmetic.
_ROUNDED = 0.5 + 2.0**-12


def scale_of(largest: float) -> float:
    """The scale on which no value of at most this magnitude is cut off."""
    return float(np.float32(largest / CODE_MAX)) if largest > 0 else 1.0


def law_within(largest: float, norm_max: float, dimension: int) -> Law:
    """The law of rows that are coded on the scale of their `largest` magnitude without their errors being measured.
    `norm_max` bounds their lengths."""
    scale = scale_of(largest)
    error = scale * _ROUNDED * dimension**0.5 * _UP
    return Law(scale, error, (norm_max + error) * _UP)


def longest_error(rows: Float32, scale: float) -> float:
    """The largest length of what coding loses of `rows`, [m, d], as float32 arithmetic finds it."""
    near = rows / np.float32(scale)
    np.rint(near, out=near)
    near *= np.float32(scale)
    np.subtract(rows, near, out=near)
    return float(np.sqrt(np.einsum("ij,ij->i", near, near).max(initial=0.0)))


def law_measured(scale: float, longest: float, norm_max: float, dimension: int) -> Law:
    """The law of rows whose `longest_error` on the `scale` of their largest magnitude is known.

    In float32 each of d differences is off by less than 2^-16 of the scale, or by 2^-11 where a value so near to the
    middle of two codes is given the other one; and the sum of d squares by (d + 2) 2^-24 of itself.
    """
    error = (longest * (1 + (dimension + 2) * 2.0**-24) + scale * 2.0**-10 * dimension**0.5) * _UP
    return Law(scale, error, (norm_max + error) * _UP)


class CodedProbes(NamedTuple):
    """n probes as int8: `codes` int8 [n, d], `scales` float64 [n] (float32 numbers; 0: the probe has no codes),
    and upper bounds of their lengths and of their coding errors, float64 [n]."""

    codes: NDArray[np.int8]
    scales: Float64
    lengths: Float64
    errors: Float64


def upper(lengths: Float64) -> Float64:
    """Upper bounds for computed lengths; see above."""
    return np.asarray(lengths * _UP)


def code_rows(stored: NDArray[np.float16]) -> tuple[NDArray[np.uint8], Law]:
    """Codes of `stored`, float16 [n, d] in C order and finite, on the scale of their largest magnitude and around
    `MIDDLE`, uint8 [n, d]; and their law."""
    scale = scale_of(largest_magnitude(stored))
    codes = np.empty(stored.shape, np.uint8)
    worst = np.zeros(2)
    for start in range(0, len(stored), _AT_ONCE):
        here = slice(start, start + _AT_ONCE)
        wide = stored[here].astype(np.float64)
        near = np.rint(wide / scale)
        codes[here] = near + MIDDLE
        near *= scale
        wide -= near
        worst = np.maximum(worst, [_lengths(wide).max(), _lengths(near).max()])
    error, reach = upper(worst).tolist()
    return codes, Law(scale, error, reach)


def code_probes(probes: Float32, most: int = CODE_MAX) -> CodedProbes:
    """Codes of `probes`, float32 [n, d], each on the scale of its largest value, which becomes `most`. A probe of zeros
    or of what is no number has none."""
    largest = np.maximum(probes.max(axis=1, initial=0.0), -probes.min(axis=1, initial=0.0))
    scales = (largest.astype(np.float64) / most).astype(np.float32)
    # Below 2^-100 float32 scales lose bits; nothing that small is a template.
    coded = np.isfinite(scales) & (scales > 2.0**-100)
    codes = np.zeros(probes.shape, np.int8)
    lengths, errors = np.zeros(len(probes)), np.zeros(len(probes))
    every = np.flatnonzero(coded)
    for start in range(0, every.size, _AT_ONCE):
        here = every[start : start + _AT_ONCE]
        scale = scales[here, None]
        # At most `most` but for the rounding of two divisions, which is far less than a half.
        near = np.rint(probes[here] / scale)
        codes[here] = near
        wide = probes[here].astype(np.float64)
        lengths[here] = _lengths(wide)
        wide -= near.astype(np.float64) * scale
        errors[here] = _lengths(wide)
    return CodedProbes(codes, np.where(coded, scales, 0.0).astype(np.float64), upper(lengths), upper(errors))


def strays(law: Law, probes: Float32) -> float:
    """By how much the sums of `law` let rows below a floor reach it, for probes like these, float32 [n, d], of length
    1; on average."""
    if not len(probes):
        return 0.0
    coded = code_probes(probes[:_AT_ONCE])
    return float(law.error + law.reach * (coded.errors / np.maximum(coded.lengths, _TINY)).mean())


def cut_offs(probes: CodedProbes, floors: Float32, laws: list[Law]) -> NDArray[np.int32]:
    """The integer cut-off of each probe in each of g groups of rows, int32 [g, n]; 0: not served there.

    `floors` float32 [n, g]. A row of the group whose score reaches the floor has a sum that reaches the cut-off.
    """
    least = _least_sums(floors.T, *_bounds(probes, laws))
    served = (probes.scales > 0)[None, :] & (least >= 1)
    return np.where(served, np.minimum(np.where(served, least, 0), CUT_OFF_MAX), 0).astype(np.int32)


class CutOffs:
    """The same for one group of rows and any floors; `served` bool [n]: the probes that have codes."""

    def __init__(self, probes: CodedProbes, law: Law) -> None:
        self.served = probes.scales > 0
        self._bound, self._unit = (np.where(self.served, one[0], 1.0) for one in _bounds(probes, [law]))

    def of(self, floors: Float32) -> NDArray[np.int32]:
        """Of floors float32 [n], the cut-offs int32 [n]; `CUT_OFF_MIN`, which every row reaches, for a floor of -inf
        and for a probe without codes."""
        return self._whole(_least_sums(floors, self._bound, self._unit))

    def near(self, floors: Float32) -> NDArray[np.int32]:
        """The sums that scores as high as these floors have, but for the errors of coding; int32 [n]."""
        return self._whole(floors / self._unit)

    def _whole(self, sums: Float64) -> NDArray[np.int32]:
        return np.clip(np.where(self.served, sums, CUT_OFF_MIN), CUT_OFF_MIN, CUT_OFF_MAX).astype(np.int32)


def _bounds(probes: CodedProbes, laws: list[Law]) -> tuple[Float64, Float64]:
    """Most by which a product of codes may stray from the score, and the value of one of its steps; float64 [g, n]."""
    scale, error, reach = (np.array([law[column] for law in laws])[:, None] for column in range(3))
    length, strayed = probes.lengths[None, :], probes.errors[None, :]
    bound = (length * error + strayed * reach + _SCORE * length * (reach + error)) * _UP + _TINY
    return bound, probes.scales[None, :] * scale


def _least_sums(floors: Float32, bound: Float64, unit: Float64) -> Float64:
    """The least sum of a row whose score reaches the floor, whole numbers; of a probe without codes anything."""
    floor = floors.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        least = np.ceil((floor - bound) / unit - _SLACK * (np.abs(floor) + bound) / unit)
    # An endless floor is above every score; a slack of the same size must not make it no number.
    return np.where(floor == np.inf, CUT_OFF_MAX, least)


def _lengths(rows: Float64) -> Float64:
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows)))
