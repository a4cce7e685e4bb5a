"""The bounded queue between callers and the thread that owns all writes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from matcher_service.gallery.transaction import WriteTransaction
from matcher_service.terms import Actor, Alert, AuditEvent, Enrol, EnrolRows, Write


@dataclass(frozen=True, slots=True, eq=False)
class AppendJob:
    writes: Sequence[Write]
    actor: Actor
    answer: Future[Any] = field(default_factory=Future)

    @property
    def weight(self) -> int:
        return max(len(self.writes), 1)


@dataclass(frozen=True, slots=True, eq=False)
class EnrolJob:
    rows: EnrolRows
    actor: Actor
    answer: Future[Any] = field(default_factory=Future)

    @property
    def weight(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class RecordJob:
    """`details` are the events' details in canonical form, b"" for none."""

    events: Sequence[AuditEvent]
    details: Sequence[bytes]
    alerts: Sequence[Alert]
    answer: Future[Any] = field(default_factory=Future)

    @property
    def weight(self) -> int:
        return max(len(self.events) + len(self.alerts), 1)


@dataclass(frozen=True, slots=True, eq=False)
class EraseJob:
    now_ms: int
    answer: Future[Any] = field(default_factory=Future)

    @property
    def weight(self) -> int:
        return 1


@dataclass(frozen=True, slots=True, eq=False)
class WorkJob:
    """A piece of work inside the write transaction. It may be done again, alone, if the transaction fails; if it
    refuses, it does so before it has handed anything to the transaction."""

    work: Callable[[WriteTransaction], Any]
    answer: Future[Any] = field(default_factory=Future)

    @property
    def weight(self) -> int:
        return 1


Job = AppendJob | EnrolJob | RecordJob | EraseJob | WorkJob


class Inbox:
    """Bounded in jobs and in writes; closed once.

    Enrolments have a queue of their own, and every other transaction while both queues wait: a withdrawal, or an alert
    that must be in the audit before it is given, waits for one transaction of an import at most, and not for all of it.
    Each queue is first in, first out.
    """

    def __init__(self, jobs_max: int, writes_max: int) -> None:
        self._enrolments: deque[Job] = deque()
        self._others: deque[Job] = deque()
        self._enrolments_next = False
        self._jobs_max = jobs_max
        self._writes_max = writes_max
        self._writes = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, job: Job) -> bool:
        """False if there is no room. Raises RuntimeError once closed."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the inbox is closed")
            # An empty inbox takes anything, so that no job can be refused for ever.
            waiting = len(self._enrolments) + len(self._others)
            if waiting and (waiting >= self._jobs_max or self._writes + job.weight > self._writes_max):
                return False
            (self._enrolments if _enrols(job) else self._others).append(job)
            self._writes += job.weight
            self._changed.notify()
            return True

    def take(self, writes_max: int) -> list[Job]:
        """The jobs of the next transaction: at least one, and more while they are within `writes_max`. An erasure
        comes alone. Waits while there are none; [] once closed and drained."""
        with self._changed:
            while not self._enrolments and not self._others:
                if self._closed:
                    return []
                self._changed.wait()
            if self._enrolments and (self._enrolments_next or not self._others):
                jobs, self._enrolments_next = self._enrolments, False
            else:
                jobs, self._enrolments_next = self._others, True
            taken: list[Job] = []
            writes = 0
            while jobs:
                following = jobs[0]
                if taken and (isinstance(following, EraseJob) or writes + following.weight > writes_max):
                    break
                taken.append(jobs.popleft())
                writes += following.weight
                if isinstance(following, EraseJob):
                    break
            self._writes -= writes
            return taken

    def close(self) -> None:
        """Take no more jobs; those inside are still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _enrols(job: Job) -> bool:
    return isinstance(job, EnrolJob) or (
        isinstance(job, AppendJob) and any(isinstance(write, Enrol) for write in job.writes)
    )
