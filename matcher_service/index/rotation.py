"""The secret rotation of a segment and the codebook that every rotated segment shares.

The rotation is drawn from the Haar measure: the QR decomposition of a Gaussian matrix with the signs of R's
diagonal moved into Q (Mezzadri, How to generate random matrices from the classical compact groups, Notices of
the AMS 54, 2007). Its generator is seeded by the operating system. It is kept secret and is never drawn again
because of a result: the error law of the filter (`certificate.py`) rests on its independence from the probes.

A coordinate block of a rotated unit vector has the same distribution in every gallery and at every place: close
to a Gaussian of variance 1/d. So one codebook, trained once on random unit vectors, fits them all.
"""

from __future__ import annotations

from functools import lru_cache

import faiss
import numpy as np
from numpy.typing import NDArray

from matcher_service.terms import Float32

CENTROIDS = 16  # 4-bit codes
_SAMPLES = 32_768
_ROUNDS_MAX = 60


def draw_rotation(dimension: int, entropy: int | None = None) -> Float32:
    """A Haar rotation, float32 [d, d]; rows y of rotated vectors are x @ rotation.T.

    `entropy` None: from the operating system, as every segment must have it. A number is for tests.
    """
    source = np.random.default_rng(entropy)
    q, r = np.linalg.qr(source.standard_normal((dimension, dimension)))
    diagonal = np.diag(r)
    return np.ascontiguousarray(q * np.where(diagonal < 0, -1.0, 1.0), np.float32)


class Rotation:
    """Applies a rotation, float32 [d, d], to probes: by FAISS, whose product keeps to the threads set for the
    calling thread. numpy's would wake threads that then compete with those of the scan."""

    def __init__(self, matrix: Float32) -> None:
        self.matrix = np.ascontiguousarray(matrix, np.float32)
        dimension = len(self.matrix)
        self._transform = faiss.LinearTransform(dimension, dimension, False)
        faiss.copy_array_to_vector(self.matrix.ravel(), self._transform.A)
        self._transform.is_trained = True

    def __call__(self, probes: Float32) -> Float32:
        """R q for each probe, float32 [n, d]."""
        return np.asarray(self._transform.apply(probes), np.float32)


@lru_cache(maxsize=64)
def codebook(dimension: int, block: int) -> Float32:
    """Centroids float32 [16, block] for the blocks of `block` coordinates of random unit vectors in
    `dimension` dimensions, by Lloyd's algorithm on a fixed sample. Read-only: it is shared."""
    source = np.random.default_rng(20_250_101 + 1000 * dimension + block)
    points = source.standard_normal((_SAMPLES, block)) / np.sqrt(dimension)
    centroids = points[:CENTROIDS].copy()
    # Written again in every round: fresh memory costs as much as the arithmetic.
    every, closeness, members = np.arange(_SAMPLES), np.empty((_SAMPLES, CENTROIDS)), np.zeros((CENTROIDS, _SAMPLES))
    nearest: NDArray[np.intp] | None = None
    for _ in range(_ROUNDS_MAX):
        np.matmul(points, centroids.T, out=closeness)
        closeness -= 0.5 * np.einsum("ij,ij->i", centroids, centroids)
        moved = closeness.argmax(axis=1)
        if nearest is not None:
            if np.array_equal(moved, nearest):
                break
            members[nearest, every] = 0.0
        nearest = moved
        members[nearest, every] = 1.0
        counts = np.bincount(nearest, minlength=CENTROIDS)[:, None]
        centroids = np.where(counts > 0, members @ points / np.maximum(counts, 1), centroids)
    found: Float32 = centroids.astype(np.float32)
    found.setflags(write=False)
    return found
