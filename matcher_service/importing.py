"""Import of a file of references into a gallery: in blocks, over the Enrol stream, to be resumed at will.

Each block's idempotency key follows from the gallery, the identifiers in the file and the block's place, so
that sending a block again changes nothing. A small file beside the imported one remembers how far everything
is durable; losing it costs only time, within the service's idempotency window.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from matcher_service.client import (
    MatcherClient,
    ReceiptOutcome,
    Receipts,
    ReferenceReceipt,
    References,
    error_for,
)
from matcher_service.errors import InvalidInput, MatcherError
from matcher_service.template_files import QUALITY, QUALITY_PARTS, Rows, TemplateFile
from matcher_service.terms import Cause, Grounds, Int64, SpaceId

BLOCK_ROWS = 1000
BLOCK_BYTES_MAX = 2 * 1024 * 1024
_TEXTS = ("reference_id", "subject_id")

# Causes that hold for the row alone; any other one stops the import, since the next rows would meet it too.
ROW_CAUSES = frozenset(
    {
        Cause.INVALID,
        Cause.NOT_FINITE,
        Cause.ZERO_TEMPLATE,
        Cause.CONFLICT,
        Cause.EXPIRED,
        Cause.LOW_QUALITY,
        Cause.RESEMBLES_OTHERS,
        Cause.WRONG_DIMENSION,
        Cause.WRONG_LENGTH,
    }
)


class BadRow(NamedTuple):
    """A row that did not go in; `row` counts from 0 in the file."""

    row: int
    reference_id: str
    cause: str
    field: str
    detail: str


@dataclass(slots=True)
class Progress:
    """How far an import has come. All rows of the first `blocks_done` blocks are durable or reported.

    `run` tells one import with `replace` from the next one: a new one shall replace again. `gallery_created_at_ms`
    tells the gallery from one of the same name in another service.
    """

    gallery_id: str
    gallery_created_at_ms: int
    ids_digest: str
    block_rows: int
    replace: bool
    run: str
    blocks_done: int = 0
    enrolled: int = 0
    replaced: int = 0
    repeated: int = 0
    refused: int = 0

    @property
    def rows_done(self) -> int:
        return self.enrolled + self.replaced + self.repeated + self.refused

    def same_import(self, other: Progress) -> bool:
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("gallery_id", "gallery_created_at_ms", "ids_digest", "block_rows", "replace")
        )

    def key(self, block: int) -> str:
        """The idempotency key of a block. Without `replace` it follows from the file alone."""
        run = self.run if self.replace else ""
        told = json.dumps([self.gallery_id, self.ids_digest, self.block_rows, run])
        return f"import-{hashlib.sha256(told.encode()).hexdigest()[:32]}-{block}"


@dataclass(frozen=True, slots=True)
class ProgressFile:
    """The small file beside the imported one."""

    path: Path

    @classmethod
    def beside(cls, path: Path, gallery_id: str) -> ProgressFile:
        # A gallery's name may hold any printable character; a digest of it always makes a file name.
        return cls(path.with_name(f"{path.name}.{hashlib.sha256(gallery_id.encode()).hexdigest()[:12]}.progress"))

    def read(self) -> Progress | None:
        """None if there is none, or it is not one."""
        try:
            return Progress(**json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, progress: Progress) -> None:
        """Atomically; a crash leaves the old or the new one."""
        new = self.path.with_name(self.path.name + ".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(asdict(progress), file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def block_rows_for(dimension: int) -> int:
    """Rows of a block: the message stays well below the service's limit of size."""
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES_MAX // (4 * dimension)))


@dataclass(slots=True)
class _Block:
    """A block on its way: `rows` are the numbers in the file of what was sent; `waiting` counts receipts."""

    number: int
    rows: Int64
    waiting: int
    counts: Counter[str] = field(default_factory=Counter)


class Import:
    """One import of one file. `run` it once; `progress` may be read meanwhile."""

    def __init__(
        self,
        client: MatcherClient,
        file: TemplateFile,
        gallery_id: str,
        space: SpaceId,
        *,
        gallery_created_at_ms: int = 0,
        replace: bool = False,
        grounds: Grounds | None = None,
        progress_file: ProgressFile | None = None,
        on_bad_row: Callable[[BadRow], None] = lambda _: None,
        on_progress: Callable[[Progress], None] = lambda _: None,
        save_every_blocks: int = 8,
    ) -> None:
        for column in _TEXTS:
            if not file.has(column):
                raise InvalidInput(f"{file.path.name} has no column {column}", field=column, hint=f"add {column}")
        self._client = client
        self._file = file
        self._space = space
        self._grounds = grounds or Grounds()
        self._numbers = tuple(one for one in ("expires_at_ms", "review_by_ms", QUALITY) if file.has(one))
        self._progress_file = progress_file or ProgressFile.beside(file.path, gallery_id)
        self._on_bad_row = on_bad_row
        self._on_progress = on_progress
        self._save_every_blocks = save_every_blocks
        self.progress = Progress(
            gallery_id=gallery_id,
            gallery_created_at_ms=gallery_created_at_ms,
            ids_digest=file.texts_digest(_TEXTS),
            block_rows=block_rows_for(space.dimension),
            replace=replace,
            run=uuid.uuid4().hex,
        )
        before = self._progress_file.read()
        self.resumed = before is not None and before.same_import(self.progress)
        if before is not None and self.resumed:
            self.progress = before
        # Blocks end out of order; what is durable up to is the first that has not ended.
        self._ended: dict[int, _Block] = {}
        self._under_way: dict[int, _Block] = {}

    async def run(self) -> Progress:
        """Send what is left. Raises what stopped it; everything durable until then is remembered, and running
        again goes on from there. The progress file is removed when every row was dealt with."""
        try:
            async with aclosing(self._client.enrol_messages(self._messages())) as groups:
                async for receipts in groups:
                    self._take(receipts)
        finally:
            if self.progress.blocks_done:
                self._progress_file.write(self.progress)
        self._progress_file.remove()
        return self.progress

    async def _messages(self) -> AsyncIterator[References]:
        progress = self.progress
        first_row = progress.blocks_done * progress.block_rows
        blocks = self._file.blocks(progress.block_rows, self._space.dimension, _TEXTS, self._numbers, first_row)
        # Reading and unpacking take the disk and the processor; the stream goes on meanwhile.
        while (rows := await asyncio.to_thread(_next, blocks)) is not None:
            number = rows.first_row // progress.block_rows
            references, block = self._block(number, rows)
            if not block.waiting:
                self._end(block)
                continue
            self._under_way[number] = block
            yield references

    def _block(self, number: int, rows: Rows) -> tuple[References, _Block]:
        reference_ids, subject_ids = rows.texts["reference_id"], rows.texts["subject_id"]
        refused: Counter[str] = Counter()
        good = np.arange(len(reference_ids))
        if rows.faults or len(set(reference_ids)) != len(reference_ids):
            bad = self._bad_rows(rows)
            refused["refused"] = len(bad)
            good = np.delete(good, bad)
            reference_ids = [reference_ids[offset] for offset in good.tolist()]
            subject_ids = [subject_ids[offset] for offset in good.tolist()]
        expires, reviews = rows.numbers.get("expires_at_ms"), rows.numbers.get("review_by_ms")
        qualities = rows.numbers.get(QUALITY)
        references = References(
            gallery_id=self.progress.gallery_id,
            space=self._space,
            reference_ids=reference_ids,
            subject_ids=subject_ids,
            templates=rows.templates[good] if refused else rows.templates,
            expires_at_ms=() if expires is None else np.asarray(expires[good]),
            replace=self.progress.replace,
            idempotency_key=self.progress.key(number),
            message_id=str(number),
            grounds=dataclasses.replace(
                self._grounds,
                reviews_by_ms=() if reviews is None else tuple(reviews[good].tolist()),
                qualities=() if qualities is None else tuple((qualities[good] / QUALITY_PARTS).tolist()),
            ),
        )
        return references, _Block(number, rows.first_row + good, len(good), refused)

    def _bad_rows(self, rows: Rows) -> list[int]:
        """Tell of the rows that cannot be sent; their places in the block."""
        bad: list[int] = []
        first_at: dict[str, int] = {}
        for offset, reference_id in enumerate(rows.texts["reference_id"]):
            row = rows.first_row + offset
            fault = rows.faults.get(offset)
            if fault is not None:
                told = BadRow(row, reference_id, fault.cause.value, fault.field, fault.detail)
            elif reference_id in first_at:
                detail = f"stands already in row {first_at[reference_id]}"
                told = BadRow(row, reference_id, Cause.CONFLICT.value, "reference_id", detail)
            else:
                first_at[reference_id] = row
                continue
            bad.append(offset)
            self._on_bad_row(told)
        return bad

    def _take(self, receipts: Sequence[ReferenceReceipt]) -> None:
        """Receipts of one message, perhaps not yet all of them."""
        block = self._under_way[int(receipts[0].message_id)]
        if isinstance(receipts, Receipts):
            outcomes, refusals = receipts.outcomes, list(receipts.refusals.values())
        else:
            outcomes = [receipt.outcome for receipt in receipts]
            refusals = [receipt for receipt in receipts if receipt.outcome is ReceiptOutcome.REFUSED]
        for receipt in refusals:
            if receipt.cause not in ROW_CAUSES:
                raise _stopped(receipt)
            detail = receipt.detail or receipt.cause
            self._on_bad_row(
                BadRow(int(block.rows[receipt.row]), receipt.reference_id, receipt.cause, receipt.field, detail)
            )
        block.counts.update({outcome.value.lower(): count for outcome, count in Counter(outcomes).items()})
        block.waiting -= len(receipts)
        if not block.waiting:
            del self._under_way[block.number]
            self._end(block)

    def _end(self, block: _Block) -> None:
        progress = self.progress
        self._ended[block.number] = block
        while (ended := self._ended.pop(progress.blocks_done, None)) is not None:
            progress.blocks_done += 1
            progress.enrolled += ended.counts["enrolled"]
            progress.replaced += ended.counts["replaced"]
            progress.repeated += ended.counts["repeated"]
            progress.refused += ended.counts["refused"]
            if progress.blocks_done % self._save_every_blocks == 0:
                self._progress_file.write(progress)
        self._on_progress(progress)


def _next(blocks: Iterator[Rows]) -> Rows | None:
    return next(blocks, None)


def _stopped(receipt: ReferenceReceipt) -> MatcherError:
    detail, _, hint = receipt.detail.partition("; ")
    again = "run the same import again to go on"
    return error_for(receipt.cause, detail, receipt.field, hint=f"{hint}; then {again}" if hint else again)
