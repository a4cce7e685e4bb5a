"""Proves at load that this process finds what is there: the engine on this machine, with this numpy and this FAISS,
against sums written out, and through the tensors in which it will be asked and will answer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from matcher_service.index.engine import Engine
from matcher_service.index.fastscan import build_fastscan, one_thread
from matcher_service.models.hosted import ValuesHarmed
from matcher_service.shards.exchange import ShardState, answer_of, answer_tensors, request_of, request_tensors
from matcher_service.terms import EntryKind, Float32, LogEntry, SearchRequest

_DIMENSION, _ROWS, _FLOOR = 64, 4096, 0.3


def check_engine(tensor: Any) -> None:
    """`tensor` is the Python backend's Tensor class. Raises ValuesHarmed."""
    one_thread()
    stored, probes = _known_rows()
    engine = Engine(
        build=build_fastscan,
        dimension_of=lambda _: _DIMENSION,
        segment_rows_max=_ROWS,
        memory_bytes_max=1 << 30,
        tail_rows_max=_ROWS,
    )
    template = [row.tobytes() for row in stored]
    engine.apply([_entry(1, EntryKind.GALLERY_CREATED, "", None)])
    engine.apply([_entry(row + 2, EntryKind.ENROL, str(row), template[row]) for row in range(_ROWS)])
    request = SearchRequest(
        ("check",),
        probes,
        np.full((len(probes), 1), _FLOOR, np.float32),
        np.full(len(probes), _ROWS, np.int64),
        0,
    )
    there = {name: _passed_on(tensor, name, values) for name, values in request_tensors(request).items()}
    result = engine.search(request_of(there).search)
    state = ShardState("check", result.sequence, None, frozenset())
    back = [_passed_on(tensor, name, values) for name, values in answer_tensors(result, state).items()]
    answer = answer_of(back, len(probes), 1).result
    scores = np.einsum("pd,rd->pr", probes.astype(np.float64), stored.astype(np.float64)).astype(np.float32)
    for probe in range(len(probes)):
        found = slice(int(answer.offsets[probe]), int(answer.offsets[probe + 1]))
        expected = {str(row) for row in np.flatnonzero(scores[probe] >= _FLOOR)}
        if set(answer.reference_ids[found]) != expected or not expected:
            raise ValuesHarmed(
                f"a search of known rows found {len(answer.reference_ids[found])} of {len(expected)}",
                hint="install the versions that triton_models/requirements.txt names",
            )


def _passed_on(tensor: Any, name: str, values: NDArray[Any]) -> NDArray[Any]:
    passed = tensor(name, values)
    if values.dtype != np.object_:
        # Through DLPack, because a tensor made from an array hands back that very array, unread.
        passed = tensor.from_dlpack(name, passed.to_dlpack())
    arrived: NDArray[Any] = passed.as_numpy()
    return arrived


def _known_rows() -> tuple[Any, Float32]:
    """Rows float16 [_ROWS, _DIMENSION] and probes float32 [4, _DIMENSION] near to some of them; always the same."""
    rng = np.random.default_rng(20)
    rows = rng.standard_normal((_ROWS, _DIMENSION))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    probes = rows[:: _ROWS // 4] + 0.1 * rng.standard_normal((4, _DIMENSION))
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    return rows.astype(np.float16), np.ascontiguousarray(probes, np.float32)


def _entry(sequence: int, kind: EntryKind, reference_id: str, template: bytes | None) -> LogEntry:
    return LogEntry(sequence, kind, 1, "check", reference_id, reference_id, 2, template, b"")
