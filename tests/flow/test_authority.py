"""Deployments and cases: what they must say, and what is refused outside of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from matcher_service import records
from matcher_service.client import Probes
from matcher_service.errors import Forbidden, Gone, InvalidInput, MatcherError, NotFound, Overloaded, TooLarge
from matcher_service.terms import (
    Actor,
    Case,
    CreateCase,
    CreateDeployment,
    CreateGallery,
    Deployment,
    Gallery,
    GalleryKind,
    Outcome,
    ProbeMessage,
    Scope,
    SpaceId,
)
from tests.running_service import DAY_MS, TESTER, WholeService, whole_service

SPACE = SpaceId("test", 1, 8)
ROWS = np.eye(8, dtype=np.float32)
OFFICER = Actor("person-high", frozenset((Scope.AUTHORISING_OFFICER,)), person="high")
OPERATOR = Actor("person-op", frozenset((Scope.OPERATOR,)), person="op")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def deployment(**other: Any) -> Deployment:
    said = {
        "deployment_id": "square",
        "gallery_ids": ("custody",),
        "opens_at_ms": now_ms() - 1000,
        "closes_at_ms": now_ms() + DAY_MS,
        "probe_age_ms_max": 60_000,
        "authorised_by": "Supt. Gray",
        "reason": "robberies",
        "place": "Market Square",
        "legal_authority": "common law; authority 7/26",
        "necessity": "nothing less has worked",
    }
    return Deployment(**{**said, **other})


def case(**other: Any) -> Case:
    said = {
        "case_reference": "case-1",
        "gallery_ids": ("custody", "immigration"),
        "opens_at_ms": now_ms() - 1000,
        "closes_at_ms": now_ms() + DAY_MS,
        "requested_by": "DC Hall",
        "purpose": "burglary 12/26",
        "immigration_authority": "agreement 3, request 44",
    }
    return Case(**{**said, **other})


@asynccontextmanager
async def world(tmp_path: Path, **sections: Any) -> AsyncIterator[WholeService]:
    async with whole_service(tmp_path, **sections) as service:
        await service.space(8)
        for kind in (GalleryKind.CUSTODY, GalleryKind.IMMIGRATION):
            gallery = Gallery(kind.value, kind, "a force", "a law", "a test", DAY_MS, SPACE, 0.5)
            await service.running.service.change(CreateGallery(gallery), TESTER)
            await service.enrol(kind.value, SPACE, ROWS[:1], ["r"], ["s"])
        yield service


async def search(service: WholeService, *gallery_ids: str, count: int = 1, reference: str = "case-1") -> Any:
    return await service.client.identify(
        Probes(
            space=SPACE,
            probe_ids=[f"p{at}" for at in range(count)],
            templates=np.repeat(ROWS[:1], count, axis=0),
            captured_at_ms=[now_ms()] * count,
            case_reference=reference,
            gallery_ids=gallery_ids,
            rank_max=5,
        )
    )


async def test_an_officers_deployment_says_where_on_what_law_and_why(tmp_path: Path) -> None:
    async with world(tmp_path) as service:
        change = service.running.service.change
        for field in ("place", "legal_authority", "necessity", "authorised_by", "reason"):
            with pytest.raises(InvalidInput) as refused:
                await change(CreateDeployment(deployment(**{field: " "})), OFFICER)
            assert refused.value.field == field
        await change(CreateDeployment(deployment()), OFFICER)


async def test_on_the_loopback_token_a_deployment_may_say_less(tmp_path: Path) -> None:
    async with world(tmp_path) as service:
        await service.running.service.change(
            CreateDeployment(deployment(place="", legal_authority="", necessity="")), TESTER
        )
        held = service.running.service.catalogue.deployments["square"]
        assert (held.place, held.legal_authority, held.necessity) == ("", "", "")


async def test_a_deployment_beyond_its_bounds_is_refused(tmp_path: Path) -> None:
    beyond: list[tuple[dict[str, Any], str]] = [
        ({"threshold": 0.4}, "threshold"),
        ({"threshold": 1.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"cameras": ("north", "")}, "cameras[1]"),
        ({"cameras": tuple(map(str, range(257)))}, "cameras"),
        ({"gallery_ids": ("custody", "elsewhere")}, "gallery_ids"),
    ]
    async with world(tmp_path) as service:
        for other, field in beyond:
            with pytest.raises(MatcherError) as refused:
                await service.running.service.change(CreateDeployment(deployment(**other)), OFFICER)
            assert refused.value.field == field


async def test_outside_its_window_a_deployment_searches_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as service:
        later = deployment(deployment_id="later", opens_at_ms=now_ms() + DAY_MS // 2)
        await service.running.service.change(CreateDeployment(later), OFFICER)
        answer = (await service.ask(SPACE, ROWS[:1], deployment_id="later"))["p0"].decision
        assert (answer.outcome, answer.cause) == (Outcome.REJECTED, "FORBIDDEN")


def test_records_of_the_first_release_still_read() -> None:
    first = records.deployment_dict(deployment())
    for name in ("cameras", "legal_authority", "necessity", "threshold"):
        del first[name]
    held = records.decode_deployment(orjson.dumps(first))
    assert (held.cameras, held.legal_authority, held.necessity, held.threshold) == ((), "", "", None)
    searched = records.case_dict(case())
    del searched["immigration_authority"]
    assert records.decode_case(orjson.dumps(searched)).immigration_authority == ""
    rich = deployment(cameras=("a", "b"), threshold=0.7)
    assert records.decode_deployment(records.encode_deployment(rich)) == rich
    asked = case()
    assert records.decode_case(records.encode_case(asked)) == asked


# --- cases over an immigration gallery ---------------------------------------------------------------------


async def test_an_immigration_gallery_needs_its_own_authority_a_custody_gallery_and_an_officer(tmp_path: Path) -> None:
    async with world(tmp_path) as service:
        change = service.running.service.change
        for wish, actor, field in (
            (case(immigration_authority=""), OFFICER, "immigration_authority"),
            (case(immigration_authority=""), TESTER, "immigration_authority"),
            (case(gallery_ids=("immigration",)), OFFICER, "gallery_ids"),
            (case(), OPERATOR, "gallery_ids"),
        ):
            with pytest.raises((InvalidInput, Forbidden)) as refused:
                await change(CreateCase(wish), actor)
            assert refused.value.field == field
        await change(CreateCase(case(gallery_ids=("custody",), immigration_authority="")), OPERATOR)
        await change(CreateCase(case(case_reference="case-2")), OFFICER)


async def test_custody_is_searched_first_and_immigration_only_when_asked_and_counted_apart(tmp_path: Path) -> None:
    async with world(tmp_path) as service:
        await service.running.service.change(CreateCase(case()), OFFICER)
        for galleries in (("immigration",), ("custody", "immigration")):
            with pytest.raises(Forbidden, match="after custody"):
                await search(service, *galleries)
        first = await search(service)
        assert {one.gallery_id for one in first.decisions[0].candidates} == {"custody"}
        assert set(first.thresholds) == {"custody"}
        with pytest.raises(Forbidden, match="after custody"):
            await search(service, "custody", "immigration")
        assert service.running.service.metrics.case_probes.labels("custody")._value.get() == 1
    # A restart does not make the case begin anew.
    async with whole_service(tmp_path) as service:
        await reached(service, "case-1")
        second = await search(service, "immigration")
        assert {one.gallery_id for one in second.decisions[0].candidates} == {"immigration"}
        counted = service.running.service.metrics.case_probes
        assert counted.labels("custody")._value.get() == 0
        assert counted.labels("immigration")._value.get() == 1
        # Another case begins at custody again.
        await service.running.service.change(CreateCase(case(case_reference="case-2")), OFFICER)
        with pytest.raises(Forbidden):
            await search(service, "immigration", reference="case-2")


async def test_an_evaluation_searches_an_immigration_gallery_alone(tmp_path: Path) -> None:
    """Nobody is signed in: no person can create such a case."""
    async with world(tmp_path) as service:
        alone = case(gallery_ids=("immigration",), immigration_authority="an evaluation")
        with pytest.raises(InvalidInput):
            await service.running.service.change(CreateCase(alone), OFFICER)
        await service.running.service.change(CreateCase(alone), TESTER)
        assert set((await search(service)).thresholds) == {"immigration"}


async def test_a_case_of_the_first_release_does_not_reach_an_immigration_gallery(tmp_path: Path) -> None:
    async with world(tmp_path) as service:
        old = case(immigration_authority="")
        (receipt,) = await service.running.service.log.append([CreateCase(old)], TESTER)
        assert not isinstance(receipt, MatcherError)
        while "case-1" not in service.running.service.catalogue.cases:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with pytest.raises(Forbidden, match="no authority for an immigration gallery"):
            await search(service, "immigration")


async def test_searching_everyone_is_more_than_a_case_allows(tmp_path: Path) -> None:
    async with world(tmp_path, access={"case_probes_per_h_max": 20}) as service:
        await service.running.service.change(CreateCase(case()), OFFICER)
        await service.running.service.change(CreateCase(case(case_reference="case-2")), OFFICER)

        async def ask(person: str, count: int, reference: str = "case-1") -> None:
            asked = ProbeMessage(
                actor=Actor(f"person-{person}", frozenset((Scope.OPERATOR,)), person=person),
                space=SPACE,
                probe_ids=[f"p{at}" for at in range(count)],
                templates=np.repeat(ROWS[:1], count, axis=0),
                captured_at_ms=np.full(count, now_ms()),
                deployment_id="",
                case_reference=reference,
                gallery_ids=(),
                threshold=None,
                rank_max=1,
                min_sequence=0,
                received_at=time.monotonic(),
                deadline=time.monotonic() + 30,
            )
            await service.running.service.identify(asked)

        await ask("op", 15)
        with pytest.raises(Overloaded) as refused:
            await ask("op", 10)
        assert (refused.value.retry_after_ms or 0) > 60_000
        # Neither more cases nor more people are a way round: who asks is counted, and so is the case.
        for person, reference in (("op", "case-2"), ("other", "case-1")):
            with pytest.raises(Overloaded):
                await ask(person, 10, reference)
        await ask("op", 5)
        with pytest.raises(TooLarge):
            await ask("new", 21, "case-2")
        used = await service.running.service.alert_records.counts("person:person-op")  # type: ignore[union-attr]
        assert 19_000 < used["used_milli"] <= 20_000
    # Nor is a restart, or another gateway, which reads the same counters.
    async with whole_service(tmp_path, access={"case_probes_per_h_max": 20}) as service:
        await reached(service, "case-2")
        with pytest.raises(Overloaded):
            await ask("op", 10, "case-2")
        with pytest.raises(Overloaded):
            await ask("other", 10)
        # What leaked away within the hour is forgotten.
        await service.running.service.log.erase(now_ms() + 3_600_001)
        assert await service.running.service.alert_records.counts("person:person-op") == {}  # type: ignore[union-attr]


async def reached(service: WholeService, case_reference: str) -> None:
    """Until the catalogue was read again."""
    for _ in range(6000):
        if case_reference in service.running.service.catalogue.cases:
            return
        await asyncio.sleep(0.01)


async def test_an_authority_that_is_unknown_or_over_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as service:
        with pytest.raises(NotFound):
            await search(service, reference="nowhere")
        over = case(closes_at_ms=now_ms() + 300)
        await service.running.service.change(CreateCase(over), OFFICER)
        while now_ms() < over.closes_at_ms:
            await search_quietly(service)
        with pytest.raises(Gone):
            await search(service)


async def search_quietly(service: WholeService) -> None:
    try:
        await search(service)
    except Gone:
        return
