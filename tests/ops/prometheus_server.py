"""A real Prometheus as a child process, with the rules under test, in real or in quicker time.

Quicker: a `pace` of 30 makes two seconds of a minute. Every duration by which the rules look back or wait (`for: 5m`,
`[1h]`) and the intervals of scraping and judging are divided by it; thresholds, of seconds too, are what they are.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.ops.tools import RULES, tool, yaml

# As k8s/base/pod-monitor.yaml has it.
SCRAPE_S = 15.0
# A scrape must have time to be answered, on a busy machine too.
SCRAPE_S_MIN = 2.0
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Prometheus:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def query(self, expression: str) -> list[Any]:
        answer = (await self._http.get("/api/v1/query", params={"query": expression})).json()
        assert answer["status"] == "success", (expression, answer)
        result = answer["data"]["result"]
        return list(result) if answer["data"]["resultType"] == "vector" else [result]

    async def query_range(self, expression: str, since_s: float, step_s: float) -> list[Any]:
        """The series of an expression over the last `since_s` seconds."""
        now = float((await self.query("time()"))[0][0])
        asked = {"query": expression, "start": now - since_s, "end": now, "step": step_s}
        answer = (await self._http.get("/api/v1/query_range", params=asked)).json()
        assert answer["status"] == "success", (expression, answer)
        return list(answer["data"]["result"])

    async def rules(self) -> list[dict[str, Any]]:
        groups = (await self._http.get("/api/v1/rules")).json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    async def stirring(self) -> set[str]:
        """Alerts that are pending or firing."""
        return await self._in("pending", "firing")

    async def firing(self) -> set[str]:
        return await self._in("firing")

    async def _in(self, *states: str) -> set[str]:
        return {rule["name"] for rule in await self.rules() if rule["type"] == "alerting" and rule["state"] in states}

    async def were(self, state: str, since_s: float) -> set[str]:
        """Alerts that were in this state at any time of the last `since_s` seconds, by Prometheus's own record."""
        found = await self.query(f'count_over_time(ALERTS{{alertstate="{state}"}}[{max(1, int(since_s * 1000))}ms])')
        return {one["metric"]["alertname"] for one in found}

    async def becomes(self, so: Callable[[], Awaitable[bool]], within_s: float = 60) -> None:
        async with asyncio.timeout(within_s):
            while True:
                if await so():
                    return
                await asyncio.sleep(0.2)


def quickened(rules: Path, pace: float) -> str:
    """The rule file in time that runs `pace` times as fast."""

    def scaled(found: re.Match[str]) -> str:
        return f"{found[1]}{int(found[2]) * SECONDS[found[3]] / pace * 1000:.0f}ms{found[4]}"

    held = yaml.safe_load(rules.read_text())
    for group in held["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"(\[)(\d+)([smhd])(\])", scaled, rule["expr"])
            if "for" in rule:
                rule["for"] = re.sub(r"()(\d+)([smhd])()", scaled, rule["for"])
    return json.dumps(held)


@contextmanager
def started(folder: Path, port: int, pace: float, scrape_s: float) -> Iterator[str]:
    """A Prometheus of its own that scrapes `port` of this machine; its address, before it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = f"127.0.0.1:{free.getsockname()[1]}"
    folder.mkdir()
    (folder / "rules.json").write_text(quickened(RULES, pace))
    interval = f"{scrape_s * 1000:.0f}ms"
    judged = f"{min(scrape_s, SCRAPE_S_MIN / 2) * 1000:.0f}ms"
    settings = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": judged},
        "rule_files": [str(folder / "rules.json")],
        "scrape_configs": [{"job_name": "matcher", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }
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
async def scraping(
    folder: Path, port: int, *, pace: float = 1.0, scrape_s: float | None = None
) -> AsyncIterator[Prometheus]:
    """Scraping `port` every `scrape_s` seconds, by default as often as a deployment does at this pace."""
    with started(folder, port, pace, scrape_s or max(SCRAPE_S / pace, SCRAPE_S_MIN)) as own:
        async with httpx.AsyncClient(base_url=f"http://{own}", timeout=30) as http:
            prometheus = Prometheus(http)

            async def ready() -> bool:
                with suppress(httpx.HTTPError):
                    return (await http.get("/-/ready")).status_code == 200
                return False

            await prometheus.becomes(ready)
            yield prometheus
