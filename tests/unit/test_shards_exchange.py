"""What gateway and shard say to each other survives the way as it was meant, and nonsense is refused on both sides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.errors import InvalidInput, ShardUnavailable
from matcher_service.partitions import ALL_PARTITIONS, share
from matcher_service.shards import exchange
from matcher_service.shards.exchange import ShardState, answer_of, answer_tensors, request_of, request_tensors
from matcher_service.terms import Cause, SearchRequest, SearchResult
from tests.oracle import same

STATE = ShardState(
    shard="a",
    sequence=2**60,
    caught_up_age_ms=12.5,
    partitions=share(0, 4),
    assigned=ALL_PARTITIONS,
    certified=3,
    scanned=4,
    missing=("gallery/ä",),
    refusal="stuck",
    searched_us=900,
    live={"g": 1},
    dead={"g": 2},
    bytes_in_memory=5,
    segments=6,
)
names = st.text(max_size=6)


@st.composite
def requests(draw: st.DrawFn) -> SearchRequest:
    galleries = draw(st.lists(names, max_size=4, unique=True))
    count, dimension = draw(st.integers(0, 5)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    floors = rng.standard_normal((count, len(galleries))).astype(np.float32)
    floors[rng.random(floors.shape) < 0.3] = -np.inf
    return SearchRequest(
        tuple(galleries),
        rng.standard_normal((count, dimension)).astype(np.float32),
        floors,
        rng.integers(1, 99, count),
        draw(st.integers(0, 2**62)),
    )


@st.composite
def results(draw: st.DrawFn) -> SearchResult:
    found = draw(st.lists(st.tuples(names, names, st.floats(-1, 1, width=32), st.integers(0, 2)), max_size=9))
    cuts = sorted(draw(st.lists(st.integers(0, len(found)), max_size=4)))
    return SearchResult(
        np.array([0, *cuts, len(found)], np.int64),
        np.array([one[3] for one in found], np.int64),
        np.array([one[2] for one in found], np.float32),
        [one[0] for one in found],
        [one[1] for one in found],
        STATE.sequence,
        STATE.missing,
        STATE.certified,
        STATE.scanned,
    )


@given(requests())
def test_a_shard_reads_the_request_that_the_gateway_made(request: SearchRequest) -> None:
    """Bit for bit, whatever the numbers of probes and galleries."""
    asked = request_of(request_tensors(request))
    assert asked.assign is None
    assert asked.search.gallery_ids == request.gallery_ids
    assert asked.search.at_ms == request.at_ms
    for name in ("probes", "floors", "rank_max"):
        sent, read = getattr(request, name), getattr(asked.search, name)
        assert (read.dtype, read.shape, read.tobytes()) == (sent.dtype, sent.shape, sent.tobytes())


@given(results())
def test_a_gateway_reads_the_answer_that_the_shard_gave(result: SearchResult) -> None:
    """Candidates, what they cover and how fresh they are."""
    tensors = answer_tensors(result, STATE)
    assert tuple(tensors) == exchange.OUTPUTS
    answer = answer_of(list(tensors.values()), len(result.offsets) - 1, 3)
    assert same(answer.result, result)
    assert answer.state == STATE
    assert replace(answer.result, offsets=0, gallery=0, scores=0) == replace(result, offsets=0, gallery=0, scores=0)


@pytest.mark.parametrize("assign", [None, frozenset(), share(2, 3), ALL_PARTITIONS])
def test_a_request_without_probes_may_assign_partitions(assign: frozenset[int] | None) -> None:
    """The empty set is an assignment too: the shard is to let go of everything."""
    asked = request_of(exchange.status_tensors(assign))
    assert asked.assign == assign
    assert asked.search.probes.shape == (0, 0)


def test_a_shard_that_was_never_caught_up_says_so() -> None:
    """None is not an age, and no lease covers it."""
    assert exchange.decode_state(exchange.encode_state(replace(STATE, caught_up_age_ms=None))).caught_up_age_ms is None


REQUEST = SearchRequest(("g", "h"), np.eye(3, dtype=np.float32), np.zeros((3, 2), np.float32), np.ones(3, np.int64), 5)
RESULT = SearchResult(np.array([0, 1, 1, 2]), np.array([0, 1]), np.array([0.5, 0.25], np.float32), "ab", "cd", 9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROBES", np.eye(3)),
        ("PROBES", np.ones(3, np.float32)),
        ("FLOORS", np.zeros((2, 2), np.float32)),
        ("FLOORS", np.zeros((3, 1), np.float32)),
        ("RANK_MAX", np.zeros(3, np.int64)),
        ("RANK_MAX", np.ones(2, np.int64)),
        ("AT_MS", np.empty(0, np.int64)),
        ("GALLERY_IDS", exchange.byte_strings([b"g", b"g"])),
        ("GALLERY_IDS", exchange.byte_strings([b"g", b"\xff"])),
        ("ASSIGN", exchange.byte_strings([b"12"])),
        ("ASSIGN", exchange.byte_strings([])),
    ],
)
def test_a_request_that_makes_no_sense_is_the_callers_fault(name: str, value: np.ndarray) -> None:
    """It is refused before the engine sees it."""
    with pytest.raises(InvalidInput):
        request_of({**request_tensors(REQUEST), name: value})


def test_a_request_that_lacks_a_tensor_is_the_callers_fault() -> None:
    """Whichever it is."""
    tensors = request_tensors(REQUEST)
    for name in exchange.INPUTS:
        with pytest.raises(InvalidInput):
            request_of({key: value for key, value in tensors.items() if key != name})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OFFSETS", np.array([0, 1, 2])),
        ("OFFSETS", np.array([0, 2, 1, 2])),
        ("OFFSETS", np.array([1, 1, 1, 2])),
        ("OFFSETS", np.array([0, 1, 1, 3])),
        ("GALLERY", np.array([0, 2])),
        ("GALLERY", np.array([-1, 0])),
        ("GALLERY", np.array([0])),
        ("SCORES", np.array([0.5, 0.25])),
        ("REFERENCE_IDS", exchange.byte_strings([b"a"])),
        ("SUBJECT_IDS", exchange.byte_strings([b"a", b"\xff"])),
        ("STATE", exchange.byte_strings([b"{}"])),
        ("STATE", exchange.byte_strings([b"[]"])),
        ("STATE", exchange.byte_strings([b"not json"])),
        ("STATE", exchange.byte_strings([exchange.encode_state(STATE).replace(b"partitions", b"p")])),
        ("STATE", exchange.byte_strings([])),
    ],
)
def test_an_answer_that_makes_no_sense_counts_as_none(name: str, value: np.ndarray) -> None:
    """Law 4: nothing is read into it; the shard did not answer."""
    tensors = {**answer_tensors(RESULT, STATE), name: value}
    with pytest.raises(ShardUnavailable):
        answer_of(list(tensors.values()), 3, 2)


def test_a_refusal_keeps_its_cause() -> None:
    """The caller's fault stays the caller's; anything else is the shard's."""
    refused = exchange.refusal_of("[WRONG_DIMENSION] probes: gallery g holds 2-d templates")
    assert isinstance(refused, InvalidInput)
    assert refused.cause is Cause.WRONG_DIMENSION
    for text in ("[INTERNAL] what", "no token", "[WRONG_DIMENSION]", ""):
        assert isinstance(exchange.refusal_of(text), ShardUnavailable)
