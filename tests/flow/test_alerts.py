"""An alert is raised, watched, judged by people, counted, and erased on its own clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.flow.test_lawful_references import Office, office
from tests.running_service import DAY_MS


@asynccontextmanager
async def operation(folder: Path, **terms: Any) -> AsyncIterator[Office]:
    async with office(folder) as it:
        await it.gallery("g", **terms)
        await it.enrol("g", [0, 1, 2])
        await it.deployment("g")
        yield it


async def raised(it: Office, row: int = 0) -> str:
    assert await it.search(row) == "ALERT"
    alerts = (await it.ask("GET", "alerts"))["alerts"]
    return str(alerts[0]["alert_id"])


async def judge(it: Office, alert_id: str, verdict: str, by: str = "PC Ames", status: int = 201) -> Any:
    body = {"verdict": verdict, "by": by, "reason": "looked at both", "evidence_reference": "EV/7"}
    return await it.ask("POST", f"alerts/{alert_id}/adjudications", body, status)


async def counts(it: Office) -> dict[str, int]:
    records = it.service.running.service.alert_records
    assert records is not None
    return await records.counts("deployment:op")


async def test_people_judge_an_alert_and_their_words_are_counted_and_audited(tmp_path: Path) -> None:
    async with operation(tmp_path) as it:
        first, second = await raised(it, 0), await raised(it, 1)
        assert (await it.ask("GET", f"alerts/{first}"))["state"] == "open"
        assert (await judge(it, first, "rejected"))["state"] == "rejected"
        told = await judge(it, second, "confirmed")
        assert [(one["verdict"], one["by"]) for one in told["adjudications"]] == [("confirmed", "PC Ames")]
        assert (await counts(it))["alerts"] == 2
        # A later word of the same person counts instead, and both stay on record.
        told = await judge(it, first, "inconclusive")
        assert (told["state"], len(told["adjudications"])) == ("inconclusive", 2)
        found = await counts(it)
        outcomes = {name: found.get(f"alerts_{name}") for name in ("open", "confirmed", "rejected", "inconclusive")}
        assert outcomes == {"open": 0, "confirmed": 1, "rejected": 0, "inconclusive": 1}
        audited = await it.audited("alert.adjudicated")
        assert [one["subject"] for one in audited] == [first, second, first]
        assert audited[0]["detail"] == {"by": "PC Ames", "reason": "looked at both", "evidence_reference": "EV/7"}
        assert audited[0]["facts"]["state"] == "rejected"
        assert (await judge(it, first, "identified", status=400))["field"] == "verdict"
        assert (await judge(it, first, "rejected", by=" ", status=400))["field"] == "by"
        assert (await judge(it, "none", "rejected", status=404))["field"] == "alert_id"


async def test_where_two_people_are_asked_for_one_cannot_settle_an_alert(tmp_path: Path) -> None:
    async with operation(tmp_path, adjudicators=2) as it:
        alert_id = await raised(it)
        assert (await judge(it, alert_id, "confirmed"))["state"] == "open"
        assert (await judge(it, alert_id, "confirmed", by="pc  ames"))["state"] == "open"
        assert (await judge(it, alert_id, "confirmed", by="Sgt. Low"))["state"] == "confirmed"


async def test_faces_seen_are_counted_and_nothing_else_of_them_is_kept(tmp_path: Path) -> None:
    """Law 6: of those who were not alerted on there is a number, and it survives a restart."""
    async with operation(tmp_path) as it:
        for row in (0, 5, 6, 7):
            await it.search(row)
        assert "faces_searched" not in await counts(it)
        audited = await it.ask("GET", "audit", limit="1000")
        assert "p" not in {one["subject"] for one in audited["records"]}
    async with office(tmp_path) as it:
        found = await counts(it)
        assert (found["faces_searched"], found["alerts"]) == (4, 1)


async def test_an_alert_and_what_was_said_of_it_are_erased_together_and_the_counts_stay(tmp_path: Path) -> None:
    async with operation(tmp_path) as it:
        alert_id = await raised(it)
        await judge(it, alert_id, "rejected")
        it.clock.ahead_ms = 31 * DAY_MS + 1000
        await it.erased()
        assert (await it.ask("GET", f"alerts/{alert_id}", status=404))["cause"] == "NOT_FOUND"
        (judged,) = await it.audited("alert.adjudicated")
        assert judged["detail"] is None
        assert (await counts(it))["alerts_rejected"] == 1


async def test_an_alert_lives_as_long_as_its_deployment_says_and_no_setting_lengthens_it(tmp_path: Path) -> None:
    async with operation(tmp_path) as it:
        assert (await it.ask("GET", "deployments/op"))["alert_retention_ms"] == 31 * DAY_MS
        await it.deployment("g", deployment_id="short", alert_retention_ms=DAY_MS)
        beyond = await it.deployment("g", deployment_id="long", status=400, alert_retention_ms=366 * DAY_MS)
        assert beyond["field"] == "alert_retention_ms"
        usual = await raised(it, 0)
        assert await it.search(1, deployment_id="short") == "ALERT"
        short = (await it.ask("GET", "alerts", deployment_id="short"))["alerts"][0]["alert_id"]
        it.clock.ahead_ms = DAY_MS + 1000
        # Out of use before anything is erased.
        assert [one["alert_id"] for one in (await it.ask("GET", "alerts"))["alerts"]] == [usual]
        assert (await it.ask("GET", f"alerts/{short}", status=404))["cause"] == "NOT_FOUND"
        assert (await judge(it, short, "confirmed", status=404))["field"] == "alert_id"
        await it.erased()
        assert [one["subject"] for one in await it.audited("alert.erased")] == [short]
        (first, second) = await it.audited("alert.raised")
        assert (first["detail"] is None, second["detail"] is None) == (False, True)


class Stream:
    """Server-sent events as a browser reads them."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()

    async def comment(self) -> None:
        async for line in self._lines:
            if line.startswith(":"):
                return

    async def event(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        async for line in self._lines:
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                found[name] = value
            elif not line and found:
                return found | {"data": json.loads(found["data"])}
        raise AssertionError("the stream ended without an event")


async def test_alerts_are_watched_as_server_sent_events_and_none_is_missed(tmp_path: Path) -> None:
    async with operation(tmp_path) as it:
        missed = await raised(it, 0)
        async with it.http.stream("GET", "/v1/alerts/stream", params={"deployment_id": "op"}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            stream = Stream(response)
            await stream.comment()
            seen = await raised(it, 1)
            event = await stream.event()
            assert (event["event"], event["id"]) == ("alert", seen)
            assert event["data"]["candidates"][0]["subject_id"] == "s1"
            assert event["data"]["state"] == "open"
        third = await raised(it, 2)
        async with it.http.stream("GET", "/v1/alerts/stream", headers={"Last-Event-ID": missed}) as response:
            stream = Stream(response)
            assert [(await stream.event())["id"] for _ in range(2)] == [seen, third]
        async with it.http.stream("GET", "/v1/alerts/stream", params={"deployment_id": "another"}) as response:
            stream = Stream(response)
            await stream.comment()
            await raised(it, 0)
            with_nothing = asyncio.ensure_future(stream.event())
            await asyncio.sleep(0)
            assert not with_nothing.done()
            with_nothing.cancel()
            await asyncio.wait((with_nothing,))


async def test_a_stream_says_why_it_ends_when_the_service_stops(tmp_path: Path) -> None:
    async with httpx.AsyncClient(timeout=30) as http:
        async with operation(tmp_path) as it:
            request = http.build_request("GET", it.http.base_url.join("/v1/alerts/stream"), headers=it.http.headers)
            response = await http.send(request, stream=True)
            stream = Stream(response)
            await stream.comment()
        event = await stream.event()
        assert (event["event"], event["data"]["cause"]) == ("end", "SHUTTING_DOWN")
        await response.aclose()
