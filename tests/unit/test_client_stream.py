"""The client's streams against a real grpc.aio server with scripted faults."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from matcher_service.client import Backoff, MatcherClient, ProbeAnswer, Probes, ReceiptOutcome, References
from matcher_service.errors import Forbidden, InvalidInput, ShuttingDown, Unauthenticated
from matcher_service.terms import Outcome, SpaceId
from tests.fake_matcher import TOKEN, Script, fake_server, subject_of

SPACE = SpaceId("test", 1, 4)
QUICK = Backoff(first_s=0.001, most_s=0.004)


def message(number: int, rows: int, rng: np.random.Generator, **more: object) -> Probes:
    templates = rng.normal(size=(rows, SPACE.dimension)).astype(np.float32)
    templates[:, 1] = np.arange(rows) + 100 * number
    return Probes(
        space=SPACE,
        probe_ids=[f"{number}-{row}" for row in range(rows)],
        templates=templates,
        captured_at_ms=[1] * rows,
        deployment_id="d",
        message_id=str(number),
        **more,  # type: ignore[arg-type]
    )


async def each(messages: list[Probes]) -> AsyncIterator[Probes]:
    for one in messages:
        yield one


def client_of(port: int, **more: object) -> MatcherClient:
    settings: dict[str, object] = {"backoff": QUICK, "rng": random.Random(1), "deadline_s": 30.0} | more
    return MatcherClient(f"127.0.0.1:{port}", TOKEN, **settings)  # type: ignore[arg-type]


async def identify_all(
    script: Script, messages: list[Probes], **more: object
) -> tuple[list[ProbeAnswer], MatcherClient]:
    async with fake_server(script) as port, client_of(port, **more) as client:
        return [answer async for answer in client.identify_stream(each(messages))], client


def assert_each_answered_rightly(messages: list[Probes], answers: list[ProbeAnswer]) -> None:
    assert Counter(answer.decision.probe_id for answer in answers) == Counter(
        probe_id for one in messages for probe_id in one.probe_ids
    )
    by_id = {answer.decision.probe_id: answer for answer in answers}
    for one in messages:
        for probe_id, template in zip(one.probe_ids, one.templates, strict=True):
            answer = by_id[probe_id]
            assert answer.message_id == one.message_id
            if template[0] > 0:
                assert answer.decision.outcome is Outcome.ALERT
                assert [candidate.subject_id for candidate in answer.decision.candidates] == [subject_of(template)]
            else:
                assert answer.decision.outcome is Outcome.NO_CANDIDATE
            assert (answer.sequence, answer.space, answer.policy_version) == (7, SPACE, "p1")
            assert answer.thresholds == {"g": 0.5}
            assert answer.complete
            assert answer.error is None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.integers(0, 5), max_size=12),
    break_at=st.frozensets(st.integers(1, 20), max_size=5),
    overload_times=st.integers(0, 2),
    cause=st.sampled_from(["OVERLOADED", "SHUTTING_DOWN"]),
    repeat=st.booleans(),
    split=st.booleans(),
    reorder=st.booleans(),
    window=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_law_3_every_probe_gets_exactly_one_right_answer_through_any_faults(
    sizes: list[int],
    break_at: frozenset[int],
    overload_times: int,
    cause: str,
    repeat: bool,
    split: bool,
    reorder: bool,
    window: int,
    seed: int,
) -> None:
    """Law 3: whatever breaks, repeats, splits or reorders, each probe is answered once, and with its own answer."""
    note(f"seed {seed}")
    rng = np.random.default_rng(seed)
    messages = [message(number, rows, rng) for number, rows in enumerate(sizes)]
    script = Script(
        seed=seed,
        break_at=break_at,
        overload_times=overload_times,
        overload_cause=cause,
        repeat_replies=repeat,
        split_replies=split,
        reorder=reorder,
    )
    answers, client = asyncio.run(identify_all(script, messages, in_flight_messages_max=window))
    assert_each_answered_rightly(messages, answers)
    assert script.unanswered_most <= window
    assert client.counts.connections == script.streams
    if repeat and any(sizes):
        assert client.counts.surplus_answers_dropped > 0


async def test_the_window_bounds_the_unanswered_messages() -> None:
    """No more than in_flight_messages_max messages wait for an answer, however many there are to send."""
    script = Script(mute=frozenset(f"{number}-0" for number in range(50)))
    taken = 0

    async def source() -> AsyncIterator[Probes]:
        nonlocal taken
        for number in range(50):
            taken += 1
            yield message(number, 1, np.random.default_rng(number))

    async with fake_server(script) as port, client_of(port, in_flight_messages_max=3, deadline_s=0.05) as client:
        answers = [answer async for answer in client.identify_stream(source())]
    assert script.unanswered_most <= 3
    assert taken == 50
    assert Counter(answer.decision.cause for answer in answers) == {"DEADLINE": 50}


async def test_a_slow_reader_holds_the_window_closed() -> None:
    """Answers that the caller has not taken count against the window, so nothing piles up behind a slow reader."""
    taken = 0

    async def source() -> AsyncIterator[Probes]:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield message(number, 1, np.random.default_rng(number))

    async with fake_server(Script()) as port, client_of(port, in_flight_messages_max=4) as client:
        given = 0
        async with aclosing(client.identify_stream(source())) as answers:
            async for _ in answers:
                given += 1
                for _ in range(50):
                    await asyncio.sleep(0)
                # Beyond what was handed out there are at most the four of the window.
                assert taken <= given + 4
    assert given == 40


async def test_a_probe_that_is_never_answered_gets_one_deadline_and_the_others_their_answers() -> None:
    """Law 3: a mute probe is REJECTED with DEADLINE once; its neighbours in the message are answered normally."""
    rng = np.random.default_rng(5)
    messages = [message(number, 4, rng) for number in range(6)]
    mute = frozenset({"1-2", "4-0"})
    answers, _ = await identify_all(Script(mute=mute), messages, deadline_s=0.2)
    ids = Counter(answer.decision.probe_id for answer in answers)
    assert ids == Counter(probe_id for one in messages for probe_id in one.probe_ids)
    for answer in answers:
        if answer.decision.probe_id in mute:
            assert (answer.decision.outcome, answer.decision.cause) == (Outcome.REJECTED, "DEADLINE")
            assert not answer.answered
            assert not answer.complete
            assert answer.error is not None
        else:
            assert answer.answered


async def test_a_refusal_is_handed_over_when_there_is_no_time_for_another_try() -> None:
    """OVERLOADED with a retry_after_ms beyond the deadline is the answer, at once, and not a later DEADLINE."""
    rng = np.random.default_rng(6)
    answers, client = await identify_all(Script(overload_times=9, retry_after_ms=3_600_000), [message(1, 3, rng)])
    assert [answer.decision.cause for answer in answers] == ["OVERLOADED"] * 3
    assert client.counts.rows_retried == 0


async def test_a_server_that_is_killed_and_comes_back_on_its_port_loses_no_probe() -> None:
    """A broken TCP connection is survived: unanswered probes are sent again to whatever answers there next."""
    rng = np.random.default_rng(7)
    messages = [message(number, 2, rng) for number in range(30)]
    first = Script(mute=frozenset(probe_id for one in messages[10:] for probe_id in one.probe_ids))
    answers: list[ProbeAnswer] = []
    served = asyncio.Event()

    async with fake_server(first) as port:
        client = client_of(port)

        async def stream() -> None:
            async for answer in client.identify_stream(each(messages)):
                answers.append(answer)
                if len(answers) == 20:
                    served.set()

        streaming = asyncio.create_task(stream())
        await served.wait()
    async with fake_server(Script(), port=port), client:
        await streaming
    assert_each_answered_rightly(messages, answers)
    assert client.counts.breaks >= 1


async def test_a_silent_connection_is_given_up_for_a_new_one() -> None:
    """When nothing at all came back by a message's deadline, the next message goes out on another connection."""
    rng = np.random.default_rng(8)
    # Long enough for the first message to be on its way on a busy machine.
    messages = [message(1, 1, rng, deadline_s=0.5), message(2, 1, rng)]
    script = Script(silent_streams=1)
    answers, client = await identify_all(script, messages, in_flight_messages_max=1)
    assert [answer.decision.cause for answer in answers] == ["DEADLINE", ""]
    assert script.streams == 2
    assert client.counts.connections == 2


async def test_nobody_listening_is_a_deadline_that_says_why() -> None:
    """With no server at all each probe gets DEADLINE, and its detail quotes what the connection said."""
    async with fake_server(Script()) as port:
        pass
    async with client_of(port, deadline_s=0.3) as client:
        answers = [one async for one in client.identify_stream(each([message(1, 2, np.random.default_rng(1))]))]
    assert [answer.decision.cause for answer in answers] == ["DEADLINE"] * 2
    assert "unavailable" in answers[0].decision.detail


async def collect(stream: AsyncIterator[ProbeAnswer], into: list[ProbeAnswer]) -> None:
    async for answer in stream:
        into.append(answer)


async def test_a_stream_ended_for_good_answers_every_probe_taken_and_then_raises() -> None:
    """An error that trying again cannot help is raised once, after each probe taken got its one refusal."""
    rng = np.random.default_rng(9)
    answers: list[ProbeAnswer] = []
    taken: list[Probes] = []

    async def source() -> AsyncIterator[Probes]:
        for number in range(9):
            taken.append(message(number, 2, rng))
            yield taken[-1]

    async with fake_server(Script()) as port, MatcherClient(f"127.0.0.1:{port}", "wrong", backoff=QUICK) as client:
        with pytest.raises(Unauthenticated):
            await collect(client.identify_stream(source()), answers)
    assert [answer.decision.cause for answer in answers] == ["UNAUTHENTICATED"] * len(answers)
    assert Counter(answer.decision.probe_id for answer in answers) == Counter(
        probe_id for one in taken for probe_id in one.probe_ids
    )
    assert "wrong" not in repr(client)


async def test_what_the_source_raises_is_raised_after_the_answers_of_what_it_gave() -> None:
    """A failing source ends the stream with its own error; the probes it gave before are answered first."""
    rng = np.random.default_rng(10)

    async def source() -> AsyncIterator[Probes]:
        yield message(1, 3, rng)
        raise RuntimeError("the camera is gone")

    answers: list[ProbeAnswer] = []
    async with fake_server(Script()) as port, client_of(port) as client:
        with pytest.raises(RuntimeError, match="the camera is gone"):
            await collect(client.identify_stream(source()), answers)
    assert len(answers) == 3


@pytest.mark.parametrize("how", ["cancelled", "left", "closed", "unreachable"])
async def test_a_stream_that_is_left_leaves_no_tasks(how: str) -> None:
    """Cancelled, broken out of, or closed under way: no task of the client outlives it."""
    before = asyncio.all_tasks()
    rng = np.random.default_rng(11)
    messages = [message(number, 1, rng) for number in range(40)]
    script = Script(mute=frozenset(f"{number}-0" for number in range(5, 40)))
    async with fake_server(script) as port:
        server_tasks = asyncio.all_tasks()
        client = client_of(port if how != "unreachable" else 1)
        some = asyncio.Event()

        async def stream() -> None:
            async with aclosing(client.identify_stream(each(messages))) as answers:
                async for _ in answers:
                    some.set()
                    if how == "left":
                        break

        streaming = asyncio.create_task(stream())
        if how == "unreachable":
            while not client.counts.breaks:  # noqa: ASYNC110 - the count is the client's, not ours to signal
                await asyncio.sleep(0)
        else:
            await some.wait()
        if how in ("cancelled", "unreachable"):
            streaming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await streaming
        elif how == "closed":
            await client.close()
            with pytest.raises(ShuttingDown):
                await streaming
        else:
            await streaming
        await client.close()
        left = {task for task in asyncio.all_tasks() - server_tasks - before if task.get_name().startswith("matcher")}
        assert left == set()


async def test_a_stream_that_is_left_closes_its_connection_without_waiting_for_the_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        async with fake_server(Script()) as port, client_of(port) as client:

            async def leave() -> None:
                async with aclosing(client.identify_stream(each([message(1, 2, np.random.default_rng(1))]))) as answers:
                    await anext(answers)

            await leave()
            files_before = len(os.listdir("/proc/self/fd"))
            for _ in range(10):
                await leave()
            async with asyncio.timeout(20):
                # Both ends are in this process.
                while len(os.listdir("/proc/self/fd")) > files_before + 6:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    finally:
        gc.enable()


async def test_half_precision_goes_out_as_half_precision() -> None:
    """float16 templates cost two bytes a value on the wire and arrive unchanged."""
    one = message(3, 4, np.random.default_rng(12))
    half = Probes(
        space=SPACE,
        probe_ids=one.probe_ids,
        templates=one.templates.astype(np.float16),
        captured_at_ms=one.captured_at_ms,
        deployment_id="d",
        message_id=one.message_id,
    )
    answers, _ = await identify_all(Script(), [half])
    assert_each_answered_rightly([half], answers)


async def test_a_message_beyond_the_limit_is_refused_here_and_the_stream_goes_on() -> None:
    """A message too large for the service would break the stream for all: its rows are TOO_LARGE, the rest answered."""
    rng = np.random.default_rng(13)
    messages = [message(1, 2, rng), message(2, 200, rng), message(3, 2, rng)]
    answers, _ = await identify_all(Script(), messages, message_bytes_max=2000)
    causes = Counter((answer.message_id, answer.decision.cause) for answer in answers)
    assert causes == {("1", ""): 2, ("2", "TOO_LARGE"): 200, ("3", ""): 2}


# --- enrol -----------------------------------------------------------------------------------------------


def references(number: int, rows: int) -> References:
    return References(
        gallery_id="g",
        space=SPACE,
        reference_ids=[f"{number}-{row}" for row in range(rows)],
        subject_ids=[f"s{number}-{row}" for row in range(rows)],
        templates=np.ones((rows, SPACE.dimension), np.float32),
        message_id=str(number),
    )


async def each_of(messages: list[References]) -> AsyncIterator[References]:
    for one in messages:
        yield one


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.integers(0, 4), max_size=10),
    break_at=st.frozensets(st.integers(1, 16), max_size=5),
    overload_times=st.integers(0, 2),
    cause=st.sampled_from(["OVERLOADED", "SHUTTING_DOWN", "LOG_UNAVAILABLE"]),
    refuse=st.frozensets(st.sampled_from(["0-0", "1-1", "2-0", "3-3"])),
    window=st.integers(1, 5),
)
def test_every_reference_gets_one_receipt_and_is_enrolled_once_through_any_breaks(
    sizes: list[int], break_at: frozenset[int], overload_times: int, cause: str, refuse: frozenset[str], window: int
) -> None:
    """Messages broken after the write and before the receipt are sent again under the same key: nothing is
    enrolled twice, and each reference has exactly one receipt."""
    messages = [references(number, rows) for number, rows in enumerate(sizes)]
    script = Script(break_at=break_at, overload_times=overload_times, overload_cause=cause, refuse_rows=refuse)

    async def scenario() -> list[tuple[str, str]]:
        async with fake_server(script) as port, client_of(port, in_flight_messages_max=window) as client:
            return [
                (receipt.reference_id, receipt.outcome.value)
                async for receipt in client.enrol_stream(each_of(messages))
            ]

    receipts = asyncio.run(scenario())
    wanted = Counter(reference_id for one in messages for reference_id in one.reference_ids)
    assert Counter(reference_id for reference_id, _ in receipts) == wanted
    assert set(script.enrolled) == set(wanted) - refuse
    for reference_id, outcome in receipts:
        assert (outcome == ReceiptOutcome.REFUSED) == (reference_id in refuse)


async def test_the_receipts_of_one_message_come_in_the_order_of_its_rows() -> None:
    """enrol() gives a receipt per row, in order, also after a break."""
    script = Script(break_at=frozenset({1}))
    async with fake_server(script) as port, client_of(port) as client:
        receipts = await client.enrol(references(4, 5))
    assert [receipt.reference_id for receipt in receipts] == [f"4-{row}" for row in range(5)]
    assert {receipt.outcome for receipt in receipts} == {ReceiptOutcome.REPEATED}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"probe_ids": ["a", "a"]}, "DUPLICATE_PROBE_ID"),
        ({"probe_ids": ["a"]}, "WRONG_LENGTH"),
        ({"captured_at_ms": [1]}, "WRONG_LENGTH"),
        ({"templates": np.zeros((2, 3), np.float32)}, "WRONG_DIMENSION"),
        ({"deployment_id": ""}, "INVALID"),
        ({"case_reference": "c"}, "INVALID"),
    ],
)
def test_a_message_that_makes_no_sense_cannot_be_made(change: dict[str, object], cause: str) -> None:
    """Columns that do not agree are the programmer's fault and are told where they are made."""
    good: dict[str, object] = {
        "space": SPACE,
        "probe_ids": ["a", "b"],
        "templates": np.zeros((2, 4), np.float32),
        "captured_at_ms": [1, 2],
        "deployment_id": "d",
    }
    Probes(**good)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput) as refused:
        Probes(**(good | change))  # type: ignore[arg-type]
    assert refused.value.cause == cause
    assert refused.value.field
    assert refused.value.hint


def test_a_token_is_never_sent_in_clear_beyond_loopback() -> None:
    """An address that is not loopback needs TLS before the client will talk to it."""
    with pytest.raises(InvalidInput, match="clear"):
        MatcherClient("192.0.2.7:8081", TOKEN)
    for address in ("127.0.0.1:8081", "localhost:8081", "[::1]:8081"):
        MatcherClient(address, TOKEN)


async def test_the_stream_status_of_a_revoked_authority_is_not_tried_again() -> None:
    """PERMISSION_DENIED ends the stream for good instead of reconnecting for ever."""
    script = Script(end_with=(grpc.StatusCode.PERMISSION_DENIED, "the deployment has ended"))
    with pytest.raises(Forbidden, match="the deployment has ended"):
        await identify_all(script, [message(1, 2, np.random.default_rng(1))])
    assert script.streams == 1
