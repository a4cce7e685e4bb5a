"""Rows of `erasure_receipt` as erasing makes them; `erasure_receipts` reads and completes them."""

from __future__ import annotations

from collections.abc import Iterable

import orjson
from sqlalchemy import Connection, func, insert, select, update

from matcher_service.gallery.schema import erasure_receipt
from matcher_service.gallery.transaction import WriteTransaction
from matcher_service.terms import ErasedKind


def open_receipt(
    transaction: WriteTransaction, kind: ErasedKind, erased: int, gallery_id: str = "", sequences: Iterable[int] = ()
) -> tuple[int, list[list[int]]]:
    """Open the receipt of an erasure in its transaction; its number, and the ascending `sequences` as ranges."""
    receipt_id = (transaction.connection.execute(_NEWEST).scalar() or 0) + 1
    spans = ranges(sequences)
    transaction.connection.execute(
        insert(erasure_receipt).values(
            receipt_id=receipt_id,
            kind=kind,
            gallery_id=gallery_id,
            erased=erased,
            sequences=orjson.dumps(spans),
            erased_at_ms=transaction.at_ms,
            head=transaction.sequence,
            backups_until_ms=transaction.at_ms + transaction.terms.backups_destroyed_within_ms,
        )
    )
    return receipt_id, spans


def ranges(sequences: Iterable[int]) -> list[list[int]]:
    """Ascending numbers as closed ranges."""
    spans: list[list[int]] = []
    for one in sequences:
        if spans and spans[-1][1] == one - 1:
            spans[-1][1] = one
        else:
            spans.append([one, one])
    return spans


def newest_unwiped(connection: Connection) -> int:
    """The newest receipt whose older versions may still be in the database; 0 if there is none."""
    unwiped = _NEWEST.where(erasure_receipt.c.wiped_at_ms.is_(None), erasure_receipt.c.complete_at_ms.is_(None))
    return connection.execute(unwiped).scalar() or 0


def wiped(transaction: WriteTransaction, receipt_id: int) -> None:
    """The database was wiped after all erasures up to this one were committed."""
    transaction.connection.execute(
        update(erasure_receipt)
        .where(erasure_receipt.c.receipt_id <= receipt_id, erasure_receipt.c.wiped_at_ms.is_(None))
        .values(wiped_at_ms=transaction.at_ms)
    )


_NEWEST = select(func.max(erasure_receipt.c.receipt_id))
