"""Permits: Law 3, every queue is bounded and nothing queues without a permit."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge

from matcher_service.admission import Admission, ServiceTime
from matcher_service.errors import DeadlineExceeded, MatcherError, Overloaded, ShuttingDown, TooLarge
from matcher_service.terms import Actor
from tests.fake_clock import FakeClock

VAN, DESK = Actor("van"), Actor("desk")


def admission(
    clock: FakeClock, rows_max: int = 100, per_credential: int = 60, time: ServiceTime | None = None
) -> Admission:
    gauge = Gauge("permits", "permits", registry=CollectorRegistry())
    return Admission(rows_max, per_credential, time or ServiceTime(64, 1), clock, gauge)


async def test_permits_are_bounded_in_total_and_per_credential() -> None:
    clock = FakeClock()
    door = admission(clock)
    deadline = clock.monotonic() + 10
    with door.admit(VAN, 60, deadline):
        with pytest.raises(Overloaded, match="this credential"):
            door.admit(VAN, 1, deadline)
        with door.admit(DESK, 40, deadline), pytest.raises(Overloaded, match="the service") as refused:
            door.admit(Actor("third"), 1, deadline)
        assert refused.value.retry_after_ms is not None
        assert refused.value.retry_after_ms >= 10
    with door.admit(VAN, 60, deadline):
        pass


async def test_what_could_never_be_admitted_is_told_so() -> None:
    clock = FakeClock()
    with pytest.raises(TooLarge, match="never"):
        admission(clock).admit(VAN, 61, clock.monotonic() + 10)


async def test_a_passed_deadline_never_queues() -> None:
    clock = FakeClock()
    with pytest.raises(DeadlineExceeded):
        admission(clock).admit(VAN, 1, clock.monotonic())


async def test_a_permit_is_given_back_once_however_its_work_ends() -> None:
    clock = FakeClock()
    door = admission(clock)
    permit = door.admit(VAN, 60, clock.monotonic() + 1)
    with pytest.raises(ZeroDivisionError), permit:
        raise ZeroDivisionError
    with permit:
        pass
    await asyncio.wait_for(door.idle(), 1)
    door.admit(VAN, 60, clock.monotonic() + 1)
    with pytest.raises(Overloaded):
        door.admit(VAN, 60, clock.monotonic() + 1)


async def test_a_queue_that_outlasts_the_deadline_is_refused_at_the_door() -> None:
    clock = FakeClock()
    time = ServiceTime(10, 1)
    for _ in range(50):
        time.learn(1, 0.11)
        time.learn(10, 0.2)
    door = admission(clock, time=time)
    with door.admit(VAN, 50, clock.monotonic() + 10):
        with pytest.raises(Overloaded) as refused:
            door.admit(DESK, 10, clock.monotonic() + 0.5)
        assert refused.value.retry_after_ms == pytest.approx(700, rel=0.02)
        door.admit(DESK, 10, clock.monotonic() + 2)


async def test_what_finds_nobody_ahead_is_tried_however_slow_the_past_was() -> None:
    clock = FakeClock()
    time = ServiceTime(10, 1)
    time.learn(1, 1000.0)
    admission(clock, time=time).admit(VAN, 1, clock.monotonic() + 0.01)


async def test_a_closed_door_refuses_newcomers_and_lets_the_admitted_finish() -> None:
    clock = FakeClock()
    door = admission(clock)
    with door.admit(VAN, 5, clock.monotonic() + 10):
        door.close()
        with pytest.raises(ShuttingDown):
            door.admit(DESK, 1, clock.monotonic() + 10)
        waiting = asyncio.create_task(door.idle())
        await asyncio.sleep(0)
        assert not waiting.done()
    await asyncio.wait_for(waiting, 1)


@given(st.floats(0, 0.1), st.floats(1e-6, 0.01), st.integers(2, 64))
def test_the_fixed_and_the_per_row_time_are_recovered(fixed: float, per_row: float, large: int) -> None:
    time = ServiceTime(64, 1)
    for _ in range(30):
        for rows in (1, large):
            time.learn(rows, fixed + per_row * rows)
    assert time.wait_s(64) == pytest.approx(fixed + 64 * per_row, rel=1e-3, abs=1e-6)


def test_no_knowledge_means_no_refusal() -> None:
    assert ServiceTime(64, 1).wait_s(10_000) == 0


@given(st.lists(st.tuples(st.sampled_from([VAN, DESK]), st.integers(1, 70), st.booleans()), max_size=60))
def test_permits_out_never_exceed_the_limits(steps: list[tuple[Actor, int, bool]]) -> None:
    async def walk() -> None:
        clock = FakeClock()
        door = admission(clock)
        held: list[tuple[Actor, int, object]] = []
        for actor, rows, give_back in steps:
            if give_back and held:
                held.pop(0)[2].__exit__(None, None, None)  # type: ignore[attr-defined]
                continue
            with contextlib.suppress(MatcherError):
                held.append((actor, rows, door.admit(actor, rows, clock.monotonic() + 1)))
            assert sum(rows for _, rows, _ in held) <= 100
            for one in (VAN, DESK):
                assert sum(rows for actor, rows, _ in held if actor is one) <= 60

    asyncio.run(walk())
