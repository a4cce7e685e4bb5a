"""Each erasure has a receipt that says out of which store, and when; it is complete when every store has reported."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from matcher_service.clock import SystemClock
from matcher_service.gallery.erasure_receipts import SqlErasureReceipts
from matcher_service.gallery.log import open_sqlite_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import DeleteGallery, Receipt, Withdraw
from tests.running_service import TESTER, WholeService, whole_service

DIMENSION = 8
HOUR_MS = 3_600_000
# Rows that ended leave the index within these seconds, so that a test sees it.
SOON = {"erase_within_h": 2 / 3600}
FACES = np.random.default_rng(7).normal(size=(6, DIMENSION)).astype(np.float32)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[WholeService]:
    async with whole_service(tmp_path / "data", storage=SOON) as running:
        space = await running.space(DIMENSION)
        for gallery_id in ("custody", "other"):
            await running.gallery(gallery_id, space)
            await running.enrol(
                gallery_id, space, FACES, [f"r{row}" for row in range(6)], [f"s{row}" for row in range(6)]
            )
        yield running


async def ask(service: WholeService, path: str, status: int = 200, **params: str | int) -> Any:
    base = f"http://127.0.0.1:{service.running.http_port}/v1/"
    headers = {"Authorization": f"Bearer {service.running.token}"}
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=30) as http:
        answer = await http.get(path, params=params)
    assert answer.status_code == status, answer.text
    return answer.json()


async def complete(service: WholeService, **of: str) -> list[dict[str, Any]]:
    """The receipts, when there are some, nothing waits any more, and all are complete."""
    async with asyncio.timeout(60):
        while True:
            told = await ask(service, "erasures", **of)
            if told["receipts"] and not told["waiting"]["templates"] and all(x["complete"] for x in told["receipts"]):
                return list(told["receipts"])
            await asyncio.sleep(0.05)


async def audited(service: WholeService, action: str) -> list[dict[str, Any]]:
    found = (await ask(service, "audit", limit=1000))["records"]
    return [one for one in found if one["action"] == action]


async def test_a_receipt_names_every_store_and_is_in_the_audit_when_all_have_reported(
    service: WholeService, tmp_path: Path
) -> None:
    before_ms = SystemClock().wall_ms()
    await service.running.service.withdraw("custody", ["r2"], "a test", TESTER)
    (receipt,) = await complete(service, gallery_id="custody")
    assert (receipt["kind"], receipt["gallery_id"], receipt["erased"]) == ("templates", "custody", 1)
    stores = {one["store"]: one for one in receipt["stores"]}
    assert set(stores) == {
        "database",
        "write_ahead_log",
        "caches",
        "memory of index",
        "segments of index",
        "snapshots of index",
        "backups",
    }
    backups = stores.pop("backups")
    assert backups["at_ms"] is None
    assert "ledger" in backups["how"]
    assert backups["until_at_ms"] - receipt["erased_at_ms"] == 92 * 86_400_000
    after_ms = SystemClock().wall_ms()
    assert all(before_ms <= one["at_ms"] <= receipt["complete_at_ms"] <= after_ms for one in stores.values())

    # The very template is in no file of the service: neither in the log, which says so, nor in the index, which has
    # been written since without the row.
    with sqlite3.connect(f"file:{tmp_path}/data/gallery.db?mode=ro", uri=True) as database:
        ((first, last),) = receipt["sequences"]
        assert first == last
        row = database.execute("SELECT sealed, reference_id FROM entry WHERE sequence = ?", (first,)).fetchone()
        assert row == (None, "r2")
    (record,) = await audited(service, "erasure.complete")
    assert record["subject"] == "custody"
    assert record["facts"]["receipt"] == receipt["receipt_id"]
    assert record["facts"]["sequences"] == receipt["sequences"]
    assert set(record["facts"]["indexes_at_ms"]) == {"index"}
    (begun,) = await audited(service, "template.erased")
    assert begun["facts"]["receipt"] == receipt["receipt_id"]
    assert await ask(service, f"erasures/{receipt['receipt_id']}") == receipt
    await ask(service, "erasures/77", status=404)


async def test_receipts_are_found_by_subject_and_the_look_is_on_record(service: WholeService) -> None:
    await service.running.service.withdraw("custody", ["r1"], "a test", TESTER)
    await complete(service, gallery_id="custody")
    await service.running.service.withdraw_subject("", "s4", "a test", TESTER)
    found = await complete(service, subject_id="s4")
    assert sorted(one["gallery_id"] for one in found) == ["custody", "other"]
    assert (await ask(service, "erasures", subject_id="s4", gallery_id="other"))["receipts"] == [
        one for one in found if one["gallery_id"] == "other"
    ]
    assert (await ask(service, "erasures", subject_id="s0"))["receipts"] == []
    looks = await audited(service, "erasures.consulted")
    assert {one["detail"]["subject_id"] for one in looks} == {"s4", "s0"}
    every = (await ask(service, "erasures"))["receipts"]
    assert len(every) == 3
    assert (await ask(service, "erasures", after=every[0]["receipt_id"], limit=1))["receipts"] == every[1:2]


async def test_a_deleted_gallerys_receipt_tells_when_its_key_was_destroyed(service: WholeService) -> None:
    await service.running.service.change(DeleteGallery("other", "a test"), TESTER)
    receipts = await complete(service, gallery_id="other")
    assert sum(one["erased"] for one in receipts) == 6
    for one in receipts:
        (key,) = [store for store in one["stores"] if store["store"] == "key"]
        assert key["at_ms"] <= one["erased_at_ms"]
    assert (await ask(service, "erasures", gallery_id="custody"))["receipts"] == []


async def test_a_receipt_waits_for_an_index_that_has_not_reported(tmp_path: Path) -> None:
    """A row that ended and may still be in a file keeps the receipt open, and it says for whom it waits."""
    async with whole_service(tmp_path / "data") as running:
        space = await running.space(DIMENSION)
        await running.gallery("custody", space)
        await running.enrol("custody", space, FACES, [f"r{row}" for row in range(6)])
    log = await open_sqlite_log(tmp_path / "data", tmp_path / "data" / "keys", StorageSettings(), SystemClock())
    try:
        erasures = SqlErasureReceipts(log)
        (ended,) = await log.append([Withdraw("custody", "r0", "a test")], TESTER)
        assert isinstance(ended, Receipt)
        assert await erasures.waiting("custody", "") == (
            1,
            0,
            (await log.read(ended.sequence - 1, 1))[0].at_ms + HOUR_MS,
        )
        assert await log.erase(SystemClock().wall_ms()) == 1
        assert await erasures.waiting("custody", "") == (0, 0, None)

        # One shard reports that it holds nothing of it any more, another one that it holds what ended last.
        told = await erasures.report({"near:8001": ended.sequence, "far:8001": ended.sequence - 1})
        (receipt,) = await erasures.receipts("custody", "", 0, 10)
        assert told == (0, receipt.erased_at_ms)
        assert receipt.complete_at_ms is None
        since = {one.store: one.at_ms for one in receipt.stores}
        assert since["segments of near:8001"] is not None
        assert since["segments of far:8001"] is None
        # One that cannot be asked does not count as one that has reported; what was told before stays told.
        assert await erasures.report({"near:8001": -1, "far:8001": -1}) == (0, receipt.erased_at_ms)
        assert await erasures.report({"near:8001": -1, "far:8001": ended.sequence + 1}) == (1, None)
        (whole,) = await erasures.receipts("custody", "", 0, 10)
        assert whole.complete_at_ms is not None
        assert {one.store: one.at_ms for one in whole.stores}["segments of near:8001"] == since["segments of near:8001"]
        assert await erasures.report({"near:8001": ended.sequence, "far:8001": ended.sequence}) == (0, None)
        assert [one["action"] for one in await log.audit(0, 1000)].count("erasure.complete") == 1
    finally:
        await log.close()


async def test_a_process_that_ended_before_it_wiped_leaves_a_receipt_that_the_next_completes(tmp_path: Path) -> None:
    async with whole_service(tmp_path / "data", storage=SOON) as running:
        space = await running.space(DIMENSION)
        await running.gallery("custody", space)
        await running.enrol("custody", space, FACES, [f"r{row}" for row in range(6)])
        await running.running.service.withdraw("custody", ["r0"], "a test", TESTER)
        await complete(running, gallery_id="custody")
    # As after a kill between the commit and the wiping.
    with sqlite3.connect(tmp_path / "data" / "gallery.db") as database:
        database.execute("UPDATE erasure_receipt SET wiped_at_ms = NULL, complete_at_ms = NULL, indexes = NULL")
    log = await open_sqlite_log(tmp_path / "data", tmp_path / "data" / "keys", StorageSettings(), SystemClock())
    await log.erase(SystemClock().wall_ms())
    await log.close()
    with sqlite3.connect(tmp_path / "data" / "gallery.db") as database:
        assert [one for (one,) in database.execute("SELECT wiped_at_ms FROM erasure_receipt")] != [None]
    async with whole_service(tmp_path / "data", storage=SOON) as running:
        (receipt,) = await complete(running, gallery_id="custody")
        assert receipt["complete"]
