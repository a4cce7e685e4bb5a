"""What a gateway and a shard on Triton say to each other: tensors, and JSON in one of them. Pure, for both sides.

A request is the columns of a SearchRequest. Without probes it asks for the shard's state alone, and may carry in
ASSIGN the partitions that the shard is to own from now on. An answer is the columns of a SearchResult, and STATE, one
JSON object: what the answer covers, how fresh it is, what the shard is and lacks.

    GALLERY_IDS    BYTES [g]      OFFSETS        INT64 [n+1]
    PROBES         FP32 [n, d]    GALLERY        INT64 [m]
    FLOORS         FP32 [n, g]    SCORES         FP32 [m]
    RANK_MAX       INT64 [n]      REFERENCE_IDS  BYTES [m]
    AT_MS          INT64 [1]      SUBJECT_IDS    BYTES [m]
    ASSIGN         BYTES [1] optional: bitmap    STATE  BYTES [1]

Both sides treat what they receive as written by a stranger: shapes and types are checked before they are believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from matcher_service.errors import InvalidInput, MatcherError, ShardUnavailable
from matcher_service.partitions import NO_PARTITIONS, Partitions, from_hex, to_hex
from matcher_service.terms import Cause, SearchRequest, SearchResult

MODEL = "gallery_shard"
INPUTS = ("GALLERY_IDS", "PROBES", "FLOORS", "RANK_MAX", "AT_MS")
ASSIGN = "ASSIGN"
OUTPUTS = ("OFFSETS", "GALLERY", "SCORES", "REFERENCE_IDS", "SUBJECT_IDS", "STATE")

Tensors = Mapping[str, NDArray[Any]]

_KINDS = {
    "GALLERY_IDS": "O", "PROBES": "f4", "FLOORS": "f4", "RANK_MAX": "i8", "AT_MS": "i8", "ASSIGN": "O",
    "OFFSETS": "i8", "GALLERY": "i8", "SCORES": "f4", "REFERENCE_IDS": "O", "SUBJECT_IDS": "O", "STATE": "O",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShardState:
    """What a shard says of itself with every answer.

    `sequence` is applied in the view that was searched. `caught_up_age_ms` is the age, when the answer was handed
    over, of the latest moment at which that view was known to hold the whole log; None if it never was.
    `partitions` are those answered for; `assigned` those the shard is to own. `certified` and `scanned` as in
    SearchResult; `missing` names what the answer lacks of the partitions answered for. `refusal` says why replay is
    stuck ("": it is not). `searched_us` is the time in the engine. `live` and `dead` rows per gallery,
    `bytes_in_memory` and `segments` are filled in for a request without probes only, as are `erased_through`
    (nothing that had ended by that sequence is in its memory or in any of its files) and `keys`: of each gallery the
    oldest generation of its key that a file is sealed under.
    """

    shard: str
    sequence: int
    caught_up_age_ms: float | None
    partitions: Partitions
    assigned: Partitions = NO_PARTITIONS
    certified: int = 0
    scanned: int = 0
    missing: tuple[str, ...] = ()
    refusal: str = ""
    searched_us: int = 0
    live: Mapping[str, int] = field(default_factory=dict)
    dead: Mapping[str, int] = field(default_factory=dict)
    bytes_in_memory: int = 0
    segments: int = 0
    erased_through: int = 0
    keys: Mapping[str, int] = field(default_factory=dict)


class ShardAnswer(NamedTuple):
    """What a gateway reads from an answer; `result.sequence`, `missing`, `certified`, `scanned` are the state's."""

    result: SearchResult
    state: ShardState


# --- the gateway's side -------------------------------------------------------------------------------------------


def request_tensors(request: SearchRequest) -> dict[str, NDArray[Any]]:
    """The tensors of a search; arrays of the request are passed on without a copy where they are fit."""
    return {
        "GALLERY_IDS": byte_strings([one.encode() for one in request.gallery_ids]),
        "PROBES": np.ascontiguousarray(request.probes, np.float32),
        "FLOORS": np.ascontiguousarray(request.floors, np.float32),
        "RANK_MAX": np.ascontiguousarray(request.rank_max, np.int64),
        "AT_MS": np.array([request.at_ms], np.int64),
    }


def status_tensors(assign: Partitions | None = None) -> dict[str, NDArray[Any]]:
    """A request without probes; `assign`: the partitions that the shard is to own from now on."""
    nothing = SearchRequest((), np.empty((0, 0), np.float32), np.empty((0, 0), np.float32), np.empty(0, np.int64), 0)
    tensors = request_tensors(nothing)
    if assign is not None:
        tensors[ASSIGN] = byte_strings([to_hex(assign).encode()])
    return tensors


def answer_of(answers: Sequence[NDArray[Any]], probes: int, galleries: int) -> ShardAnswer:
    """The answer to a request of so many probes and galleries, from its tensors in the order of OUTPUTS.

    Raises ShardUnavailable if they make no sense.
    """
    try:
        tensors = dict(zip(OUTPUTS, answers, strict=True))
        offsets, gallery, scores, references, subjects, state = (
            _column(tensors, name, shape)
            for name, shape in zip(OUTPUTS, ((probes + 1,), (-1,), (-1,), (-1,), (-1,), (1,)), strict=True)
        )
        found = len(scores)
        if offsets[0] != 0 or offsets[-1] != found or (np.diff(offsets) < 0).any():
            raise ValueError("OFFSETS do not divide the candidates among the probes")
        if not len(gallery) == len(references) == len(subjects) == found:
            raise ValueError("the columns of candidates differ in length")
        if found and not 0 <= int(gallery.min()) <= int(gallery.max()) < galleries:
            raise ValueError("GALLERY names none of the galleries asked for")
        said = decode_state(state[0])
        result = SearchResult(
            offsets=offsets,
            gallery=gallery,
            scores=scores,
            reference_ids=[one.decode() for one in references],
            subject_ids=[one.decode() for one in subjects],
            sequence=said.sequence,
            missing=said.missing,
            certified=said.certified,
            scanned=said.scanned,
        )
    except (MatcherError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardUnavailable(
            f"the answer of a shard makes no sense: {error}", hint="gateway and shards must be of releases that fit"
        ) from error
    return ShardAnswer(result, said)


def refusal_of(message: str) -> MatcherError:
    """What a shard meant that answered with this error text: InvalidInput if the request is at fault, else
    ShardUnavailable."""
    token, _, detail = message.removeprefix("[").partition("] ")
    if message.startswith("[") and token in _CALLER_FAULTS:
        return InvalidInput(detail, cause=Cause(token))
    return ShardUnavailable(f"a shard failed: {message}", hint="look into the log of the Triton server")


# What `request_of` and the engine refuse a request for.
_CALLER_FAULTS = frozenset((Cause.INVALID, Cause.WRONG_DIMENSION, Cause.TOO_MANY))


# --- the shard's side ---------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A request as a shard reads it. `assign` as in `status_tensors`."""

    search: SearchRequest
    assign: Partitions | None


def request_of(tensors: Tensors) -> Asked:
    """Reads a request; the probes are not copied. Raises InvalidInput."""
    try:
        gallery_ids = tuple(one.decode() for one in _column(tensors, "GALLERY_IDS", (-1,)))
        probes = _column(tensors, "PROBES", (-1, -1))
        floors = _column(tensors, "FLOORS", (len(probes), len(gallery_ids) if len(probes) else -1))
        rank_max = _column(tensors, "RANK_MAX", (len(probes),))
        at_ms = int(_column(tensors, "AT_MS", (1,))[0])
        if len(rank_max) and int(rank_max.min()) < 1:
            raise ValueError("RANK_MAX is below 1")
        if len(set(gallery_ids)) != len(gallery_ids):
            raise ValueError("GALLERY_IDS names a gallery twice")
        assign = from_hex(_column(tensors, ASSIGN, (1,))[0].decode()) if ASSIGN in tensors else None
    except (ValueError, KeyError, AttributeError) as error:
        raise InvalidInput(
            f"the request makes no sense: {error}", hint="gateway and shards must be of releases that fit"
        ) from error
    return Asked(SearchRequest(gallery_ids, np.ascontiguousarray(probes), floors, rank_max, at_ms), assign)


def answer_tensors(result: SearchResult, state: ShardState) -> dict[str, NDArray[Any]]:
    """The tensors of an answer, in the order of OUTPUTS."""
    return {
        "OFFSETS": np.ascontiguousarray(result.offsets, np.int64),
        "GALLERY": np.ascontiguousarray(result.gallery, np.int64),
        "SCORES": np.ascontiguousarray(result.scores, np.float32),
        "REFERENCE_IDS": byte_strings([one.encode() for one in result.reference_ids]),
        "SUBJECT_IDS": byte_strings([one.encode() for one in result.subject_ids]),
        "STATE": byte_strings([encode_state(state)]),
    }


# --- both ---------------------------------------------------------------------------------------------------------


def byte_strings(values: Sequence[bytes]) -> NDArray[np.object_]:
    """A BYTES tensor [n], as Triton's Python backend and its client take it: an array of bytes objects."""
    column = np.empty(len(values), np.object_)
    column[:] = values
    return column


def encode_state(state: ShardState) -> bytes:
    # `asdict` would copy the sets number by number, which takes longer than everything else here.
    told = {one.name: getattr(state, one.name) for one in fields(state)}
    told["partitions"], told["assigned"] = to_hex(state.partitions), to_hex(state.assigned)
    return orjson.dumps(told)


def decode_state(text: bytes) -> ShardState:
    """Keys that this release does not know are passed over. Raises ValueError, KeyError, TypeError or InvalidInput."""
    told = orjson.loads(text)
    age = told["caught_up_age_ms"]
    return ShardState(
        shard=str(told["shard"]),
        sequence=int(told["sequence"]),
        caught_up_age_ms=None if age is None else float(age),
        partitions=from_hex(told["partitions"]),
        assigned=from_hex(told["assigned"]),
        certified=int(told["certified"]),
        scanned=int(told["scanned"]),
        missing=tuple(str(one) for one in told["missing"]),
        refusal=str(told["refusal"]),
        searched_us=int(told["searched_us"]),
        live={str(name): int(rows) for name, rows in told["live"].items()},
        dead={str(name): int(rows) for name, rows in told["dead"].items()},
        bytes_in_memory=int(told["bytes_in_memory"]),
        segments=int(told["segments"]),
        # A shard of a release before this one does not tell: nothing is known to have left it.
        erased_through=int(told.get("erased_through", 0)),
        keys={str(name): int(one) for name, one in told.get("keys", {}).items()},
    )


def _column(tensors: Tensors, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The tensor of that name, if it has its type and this shape; -1 is any length. Raises ValueError or KeyError."""
    values = tensors[name]
    if values.dtype != np.dtype(_KINDS[name]):
        raise ValueError(f"{name} is of type {values.dtype}")
    if values.ndim != len(shape) or any(
        wanted not in (-1, length) for wanted, length in zip(shape, values.shape, strict=True)
    ):
        raise ValueError(f"{name} has shape {list(values.shape)}")
    return values
