"""How many faces each deployment and case had searched: counters, and nothing that stands for one probe (law 6).

They are added up in memory and stored every few seconds, so that a live probe costs no write. A process that is
killed loses the seconds since; one that stops in order loses nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import structlog

from matcher_service import records
from matcher_service.decisions import Decisions
from matcher_service.errors import LogUnavailable
from matcher_service.seams import AlertRecords
from matcher_service.terms import CANARY_PREFIX, Outcome, ProbeMessage

STORE_EVERY_S = 5.0

_log = structlog.get_logger(__name__)


class Tallies:
    def __init__(self, store: AlertRecords) -> None:
        self._store = store
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, message: ProbeMessage, decisions: Decisions) -> None:
        """Count the probes of an answered message; those of known people who watch over the service are no faces."""
        counts = decisions.outcomes()
        if any(one.startswith(CANARY_PREFIX) for one in decisions.probe_ids):
            counts = Counter(one.outcome for one in decisions if not one.probe_id.startswith(CANARY_PREFIX))
        authority = records.authority_name(message.deployment_id, message.case_reference)
        refused = counts[Outcome.REJECTED]
        for name, by in (
            ("faces_searched", counts.total() - refused),
            ("faces_refused", refused),
            ("faces_incomplete", counts[Outcome.INCOMPLETE]),
        ):
            if by:
                self._counts[authority, name] += by

    async def store(self) -> None:
        """Store what was counted since; on LogUnavailable it is kept for the next time."""
        counts, self._counts = self._counts, Counter()
        try:
            await self._store.add_counts(counts)
        except LogUnavailable:
            self._counts.update(counts)
            raise

    async def run(self) -> None:
        """Store every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(STORE_EVERY_S)
            try:
                await self.store()
            except LogUnavailable as error:
                _log.error("tallies_delayed", detail=str(error))
