"""Watchers of one gateway see what every gateway of the cluster records."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from matcher_service import alerts
from matcher_service.alerts import RelayedAlerts
from matcher_service.gallery.log import SqlGalleryLog, open_sqlite_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import Alert, Candidate
from tests.fake_clock import FakeClock


def alert(number: int, raised_at_ms: int = 0) -> Alert:
    candidate = Candidate("s", "r", "g", 0.9, 1, 1e-6)
    # Ids do not come in the order of recording: gateways' clocks differ.
    return Alert(
        f"{(number * 7) % 10:04d}-{number}",
        f"p{number}",
        "op",
        "",
        raised_at_ms,
        0,
        (candidate,),
        {"g": 0.5},
        1,
        "1",
        True,
    )


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[SqlGalleryLog]:
    log = await open_sqlite_log(tmp_path, tmp_path / "keys", StorageSettings(data_dir=tmp_path), FakeClock())
    yield log
    await log.close()


class Asked:
    """The log, and whether it has been asked for its alerts."""

    def __init__(self, log: SqlGalleryLog) -> None:
        self._log = log
        self.answered = asyncio.Event()
        self.outlived: set[str] = set()

    async def alerts(self, deployment_id: str, before: str, limit: int) -> list[Alert]:
        found = await self._log.alerts(deployment_id, before, limit + len(self.outlived))
        self.answered.set()
        return [one for one in found if one.alert_id not in self.outlived][:limit]


@pytest.mark.parametrize("before", [0, 1, 5])
async def test_what_is_recorded_later_is_handed_on_once_and_in_order(
    log: SqlGalleryLog, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there were before, and more at once than are asked for at a time."""
    monkeypatch.setattr(alerts, "RELAY_EVERY_S", 0.001)
    monkeypatch.setattr(alerts, "RELAYED_AT_ONCE_MAX", 3)
    if before:
        await log.record([], [alert(number) for number in range(before)])
    feed = RelayedAlerts()
    asked = Asked(log)
    relaying = asyncio.create_task(feed.relay(asked))  # type: ignore[arg-type]
    watch = feed.subscribe()
    first = asyncio.ensure_future(anext(watch))
    try:
        async with asyncio.timeout(60):
            # What was there before is not news: one recorded after the first look is the first to come.
            await asked.answered.wait()
            await log.record([], [alert(before)])
            feed.publish([alert(before)])
            seen = [await first]
            await log.record([], [alert(number) for number in range(before + 1, before + 8)])
            seen += [await anext(watch) for _ in range(7)]
        assert [one.alert_id for one in seen] == [alert(number).alert_id for number in range(before, before + 8)]
    finally:
        relaying.cancel()
        await asyncio.gather(relaying, return_exceptions=True)
        await watch.aclose()


async def test_older_alerts_are_no_news_when_those_told_last_have_outlived_their_time(
    log: SqlGalleryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "RELAY_EVERY_S", 0.001)
    monkeypatch.setattr(alerts, "RELAYED_AT_ONCE_MAX", 1)
    day_ms = 86_400_000
    await log.record([], [alert(1, 0), alert(2, day_ms)])
    feed = RelayedAlerts()
    asked = Asked(log)
    relaying = asyncio.create_task(feed.relay(asked))  # type: ignore[arg-type]
    watch = feed.subscribe()
    first = asyncio.ensure_future(anext(watch))
    try:
        async with asyncio.timeout(60):
            await asked.answered.wait()
            asked.outlived.add(alert(2).alert_id)
            # Two looks on: the list now begins with the older one.
            for _ in range(2):
                asked.answered.clear()
                await asked.answered.wait()
            await log.record([], [alert(3, 2 * day_ms)])
            assert (await first).alert_id == alert(3).alert_id
    finally:
        relaying.cancel()
        await asyncio.gather(relaying, return_exceptions=True)
        await watch.aclose()
