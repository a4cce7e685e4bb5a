"""A real Prometheus scrapes a running service under a little load; then the service goes away."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import numpy as np

from tests.ops.prometheus_server import scraping
from tests.ops.tools import dashboard_queries, rules
from tests.running_service import WholeService, whole_service

LOAD_S = 12
DIMENSION = 32

# What rightly yields nothing here: it has no TLS, no replicas and no GPU, nobody adjudicates, no station refuses, and
# nothing is due for erasure yet.
NOTHING = (
    "matcher_erasure_unreported_timestamp_seconds",
    "matcher_certificate_expiry_timestamp_seconds",
    "matcher_replica_",
    "matcher_gpu_",
    "matcher_adjudications_",
    "matcher_station_refusals_",
)
FAULTS = "matcher:unavailable:"
# How full the disk is that the drill runs on is nobody's fault.
NOT_OF_THE_SERVICE = {"MatcherDiskFull", "MatcherDiskNearlyFull"}


async def load(service: WholeService) -> None:
    """Searches with every outcome that needs no fault, refusals, enrolments and withdrawals, for LOAD_S."""
    space = await service.space(DIMENSION)
    await service.gallery("g", space, threshold=0.9)
    await service.deployment("g")
    case = await service.case("g")
    random = np.random.default_rng(7)
    enrolled = random.normal(size=(300, DIMENSION)).astype(np.float32)
    await service.enrol("g", space, enrolled, [f"r{at}" for at in range(300)])
    url = f"http://127.0.0.1:{service.running.http_port}/v1/galleries"
    clock = asyncio.get_running_loop().time
    end, turn = clock() + LOAD_S, 0
    async with httpx.AsyncClient() as stranger:
        while clock() < end:
            turn += 1
            probes = random.normal(size=(64, DIMENSION)).astype(np.float32)
            probes[0], probes[1] = enrolled[-1], 0
            await service.ask(space, probes)
            await service.ask(space, probes[2:4], case_reference=case)
            await stranger.get(url)
            await service.client.withdraw("g", reference_ids=[f"r{turn}"], reason="the drill") if turn < 200 else None
            await asyncio.sleep(0.1)


async def test_every_query_and_rule_yields_data_and_a_service_that_goes_away_is_noticed(tmp_path: Path) -> None:
    async with AsyncExitStack() as life:
        service = await life.enter_async_context(whole_service(tmp_path / "service"))
        async with scraping(tmp_path / "prometheus", service.running.http_port, scrape_s=1.0) as prometheus:
            await load(service)

            for panel, query in dashboard_queries():
                found = await prometheus.query(query.replace("$__rate_interval", "1m"))
                assert bool(found) is not any(name in query for name in NOTHING), (panel, query, found)
            for record in [rule["record"] for rule in rules() if "record" in rule]:
                found = await prometheus.query(record)
                assert bool(found) is not record.startswith(FAULTS), (record, found)
            held = await prometheus.rules()
            assert len(held) == len(rules())
            assert {rule["health"] for rule in held} == {"ok"}, [rule for rule in held if rule["health"] != "ok"]
            assert await prometheus.stirring() - NOT_OF_THE_SERVICE == set()

            await life.aclose()

            async def noticed() -> bool:
                return await prometheus.stirring() - NOT_OF_THE_SERVICE == {"MatcherDown", "MatcherAbsent"}

            await prometheus.becomes(noticed)
