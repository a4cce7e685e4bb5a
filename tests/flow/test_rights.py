"""What is owed to people, courts and the public: access, holds, erasure that no restored backup undoes, reports."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path
from typing import Any

from matcher_service import deployment_report
from tests.flow.test_alerts import judge, operation, raised
from tests.flow.test_lawful_references import ENTRY, Office, office
from tests.running_service import DAY_MS, whole_service


async def held_templates(it: Office) -> int:
    with sqlite3.connect(it.folder / "data/gallery.db") as database:
        return int(database.execute("SELECT count(*) FROM entry WHERE sealed IS NOT NULL").fetchone()[0])


async def test_a_subject_gets_everything_that_is_held_of_them_and_it_is_audited(tmp_path: Path) -> None:
    """Data Protection Act 2018, sections 45 and 62."""
    async with operation(tmp_path) as it:
        alert_id = await raised(it, 0)
        await judge(it, alert_id, "rejected")
        await it.ask("GET", "subjects/s0")
        found = await it.ask("GET", "subjects/s0/export", reason="request 12")
        (reference,) = found["references"]
        assert (reference["reference_id"], reference["controller"], reference["purpose"]) == ("r0", "a force", "a test")
        assert [one["alert_id"] for one in found["alerts"]] == [alert_id]
        assert found["alerts"][0]["state"] == "rejected"
        done = [(one["action"], one["operation"]) for one in found["processing"]]
        assert done == [
            ("reference.enrolled", "collection"),
            ("alert.raised", "disclosure"),
            ("alert.adjudicated", "alteration"),
        ]
        assert "template" not in str(found).replace("template.", "")
        (exported,) = await it.audited("subject.exported")
        assert exported["detail"]["reason"] == "request 12"
        (looked,) = await it.audited("subject.consulted")
        assert looked["detail"]["subject_id"] == "s0"
        assert (await it.ask("GET", "subjects/s0/export", status=400))["field"] == "reason"


async def hold(it: Office, status: int = 201, **more: Any) -> Any:
    body = {
        "subject_id": "s0",
        "requested_by": "Crown Court",
        "authorised_by": "Supt. Gray",
        "reason": "disclosure",
        "review_by_ms": it.clock.wall_ms() + 90 * DAY_MS,
        "hold_id": "h1",
    }
    return await it.ask("POST", "holds", body | more, status)


async def test_a_legal_hold_pauses_erasure_and_never_restores_searchability(tmp_path: Path) -> None:
    async with operation(tmp_path) as it:
        await hold(it)
        for reference_id in ("r0", "r1"):
            await it.ask("DELETE", f"galleries/g/references/{reference_id}", reason="released")
        await it.erased()
        # r0 is held, r1 is erased, r2 is live.
        assert await held_templates(it) == 2
        assert await it.search(0) == "NO_CANDIDATE"
        # Nor can its gallery, and with it the key, be destroyed.
        assert (await it.ask("DELETE", "galleries/g", reason="over", status=409))["cause"] == "CONFLICT"
        it.clock.ahead_ms = 91 * DAY_MS
        (listed,) = (await it.ask("GET", "holds"))["holds"]
        assert (listed["overdue"], listed["authorised_by"]) == (True, "Supt. Gray")
        await it.erased()
        assert await held_templates(it) == 1
        await it.ask("POST", "holds/h1/release", {"reason": "case closed", "released_by": "Supt. Gray"})
        await it.erased()
        assert await held_templates(it) == 0
        assert len(await it.audited("hold.placed")) == len(await it.audited("hold.released")) == 1
        assert (await hold(it, 409))["field"] == "hold_id"
        assert (await hold(it, 400, hold_id="h2", authorised_by=""))["field"] == "authorised_by"
        far = it.clock.wall_ms() + 400 * DAY_MS
        assert (await hold(it, 400, hold_id="h2", review_by_ms=far))["field"] == "review_by_ms"


async def test_a_legal_hold_keeps_alerts_and_what_the_audit_tells_and_puts_neither_to_use(tmp_path: Path) -> None:
    async with operation(tmp_path, retention_ms=90 * DAY_MS) as it:
        held, other = await raised(it, 0), await raised(it, 1)
        await judge(it, held, "rejected")
        await judge(it, other, "confirmed")
        await hold(it)
        await hold(it, hold_id="h2")
        it.clock.ahead_ms = 32 * DAY_MS
        await it.erased()
        assert [one["subject"] for one in await it.audited("alert.erased")] == [other]
        told = {one["subject"]: one["detail"] for one in await it.audited("alert.raised")}
        assert told[other] is None
        assert told[held]["candidates"][0]["subject_id"] == "s0"
        judged = {one["subject"]: one["detail"] for one in await it.audited("alert.adjudicated")}
        assert (judged[held]["by"], judged[other]) == ("PC Ames", None)
        kept = [(one["subject"], one["facts"]) for one in await it.audited("hold.kept")]
        assert kept == [("h1", {"alerts": 1}), ("h1", {"details": 2})]
        # Beyond its time it is nobody's to work with; who answers to the person or to a court gets it.
        assert (await it.ask("GET", "alerts"))["alerts"] == []
        assert (await it.ask("GET", f"alerts/{held}", status=404))["cause"] == "NOT_FOUND"
        assert (await judge(it, held, "confirmed", status=404))["field"] == "alert_id"
        (alert,) = (await it.ask("GET", "subjects/s0/export", reason="request 12"))["alerts"]
        assert (alert["alert_id"], alert["state"], alert["kept_under_a_hold"]) == (held, "rejected", True)
        # The first hold goes, the second one still stands.
        for hold_id, erased in (("h1", [other]), ("h2", [other, held])):
            await it.ask("POST", f"holds/{hold_id}/release", {"reason": "closed", "released_by": "Supt. Gray"})
            await it.erased()
            assert [one["subject"] for one in await it.audited("alert.erased")] == erased
        assert [one["detail"] for one in await it.audited("alert.raised")] == [None, None]
        assert [one["detail"] for one in await it.audited("alert.adjudicated")] == [None, None]


async def test_details_that_name_a_person_or_tell_of_their_references_are_kept_under_a_hold(tmp_path: Path) -> None:
    """The audit's own clock, two years, is over; others' details go."""
    async with operation(tmp_path, retention_ms=90 * DAY_MS) as it:
        for row in (0, 1):
            await it.ask("DELETE", f"galleries/g/references/r{row}", reason=f"why {row}")
            await it.ask("GET", f"subjects/s{row}")
        await hold(it, review_by_ms=it.clock.wall_ms() + 300 * DAY_MS)
        (reference,) = (await it.ask("GET", "subjects/s0/export", reason="request 12"))["references"]
        assert (reference["reference_id"], reference["searchable"]) == ("r0", False)
        it.clock.ahead_ms = 732 * DAY_MS
        await it.erased()
        kept = [one["detail"] for one in await it.audited("reference.withdrawn")]
        assert kept == [{"reason": "why 0"}, None]
        assert [one["detail"] for one in await it.audited("subject.consulted")] == [
            {"subject_id": "s0", "references": 0},
            None,
        ]
        assert (await it.audited("hold.placed"))[0]["detail"]["authorised_by"] == "Supt. Gray"


async def test_the_inputs_of_an_impact_assessment_are_told_and_name_nobody(tmp_path: Path) -> None:
    """Data Protection Act 2018, section 64."""
    async with operation(tmp_path, review_interval_ms=20 * DAY_MS) as it:
        told = await it.ask("GET", "impact-assessment")
        (gallery,) = told["galleries"]
        assert (gallery["review_interval_ms"], gallery["calibrated"]) == (20 * DAY_MS, None)
        assert told["clocks"]["alerts_kept_d"] == 31
        assert told["clocks"]["probes_without_an_alert_kept"] == 0
        assert set(told["processing"].values()) == {
            "collection", "alteration", "consultation", "disclosure", "combination", "erasure",
        }  # fmt: skip
        assert told["who_may"]["adjudicate_alert"] == ["adjudicator"]
        assert not any(name in str(told) for name in ("r0", "s0"))


async def test_a_restored_database_does_not_bring_back_who_was_withdrawn_since(tmp_path: Path) -> None:
    """The erasure ledger stands outside the database, names nobody, and is obeyed before anything is searched."""
    async with operation(tmp_path) as it:
        with sqlite3.connect(tmp_path / "data/gallery.db") as source, sqlite3.connect(tmp_path / "copy.db") as copy:
            source.backup(copy)
        await it.ask("DELETE", "galleries/g/references/r0", reason="released")
        await it.ask("POST", "subjects/s1/ground-ended", {"ground": "acquitted", "reason": "Crown Court"})
    for name in ("gallery.db-wal", "gallery.db-shm", "gallery.db"):
        (tmp_path / "data" / name).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "data/index", ignore_errors=True)
    shutil.copy(tmp_path / "copy.db", tmp_path / "data/gallery.db")
    (tmp_path / "data/gallery.db").chmod(0o600)
    (ledger,) = (tmp_path / "data/keys/erasures").iterdir()
    assert len(ledger.read_text().splitlines()) == 2
    assert not any(name in ledger.read_text() for name in ("r0", "s1", "g "))
    async with whole_service(tmp_path / "data") as service:
        held = await service.running.service.log.references("g", "", 10)
        assert [one.reference_id for one in held] == ["r2"]
        records = await service.running.service.log.audit(0, 100)
        again = [one for one in records if one["action"] == "reference.withdrawn"]
        assert again[0]["detail"] == {"reason": "withdrawn before the database was restored"}


async def test_a_report_tells_what_the_public_may_know_and_names_nobody(tmp_path: Path) -> None:
    async with office(tmp_path) as it:
        await it.gallery("g")
        await it.enrol("g", [0])
        await it.watchlist()
        await it.enrol("list", [1, 2], **ENTRY)
        await it.ask("POST", "watchlists/list/approval", {"approved_by": "Supt. Gray", "reason": "checked"})
        await it.deployment("g", "list", alert_retention_ms=DAY_MS)
        standing = (await it.ask("GET", "deployments/op/report"))["watchlist"]
        assert standing == {"entries": 2, "destroyed": 0, "by_category": {"wanted_on_warrant": 2}}
        for row in (0, 1, 5, 6):
            await it.search(row)
        first, second = (one["alert_id"] for one in (await it.ask("GET", "alerts"))["alerts"])
        await judge(it, first, "rejected")
        await judge(it, second, "confirmed")
        await it.ask("POST", "deployments/op/end")
        # The counters are stored every few seconds.
        for _ in range(300):
            told = await it.ask("GET", "deployments/op/report")
            if told["faces"]["searched"] == 4:
                break
            await asyncio.sleep(0.1)
        assert told["faces"] == {"searched": 4, "refused": 0, "incomplete": 0}
        outcomes = {"raised": 2, "open": 0, "confirmed": 1, "rejected": 1, "inconclusive": 0}
        assert told["alerts"] == {**outcomes, "live_ms": DAY_MS, "erased": 0}
        assert told["lasted_ms"] == told["deployment"]["ended_at_ms"] - told["deployment"]["opens_at_ms"]
        assert told["false_alerts"] == {"per_alert": 0.5, "per_face_searched": 0.25}
        assert told["watchlist"] == {"entries": 2, "destroyed": 2, "by_category": {"wanted_on_warrant": 2}}
        custody, watchlist = told["galleries"]
        assert (custody["gallery_id"], custody["thresholds"][0]["threshold"]) == ("g", 0.9)
        assert watchlist["deleted_at_ms"]
        assert watchlist["approved_by"] == "Supt. Gray"
        page = (await it.http.get("/v1/deployments/op/report", params={"form": "html"})).text
        assert page.startswith("<!doctype html>")
        assert deployment_report.page(told).split("<p>Made")[0] == page.split("<p>Made")[0]
        for text in (page, str(told)):
            assert not any(name in text for name in ("s0", "s1", "r0", "warrant 7", first))
            assert "identif" not in text
        assert "1 of 2 (50%)" in page
        it.clock.ahead_ms = DAY_MS + 60_000
        await it.erased()
        assert (await it.ask("GET", "deployments/op/report"))["alerts"]["erased"] == 2
