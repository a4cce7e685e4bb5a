"""Single calls, the watch of alerts, and errors as they come back from a gRPC status."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
import grpc.aio
import numpy as np
import pytest

from matcher_service import errors
from matcher_service.client import (
    Backoff,
    MatcherClient,
    Probes,
    Unreachable,
    WatchGap,
    error_for,
    error_of,
    identify_reply,
)
from matcher_service.errors import MatcherError
from matcher_service.gateway.grpc_call import rich_status, status_of
from matcher_service.terms import Cause, Outcome, SpaceId
from matcher_service.wire import matcher_pb2 as pb
from tests.fake_matcher import TOKEN, Script, fake_server

SPACE = SpaceId("test", 1, 4)
QUICK = Backoff(first_s=0.001, most_s=0.004)


def probes(rows: int = 3, **more: object) -> Probes:
    fields: dict[str, object] = {
        "space": SPACE,
        "probe_ids": [f"p{row}" for row in range(rows)],
        "templates": np.ones((rows, 4), np.float32),
        "captured_at_ms": [1] * rows,
        "deployment_id": "d",
        "message_id": "mine",
        "deadline_s": 30.0,
    }
    return Probes(**(fields | more))  # type: ignore[arg-type]


@pytest.fixture
async def script() -> Script:
    return Script()


@pytest.fixture
async def client(script: Script) -> AsyncIterator[MatcherClient]:
    async with (
        fake_server(script) as port,
        MatcherClient(f"127.0.0.1:{port}", TOKEN, backoff=QUICK, rng=random.Random(1)) as one,
    ):
        yield one


async def test_identify_tries_again_after_overload_and_a_broken_call(script: Script, client: MatcherClient) -> None:
    """A message refused as overloaded, then broken off, is answered at last, and once."""
    script.overload_times = 2
    script.break_at = frozenset({2})
    reply = await client.identify(probes())
    assert [one.outcome for one in reply.decisions] == [Outcome.ALERT] * 3
    assert (reply.message_id, reply.sequence, reply.complete) == ("mine", 7, True)
    assert script.messages == 4


async def test_identify_gives_up_when_the_next_try_would_come_too_late(script: Script, client: MatcherClient) -> None:
    """The refusal is raised by its cause at once if retry_after_ms lies beyond the deadline."""
    script.overload_times = 5
    script.retry_after_ms = 3_600_000
    with pytest.raises(errors.Overloaded) as refused:
        await client.identify(probes())
    assert refused.value.retry_after_ms == 3_600_000
    assert script.messages == 1


async def test_nobody_listening_is_unreachable_with_a_hint() -> None:
    """Without a server a single call raises Unreachable, which is retryable and says what to check."""
    async with fake_server(Script()) as port:
        pass
    async with MatcherClient(f"127.0.0.1:{port}", TOKEN, backoff=QUICK) as client:
        with pytest.raises(Unreachable) as refused:
            await client.identify(probes(deadline_s=0.05))
    assert refused.value.retryable
    assert "running" in refused.value.hint


async def test_a_withdrawal_by_subject_is_safe_to_try_again(script: Script, client: MatcherClient) -> None:
    """Broken off after the write, the second try finds nothing left to withdraw, which is not an error here."""
    script.enrolled = {"r1": "s1", "r2": "s1", "r3": "s2"}
    script.break_at = frozenset({1})
    await client.withdraw("g", subject_id="s1", reason="a test")
    assert script.enrolled == {"r3": "s2"}


async def test_a_withdrawal_whose_answer_was_lost_says_that_it_may_have_been_done(
    script: Script, client: MatcherClient
) -> None:
    """NotFound after a broken first try carries the hint that the first one may have succeeded."""
    script.enrolled = {"r1": "s1"}
    script.break_at = frozenset({1})
    with pytest.raises(errors.NotFound, match="earlier try"):
        await client.withdraw("g", reference_ids=["r1"], reason="a test")
    with pytest.raises(errors.NotFound) as plain:
        await client.withdraw("g", reference_ids=["r1"], reason="a test")
    assert "earlier try" not in str(plain.value)


async def test_a_withdrawal_names_references_or_a_subject(client: MatcherClient) -> None:
    """Both or neither is refused before anything is sent."""
    for what in ({}, {"reference_ids": ["r"], "subject_id": "s"}):
        with pytest.raises(errors.InvalidInput):
            await client.withdraw("g", reason="a test", **what)  # type: ignore[arg-type]


async def test_a_broken_watch_is_raised_unless_gaps_are_taken(script: Script, client: MatcherClient) -> None:
    """Law 4: alerts missed while disconnected are never passed over in silence."""
    seen = []
    with pytest.raises(Unreachable):
        await collect(client.watch_alerts(["d1", "d2"]), seen)
    assert [alert.alert_id for alert in seen] == ["alert-1-0", "alert-1-1"]
    assert seen[0].deployment_id == "d1,d2"


async def collect(stream: AsyncIterator[object], into: list) -> None:
    async for one in stream:
        into.append(one)


async def test_a_watch_that_takes_gaps_goes_on_and_tells_each(script: Script, client: MatcherClient) -> None:
    """With on_gap the watch reconnects, and tells from when to when it may have missed alerts."""
    gaps: list[WatchGap] = []
    seen = []
    async with aclosing(client.watch_alerts(on_gap=gaps.append)) as alerts:
        async for alert in alerts:
            seen.append(alert.alert_id)
            if len(seen) == 6:
                break
    assert seen == [f"alert-{number}-{row}" for number in (1, 2, 3) for row in (0, 1)]
    assert len(gaps) == 2
    assert all(gap.from_ms <= gap.to_ms and isinstance(gap.error, Unreachable) for gap in gaps)


async def test_a_watch_without_a_valid_token_is_not_tried_again(script: Script, client: MatcherClient) -> None:
    """An error that trying again cannot help ends the watch, gaps taken or not."""
    async with MatcherClient(client.address, "wrong", backoff=QUICK) as other:
        with pytest.raises(errors.Unauthenticated):
            await collect(other.watch_alerts(on_gap=lambda _: None), [])


def rpc_error(refusal: MatcherError) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", rich_status(refusal).SerializeToString()))
    return grpc.aio.AioRpcError(status_of(refusal), grpc.aio.Metadata(), trailing, details=str(refusal))


@pytest.mark.parametrize("cause", list(Cause))
def test_every_cause_comes_back_as_the_error_it_was(cause: Cause) -> None:
    """Class, cause, detail, field, hint and time of another try survive the gateway's status and the client."""
    sent = error_for(cause.value, "what happened", "the_field", 1500, "what to do")
    got = error_of(rpc_error(sent))
    assert type(got) is type(sent)
    assert (got.cause, got.detail, got.field, got.hint, got.retry_after_ms) == (
        cause,
        "what happened",
        "the_field",
        "what to do",
        1500,
    )


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_a_status_without_details_is_still_an_error_of_the_tree(code: grpc.StatusCode) -> None:
    """Proxies and the transport know no causes: their codes alone decide, and retryable ones stay retryable."""
    got = error_of(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="told"))
    assert "told" in got.detail
    retryable = {"UNAVAILABLE", "INTERNAL", "UNKNOWN", "ABORTED", "CANCELLED", "DATA_LOSS", "RESOURCE_EXHAUSTED", "OK"}
    assert got.retryable == (code.name in retryable)


def test_a_cause_of_a_newer_service_is_quoted() -> None:
    """An unknown cause is not passed off as a known one."""
    got = error_for("FROM_THE_FUTURE", "something new")
    assert isinstance(got, errors.ServiceFault)
    assert "FROM_THE_FUTURE" in got.detail


def test_an_outcome_of_a_newer_service_is_incomplete() -> None:
    """Law 4: what the client cannot read is never taken for NO_CANDIDATE."""
    wire = pb.IdentifyReply(decisions=[pb.Decision(probe_id="p")])
    assert identify_reply(wire).decisions[0].outcome is Outcome.INCOMPLETE
