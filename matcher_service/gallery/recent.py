"""Enrolments that this process has just committed, for the replay that follows at once.

The tables are the truth: nothing is put here before its commit has returned, and what is not here is read from
them. What is here spares replay from reading, and unsealing, what was sealed a moment ago.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from matcher_service.terms import EnrolRun


class Recent:
    """The newest runs, in the order of their sequences; at most `bytes_max` bytes of templates. For any thread."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._runs: deque[EnrolRun] = deque()
        self._changing = threading.Lock()

    def add(self, runs: Iterable[EnrolRun]) -> None:
        """Committed runs. The oldest go if there is no room."""
        with self._changing:
            for run in runs:
                self._runs.append(run)
                self._bytes += run.templates.nbytes
            while self._bytes > self._bytes_max:
                self._drop()

    def beyond(self, after: int, limit: int) -> EnrolRun | None:
        """The entries that follow on `after`, at most `limit`; None if they are not here. Earlier runs are let go:
        whoever asks again reads them from the tables."""
        with self._changing:
            while self._runs and self._runs[0].last_sequence <= after:
                self._drop()
            if not self._runs or self._runs[0].sequence > after + 1:
                return None
            run = self._runs[0]
            start = after + 1 - run.sequence
            return run[start : start + limit]

    def clear(self) -> None:
        """Hold no template any longer: some were erased, or their key was destroyed."""
        with self._changing:
            self._runs.clear()
            self._bytes = 0

    def _drop(self) -> None:
        self._bytes -= self._runs.popleft().templates.nbytes
