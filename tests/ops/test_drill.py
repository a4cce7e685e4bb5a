"""A real Prometheus scrapes a running service under a little load; then the service goes away."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.ops.tools import RULES, dashboard_queries, rules, tool
from tests.running_service import WholeService, whole_service

LOAD_S = 12
DIMENSION = 32

# What rightly yields nothing in this drill: it has no TLS and no replicas, and no fault has ever been counted.
NOTHING = ("matcher_certificate_expiry_timestamp_seconds", "matcher_replica_")
FAULTS = "matcher:unavailable:"
# How full the disk is that the drill runs on is nobody's fault.
NOT_OF_THE_SERVICE = {"MatcherDiskFull", "MatcherDiskNearlyFull"}


class Prometheus:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def query(self, expression: str) -> list[Any]:
        answer = (await self._http.get("/api/v1/query", params={"query": expression})).json()
        assert answer["status"] == "success", (expression, answer)
        result = answer["data"]["result"]
        return list(result) if answer["data"]["resultType"] == "vector" else [result]

    async def rules(self) -> list[dict[str, Any]]:
        groups = (await self._http.get("/api/v1/rules")).json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    async def stirring(self) -> set[str]:
        """Alerts that are pending or firing."""
        return {
            rule["name"] for rule in await self.rules() if rule["type"] == "alerting" and rule["state"] != "inactive"
        }

    async def becomes(self, so: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(60):
            while True:
                if await so():
                    return
                await asyncio.sleep(0.2)


@contextmanager
def started(folder: Path, port: int) -> Iterator[str]:
    """A Prometheus of its own that scrapes `port` with the rules under test; its address, before it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "matcher", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }
    folder.mkdir()
    (folder / "prometheus.yml").write_text(json.dumps(settings))
    command = [
        tool("prometheus", "prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={own}",
        "--log.level=error",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
    try:
        yield own
    finally:
        process.terminate()
        process.wait(30)


@asynccontextmanager
async def scraping(folder: Path, port: int) -> AsyncIterator[Prometheus]:
    with started(folder, port) as own:
        async with httpx.AsyncClient(base_url=f"http://{own}", timeout=30) as http:
            prometheus = Prometheus(http)

            async def ready() -> bool:
                with suppress(httpx.HTTPError):
                    return (await http.get("/-/ready")).status_code == 200
                return False

            await prometheus.becomes(ready)
            yield prometheus


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
        async with scraping(tmp_path / "prometheus", service.running.http_port) as prometheus:
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
