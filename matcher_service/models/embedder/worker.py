"""An embedder in a process of its own beside the service, for the gateway without Triton.

dlib holds the interpreter's lock while its network computes, a tenth of a second per face. In the service's own
process every stream would stand still for as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from matcher_service.errors import MatcherError, ModelsUnavailable, Overloaded, StartRefused
from matcher_service.models.embedder.card import ModelCard, read_card
from matcher_service.models.embedder.embed import FaceEmbedder, open_embedder
from matcher_service.models.embedder.outcome import Embedding, Form

# Pictures admitted at once; at a tenth of a second each, more would only wait beyond any deadline.
PICTURES_WAITING_MAX = 64
ANSWER_S_MAX = 30.0


class WorkerEmbedder:
    """As the protocol `TemplateMaker` says. Made by `open`; `close` ends the process."""

    def __init__(self, card: ModelCard, card_name: str, files_dir: Path | None) -> None:
        self._card = card
        self._opened_with = (card_name, files_dir)
        self._waiting = 0
        self._pool = self._new_pool()

    @classmethod
    async def open(cls, card_name: str, files_dir: Path | None = None) -> WorkerEmbedder:
        """Start the process and load the embedder there. Raises StartRefused as `open_embedder` does."""
        made = cls(read_card(card_name), card_name, files_dir)
        try:
            refusal = await asyncio.wrap_future(made._pool.submit(_open_here, *made._opened_with))
        except BrokenProcessPool as error:
            raise StartRefused("the embedder's process died while loading", hint="look into the log") from error
        if refusal is not None:
            await made.close()
            detail, hint, field = refusal
            raise StartRefused(detail, hint=hint, field=field)
        return made

    @property
    def card(self) -> ModelCard:
        return self._card

    async def embed(self, pictures: Sequence[bytes], form: Form) -> list[Embedding]:
        if self._waiting + len(pictures) > PICTURES_WAITING_MAX:
            raise Overloaded(
                f"{self._waiting} pictures wait already",
                hint="send fewer pictures at a time",
                retry_after_ms=200 * max(1, self._waiting),
            )
        pool, loop, count = self._pool, asyncio.get_running_loop(), len(pictures)
        try:
            computing = pool.submit(_embed_here, *self._opened_with, list(pictures), form)
        except BrokenProcessPool as error:
            raise self._died(pool) from error
        self._waiting += count
        # Its place is free when the work is done, not when its caller has left: else callers who come and go would
        # fill the pool's own queue without bound.
        computing.add_done_callback(lambda _: self._call_in(loop, self._release, count))
        answer = asyncio.wrap_future(computing)
        answer.add_done_callback(_seen)
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                return await asyncio.shield(answer)
        except TimeoutError as error:
            raise ModelsUnavailable(
                f"the embedder did not answer within {ANSWER_S_MAX:g} s",
                hint="send fewer pictures at a time",
                retry_after_ms=2000,
            ) from error
        except BrokenProcessPool as error:
            raise self._died(pool) from error

    def _died(self, pool: ProcessPoolExecutor) -> ModelsUnavailable:
        # One new process for however many callers saw the old one die.
        if self._pool is pool:
            self._pool = self._new_pool()
        return ModelsUnavailable(
            "the embedder's process died and is being started again",
            hint="repeat the request; if it goes on, look into the log",
            retry_after_ms=2000,
        )

    def _release(self, count: int) -> None:
        self._waiting -= count

    @staticmethod
    def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[int], None], count: int) -> None:
        # At the end of the process the loop may be gone before the pool.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(function, count)

    async def close(self) -> None:
        await asyncio.to_thread(self._pool.shutdown, wait=True, cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        # Spawned, because a process with running threads and gRPC channels must not be forked.
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _seen(answer: asyncio.Future[list[Embedding]]) -> None:
    """The failure of work whose caller has left is nobody's news."""
    if not answer.cancelled():
        answer.exception()


_embedder: FaceEmbedder | None = None


def _open_here(card_name: str, files_dir: Path | None) -> tuple[str, str, str] | None:
    """In the worker: load the embedder; what refuses it crosses over as (detail, hint, field)."""
    global _embedder
    try:
        _embedder = open_embedder(card_name, files_dir)
    except MatcherError as refusal:
        return refusal.detail, refusal.hint, refusal.field
    return None


def _embed_here(card_name: str, files_dir: Path | None, pictures: list[bytes], form: Form) -> list[Embedding]:
    global _embedder
    if _embedder is None:
        _embedder = open_embedder(card_name, files_dir)
    return _embedder.embed(pictures, form)
