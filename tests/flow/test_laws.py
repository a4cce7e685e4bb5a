"""Laws as the whole service keeps them, through its real edges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from matcher_service.client import Probes, ReceiptOutcome
from matcher_service.errors import (
    AuditUnavailable,
    DeadlineExceeded,
    Gone,
    InvalidInput,
    MatcherError,
    NotFound,
    ReplayBehind,
)
from matcher_service.terms import Alert, AuditEvent, DeleteGallery, EndDeployment, Outcome, ProbeMessage
from tests.fake_clock import SteppedClock
from tests.running_service import DAY_MS, TESTER, WholeService, whole_service

DIMENSION = 16


def templates(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)


async def prepared(service: WholeService, count: int = 10, **gallery: Any) -> Any:
    """A gallery `g` with references r0, r1, ... whose templates are templates(count)."""
    space = await service.space(DIMENSION)
    await service.gallery("g", space, **gallery)
    await service.deployment("g")
    receipts = await service.enrol("g", space, templates(count), [f"r{at}" for at in range(count)])
    assert all(receipt.outcome is ReceiptOutcome.ENROLLED for receipt in receipts)
    return space


async def found(service: WholeService, space: Any, rows: np.ndarray, **more: Any) -> list[str]:
    """The reference at rank 1 of each row, "" for none."""
    more.setdefault("min_sequence", await service.running.service.log.head())
    answers = await service.ask(space, rows, **more)
    decisions = [answers[f"p{at}"].decision for at in range(len(rows))]
    return [one.candidates[0].reference_id if one.candidates else "" for one in decisions]


async def test_law_5_a_withdrawn_reference_is_found_by_no_search_that_starts_later(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, threshold=0.95)
        for at in range(10):
            assert await found(service, space, templates(10)[at : at + 1]) == [f"r{at}"]
            await service.client.withdraw("g", reference_ids=[f"r{at}"], reason="released")
            assert await found(service, space, templates(10)[at : at + 1], min_sequence=0) == [""]
        with pytest.raises(NotFound):
            await service.client.withdraw("g", reference_ids=["r1"], reason="again")
    async with whole_service(tmp_path) as service:
        assert await found(service, space, templates(10)) == [""] * 10


async def test_law_5_withdrawing_a_subject_ends_all_its_references(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await service.space(DIMENSION)
        for name in ("g", "h"):
            await service.gallery(name, space, 0.95)
        await service.deployment("g", "h")
        await service.enrol("g", space, templates(2), ["a", "b"], ["one", "two"])
        await service.enrol("h", space, templates(4)[2:], ["c", "d"], ["one", "two"])
        assert await found(service, space, templates(4)) == ["a", "b", "c", "d"]
        receipt = await service.running.service.withdraw_subject("", "one", "erasure asked for", TESTER)
        assert set(receipt.reference_ids) == {("g", "a"), ("h", "c")}
        assert await found(service, space, templates(4)) == ["", "b", "", "d"]


async def test_a_replacement_is_never_seen_as_both_nor_as_neither(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, 1)
        row = templates(1)
        stop = asyncio.Event()

        async def replace_on() -> None:
            for at in range(40):
                near = row + np.float32(0.001 * at)
                receipts = await service.enrol("g", space, near, ["r0"], replace=True)
                assert [one.outcome for one in receipts] == [ReceiptOutcome.REPLACED]
            stop.set()

        replacing = asyncio.create_task(replace_on())
        searches = 0
        while not stop.is_set():
            answers = await service.ask(space, row, rank_max=10)
            assert [one.reference_id for one in answers["p0"].decision.candidates] == ["r0"]
            searches += 1
        await replacing
        assert searches > 3


async def test_law_9_expiry_is_enforced_when_searching_and_a_clock_stepped_back_revives_nobody(tmp_path: Path) -> None:
    clock = SteppedClock()
    async with whole_service(tmp_path, clock) as service:
        space = await prepared(service, 3, retention_ms=30 * DAY_MS)
        soon = clock.wall_ms() + 3_600_000
        await service.enrol("g", space, templates(4)[3:], ["soon"], expires_at_ms=[soon])
        assert await found(service, space, templates(4)) == ["r0", "r1", "r2", "soon"]
        clock.step_wall(3_600_000)
        await service.running.service.change(EndDeployment("op"), TESTER)
        await service.deployment("g", deployment_id="op-2")
        now = clock.wall_ms()

        async def asked() -> list[str]:
            reply = await service.client.identify(
                Probes(
                    space=space,
                    probe_ids=list("abcd"),
                    templates=templates(4),
                    captured_at_ms=[now] * 4,
                    deployment_id="op-2",
                )
            )
            return [one.candidates[0].reference_id if one.candidates else "" for one in reply.decisions]

        assert await asked() == ["r0", "r1", "r2", ""]
        # The log has seen the later time; the clock goes back.
        clock.step_wall(-3_600_000)
        assert await asked() == ["r0", "r1", "r2", ""]


async def test_law_7_without_the_audit_the_answer_is_incomplete_and_names_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, 2)
        log = service.running.service.log

        async def refuse(events: Sequence[AuditEvent], alerts: Sequence[Alert]) -> None:
            raise AuditUnavailable("the disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(log, "record", refuse)
            answers = await service.ask(space, templates(3), min_sequence=await log.head())
            assert [answers[f"p{at}"].decision.outcome for at in range(3)] == [Outcome.INCOMPLETE] * 3
            assert {one.decision.cause for one in answers.values()} == {"AUDIT_UNAVAILABLE"}
            assert not any(one.decision.candidates or one.decision.alert_id for one in answers.values())
        answers = await service.ask(space, templates(3))
        assert [answers[f"p{at}"].decision.outcome for at in range(3)] == [
            Outcome.ALERT,
            Outcome.ALERT,
            Outcome.NO_CANDIDATE,
        ]


async def test_law_7_every_alert_and_case_search_is_on_record_and_the_chain_holds(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, 2)
        await service.case("g")
        answers = await service.ask(space, templates(5), min_sequence=2)
        await service.ask(space, templates(5), case_reference="case-1")
        log = service.running.service.log
        alerts = await log.alerts("op", "", 100)
        assert {one.alert_id for one in alerts} == {
            one.decision.alert_id for one in answers.values() if one.decision.alert_id
        }
        assert {one.probe_id for one in alerts} == {"p0", "p1"}
        assert all(one.candidates[0].reference_id == f"r{one.probe_id[1:]}" for one in alerts)
        actions = [str(record["action"]) for record in await log.audit(0, 1000)]
        assert actions.count("case_search") == 1
        assert sum("alert" in action for action in actions) == 4


async def test_an_answer_waits_for_the_sequence_that_it_must_have_seen(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, 1)
        head = await service.running.service.log.head()
        answers = await service.ask(space, templates(1), min_sequence=head)
        assert answers["p0"].sequence >= head
        with pytest.raises((ReplayBehind, DeadlineExceeded)) as refused:
            await service.client.identify(
                Probes(
                    space=space,
                    probe_ids=["p"],
                    templates=templates(1),
                    captured_at_ms=[time.time_ns() // 1_000_000],
                    deployment_id="op",
                    min_sequence=head + 1000,
                    deadline_s=0.5,
                )
            )
        assert refused.value.cause in ("REPLAY_BEHIND", "DEADLINE")


async def test_a_deleted_gallery_is_searched_no_more_and_its_key_is_gone(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, 3)
        await service.running.service.change(DeleteGallery("g", "basis ended"), TESTER)
        answers = await service.ask(space, templates(1), gallery_ids=["g"])
        assert answers["p0"].decision.outcome is Outcome.REJECTED
        assert answers["p0"].decision.cause == "UNKNOWN_GALLERY"
        refused = await service.enrol("g", space, templates(1), ["again"])
        assert refused[0].outcome is ReceiptOutcome.REFUSED
        assert not list((tmp_path / "keys").rglob("g.key"))
    async with whole_service(tmp_path) as service:
        with pytest.raises(MatcherError):
            await service.gallery("g", space)


async def test_an_ended_deployment_searches_no_more(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, 1)
        await service.running.service.change(EndDeployment("op"), TESTER)
        with pytest.raises(Gone):
            await service.client.identify(
                Probes(
                    space=space,
                    probe_ids=["p"],
                    templates=templates(1),
                    captured_at_ms=[time.time_ns() // 1_000_000],
                    deployment_id="op",
                )
            )


async def test_a_deployment_that_ends_while_a_message_waits_for_its_place_searches_no_more(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, 1)
        running = service.running.service
        now = running.clock.monotonic()
        captured = np.array([time.time_ns() // 1_000_000])
        message = ProbeMessage(
            TESTER, space, ["p"], templates(1), captured, "op", "", (), None, 10, 0, received_at=now, deadline=now + 10
        )
        admitted, again = running.admit(message), running.admit(message)
        assert running.metrics.permits_in_use.labels("identify")._value.get() == 2
        await running.change(EndDeployment("op"), TESTER)
        with pytest.raises(Gone):
            await admitted.answer()
        again.release()
        again.release()
        assert running.metrics.permits_in_use.labels("identify")._value.get() == 0


async def test_one_bad_probe_is_rejected_and_its_neighbours_are_answered(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, 4)
        rows = templates(4)
        rows[1, 3] = np.nan
        rows[2] = 0
        answers = await service.ask(space, rows, min_sequence=await service.running.service.log.head())
        assert [answers[f"p{at}"].decision.outcome for at in range(4)] == [
            Outcome.ALERT,
            Outcome.REJECTED,
            Outcome.REJECTED,
            Outcome.ALERT,
        ]
        assert [answers[f"p{at}"].decision.cause for at in (1, 2)] == ["NOT_FINITE", "ZERO_TEMPLATE"]
        assert await found(service, space, templates(4)) == ["r0", "r1", "r2", "r3"]


async def test_a_probe_at_the_centre_of_its_space_has_no_direction(tmp_path: Path) -> None:
    centre = np.arange(1, DIMENSION + 1, dtype=np.float32)
    async with whole_service(tmp_path) as service:
        space = await service.space(DIMENSION, centre)
        await service.gallery("g", space)
        await service.deployment("g")
        refused = await service.enrol("g", space, np.stack([centre, centre + 1]), ["zero", "some"])
        assert [(one.reference_id, one.cause) for one in refused] == [("zero", "ZERO_TEMPLATE"), ("some", "")]
        answers = await service.ask(space, np.stack([centre, centre + 1]), min_sequence=refused[-1].sequence)
        assert answers["p0"].decision.cause == "ZERO_TEMPLATE"
        assert answers["p1"].decision.outcome is Outcome.ALERT
        # Refused at another station than its neighbour, and told by its row of the message all the same.
        answers = await service.ask(space, np.stack([np.full_like(centre, np.nan), centre + 1, centre]))
        told = [(answers[f"p{at}"].decision.cause, answers[f"p{at}"].decision.field) for at in range(3)]
        assert told == [("NOT_FINITE", "templates[0]"), ("", ""), ("ZERO_TEMPLATE", "templates[2]")]


async def test_the_same_key_changes_nothing_twice(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, 0)
        first = await service.enrol("g", space, templates(3), ["a", "b", "c"], idempotency_key="k")
        again = await service.enrol("g", space, templates(3), ["a", "b", "c"], idempotency_key="k")
        assert [one.outcome for one in again] == [ReceiptOutcome.REPEATED] * 3
        assert [one.sequence for one in again] == [one.sequence for one in first]
        other = await service.enrol("g", space, templates(3, seed=9), ["a", "b", "c"], idempotency_key="k")
        assert [one.cause for one in other] == ["CONFLICT"] * 3
        plain = await service.enrol("g", space, templates(3), ["a", "b", "c"])
        assert [one.cause for one in plain] == ["CONFLICT"] * 3


async def test_metrics_tell_what_happened_and_name_nobody(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, 3)
        await service.ask(space, templates(5), min_sequence=await service.running.service.log.head())
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.running.http_port}") as http:
            text = (await http.get("/metrics")).text
        for line in (
            'matcher_decisions_total{outcome="ALERT"} 3.0',
            'matcher_decisions_total{outcome="NO_CANDIDATE"} 2.0',
            "matcher_enrolled_total 3.0",
        ):
            assert line in text
        for name in (
            "matcher_station_seconds_bucket",
            "matcher_batch_probes_bucket",
            "matcher_queue_probes",
            "matcher_log_sequence",
        ):
            assert name in text
        assert not any(name in text for name in ("r0", "r1", "p0", "tester"))


async def test_off_loopback_the_service_refuses_to_start_without_tls() -> None:
    from matcher_service.errors import StartRefused
    from matcher_service.settings import load

    with pytest.raises(StartRefused, match="tls_certificate_file"):
        load(server={"host": "0.0.0.0"})


async def test_a_threshold_may_be_raised_and_never_lowered(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await prepared(service, 1, threshold=0.5)
        row = templates(1)
        near = row + 0.6 * templates(1, seed=5)
        score = float(np.dot(row[0], near[0]) / np.linalg.norm(row) / np.linalg.norm(near))
        assert 0.55 < score < 0.98
        assert await found(service, space, near) == ["r0"]
        assert await found(service, space, near, threshold=score - 0.01) == ["r0"]
        assert await found(service, space, near, threshold=score + 0.01) == [""]
        with pytest.raises(InvalidInput) as refused:
            await service.client.identify(
                Probes(
                    space=space,
                    probe_ids=["p"],
                    templates=near,
                    captured_at_ms=[time.time_ns() // 1_000_000],
                    deployment_id="op",
                    threshold=0.4,
                )
            )
        assert refused.value.cause == "THRESHOLD_BELOW_FLOOR"
