"""A bounded window of unanswered messages over a gRPC stream that may break.

Messages are taken from a source one permit at a time. A permit is held from before a message is taken
until the answers of all its rows have been handed to the caller, so nothing in here can grow beyond the
window. Every row gets exactly one answer: the service's, or a refusal made here when its deadline passes
or the stream ends for good. After a break, unanswered rows are sent again on a new connection, oldest first.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import grpc
import grpc.aio

from matcher_service.errors import DeadlineExceeded, MatcherError, ShuttingDown, TooLarge

Question = TypeVar("Question")
Answer = TypeVar("Answer")
Asked = TypeVar("Asked", contravariant=True)
Given = TypeVar("Given", covariant=True)

# How long a finished stream may take to close politely before it is cut.
FAREWELL_S_MAX = 1.0


class RowAnswer(NamedTuple):
    """What one reply says of one row. `retry_after_ms` None: final; otherwise the row may be sent again
    no sooner than that (0: the service named no time)."""

    row: int
    answer: Any
    retry_after_ms: int | None


class Dialogue(Protocol[Asked, Given]):
    """How the messages of one RPC are written and read."""

    def open(self, channel: grpc.aio.Channel) -> Any:
        """Start the RPC; returns a grpc.aio StreamStreamCall."""
        ...

    def rows(self, question: Asked) -> int: ...

    def deadline_s(self, question: Asked) -> float: ...

    def encode(self, question: Asked, rows: Sequence[int], wire_id: str, remaining_s: float) -> Any:
        """The message that asks for these rows, or for a superset of them if asking twice is harmless."""
        ...

    def wire_id(self, reply: Any) -> str: ...

    def decode(self, question: Asked, reply: Any, elapsed_s: float) -> Iterable[RowAnswer]: ...

    def whole(self, question: Asked, reply: Any, elapsed_s: float) -> Sequence[Given] | None:
        """The final answers of all rows in order, where that is less work than row by row; None: `decode` tells."""
        ...

    def refusal(self, question: Asked, row: int, error: MatcherError, elapsed_s: float) -> Given:
        """The answer of a row that the service did not answer."""
        ...

    def error_of(self, broken: grpc.aio.AioRpcError) -> MatcherError:
        """Retryable if the rows may be sent again on a new connection."""
        ...


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with full jitter: uniform in [0, min(most, first * 2**failures)] seconds."""

    first_s: float = 0.05
    most_s: float = 5.0

    def delay_s(self, failures: int, rng: random.Random) -> float:
        return rng.uniform(0.0, min(self.most_s, self.first_s * 2.0 ** min(failures, 32)))


@dataclass(slots=True)
class StreamCounts:
    """What a client's streams went through; only ever grows."""

    connections: int = 0
    breaks: int = 0
    messages_sent: int = 0
    messages_resent: int = 0
    rows_retried: int = 0
    surplus_answers_dropped: int = 0


@dataclass(slots=True, eq=False)
class _Flight(Generic[Question]):
    """A message that was taken from the source and is not yet fully answered."""

    number: int
    question: Question
    taken_at: float
    deadline_at: float
    unanswered: set[int]
    retries: int = 0
    timers: list[asyncio.TimerHandle] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Attempt(Generic[Question]):
    """One sending of some rows of a flight."""

    flight: _Flight[Question]
    rows: set[int]
    sent_at: float = 0.0
    refused: dict[int, Any] = field(default_factory=dict)
    retry_after_ms: int = 0


class WindowedStream(Generic[Question, Answer]):
    """Runs one dialogue. Use once: `async for answer in WindowedStream(...).run(source)`."""

    def __init__(
        self,
        dialogue: Dialogue[Question, Answer],
        open_channel: Callable[[], grpc.aio.Channel],
        *,
        in_flight_messages_max: int,
        message_bytes_max: int,
        backoff: Backoff,
        rng: random.Random,
        counts: StreamCounts,
    ) -> None:
        self._dialogue = dialogue
        self._open_channel = open_channel
        self._message_bytes_max = message_bytes_max
        self._backoff = backoff
        self._rng = rng
        self._counts = counts
        self._window = asyncio.Semaphore(in_flight_messages_max)
        self._flights: dict[int, _Flight[Question]] = {}
        self._outbox: deque[_Attempt[Question]] = deque()
        self._wake_writer = asyncio.Event()
        self._sent: dict[str, _Attempt[Question]] = {}
        self._stalled = asyncio.Event()
        self._last_heard_at = 0.0
        self._last_break: MatcherError | None = None
        self._wire_ids = 0
        # Bounded by the window: a flight's permit is returned only when its last answer leaves this queue.
        self._answers: asyncio.Queue[tuple[Sequence[Answer], int] | BaseException | None] = asyncio.Queue()
        self._source_error: BaseException | None = None
        self._source_ended = False
        self._finished = False
        self._connected = False
        self._tasks: list[asyncio.Task[None]] = []

    # --- the caller's side ---------------------------------------------------------------------------

    async def run(self, source: AsyncIterable[Question]) -> AsyncGenerator[Answer, None]:
        """Answers in the order in which they come. Raises what the source raised, after the rows already
        taken were answered, and the stream's own error when it ended for good (the same applies)."""
        async with aclosing(self.groups(source)) as groups:
            async for answers in groups:
                for answer in answers:
                    yield answer

    async def groups(self, source: AsyncIterable[Question]) -> AsyncGenerator[Sequence[Answer], None]:
        """The same, in groups as they come; those of one group are of one message."""
        self._tasks = [
            asyncio.create_task(self._owned(self._take_in(source)), name="matcher-client-intake"),
            asyncio.create_task(self._owned(self._converse()), name="matcher-client-connection"),
        ]
        try:
            while (item := await self._answers.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                answers, permits = item
                for _ in range(permits):
                    self._window.release()
                if answers:
                    yield answers
            if self._source_error is not None:
                raise self._source_error
            if self._connected:
                await asyncio.wait(self._tasks, timeout=FAREWELL_S_MAX)
        finally:
            await self.stop()

    async def stop(self) -> None:
        """End every task and timer of this stream; the caller's iteration ends with ShuttingDown."""
        self._finished = True
        for flight in self._flights.values():
            for timer in flight.timers:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A cancelled task holds the frames that it was cancelled in, and those hold this stream and the call, whose
        # connection stays open as long: until the collector looks, unless nothing here refers to the tasks.
        self._tasks.clear()
        self._answers.put_nowait(ShuttingDown("the client was closed", hint="open another client"))

    async def _owned(self, work: Coroutine[Any, Any, None]) -> None:
        """A task that fails must not leave the caller waiting."""
        try:
            await work
        except Exception as failure:
            self._answers.put_nowait(failure)

    # --- from the source into the window ---------------------------------------------------------------

    async def _take_in(self, source: AsyncIterable[Question]) -> None:
        questions = aiter(source)
        loop = asyncio.get_running_loop()
        number = 0
        try:
            while True:
                await self._window.acquire()
                try:
                    question = await anext(questions)
                except StopAsyncIteration:
                    break
                rows = self._dialogue.rows(question)
                if rows == 0:
                    self._window.release()
                    continue
                now = loop.time()
                number += 1
                flight = _Flight(number, question, now, now + self._dialogue.deadline_s(question), set(range(rows)))
                self._flights[number] = flight
                flight.timers.append(loop.call_at(flight.deadline_at, self._expire, flight))
                self._send(_Attempt(flight, set(range(rows))))
        except Exception as failure:
            self._source_error = failure
        finally:
            self._source_ended = True
            self._finish_if_done()

    def _send(self, attempt: _Attempt[Question]) -> None:
        self._outbox.append(attempt)
        self._wake_writer.set()

    def _finish_if_done(self) -> None:
        if self._source_ended and not self._flights and not self._finished:
            self._finished = True
            self._answers.put_nowait(None)
            self._wake_writer.set()

    # --- answers ---------------------------------------------------------------------------------------

    def _deliver(self, flight: _Flight[Question], rows: Iterable[int], answers: Sequence[Answer]) -> None:
        flight.unanswered.difference_update(rows)
        done = not flight.unanswered
        if done:
            del self._flights[flight.number]
            for timer in flight.timers:
                timer.cancel()
        if answers or done:
            self._answers.put_nowait((answers, int(done)))
        if done:
            self._finish_if_done()

    def _refuse(self, flight: _Flight[Question], error: MatcherError) -> None:
        elapsed_s = asyncio.get_running_loop().time() - flight.taken_at
        rows = sorted(flight.unanswered)
        self._deliver(flight, rows, [self._dialogue.refusal(flight.question, row, error, elapsed_s) for row in rows])

    def _expire(self, flight: _Flight[Question]) -> None:
        waited_ms = round((flight.deadline_at - flight.taken_at) * 1000)
        last = f"; last: {self._last_break.detail}" if self._last_break else ""
        # A connection on which nothing at all came back since this message was written may be half open:
        # only a new one can tell.
        for attempt in self._sent.values():
            if attempt.flight is flight and self._last_heard_at < attempt.sent_at:
                self._stalled.set()
        for wire_id in [wire_id for wire_id, attempt in self._sent.items() if attempt.flight is flight]:
            del self._sent[wire_id]
        self._refuse(
            flight,
            DeadlineExceeded(
                f"no answer within {waited_ms} ms{last}", hint="check the service and the network, or allow more time"
            ),
        )

    def _receive(self, reply: Any) -> None:
        loop = asyncio.get_running_loop()
        now = self._last_heard_at = loop.time()
        self._last_break = None
        wire_id = self._dialogue.wire_id(reply)
        attempt = self._sent.get(wire_id)
        if attempt is None:
            self._counts.surplus_answers_dropped += 1
            return
        flight = attempt.flight
        elapsed_s = now - flight.taken_at
        whole = self._dialogue.whole(flight.question, reply, elapsed_s)
        if whole is not None and len(whole) == len(attempt.rows) == len(flight.unanswered):
            del self._sent[wire_id]
            self._deliver(flight, attempt.rows, whole)
            return
        rows: list[int] = []
        answers: list[Answer] = []
        for row, answer, after_ms in self._dialogue.decode(flight.question, reply, elapsed_s):
            if row not in attempt.rows or row not in flight.unanswered:
                self._counts.surplus_answers_dropped += 1
                continue
            attempt.rows.discard(row)
            if after_ms is not None:
                attempt.refused[row] = answer
                attempt.retry_after_ms = max(attempt.retry_after_ms, after_ms)
            else:
                rows.append(row)
                answers.append(answer)
        if not attempt.rows:
            del self._sent[wire_id]
            # Only now, so that a flight never has two messages under way and the window holds on the wire.
            if attempt.refused and not self._try_again_later(attempt, now):
                rows.extend(attempt.refused.keys())
                answers.extend(attempt.refused.values())
        if rows:
            self._deliver(flight, rows, answers)

    def _try_again_later(self, attempt: _Attempt[Question], now: float) -> bool:
        """False if the deadline leaves no time for it: then the refusals are the answers."""
        flight = attempt.flight
        delay_s = attempt.retry_after_ms / 1000 + self._backoff.delay_s(flight.retries, self._rng)
        if now + delay_s >= flight.deadline_at:
            return False
        flight.retries += 1
        self._counts.rows_retried += len(attempt.refused)
        again = _Attempt(flight, set(attempt.refused))
        flight.timers[1:] = [asyncio.get_running_loop().call_later(delay_s, self._send, again)]
        return True

    # --- the connection --------------------------------------------------------------------------------

    async def _converse(self) -> None:
        failures = 0
        while not self._finished:
            await self._wake_writer.wait()
            if self._finished:
                return
            heard_before = self._last_heard_at
            broken = await self._one_connection()
            if self._finished:
                return
            self._counts.breaks += 1
            if not broken.retryable:
                await self._end_for_good(broken)
                return
            self._last_break = broken
            self._send_again_what_was_not_answered()
            failures = 0 if self._last_heard_at > heard_before else failures + 1
            await asyncio.sleep((broken.retry_after_ms or 0) / 1000 + self._backoff.delay_s(failures, self._rng))

    async def _end_for_good(self, error: MatcherError) -> None:
        self._finished = True
        # The intake goes first: a message taken from now on would find nobody to answer it.
        intake = self._tasks[0]
        intake.cancel()
        await asyncio.gather(intake, return_exceptions=True)
        for flight in list(self._flights.values()):
            self._refuse(flight, error)
        self._answers.put_nowait(error)

    def _send_again_what_was_not_answered(self) -> None:
        waiting = list(self._sent.values())
        self._sent.clear()
        self._counts.messages_resent += len(waiting)
        again = [_Attempt(one.flight, (one.rows | one.refused.keys()) & one.flight.unanswered) for one in waiting]
        again.extend(self._outbox)
        again.sort(key=lambda attempt: attempt.flight.number)
        self._outbox = deque(again)
        if self._outbox:
            self._wake_writer.set()

    async def _one_connection(self) -> MatcherError:
        """Write and read until the stream ends; returns why it ended."""
        self._stalled.clear()
        self._counts.connections += 1
        # A channel of its own for each connection: a new stream on an old channel would meet the same
        # half-open socket, or the channel's own back-off.
        channel = self._open_channel()
        try:
            call = self._dialogue.open(channel)
            self._connected = True
            reader = asyncio.create_task(self._read(call), name="matcher-client-reader")
            writer = asyncio.create_task(self._write(call), name="matcher-client-writer")
            stall = asyncio.create_task(self._stalled.wait(), name="matcher-client-stall")
            parts: set[asyncio.Task[Any]] = {reader, writer, stall}
            try:
                # The reader alone learns the stream's status; a writer that ends has only noticed it, or
                # has said farewell.
                await asyncio.wait({reader, stall}, return_when=asyncio.FIRST_COMPLETED)
                if reader.done():
                    return reader.result()
                return ShuttingDown("the connection went silent")
            finally:
                for part in parts:
                    part.cancel()
                await asyncio.gather(*parts, return_exceptions=True)
                call.cancel()
        finally:
            self._connected = False
            await channel.close()

    async def _read(self, call: Any) -> MatcherError:
        try:
            while (reply := await call.read()) is not grpc.aio.EOF:
                self._receive(reply)
        except grpc.aio.AioRpcError as broken:
            return self._dialogue.error_of(broken)
        return ShuttingDown("the service ended the stream")

    async def _write(self, call: Any) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                while self._outbox:
                    attempt = self._outbox.popleft()
                    flight = attempt.flight
                    attempt.rows &= flight.unanswered
                    now = loop.time()
                    if not attempt.rows or now >= flight.deadline_at:
                        continue
                    self._wire_ids += 1
                    wire_id = f"{self._wire_ids:x}"
                    message = self._dialogue.encode(
                        flight.question, sorted(attempt.rows), wire_id, flight.deadline_at - now
                    )
                    size = message.ByteSize()
                    if size > self._message_bytes_max:
                        self._refuse(
                            flight,
                            TooLarge(
                                f"the message has {size} bytes, the limit is {self._message_bytes_max}",
                                field="templates",
                                hint="send fewer rows in a message",
                            ),
                        )
                        continue
                    attempt.sent_at = now
                    self._sent[wire_id] = attempt
                    self._counts.messages_sent += 1
                    await call.write(message)
                if self._finished:
                    await call.done_writing()
                    return
                self._wake_writer.clear()
                await self._wake_writer.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The stream ended under the writer; the reader holds the reason.
            return
