"""Partitions: which one a reference falls into, and sets of them as bitmap and as text."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.errors import InvalidInput
from matcher_service.partitions import (
    ALL_PARTITIONS,
    PARTITION_COUNT,
    from_hex,
    mask_of,
    named,
    parse,
    partition_of,
    partitions_of,
    ranges,
    share,
    to_hex,
)

sets = st.frozensets(st.integers(0, PARTITION_COUNT - 1))


def test_the_partition_of_a_reference_never_changes() -> None:
    """It is fixed by the ids alone: rows that a shard wrote long ago must be found where they were put."""
    assert partition_of("custody", "r-1") == hashlib.sha256(b"custody\0r-1").digest()[0] == 101
    assert partition_of("ä", "ß") == hashlib.sha256("ä\0ß".encode()).digest()[0]


@given(st.text(max_size=8), st.lists(st.text(max_size=8), max_size=5))
def test_a_column_of_references_falls_where_each_does(gallery_id: str, references: list[str]) -> None:
    """One law, for one and for many."""
    column = partitions_of(gallery_id, [one.encode() for one in references])
    assert column.tolist() == [partition_of(gallery_id, one) for one in references]


def test_references_spread_evenly() -> None:
    """No partition of 51,200 references holds twice its share, and none less than half of it."""
    counts = Counter(partitions_of("g", (b"%d" % number for number in range(200 * PARTITION_COUNT))).tolist())
    assert len(counts) == PARTITION_COUNT
    assert min(counts.values()) > 100
    assert max(counts.values()) < 400


@given(sets)
def test_a_set_survives_being_written_as_bitmap_and_as_ranges(partitions: frozenset[int]) -> None:
    """Bit i of the number stands for partition i."""
    text = to_hex(partitions)
    assert len(text) == 64
    assert int(text, 16) == sum(2**one for one in partitions)
    assert from_hex(text) == parse(text) == parse(ranges(partitions)) == partitions
    assert mask_of(partitions).tolist() == [one in partitions for one in range(PARTITION_COUNT)]


@given(st.integers(1, PARTITION_COUNT))
def test_equal_shares_are_all_partitions_each_once(count: int) -> None:
    """And no share is larger than another by more than one."""
    shares = [share(number, count) for number in range(count)]
    assert sum(map(len, shares)) == PARTITION_COUNT
    assert frozenset().union(*shares) == ALL_PARTITIONS
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_is_missing_is_named_in_ranges() -> None:
    """As an operator reads it."""
    assert named({3}) == "partition 3"
    assert named({*range(64), 70, 72, 73}) == "partitions 0-63, 70, 72-73"
    assert named(ALL_PARTITIONS) == "partitions 0-255"
    assert named(()) == ""
    assert parse(" all ") == ALL_PARTITIONS
    assert parse("") == parse("none") == frozenset()


@pytest.mark.parametrize("text", ["256", "-1", "5-3", "a", "0-300", "1;2", "1--2"])
def test_what_is_no_partition_is_refused(text: str) -> None:
    """With what to write instead."""
    with pytest.raises(InvalidInput) as refused:
        parse(text)
    assert refused.value.hint


@pytest.mark.parametrize("text", ["", "ff", "g" * 64, "+" + "0" * 63, "0x" + "0" * 62, "0" * 63 + " "])
def test_what_is_no_bitmap_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        from_hex(text)
