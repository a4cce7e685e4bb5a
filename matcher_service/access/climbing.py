"""Hill climbing: a run of probes that creeps up on one subject.

Whoever sees the score of each try can rebuild a face from nothing, by keeping what scores higher. It shows in what
the service discloses, so nothing else need be looked at: one credential's candidates of one subject, counted in
blocks of BLOCK. Of each block only the best score is kept, in bands of BAND. A climb is RISES new peaks of these
blocks without a fall by more than FALL bands in between. The scores of a person who stands fall back as often as they
rise; who walks towards a camera climbs, but not for 176 alerts and more.
Far steps hide a climb, and make it slow: bands (`bands`) come first, this comes second.

Only candidates are counted, never a probe that found nobody, and never a template (law 6).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from matcher_service.seams import Clock
from matcher_service.terms import Candidate

BLOCK = 16
BAND = 0.02
RISES = 10
FALL = 1
RUNS_MAX = 4096
# A pause as long as this ends a run.
RUN_ENDS_S = 900.0
COOL_DOWN_S = 120.0


class _Run:
    __slots__ = ("best", "count", "peak", "rises", "used_at")

    def __init__(self, now: float) -> None:
        self.count = 0
        self.best = -2.0
        self.peak: int | None = None
        self.rises = 0
        self.used_at = now


class Climbing:
    """Bounded: the runs least recently used are forgotten."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._runs: OrderedDict[tuple[str, str, str], _Run] = OrderedDict()
        self._cooling: dict[str, float] = {}

    def cooling_s(self, credential: str) -> float:
        """Seconds for which this credential is answered nothing; 0: it is answered."""
        until = self._cooling.get(credential)
        if until is None:
            return 0.0
        left = until - self._clock.monotonic()
        if left <= 0:
            del self._cooling[credential]
        return max(0.0, left)

    def note(self, credential: str, candidates: Iterable[Candidate]) -> bool:
        """Count candidates that are about to be disclosed to the credential; True if this run is a climb, from
        which moment the credential cools down."""
        now = self._clock.monotonic()
        climbs = False
        for one in candidates:
            key = (credential, one.gallery_id, one.subject_id)
            run = self._runs.get(key)
            if run is None or now - run.used_at > RUN_ENDS_S:
                run = self._runs[key] = _Run(now)
            run.used_at = now
            self._runs.move_to_end(key)
            climbs |= self._step(run, one.score)
        while len(self._runs) > RUNS_MAX:
            self._runs.popitem(last=False)
        if climbs:
            self._cooling[credential] = now + COOL_DOWN_S
        return climbs

    @staticmethod
    def _step(run: _Run, score: float) -> bool:
        run.count += 1
        run.best = max(run.best, score)
        if run.count < BLOCK:
            return False
        level = int(run.best // BAND)
        run.count, run.best = 0, -2.0
        if run.peak is None or level < run.peak - FALL:
            run.peak, run.rises = level, 0
        elif level > run.peak:
            run.peak, run.rises = level, run.rises + 1
        if run.rises < RISES:
            return False
        run.rises = 0
        return True
