"""Ready with hysteresis: a moment takes nobody out of service, and a moment puts nobody back."""

from __future__ import annotations

from matcher_service.readiness import READY_AFTER_S, UNREADY_AFTER_S, Readiness
from tests.fake_clock import FakeClock


class Dependency:
    """What a process depends on, as a test sets it."""

    def __init__(self) -> None:
        self.lacking = ""
        self.clock = FakeClock()
        self.readiness = Readiness(lambda: self.lacking, self.clock)

    def after(self, seconds: float) -> tuple[bool, str]:
        self.clock.advance(seconds)
        return self.readiness()


def test_it_is_started_once_and_ready_from_then_until_it_stops() -> None:
    one = Dependency()
    assert one.readiness() == (False, "starting")
    assert not one.readiness.started
    one.readiness.serve()
    assert one.readiness() == (True, "")
    one.readiness.stop()
    assert one.readiness() == (False, "stopping")
    assert one.readiness.started


def test_a_moment_without_a_dependency_changes_nothing_and_a_while_does() -> None:
    one = Dependency()
    one.readiness.serve()
    one.lacking = "the log is away"
    assert one.after(0) == (True, "")
    assert one.after(UNREADY_AFTER_S - 0.1) == (True, "")
    one.lacking = ""
    assert one.after(0) == (True, "")
    one.lacking = "the log is away"
    assert one.after(UNREADY_AFTER_S - 0.1) == (True, "")
    assert one.after(UNREADY_AFTER_S) == (False, "the log is away")


def test_it_is_ready_again_when_the_dependency_has_been_there_for_a_while() -> None:
    one = Dependency()
    one.readiness.serve()
    one.lacking = "the log is away"
    one.after(0)
    assert not one.after(UNREADY_AFTER_S)[0]
    # Another reason is told at once: nothing changes in what is done.
    one.lacking = "no shard answers"
    assert one.after(0) == (False, "no shard answers")
    one.lacking = ""
    assert one.after(0) == (False, "no shard answers")
    assert not one.after(READY_AFTER_S - 0.1)[0]
    one.lacking = "the log is away"
    assert not one.after(1)[0]
    one.lacking = ""
    assert not one.after(READY_AFTER_S - 0.1)[0]
    assert one.after(READY_AFTER_S) == (True, "")


def test_who_was_unready_when_it_started_to_serve_is_told_after_the_same_while() -> None:
    one = Dependency()
    one.lacking = "the log is away"
    one.readiness.serve()
    assert one.after(0) == (True, "")
    assert one.after(UNREADY_AFTER_S) == (False, "the log is away")
    one.readiness.stop()
    assert one.readiness() == (False, "stopping")
