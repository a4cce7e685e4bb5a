"""What the fault drills have in common: probes that keep coming, and the alerts that a fault is to raise, and no other.

`MATCHER_DRILL_PACE` is how much faster than a deployment's the time of the rules runs; 1 is real time (`make drills`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from matcher_service.client import MatcherClient, Probes, References
from matcher_service.errors import MatcherError
from matcher_service.terms import SpaceId
from tests.ops.prometheus_server import Prometheus

PACE = float(os.environ.get("MATCHER_DRILL_PACE", "30"))
DIMENSION = 32
SPACE = SpaceId("test", 1, DIMENSION)

# The error budgets that users notice being spent; a drill names those that its fault spends.
LEVELS = ("Availability", "Completeness", "Latency")
BURNS = {f"Matcher{level}{speed}" for level in LEVELS for speed in ("Burns", "BurnsFast")}
# How quick and how full the machine is on which a drill runs is nobody's fault.
OF_THE_MACHINE = {"MatcherLatencyBurns", "MatcherLatencyBurnsFast", "MatcherDiskFull", "MatcherDiskNearlyFull"}
# What follows from a cause is silent while the cause is told. In quickened time only a scrape or two lie between them,
# so it may be told for a moment; in real time it must not.
FOLLOWS = {"MatcherNotReady", *(f"Matcher{level}Burns" for level in LEVELS)} if PACE > 1 else set()
# What waits, and never fires, when a busy machine answers one scrape too late.
MISSED_SCRAPES = {"MatcherDown", "MatcherAbsent"}


def minutes(count: float) -> float:
    """So many minutes of the rules, in seconds of the drill."""
    return count * 60 / PACE


@dataclass
class Edge:
    """An edge node that sends strangers, and in every `alerting`-th message (0: none) a wanted person four times."""

    client: MatcherClient
    wanted: Any
    alerting: int = 0
    answers: dict[str, int] = field(default_factory=dict)

    async def run(self) -> None:
        random, turn = np.random.default_rng(11), 0
        while True:
            turn += 1
            rows = random.normal(size=(16, DIMENSION)).astype(np.float32)
            if self.alerting and turn % self.alerting == 0:
                rows[:4] = self.wanted
            try:
                reply = await self.client.identify(
                    Probes(
                        space=SPACE,
                        probe_ids=[f"p{at}" for at in range(16)],
                        templates=rows,
                        captured_at_ms=[time.time_ns() // 1_000_000] * 16,
                        deployment_id="op",
                        deadline_s=10,
                    )
                )
                names = [one.outcome.value for one in reply.decisions]
            except MatcherError as refusal:
                names = [refusal.cause.value]
            for name in names:
                self.answers[name] = self.answers.get(name, 0) + 1
            await asyncio.sleep(0.05)


@asynccontextmanager
async def searched(edge: Edge) -> AsyncIterator[None]:
    """Probes come meanwhile."""
    task = asyncio.create_task(edge.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def enrol(client: MatcherClient, names: list[str], rows: Any) -> None:
    """Raises the refusal if there is one."""
    await client.enrol(
        References(gallery_id="g", space=SPACE, reference_ids=names, subject_ids=names, templates=rows, deadline_s=30)
    )


class Drill:
    """One fault after another in one Prometheus, beginning with none."""

    def __init__(self, prometheus: Prometheus, machine: Set[str] = frozenset(OF_THE_MACHINE)) -> None:
        self._prometheus = prometheus
        self._machine = machine

    async def _calm(self) -> bool:
        found = await self._prometheus.query("matcher:probes:increase1h >= 100")
        return bool(found) and not await self._prometheus.stirring() - self._machine

    async def calm(self) -> None:
        """Wait until enough is measured, and nothing stirs."""
        await self._prometheus.becomes(self._calm, 60 + minutes(20))

    async def raises(
        self, causes: Set[str], burns: Set[str] = frozenset(), *, silenced: Set[str] = frozenset()
    ) -> None:
        """The fault that was just made has exactly these `causes` told, each pending before it fires, and exactly these
        error budgets spent too fast. An error budget's slower alert may wait meanwhile, and those `silenced` by a cause
        for the moment until it is known."""
        began = time.monotonic()
        expected = causes | burns

        before = await self._prometheus.firing() - self._machine

        async def told() -> bool:
            firing = await self._prometheus.firing() - self._machine
            assert firing <= expected | before | FOLLOWS, (firing, expected)
            # What was spent of a budget before is told for a while.
            return firing >= expected and firing - expected <= (before & BURNS) | FOLLOWS

        await self._prometheus.becomes(told, 60 + minutes(25))
        took = time.monotonic() - began
        fired = await self._prometheus.were("firing", took) - self._machine
        assert fired - before - FOLLOWS == expected - before, (fired, expected)
        # While the fault was being made, an alert may have begun to wait.
        waited = await self._prometheus.were("pending", took + minutes(0.5)) - self._machine
        assert waited >= expected - before, (waited, expected)
        assert waited - fired <= BURNS | FOLLOWS | MISSED_SCRAPES | silenced, (waited, expected)

    async def ends(self, causes: Set[str]) -> None:
        """What was mended is no longer told."""

        async def over() -> bool:
            return not await self._prometheus.firing() & causes

        await self._prometheus.becomes(over, 60 + minutes(15))
