"""Pieces of a scan on several threads: every piece once, in order, and no scan waits for another's pieces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from matcher_service.index import crew as crews
from matcher_service.index.crew import Crew

WAIT_S = 10.0


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(2)
    yield made
    made.close()


def test_every_piece_is_done_once_and_the_results_keep_their_order(crew: Crew) -> None:
    done: list[int] = []

    def piece(number: int) -> int:
        done.append(number)
        return number * number

    for count in (0, 1, 2, 100):
        done.clear()
        assert crews.run([partial(piece, number) for number in range(count)], crew) == [n * n for n in range(count)]
        assert sorted(done) == list(range(count))
    assert crews.run([partial(piece, 3)], None) == [9]


def test_a_helper_works_beside_whoever_scans(crew: Crew) -> None:
    """Both pieces wait for each other: one thread alone would never end them."""
    both = threading.Barrier(2, timeout=WAIT_S)

    def piece() -> str:
        both.wait()
        return threading.current_thread().name

    assert len(set(crew.run([piece, piece]))) == 2


def test_a_scan_beside_another_keeps_to_its_thread_until_that_one_has_ended(crew: Crew) -> None:
    began, end = threading.Event(), threading.Event()
    names: list[str] = []

    def long() -> None:
        began.set()
        assert end.wait(WAIT_S)

    def piece() -> None:
        names.append(threading.current_thread().name)

    def ends_the_other() -> None:
        end.set()
        other.result(WAIT_S)

    both = threading.Barrier(2, timeout=WAIT_S)
    with ThreadPoolExecutor(2, "caller") as callers:
        other = callers.submit(crew.run, [long])
        assert began.wait(WAIT_S)
        # Once the other has ended, a helper comes: the last two pieces need two threads.
        pieces: list[Callable[[], object]] = [piece, piece, piece, ends_the_other, both.wait, both.wait]
        callers.submit(crew.run, pieces).result(WAIT_S)
    assert len(set(names)) == 1
    assert names[0].startswith("caller")


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_a_piece_raises_is_raised_and_nothing_works_on_afterwards(crew: Crew, failing: int) -> None:
    at_work = threading.Semaphore(3)

    def piece(number: int) -> None:
        with at_work:
            if number == failing:
                raise ValueError(number)

    with pytest.raises(ValueError, match=str(failing)):
        crew.run([partial(piece, number) for number in range(3)])
    assert at_work._value == 3
    assert crew.run([int, int]) == [0, 0]
