"""Law 2: what the service answers over the wire equals a flat scan of the stored rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.running_service import whole_service

REFERENCES = 20_000
DIMENSION = 128


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """References with duplicates, near-duplicates and hubs; probes near some of them and near none."""
    rng = np.random.default_rng(seed)
    references = unit(rng.normal(size=(REFERENCES, DIMENSION)))
    references[5000:5200] = references[5000]  # exact duplicates: ties by id
    references[6000:7000] = unit(references[6000].astype(np.float64) + 0.03 * rng.normal(size=(1000, DIMENSION)))
    mated = references[rng.integers(0, REFERENCES, 60)].astype(np.float64)
    probes = np.concatenate(
        [
            unit(mated + 0.08 * rng.normal(size=mated.shape)),
            references[5000:5001],
            references[6000:6001],
            unit(rng.normal(size=(60, DIMENSION))),
        ]
    )
    return references, probes


async def test_law_2_the_answer_equals_a_flat_scan_of_the_stored_rows(tmp_path: Path) -> None:
    seed = 20261122
    print(f"seed {seed}")
    references, probes = clustered(seed)
    ids = [f"ref-{row:05d}" for row in range(REFERENCES)]
    subjects = [f"subject-{row // 3}" for row in range(REFERENCES)]
    half = REFERENCES // 2
    threshold, rank_max = 0.35, 20
    async with whole_service(tmp_path) as service:
        space = await service.space(DIMENSION)
        for name, rows in (("a", slice(0, half)), ("b", slice(half, None))):
            await service.gallery(name, space, threshold)
            receipts = await service.enrol(name, space, references[rows], ids[rows], subjects[rows])
            assert len(receipts) == half
        await service.deployment("a", "b")
        answers = await service.ask(space, probes, rank_max=rank_max, min_sequence=receipts[-1].sequence)

    # The oracle: what is stored is the normalised template in float16.
    stored = unit(references.astype(np.float64)).astype(np.float16).astype(np.float64)
    adapted = unit(probes.astype(np.float64)).astype(np.float64)
    scores = (adapted @ stored.T).astype(np.float32)
    alerts = 0
    for at in range(len(probes)):
        order = sorted(
            np.flatnonzero(scores[at] >= threshold),
            key=lambda row: (-scores[at, row], "a" if row < half else "b", ids[row]),
        )
        expected: list[tuple[str, str, str, float]] = []
        seen: set[tuple[str, str]] = set()
        for row in order:
            gallery = "a" if row < half else "b"
            if (gallery, subjects[row]) not in seen and len(expected) < rank_max:
                seen.add((gallery, subjects[row]))
                expected.append((gallery, subjects[row], ids[row], float(scores[at, row])))
        got = answers[f"p{at}"].decision.candidates
        assert [(one.gallery_id, one.subject_id, one.reference_id) for one in got] == [row[:3] for row in expected]
        assert np.allclose([one.score for one in got], [row[3] for row in expected], rtol=0, atol=1e-6)
        assert [one.rank for one in got] == list(range(1, len(got) + 1))
        alerts += bool(got)
    assert alerts >= 62
