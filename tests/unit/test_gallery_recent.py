"""What was just committed is handed to replay in order, whole, and within bounds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.gallery.recent import Recent
from matcher_service.terms import EnrolRun, LogEntry

DIMENSION = 4


def run(sequence: int, rows: int) -> EnrolRun:
    names = [f"r{sequence + row}" for row in range(rows)]
    templates = np.arange(sequence * DIMENSION, (sequence + rows) * DIMENSION).reshape(rows, DIMENSION)
    return EnrolRun(sequence, 7, "g", names, names, templates.astype(np.float16), np.full(rows, 9))


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), max_size=8),
    st.integers(0, 200),
    st.integers(1, 9),
    st.data(),
)
def test_law_1_whoever_reads_on_gets_what_the_log_holds_next_or_is_sent_to_the_tables(
    gaps_and_rows: list[tuple[int, int]], bytes_max: int, limit: int, data: st.DataObject
) -> None:
    """Law 1: nothing is left out, given twice or out of order, wherever the reader stands and whatever was dropped."""
    recent = Recent(bytes_max)
    log: dict[int, LogEntry] = {}
    sequence = 0
    for gap, rows in gaps_and_rows:
        made = run(sequence + gap, rows)
        log |= {entry.sequence: entry for entry in made}
        sequence = made.last_sequence
        recent.add([made])
    after = data.draw(st.integers(0, sequence + 1))
    while after <= sequence:
        given_now = recent.beyond(after, limit)
        if given_now is None:
            after += 1  # read from the tables
            continue
        assert 0 < len(given_now) <= limit
        assert list(given_now) == [log[after + 1 + place] for place in range(len(given_now))]
        after = given_now[-1].sequence
    assert recent.beyond(after, limit) is None


def test_no_more_is_held_than_was_allowed_and_nothing_after_it_was_cleared() -> None:
    recent = Recent(3 * DIMENSION * 2)
    recent.add([run(1, 2), run(3, 2)])
    assert recent.beyond(0, 9) is None
    first = recent.beyond(2, 9)
    assert first is not None
    assert [entry.sequence for entry in first] == [3, 4]
    recent.clear()
    assert recent.beyond(2, 9) is None
    recent.add([run(5, 9)])
    assert recent.beyond(4, 9) is None
