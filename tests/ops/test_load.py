"""A real Prometheus scrapes a running service under load: a little, after which the service goes away; and in the long
form minutes of Locust's, with every dashboard drawn into build/dashboards."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.served import service
from tests.ops.drawing import draw
from tests.ops.drilling import OF_THE_MACHINE
from tests.ops.prometheus_server import scraping
from tests.ops.tools import ROOT, dashboard_queries, rules
from tests.running_service import WholeService, whole_service

LOAD_S = 12
MINUTES = float(os.environ.get("MATCHER_LOAD_MINUTES", "4"))
DIMENSION = 32

# What rightly yields nothing here: it has no TLS, no replicas and no GPU, nobody adjudicates, and no station refuses.
NOTHING = (
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
                # Nothing is due for erasure yet.
                rightly = (*NOTHING, "matcher_erasure_unreported_timestamp_seconds")
                assert bool(found) is not any(name in query for name in rightly), (panel, query, found)
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


# Locust's users search live only, and none of their probes is rejected.
NOTHING_BY_LOCUST = (*NOTHING, "matcher_case_probes_total", "matcher_rejections_total")


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_every_dashboard_shows_minutes_of_locust_and_no_alert_stirs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with service(tmp_path / "service", settings={"MATCHER_LOG_LEVEL": "error"}) as served:
        async with scraping(tmp_path / "prometheus", served.http_port) as prometheus:
            told = {
                "host": served.http_address,
                "grpc-address": served.grpc_address,
                "token-file": tmp_path / "service/token",
                "duration-s": MINUTES * 60,
                "shape": "match-day",
                "users-most": 12,
                # What is looked at are the dashboards: how fast the machine is that this runs on is nobody's fault.
                "slo-p99-ms": 10_000,
            }
            command = [sys.executable, "-m", "locust", "-f", "benchmarks/locustfile.py", "--headless", "--only-summary"]
            command += ["--fill", *(f"--{name}={value}" for name, value in told.items())]
            done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

            drawn = await draw(prometheus, MINUTES * 60 + 30, ROOT / "build/dashboards")
            # Whether an erasure is under way at the moment of a scrape is chance.
            for panel, query, series in (one for one in drawn if "erasure_unreported" not in one.query):
                nothing = "vector(0)" not in query and any(name in query for name in NOTHING_BY_LOCUST)
                assert bool(series) is not nothing, (panel, query)
            assert {rule["health"] for rule in await prometheus.rules()} == {"ok"}
            fired = await prometheus.were("pending", MINUTES * 60) | await prometheus.were("firing", MINUTES * 60)
            assert fired - OF_THE_MACHINE == set()
