"""The queue in front of the thread that writes: what goes first, and how much it holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from matcher_service.gallery.inbox import AppendJob, EnrolJob, EraseJob, Inbox, Job, RecordJob
from matcher_service.terms import Actor, Enrol, EnrolRows, Withdraw

CLERK = Actor("clerk")


def importing(rows: int) -> EnrolJob:
    names = [str(row) for row in range(rows)]
    nothing = np.zeros((rows, 4), np.float16)
    return EnrolJob(EnrolRows("g", names, names, nothing, np.zeros(rows, np.int64), False, ""), CLERK)


def withdrawal() -> AppendJob:
    return AppendJob((Withdraw("g", "a", "x"),), CLERK)


def inbox_with(*jobs: Job) -> Inbox:
    inbox = Inbox(100, 10_000)
    for job in jobs:
        assert inbox.put(job)
    return inbox


def test_a_withdrawal_and_an_alert_wait_for_one_transaction_of_an_import_at_most() -> None:
    imports = [importing(1000) for _ in range(6)]
    inbox = inbox_with(*imports)
    assert inbox.take(2000) == imports[:2]
    late: list[Job] = [withdrawal(), RecordJob((), (), ())]
    for job in late:
        assert inbox.put(job)
    assert inbox.take(2000) == late


def test_an_import_goes_on_while_other_writes_never_end() -> None:
    """Each queue has every other transaction, and keeps its order."""
    imports = [importing(1000) for _ in range(3)]
    inbox = inbox_with(*imports)
    served: list[Any] = []
    for _ in range(6):
        assert inbox.put(withdrawal())
        served += inbox.take(1000)
    assert [job for job in served if isinstance(job, EnrolJob)] == imports


def test_a_single_enrolment_keeps_its_place_among_enrolments() -> None:
    """Two messages of one caller about one reference must not change places."""
    jobs: list[Job] = [importing(10), AppendJob((Enrol("g", "a", "s", b""),), CLERK), importing(10)]
    assert inbox_with(*jobs).take(100) == jobs


def test_an_erasure_comes_alone() -> None:
    jobs: list[Job] = [withdrawal(), EraseJob(0), withdrawal()]
    inbox = inbox_with(*jobs)
    assert [inbox.take(100) for _ in jobs] == [[job] for job in jobs]


def test_law_3_the_inbox_is_bounded_and_an_empty_one_takes_anything() -> None:
    """Law 3: in jobs and in writes."""
    inbox = Inbox(2, 100)
    assert inbox.put(importing(1000))
    assert not inbox.put(withdrawal())
    assert len(inbox.take(10)) == 1
    assert inbox.put(withdrawal())
    assert inbox.put(importing(10))
    assert not inbox.put(withdrawal())
    inbox.close()
    assert len(inbox.take(100)) == 1
    assert len(inbox.take(100)) == 1
    assert inbox.take(100) == []
