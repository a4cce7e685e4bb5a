"""A following shard in a process that is not asyncio's own, such as the one that Triton's Python backend makes.

A thread of its own runs the event loop in which the shard follows its log. Requests are answered in threads for
searches, as many at once as in one process without Triton: while one is read, merged or sent, another keeps the cores
busy. One more waits here, so that a free thread finds work; all others wait with whoever brings them.

Opening can take long and can fail for a while: the log is not there yet, the keys are not mounted. Until it has
succeeded, and after a failure, every answer says why, and answers for no partition.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from matcher_service import interpreter
from matcher_service.errors import MatcherError, ShardUnavailable
from matcher_service.index.fastscan import one_thread
from matcher_service.partitions import NO_PARTITIONS
from matcher_service.shards.exchange import ShardAnswer, ShardState, answer_tensors, request_of
from matcher_service.shards.following import FollowingShard, OpenLog
from matcher_service.shards.local import searches_at_once
from matcher_service.terms import SearchRequest, SearchResult

# A shard, opened, and how to open the log that it is to follow. Left again when the shard ends, in whatever way.
Opening = Callable[[], AbstractAsyncContextManager[tuple[FollowingShard, OpenLog]]]

RETRY_S = 1.0
# An assignment waits for the disk; a count of rows, for a block of entries that is being applied.
CONTROL_S_MAX = 10.0
END_S_MAX = 60.0

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class HostedShard:
    """Begins to open the shard when it is made; `close` ends it."""

    def __init__(self, name: str, opening: Opening) -> None:
        self._name = name
        self._opening = opening
        self._shard: FollowingShard | None = None
        self._refusal = "starting"
        self._loop = asyncio.new_event_loop()
        self._tasks: list[asyncio.Task[None]] = []
        self._thread = threading.Thread(target=self._run, name=f"shard-{name}", daemon=True)
        self._thread.start()
        searches = searches_at_once()
        self._room = threading.BoundedSemaphore(searches + 1)
        self._answering = ThreadPoolExecutor(searches, "search", one_thread)

    def submit(self, work: Callable[[], None]) -> None:
        """Do the work of a request, which is to call `answer` and to answer whatever happens, in a thread for searches.
        Waits while there is no room."""
        self._room.acquire()
        try:
            self._answering.submit(self._worked, work)
        except BaseException:
            self._room.release()
            raise

    def _worked(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as fault:
            _log.critical("request_not_answered", shard=self._name, exc_info=fault)
        finally:
            self._room.release()

    def answer(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The tensors that answer a request; from any thread but the loop's. Raises MatcherError."""
        asked = request_of(tensors)
        shard = self._shard
        if asked.assign is not None:
            if shard is None:
                raise ShardUnavailable(f"shard {self._name} is not open: {self._refusal}", hint="assign again later")
            self._await(shard.assign(asked.assign))
        if len(asked.search.probes):
            answer = shard.search(asked.search) if shard is not None else self._without(asked.search)
        else:
            state = self._await(shard.status()) if shard is not None else self._state()
            answer = ShardAnswer(_nothing(0, state.sequence), state)
        return answer_tensors(answer.result, answer.state)

    def close(self) -> None:
        """Answer what was brought, write the files and end; repeatable."""
        self._answering.shutdown()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._cancel)
            self._thread.join(END_S_MAX)

    # --- in the loop's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._tasks = [self._loop.create_task(self._work()), self._loop.create_task(self._sweep())]
        try:
            self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _sweep(self) -> None:
        """As every process that templates of probes go through; a fault is told, and the shard goes on."""
        while True:
            try:
                await interpreter.sweep()
            except Exception as fault:
                _log.critical("sweep_failed", shard=self._name, exc_info=fault)
                await asyncio.sleep(RETRY_S)

    async def _work(self) -> None:
        """Open and follow, again and again, until cancelled: whatever failed, what is on disk and the log remain."""
        while True:
            try:
                async with self._opening() as (shard, open_log):
                    self._shard = shard
                    await shard.run(open_log)
            except MatcherError as refusal:
                if str(refusal) != self._refusal:
                    _log.error("shard_not_open", shard=self._name, detail=str(refusal))
                self._refusal = str(refusal)
            except Exception as fault:
                self._refusal = f"failed, and is opened again: {type(fault).__name__}"
                _log.critical("shard_failed", shard=self._name, exc_info=fault)
            finally:
                self._shard = None
            await asyncio.sleep(RETRY_S)

    # --- answers -----------------------------------------------------------------------------------

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(CONTROL_S_MAX)
        except TimeoutError as late:
            raise ShardUnavailable(f"shard {self._name} is busy", hint="ask again") from late
        except OSError as broken:
            raise ShardUnavailable(
                f"shard {self._name}: {broken.strerror}", hint="look at its data directory"
            ) from broken

    def _without(self, request: SearchRequest) -> ShardAnswer:
        return ShardAnswer(_nothing(len(request.probes), 0), self._state())

    def _state(self) -> ShardState:
        return ShardState(self._name, 0, None, NO_PARTITIONS, refusal=self._refusal)


def _nothing(probes: int, sequence: int) -> SearchResult:
    none = np.empty(0, np.int64)
    return SearchResult(np.zeros(probes + 1, np.int64), none, none.astype(np.float32), (), (), sequence)
