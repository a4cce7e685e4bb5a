"""Stored rows as int8 codes on a device, with what `integer_bound.py` needs to know of them.

A scale is chosen once for a group of rows and is never wrong: whatever it cuts off or rounds away is measured row
by row. Rows whose error is far above that of others (long ones, or ones with a single large value) would spoil
the cut-off of all, so up to `ODD_MAX` of them get no codes and are scored for every probe.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from matcher_service.index.integer_bound import CODE_MAX, Law, upper
from matcher_service.terms import Int64

ODD_MAX = 64
_SAMPLE_ROWS = 1024
# A scale covers so many standard deviations of the values: less cuts off more, more rounds more coarsely.
_SPANS = (3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0, 12.0, 24.0)
_USUAL_SPAN = 4.5
_ODD_TIMES = 2.5  # an error of so many times the usual one is odd
_ENCODE_VALUES = 1 << 25  # float64 values held at once while encoding: 256 MiB


class Encoded(NamedTuple):
    """Codes int8 [n, d] on the device; the law that holds for all but the `odd` rows (int64 [m]), whose codes
    are 0."""

    codes: torch.Tensor
    law: Law
    odd: Int64


def usual_scale(dimension: int) -> float:
    """The scale of unit rows whose values are spread evenly: for rows not seen yet."""
    return float(np.float32(_USUAL_SPAN / (CODE_MAX * dimension**0.5)))


def choose_scale(stored: NDArray[np.float16]) -> float:
    """The scale with the least coding error for nearly all rows of a sample of `stored`, float16 [n, d]."""
    sample = stored[np.unique(np.linspace(0, max(0, len(stored) - 1), _SAMPLE_ROWS).astype(np.int64))[: len(stored)]]
    wide = sample.astype(np.float32)
    deviation = float(np.sqrt(np.mean(wide * wide))) if wide.size else 0.0
    if not deviation > 0:
        return usual_scale(stored.shape[1])
    scales = [float(np.float32(span * deviation / CODE_MAX)) for span in _SPANS]
    errors = []
    for scale in scales:
        lost = wide - np.clip(np.rint(wide / scale), -CODE_MAX, CODE_MAX) * np.float32(scale)
        errors.append(float(np.quantile(np.sqrt(np.einsum("ij,ij->i", lost, lost)), 0.99)))
    return scales[int(np.argmin(errors))]


def encode(stored: NDArray[np.float16], scale: float, device: Any, odd_max: int = ODD_MAX) -> Encoded:
    """Codes of `stored`, float16 [n, d] of finite numbers, on `device`. At most `odd_max` rows are odd."""
    count, dimension = stored.shape
    step = max(1, _ENCODE_VALUES // dimension)
    codes = torch.empty((count, dimension), dtype=torch.int8, device=device)
    errors, reaches = np.empty(count), np.empty(count)
    for start in range(0, count, step):
        here = slice(start, min(start + step, count))
        # A copy, since rows may be read-only and torch knows no such thing.
        wide = torch.from_numpy(np.array(stored[here])).to(device).to(torch.float64)
        near = torch.clamp(torch.round(wide / scale), -CODE_MAX, CODE_MAX)
        codes[here] = near.to(torch.int8)
        near *= scale
        wide -= near
        errors[here] = torch.sqrt((wide * wide).sum(dim=1)).cpu().numpy()
        reaches[here] = torch.sqrt((near * near).sum(dim=1)).cpu().numpy()
    odd = _odd(errors, scale, dimension, odd_max)
    if odd.size:
        codes[torch.from_numpy(odd).to(device)] = 0
        errors[odd], reaches[odd] = 0.0, 0.0
    worst = upper(np.array([errors.max(initial=0.0), reaches.max(initial=0.0)]))
    return Encoded(codes, Law(scale, float(worst[0]), float(worst[1])), odd)


def _odd(errors: NDArray[np.float64], scale: float, dimension: int, odd_max: int) -> Int64:
    usual = scale * (dimension / 12) ** 0.5
    odd = np.flatnonzero(errors > _ODD_TIMES * usual)
    if odd.size > odd_max:
        odd = odd[np.argsort(-errors[odd], kind="stable")[:odd_max]]
    return np.sort(odd).astype(np.int64)
