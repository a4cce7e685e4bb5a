"""The erasure ledger outlives the database, survives a torn end, names nobody, and forgets with the oldest backup."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from matcher_service.gallery.ledger import Ended, ErasureLedger, returned

DAY_MS = 86_400_000
NOON_MS = round(datetime(2026, 5, 20, 12, tzinfo=UTC).timestamp() * 1000)
ENDED = st.builds(Ended, st.sampled_from("gh"), st.sampled_from("abc"), st.integers(1, 50), st.integers(0, 5))


def test_what_is_written_is_read_with_the_newest_head(tmp_path: Path) -> None:
    ledger = ErasureLedger(tmp_path / "erasures")
    assert ledger.read() == (frozenset(), 0)
    one, other = Ended("g", "a", 3, 7), Ended("g", "b", 4, 7)
    ledger.add([one], 9, NOON_MS)
    ledger.add([], 10, NOON_MS)
    ledger.add([other], 12, NOON_MS + 40 * DAY_MS)
    assert ledger.read() == (frozenset({one.digest, other.digest}), 12)
    assert len(list((tmp_path / "erasures").iterdir())) == 2


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    ledger = ErasureLedger(tmp_path)
    ledger.add([Ended("g", "a", 3, 7), Ended("g", "b", 4, 7)], 9, NOON_MS)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    assert ledger.read() == (frozenset({Ended("g", "a", 3, 7).digest}), 9)


def test_what_no_backup_can_bring_back_is_dropped_by_whole_months(tmp_path: Path) -> None:
    ledger = ErasureLedger(tmp_path)
    for months in range(3):
        ledger.add([Ended("g", "a", months, 7)], months + 1, NOON_MS + 30 * months * DAY_MS)
    ledger.drop_before(NOON_MS + 30 * DAY_MS)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["2026-06", "2026-07"]


@given(st.sets(ENDED, max_size=8), st.sets(ENDED, max_size=8))
def test_exactly_who_stands_in_the_ledger_is_found_again(ended: set[Ended], live: set[Ended]) -> None:
    """A later enrolment of the same reference has another sequence or time, and is another line."""
    digests = frozenset(one.digest for one in ended)
    assert set(returned(live, digests)) == ended & live
