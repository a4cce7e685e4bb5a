"""Galleries and probes for the benchmarks, from a seed: the same at every run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from matcher_service.demo.data import load_faces
from matcher_service.demo.distractors import fit

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]
Kind = Literal["isotropic", "spread07", "spread10", "real"]
KINDS: tuple[Kind, ...] = ("isotropic", "spread07", "spread10", "real")
REAL_DIMENSION = 128
_BLOCK = 65_536
_SPREAD = {"spread07": 0.07, "spread10": 0.10}
_DUPLICATES = 0.01
_HUBS = 20
_HUB_SHARE = 0.01
_HUB_COSINE = 0.5
# Real probes are at the cosine to their mate that the model gives them, not at one of our choice.
REAL_COSINE_MEDIAN = 0.84


@dataclass(frozen=True, slots=True)
class Probes:
    """Unit probes float32 [n, d]; `mates` int64 [n], the row of each one's mate, -1 for none."""

    vectors: Float32
    mates: NDArray[np.int64]


def gallery(kind: Kind, references: int, dimension: int, seed: int, file: Path | None = None) -> Float16:
    """Stored rows, float16 [references, dimension]; in memory, or in a `file` that is mapped.

    `isotropic`: independent directions. `spread07`, `spread10`: impostor scores with a standard deviation of
    0.07 and 0.10 through a spectrum that falls, 1% exact duplicates, and 20 hubs with 1% of the rows at cosine
    0.5 to one of them. `real`: the 400 real templates, centred, and synthetic people drawn like them.
    """
    shape = (references, dimension)
    stored: Float16 = (
        np.empty(shape, np.float16)
        if file is None
        else np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
    )
    for start, rows in _blocks(kind, references, dimension, seed):
        stored[start : start + len(rows)] = rows
    if kind in _SPREAD:
        source = np.random.default_rng(seed + 1)
        copies = source.choice(references, int(_DUPLICATES * references), replace=False)
        stored[copies] = stored[source.integers(0, references, copies.size)]
    return stored


def probes(stored: Float16, kind: Kind, count: int, cosine: float, seed: int, mated: float = 0.5) -> Probes:
    """A share `mated` has a mate among the rows at `cosine`, the others have none; in mixed order."""
    source = np.random.default_rng(seed)
    dimension = stored.shape[1]
    strangers = np.concatenate([rows for _, rows in _blocks(kind, count + 400, dimension, seed + 7)])[400:]
    mates = np.where(source.random(count) < mated, source.integers(0, len(stored), count), -1)
    vectors = _unit(strangers[:count])
    for number in np.flatnonzero(mates >= 0):
        row = _unit(stored[mates[number]][None])[0].astype(np.float64)
        away = vectors[number].astype(np.float64)
        away -= (away @ row) * row
        vectors[number] = cosine * row + np.sqrt(1 - cosine**2) * away / np.linalg.norm(away)
    return Probes(np.ascontiguousarray(_unit(vectors)), mates.astype(np.int64))


def _blocks(kind: Kind, references: int, dimension: int, seed: int) -> Iterator[tuple[int, Float32]]:
    source = np.random.default_rng(seed)
    hubs = _unit(np.random.default_rng(99).standard_normal((_HUBS, dimension)))
    scales = _spectrum(dimension, _SPREAD[kind]) if kind in _SPREAD else None
    generator = None
    start = 0
    if kind == "real":
        if dimension != REAL_DIMENSION:
            raise ValueError(f"the real templates have {REAL_DIMENSION} dimensions")
        faces = load_faces()
        units = _unit(faces.templates - faces.templates.mean(axis=0))
        generator = fit(units, faces.subjects)
        yield 0, units[:references]
        start = min(references, len(units))
    while start < references:
        count = min(_BLOCK, references - start)
        if generator is not None:
            rows = generator.draw(count, source)
        else:
            rows = source.standard_normal((count, dimension), np.float32)
            if scales is not None:
                rows = _unit(rows * scales)
                near = source.random(count) < _HUB_SHARE
                rows[near] = (
                    rows[near] * np.sqrt(1 - _HUB_COSINE**2)
                    + _HUB_COSINE * hubs[source.integers(0, _HUBS, int(near.sum()))]
                )
        yield start, _unit(rows)
        start += count


def _spectrum(dimension: int, spread: float) -> Float32:
    """Scales [d] of a spectrum lambda ~ 1/i^p, so chosen that scores of independent rows spread by `spread`:
    their variance is sum(lambda^2) / sum(lambda)^2."""
    low, high = 0.0, 3.0
    numbers = np.arange(1, dimension + 1, dtype=np.float64)
    for _ in range(60):
        power = (low + high) / 2
        values = numbers**-power
        if np.sqrt((values**2).sum()) / values.sum() < spread:
            low = power
        else:
            high = power
    return np.sqrt(numbers ** -((low + high) / 2)).astype(np.float32)


def _unit(rows: NDArray[np.floating]) -> Float32:
    wide = rows.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)
