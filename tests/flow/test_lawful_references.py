"""A reference is searched only while a lawful ground is retained for it, and a watchlist only as long as it is approved
for its one deployment."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from matcher_service.clock import SystemClock
from tests.running_service import DAY_MS, WholeService, whole_service

DIMENSION = 16
SPACE = {"name": "test", "version": 1, "dimension": DIMENSION}


class AdvancedClock(SystemClock):
    """The machine's clock, which a test can put forward."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.ahead_ms


class Office:
    """A running service seen through HTTP, with a custody gallery, and a clock that can be put forward."""

    def __init__(self, service: WholeService, http: httpx.AsyncClient, clock: AdvancedClock, folder: Path) -> None:
        self.service = service
        self.http = http
        self.clock = clock
        self.folder = folder
        self.faces: NDArray[np.float32] = np.random.default_rng(3).normal(size=(8, DIMENSION)).astype(np.float32)

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None, status: int = 200, **q: str) -> Any:
        answer = await self.http.request(method, f"/v1/{path}", json=body, params=q)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def gallery(self, gallery_id: str, status: int = 201, **terms: Any) -> Any:
        body = {
            "gallery_id": gallery_id,
            "kind": "custody",
            "controller": "a force",
            "lawful_basis": "PACE 1984 s.64A",
            "purpose": "a test",
            "retention_ms": 30 * DAY_MS,
            "space": SPACE,
            "threshold": 0.9,
        }
        return await self.ask("POST", "galleries", body | terms, status)

    async def watchlist(self, gallery_id: str = "list", deployment_id: str = "op", status: int = 201, **t: Any) -> Any:
        terms: dict[str, Any] = {"deployment_id": deployment_id, "categories": ["wanted_on_warrant"], "author": "Hall"}
        more = {"size_max": 3, "retention_ms": DAY_MS, **t}
        return await self.gallery(gallery_id, status, kind="watchlist", watchlist=terms, **more)

    async def enrol(self, gallery_id: str, rows: list[int], status: int = 200, **more: Any) -> Any:
        references = [
            {"reference_id": f"r{row}", "subject_id": f"s{row}", "template": self.faces[row].tolist()} for row in rows
        ]
        body = {"space": SPACE, "references": references, **more}
        return await self.ask("POST", f"galleries/{gallery_id}/references", body, status)

    async def deployment(self, *gallery_ids: str, deployment_id: str = "op", status: int = 201, **t: Any) -> Any:
        body = {
            "deployment_id": deployment_id,
            "gallery_ids": gallery_ids,
            "closes_at_ms": self.clock.wall_ms() + DAY_MS,
            "probe_age_ms_max": 60_000,
            "authorised_by": "Supt. Gray",
            "reason": "a test",
        }
        return await self.ask("POST", "deployments", body | t, status)

    async def search(self, row: int, status: int = 200, deployment_id: str = "op") -> Any:
        probe = {"probe_id": "p", "template": self.faces[row].tolist(), "captured_at_ms": self.clock.wall_ms()}
        # Longer than a busy machine's disk takes to record an alert.
        body = {"space": SPACE, "probes": [probe], "deployment_id": deployment_id, "deadline_ms": 30_000}
        answer = await self.ask("POST", "identify", body, status)
        return answer["decisions"][0]["outcome"] if status == 200 else answer

    async def audited(self, action: str) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = (await self.ask("GET", "audit", limit="1000"))["records"]
        return [one for one in records if one["action"] == action]

    async def erased(self) -> None:
        """Do at once what the service does every minute."""
        log = self.service.running.service.log
        while await log.erase(self.clock.wall_ms()):
            pass


@asynccontextmanager
async def office(folder: Path) -> AsyncIterator[Office]:
    clock = AdvancedClock()
    async with whole_service(folder / "data", clock) as service:
        base = f"http://127.0.0.1:{service.running.http_port}"
        headers = {"Authorization": f"Bearer {service.running.token}"}
        async with httpx.AsyncClient(base_url=base, headers=headers, timeout=30) as http:
            await service.space(DIMENSION)
            yield Office(service, http, clock, folder)


async def test_a_gallery_has_its_terms_and_a_reference_what_it_rests_on(tmp_path: Path) -> None:
    async with office(tmp_path) as it:
        await it.gallery("plain")
        told = await it.ask("GET", "galleries/plain")
        assert (told["review_interval_ms"], told["adjudicators"], told["watchlist"]) == (30 * DAY_MS, 1, None)
        await it.enrol("plain", [0])
        rests = await it.ask("GET", "galleries/plain/references/r0")
        assert (rests["source"], rests["lawful_basis"]) == ("records of a force", "PACE 1984 s.64A")
        assert rests["review_by_ms"] == rests["enrolled_at_ms"] + 30 * DAY_MS
        assert rests["quality"] is None
        due_ms = it.clock.wall_ms() + DAY_MS
        await it.enrol("plain", [1], source="custody suite 4", lawful_basis="PACE 1984 s.61", review_by_ms=due_ms)
        rests = await it.ask("GET", "galleries/plain/references/r1")
        assert (rests["source"], rests["lawful_basis"]) == ("custody suite 4", "PACE 1984 s.61")
        assert (rests["review_by_ms"], rests["expires_at_ms"]) == (due_ms, due_ms)


UNLAWFUL: list[tuple[dict[str, Any], str]] = [
    ({"review_interval_ms": 31 * DAY_MS}, "review_interval_ms"),
    ({"retention_ms": 8 * 366 * DAY_MS}, "review_interval_ms"),
    ({"retention_ms": 11 * 366 * DAY_MS, "review_interval_ms": DAY_MS}, "retention_ms"),
    ({"controller": " "}, "controller"),
    ({"lawful_basis": ""}, "lawful_basis"),
    ({"purpose": ""}, "purpose"),
    ({"quality_min": 1.5}, "quality_min"),
    ({"adjudicators": 3}, "adjudicators"),
    ({"kind": "watchlist"}, "watchlist"),
    ({"watchlist": {"deployment_id": "op", "categories": ["wanted_on_warrant"], "author": "Hall"}}, "watchlist"),
]


async def test_a_gallery_without_lawful_terms_cannot_exist(tmp_path: Path) -> None:
    async with office(tmp_path) as it:
        for terms, field in UNLAWFUL:
            assert (await it.gallery("g", 400, **terms))["field"] == field


async def test_a_reference_whose_review_is_overdue_stops_being_searched_by_itself_and_is_erased(tmp_path: Path) -> None:
    """Law 9: the review date ends a reference when searching, before anybody withdraws it."""
    async with office(tmp_path) as it:
        await it.gallery("g", review_interval_ms=10 * DAY_MS)
        await it.enrol("g", [0], review_by_ms=it.clock.wall_ms() + 3_600_000)
        await it.enrol("g", [1])
        await it.deployment("g")
        assert await it.search(0) == await it.search(1) == "ALERT"
        it.clock.ahead_ms = 3_600_001
        assert await it.search(0) == "NO_CANDIDATE"
        assert await it.search(1) == "ALERT"
        await it.erased()
        (erased,) = await it.audited("template.erased")
        assert erased["facts"]["count"] == 1
        overdue = await it.enrol("g", [2], 410, review_by_ms=it.clock.wall_ms() - 1)
        assert (overdue["cause"], overdue["field"]) == ("EXPIRED", "references[0].review_by_ms")
        late = await it.enrol("g", [2], 400, review_by_ms=it.clock.wall_ms() + 11 * DAY_MS)
        assert late["field"] == "references[0].review_by_ms"
        # Without a date of its own a reference is searched until the gallery's review interval is over.
        rests = await it.ask("GET", "galleries/g/references/r1")
        assert rests["expires_at_ms"] == rests["enrolled_at_ms"] + 10 * DAY_MS


async def test_a_review_keeps_a_reference_and_never_beyond_its_retention(tmp_path: Path) -> None:
    async with office(tmp_path) as it:
        await it.gallery("g", review_interval_ms=20 * DAY_MS)
        await it.enrol("g", [0], source="suite 4")
        await it.deployment("g")
        first = await it.ask("GET", "galleries/g/references/r0")
        it.clock.ahead_ms = 15 * DAY_MS
        review = {"review_by_ms": it.clock.wall_ms() + 19 * DAY_MS, "reviewed_by": "Sgt. Low", "reason": "charged"}
        await it.ask("POST", "galleries/g/references/r0/review", review)
        kept = await it.ask("GET", "galleries/g/references/r0")
        assert kept["source"] == "suite 4"
        assert kept["review_by_ms"] == review["review_by_ms"]
        assert kept["expires_at_ms"] == first["enrolled_at_ms"] + 30 * DAY_MS
        assert kept["sequence"] > first["sequence"]
        (audited,) = await it.audited("reference.reviewed")
        assert audited["detail"]["by"] == "Sgt. Low"
        answer = await it.ask("POST", "galleries/g/references/r0/review", {**review, "reason": " "}, 400)
        assert answer["field"] == "reason"
        far = {**review, "review_by_ms": it.clock.wall_ms() + 21 * DAY_MS}
        assert (await it.ask("POST", "galleries/g/references/r0/review", far, 400))["field"] == "review_by_ms"
        it.clock.ahead_ms = 31 * DAY_MS
        await it.deployment("g", deployment_id="later")
        assert await it.search(0, deployment_id="later") == "NO_CANDIDATE"
        assert (await it.ask("POST", "galleries/g/references/r0/review", review, 404))["cause"] == "NOT_FOUND"


async def test_an_ended_ground_ends_the_custody_references_of_a_subject(tmp_path: Path) -> None:
    async with office(tmp_path) as it:
        await it.gallery("g")
        await it.gallery("visas", kind="immigration")
        await it.enrol("g", [0, 1])
        await it.enrol("visas", [0])
        await it.deployment("g")
        assert await it.search(0) == "ALERT"
        ended = {"ground": "acquitted", "reason": "Crown Court, 4 May"}
        answer = await it.ask("POST", "subjects/s0/ground-ended", ended)
        assert answer["withdrawn"] == [{"gallery_id": "g", "reference_id": "r0"}]
        assert await it.search(0) == "NO_CANDIDATE"
        assert await it.search(1) == "ALERT"
        # What is held under another law is not touched, unless it is named.
        assert [one["gallery_id"] for one in (await it.ask("GET", "subjects/s0"))["references"]] == ["visas"]
        (audited,) = await it.audited("ground.ended")
        assert audited["detail"] == {"ground_ended": "acquitted", "reason": "Crown Court, 4 May", "subject_id": "s0"}
        assert (await it.ask("POST", "subjects/s0/ground-ended", {**ended, "ground": "tired"}, 400))[
            "field"
        ] == "ground"


async def test_a_poor_reference_does_not_enter(tmp_path: Path) -> None:
    async with office(tmp_path) as it:
        await it.gallery("g", quality_min=0.4)
        assert (await it.enrol("g", [0], 400))["cause"] == "LOW_QUALITY"
        body = {
            "space": SPACE,
            "references": [
                {"reference_id": f"r{row}", "subject_id": "s", "template": it.faces[row].tolist(), "quality": quality}
                for row, quality in enumerate((0.39, 0.4, 0.9))
            ],
        }
        receipts = (await it.ask("POST", "galleries/g/references", body))["receipts"]
        assert [one["outcome"] for one in receipts] == ["REFUSED", "ENROLLED", "ENROLLED"]
        assert receipts[0]["field"] == "references[0].quality"
        assert (await it.ask("GET", "galleries/g/references/r2"))["quality"] == 0.9


async def test_a_reference_that_resembles_too_many_others_does_not_enter(tmp_path: Path) -> None:
    """Against what the gallery holds, and against the rest of its own message."""
    async with office(tmp_path) as it:
        await it.gallery("g", resembles_max=1)
        base = it.faces[0]
        noise = np.random.default_rng(4).normal(size=(8, DIMENSION)).astype(np.float32) * 0.05
        it.faces[:4] = base + noise[:4]
        await it.enrol("g", [0, 4])
        # A second subject like the first may be a twin; the third would be a hub.
        await it.enrol("g", [1])
        refused = await it.enrol("g", [2], 400)
        assert (refused["cause"], refused["field"]) == ("RESEMBLES_OTHERS", "references[0].template")
        assert "s0" not in str(refused)
        # Its own other references are no others.
        same = {"reference_id": "r0b", "subject_id": "s0", "template": it.faces[2].tolist()}
        await it.ask("POST", "galleries/g/references", {"space": SPACE, "references": [same]})
        await it.gallery("empty", resembles_max=1)
        refused = await it.enrol("empty", [0, 1, 2, 5])
        assert [one["outcome"] for one in refused["receipts"]] == ["REFUSED"] * 3 + ["ENROLLED"]


ENTRY = {"category": "wanted_on_warrant", "reason": "warrant 7", "source": "custody suite 4"}


async def test_a_watchlist_is_searched_only_when_another_person_than_its_author_approved_it(tmp_path: Path) -> None:
    async with office(tmp_path) as it:
        await it.watchlist()
        await it.enrol("list", [0, 1], **ENTRY)
        await it.deployment("list")
        assert (await it.search(0, 403))["cause"] == "NOT_APPROVED"
        approval = {"approved_by": " hall ", "reason": "checked each entry"}
        assert (await it.ask("POST", "watchlists/list/approval", approval, 400))["field"] == "approved_by"
        approval["approved_by"] = "Supt. Gray"
        await it.ask("POST", "watchlists/list/approval", approval)
        assert await it.search(0) == "ALERT"
        assert (await it.ask("GET", "watchlists/list"))["watchlist"]["approved_by"] == "Supt. Gray"
        # While it is approved nobody is added; reopened, nothing is searched in it.
        assert (await it.enrol("list", [2], 409, **ENTRY))["cause"] == "CONFLICT"
        await it.ask("POST", "watchlists/list/approval", {**approval, "approved": False})
        assert (await it.search(0, 403))["cause"] == "NOT_APPROVED"
        await it.enrol("list", [2], **ENTRY)
        await it.ask("POST", "watchlists/list/approval", approval)
        assert await it.search(2) == "ALERT"
        assert len(await it.audited("watchlist.approved")) == 2


async def test_a_watchlist_holds_named_categories_with_reasons_and_no_more_than_was_calibrated(tmp_path: Path) -> None:
    async with office(tmp_path) as it:
        await it.watchlist()
        for missing, field in (("category", "category"), ("reason", "reason"), ("source", "source")):
            entry = {name: text for name, text in ENTRY.items() if name != missing}
            assert (await it.enrol("list", [0], 400, **entry))["field"] == f"references[0].{field}"
        for category in ("of interest", "missing_or_at_risk"):
            refused = await it.enrol("list", [0], 400, **{**ENTRY, "category": category})
            assert refused["field"] == "references[0].category"
        receipts = (await it.enrol("list", [0, 1, 2, 3], **ENTRY))["receipts"]
        assert [one["outcome"] for one in receipts] == ["ENROLLED"] * 3 + ["REFUSED"]
        assert receipts[3]["cause"] == "GALLERY_FULL"
        assert (await it.enrol("list", [4], 409, **ENTRY))["cause"] == "GALLERY_FULL"
        rests = await it.ask("GET", "galleries/list/references/r0")
        assert {name: rests[name] for name in ENTRY} == ENTRY
        bad = {"deployment_id": "op", "categories": ["of_interest"], "author": "Hall"}
        refused = await it.gallery("other", 400, kind="watchlist", watchlist=bad, size_max=1, retention_ms=DAY_MS)
        assert refused["field"] == "watchlist.categories[0]"
        assert (await it.watchlist("other", status=400, size_max=0))["field"] == "size_max"
        assert (await it.watchlist("other", status=400, retention_ms=32 * DAY_MS))["field"] == "retention_ms"


async def test_a_watchlist_belongs_to_one_deployment_and_to_no_case(tmp_path: Path) -> None:
    async with office(tmp_path) as it:
        await it.watchlist()
        assert (await it.deployment("list", deployment_id="other", status=400))["field"] == "gallery_ids"
        case = {
            "case_reference": "c",
            "gallery_ids": ["list"],
            "closes_at_ms": it.clock.wall_ms() + DAY_MS,
            "requested_by": "DC Hall",
            "purpose": "a test",
        }
        assert (await it.ask("POST", "cases", case, 400))["field"] == "gallery_ids"


@pytest.mark.parametrize("how", ["ended", "closed", "outlived"])
async def test_a_watchlist_is_destroyed_with_its_deployment(tmp_path: Path, how: str) -> None:
    """At the end of the deployment, at the close of its window, or when its own retention is over; with its key."""
    async with office(tmp_path) as it:
        await it.watchlist()
        await it.enrol("list", [0], **ENTRY)
        if how != "outlived":
            await it.deployment("list")
            await it.ask("POST", "watchlists/list/approval", {"approved_by": "Supt. Gray", "reason": "checked"})
            assert await it.search(0) == "ALERT"
        if how == "ended":
            answer = await it.ask("POST", "deployments/op/end")
            assert answer["destroyed_watchlists"] == ["list"]
        else:
            it.clock.ahead_ms = DAY_MS + 1
            await it.erased()
            deadline = time.monotonic() + 20
            while "list" in it.service.running.service.catalogue.galleries and time.monotonic() < deadline:
                await it.ask("GET", "galleries")
        assert (await it.ask("GET", "galleries/list", status=404))["cause"] == "UNKNOWN_GALLERY"
        assert len(await it.audited("gallery.deleted")) == 1
        (tombstone,) = (it.folder / "data/keys/galleries").glob("*.destroyed")
        assert not tombstone.with_suffix(".key").exists()
        await it.erased()
        assert (it.folder / "data/gallery.db").exists()
