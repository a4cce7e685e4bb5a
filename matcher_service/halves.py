"""Between float16 and float32, bit for bit as numpy's `astype`, several times as fast. Pure.

numpy converts halves one by one where it was built without the processor's instructions for them, as the wheels are
that most people install. Moving the bits by whole columns gives the same numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from matcher_service.terms import Float32

_HALF_BITS = np.uint32(0x8FFFE000).view(np.int32)
_HALF_BIAS = np.float32(2.0**112)
_MAGNITUDE = np.uint16(0x7FFF)
_INFINITY = 0x7C00  # the bits of it, and of NaN more
_BLOCK_VALUES = 1 << 16  # whose bits, four times over, stay in the last cache

# Bits of the magnitudes, float32, that round to normal halves: from 2^-14 to below 65520.
_LEAST_NORMAL = np.uint32(113 << 23)
_TOO_LARGE = np.uint32(0x477FF000)
# Moves the exponent's bias from 127 to 15 and rounds to nearest; what is half way goes to even by the bit added to it.
_TO_HALF = np.uint32(((15 - 127) << 23) % 2**32 + 0xFFF)


def widen(halves: NDArray[np.float16], out: Float32) -> Float32:
    """Finite float16 values as float32, into `out` of the same shape.

    Sign, exponent and mantissa are moved to their places in float32 and the exponent's bias is corrected by
    a multiplication, which is exact and also serves zeros and subnormal numbers.
    """
    bits = out.view(np.int32)
    np.copyto(bits, halves.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _HALF_BITS, out=bits)
    return np.multiply(out, _HALF_BIAS, out=out)


def widened(halves: NDArray[np.float16]) -> Float32:
    """Any float16 values as float32, NaN and infinity among them; a copy in C order."""
    if (halves.view(np.uint16) & _MAGNITUDE).max(initial=0) >= _INFINITY:
        return halves.astype(np.float32)
    return widen(halves, np.empty(halves.shape, np.float32))


def largest_magnitude(halves: NDArray[np.float16]) -> float:
    """Of finite float16 values in C order; 0 where there are none. The bits of a magnitude grow with it."""
    bits = halves.reshape(-1).view(np.uint16)
    positive = max(0, int(bits.view(np.int16).max(initial=0)))
    negative = int(bits.max(initial=0)) & int(_MAGNITUDE)
    largest = positive if int(bits.max(initial=0)) <= _MAGNITUDE else max(positive, negative)
    return float(np.uint16(largest).view(np.float16))


def narrowed(values: Float32) -> NDArray[np.float16]:
    """Float32 values as float16, to the nearest, and of two that are as near to the even one; a copy in C order."""
    flat = np.ascontiguousarray(values).reshape(-1)
    halves = np.empty(flat.size, np.float16)
    with np.errstate(over="ignore"):
        for start in range(0, flat.size, _BLOCK_VALUES):
            some = flat[start : start + _BLOCK_VALUES]
            bits = some.view(np.uint32)
            magnitudes = bits & np.uint32(0x7FFFFFFF)
            # Below the least it wraps round, so that one comparison tells of both ends.
            odd = np.flatnonzero(magnitudes - _LEAST_NORMAL >= _TOO_LARGE - _LEAST_NORMAL)
            moved = magnitudes >> 13
            moved &= 1
            moved += magnitudes
            moved += _TO_HALF
            moved >>= 13
            signs = bits >> 16
            signs &= 0x8000
            moved |= signs
            found = halves[start : start + some.size]
            found.view(np.uint16)[:] = moved
            found[odd] = some[odd].astype(np.float16)  # zeros, subnormal halves, and what overflows
    return halves.reshape(values.shape)
