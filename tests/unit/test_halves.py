"""Between float16 and float32: the same bits as numpy's own conversion, which is the standard's."""

from __future__ import annotations

import numpy as np
import pytest

from matcher_service.halves import largest_magnitude, narrowed, widen, widened

EVERY = np.arange(65536, dtype=np.uint16).view(np.float16)


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Bit for bit, but for which of the NaNs it is."""
    bits = np.uint16 if found.dtype == np.float16 else np.uint32
    number = ~np.isnan(wanted)
    return bool(
        found.dtype == wanted.dtype
        and np.array_equal(found[number].view(bits), wanted[number].view(bits))
        and np.isnan(found[~number]).all()
    )


def test_every_finite_float16_is_widened_to_itself() -> None:
    finite = EVERY[np.isfinite(EVERY)]
    assert same(widen(finite, np.empty(finite.shape, np.float32)), finite.astype(np.float32))
    assert same(widened(finite.reshape(2, -1)), finite.reshape(2, -1).astype(np.float32))


def test_infinity_and_nan_stay_what_they_are() -> None:
    assert same(widened(EVERY), EVERY.astype(np.float32))


def test_the_largest_magnitude_is_found_among_either_sign() -> None:
    finite = EVERY[np.isfinite(EVERY)]
    for some in (finite, finite[finite > 0], finite[finite < 0], finite[np.abs(finite) < 1e-4], -finite[:300]):
        assert largest_magnitude(some) == float(np.abs(some).max())
    draw = np.random.default_rng(4)
    for _ in range(200):
        some = draw.choice(finite, draw.integers(1, 6))
        assert largest_magnitude(some) == float(np.abs(some).max())
    assert largest_magnitude(np.zeros((2, 0), np.float16)) == largest_magnitude(np.float16([[-0.0]])) == 0.0


def test_every_border_between_two_float16_is_rounded_as_the_standard_has_it() -> None:
    finite = np.sort(EVERY[np.isfinite(EVERY)].astype(np.float32))
    middle = (finite[:-1] + finite[1:]) / 2
    above, below = np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))
    for values in (finite, middle, above, below):
        assert same(narrowed(values), values.astype(np.float16))


def test_what_a_float16_cannot_hold_is_rounded_as_the_standard_has_it() -> None:
    largest = np.array([65504, 65519.996, 65520, 65536, 3e38, np.inf, np.nan], np.float32)
    least = np.array([0.0, 1e-45, 2.9e-8, 2.0**-25, 2.0**-24, 6.1e-5, 2.0**-14], np.float32)
    with np.errstate(over="ignore"):
        for values in (largest, -largest, least, -least):
            assert same(narrowed(values), values.astype(np.float16))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (70, 1000)])
def test_any_bits_in_any_shape_and_order(shape: tuple[int, int]) -> None:
    seed = 3
    print(f"seed {seed}")
    bits = np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)
    values = bits.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        assert same(narrowed(values), values.astype(np.float16))
        assert same(narrowed(values[:, ::-1]), values[:, ::-1].astype(np.float16))
