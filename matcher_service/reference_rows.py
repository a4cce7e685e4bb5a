"""From a message of references to what is asked of the log, and from its receipts to those of the message. Pure.

Columns all the way: an import has tens of thousands of rows a second, and nearly all of them are plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service import policy
from matcher_service.errors import MatcherError
from matcher_service.grounds import Standing
from matcher_service.halves import narrowed
from matcher_service.receipts import EnrolReceipts
from matcher_service.terms import EnrolMessage, EnrolRows, Float32, Int64


class Usable(NamedTuple):
    """The rows of a message that nothing speaks against so far, int64 [m] ascending, and what does against others."""

    rows: Int64
    refusals: dict[int, MatcherError]


def judged(message: EnrolMessage, id_bytes_max: int) -> Usable:
    """By their templates and identifiers alone."""
    refusals = dict(policy.judge_templates(message.templates).refusals)
    for field in ("reference_ids", "subject_ids"):
        refusals |= policy.require_ids(getattr(message, field), field, id_bytes_max)
    return Usable(np.delete(np.arange(len(message.reference_ids)), sorted(refusals)), refusals)


def without(rows: Int64, refusals: Mapping[int, MatcherError]) -> Int64:
    """The rows that nothing speaks against."""
    return rows[~np.isin(rows, list(refusals))] if refusals else rows


def templates_of(message: EnrolMessage, rows: Int64) -> Float32:
    """The templates of these rows, not copied if they are all there are."""
    return message.templates if len(rows) == len(message.templates) else message.templates[rows]


def as_stored(adapted: Float32) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
    """Adapted rows [n, d] as they are stored, float16 in C order, and which of them have a direction."""
    stored = narrowed(adapted).astype("<f2", copy=False)
    # As whole numbers, which are compared ten times as fast; a zero may have a sign.
    return stored, np.asarray((stored.view(np.uint16) & 0x7FFF).any(axis=1))


def wish(message: EnrolMessage, rows: Int64, stored: NDArray[np.float16], standing: Standing) -> EnrolRows:
    """What the log is asked for: these rows of the message, with their stored templates and what they rest on."""
    whole = len(rows) == len(message.reference_ids)
    chosen = rows.tolist()
    return EnrolRows(
        gallery_id=message.gallery_id,
        reference_ids=message.reference_ids if whole else [message.reference_ids[row] for row in chosen],
        subject_ids=message.subject_ids if whole else [message.subject_ids[row] for row in chosen],
        templates=stored,
        expires_at_ms=standing.expires_at_ms[rows],
        replace=message.replace,
        idempotency_key=message.idempotency_key,
        attributes=[standing.attributes[row] for row in chosen] if standing.attributes else (),
    )


def in_message(receipts: EnrolReceipts, rows: Int64, refusals: Mapping[int, MatcherError], count: int) -> EnrolReceipts:
    """The log's receipts of these rows of a message of `count`, and what was refused before, row by row."""
    if not refusals and not receipts.refusals and len(rows) == count:
        return receipts
    sequences = np.zeros(count, np.int64)
    sequences[rows] = receipts.sequences
    told = dict(refusals)
    for at, refusal in receipts.refusals.items():
        row = int(rows[at])
        # The log judges one reference; the caller sent a column.
        if refusal.field in ("expires_at_ms", "templates"):
            refusal.field = f"{refusal.field}[{row}]"
        told[row] = refusal
    others = {int(rows[at]): outcome for at, outcome in receipts.others.items()}
    return EnrolReceipts(sequences, told, others)
