"""Receipts of erasures: what was erased, and since when which store holds nothing of it any more.

An erasure opens a receipt in its own transaction. Stores report by themselves: the database when `Database.wipe` has
seen to it that no older version is left, an index with the sequence up to which nothing that had ended is in its
memory or in any of its files. A receipt is complete, and in the audit, when all have reported. Backups do not report:
they are destroyed by their own clock, and a restored one obeys the erasure ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from sqlalchemy import Connection, Select, func, select, update

from matcher_service.errors import NotFound
from matcher_service.gallery.held import is_held
from matcher_service.gallery.log import SqlGalleryLog
from matcher_service.gallery.schema import IS_ERASED, entry, erasure, erasure_receipt
from matcher_service.gallery.transaction import SERVICE, WriteTransaction
from matcher_service.terms import ErasedKind, ErasureReceipt, ErasureReports, ErasureWaiting, StoreErasure

COMPLETE = "erasure.complete"


class SqlErasureReceipts:
    """Implements `seams.ErasureReceipts`."""

    def __init__(self, log: SqlGalleryLog) -> None:
        self._log = log
        # The indexes that were last said to be there: an open receipt names those that it waits for.
        self._indexes: frozenset[str] = frozenset()

    async def receipts(self, gallery_id: str, subject_id: str, after: int, limit: int) -> list[ErasureReceipt]:
        def query(connection: Connection) -> list[Any]:
            if not subject_id:
                wanted = _ALL.where(erasure_receipt.c.receipt_id > after).limit(limit)
                return list(connection.execute(_of_gallery(wanted, gallery_id)))
            found: list[Any] = []
            for one, sequences in _erased_of(connection, gallery_id, subject_id).items():
                rows = connection.execute(_ALL.where(erasure_receipt.c.gallery_id == one))
                found += (row for row in rows if row.receipt_id > after and _covers(row, sequences))
            return sorted(found, key=lambda row: int(row.receipt_id))[:limit]

        return [self._receipt(row) for row in await self._log.query(query)]

    async def receipt(self, receipt_id: int) -> ErasureReceipt:
        wanted = _ALL.where(erasure_receipt.c.receipt_id == receipt_id)
        row = await self._log.query(lambda connection: connection.execute(wanted).first())
        if row is None:
            raise NotFound(f"no receipt {receipt_id}", field="receipt_id", hint="list the receipts of a gallery")
        return self._receipt(row)

    async def waiting(self, gallery_id: str, subject_id: str) -> ErasureWaiting:
        due = select(entry.c.sequence).join(erasure, erasure.c.sequence == entry.c.sequence)
        if gallery_id:
            due = due.where(entry.c.gallery_id == gallery_id)
        if subject_id:
            due = due.where(entry.c.subject_id == subject_id)

        def query(connection: Connection) -> ErasureWaiting:
            every = _count(connection, due)
            freed = due.where(erasure.c.held.is_(None), ~is_held())
            first = connection.execute(freed.with_only_columns(func.max(erasure.c.due_at_ms))).scalar()
            return ErasureWaiting(every, every - _count(connection, freed), first)

        return await self._log.query(query)

    async def report(self, indexes: Mapping[str, int]) -> ErasureReports:
        self._indexes = frozenset(indexes)
        still_open = await self._log.query(lambda connection: list(_open(connection)))
        if not any(_reported(row, indexes, 0) for row in still_open):
            return ErasureReports(0, _oldest(still_open))

        def store(transaction: WriteTransaction) -> ErasureReports:
            complete = 0
            left: list[Any] = []
            for row in _open(transaction.connection).fetchall():
                told = _reported(row, indexes, transaction.at_ms)
                if told is None:
                    left.append(row)
                    continue
                done = row.wiped_at_ms is not None and (
                    row.kind != ErasedKind.TEMPLATES or indexes.keys() <= told.keys()
                )
                complete += done
                transaction.connection.execute(
                    update(erasure_receipt)
                    .where(erasure_receipt.c.receipt_id == row.receipt_id)
                    .values(indexes=orjson.dumps(told), complete_at_ms=transaction.at_ms if done else None)
                )
                if not done:
                    left.append(row)
                else:
                    facts = {
                        "kind": row.kind,
                        "erased": row.erased,
                        "sequences": orjson.loads(row.sequences),
                        "database_at_ms": row.wiped_at_ms,
                        "indexes_at_ms": told,
                        "backups_until_ms": row.backups_until_ms,
                    }
                    transaction.chain(SERVICE.name, COMPLETE, row.gallery_id, {"receipt": row.receipt_id, **facts})
            return ErasureReports(complete, _oldest(left))

        return await self._log.transact(store)

    def _receipt(self, row: Any) -> ErasureReceipt:
        return ErasureReceipt(
            receipt_id=row.receipt_id,
            kind=ErasedKind(row.kind),
            gallery_id=row.gallery_id,
            erased=row.erased,
            sequences=tuple((first, last) for first, last in orjson.loads(row.sequences)),
            erased_at_ms=row.erased_at_ms,
            stores=tuple(self._stores(row)),
            complete_at_ms=row.complete_at_ms,
        )

    def _stores(self, row: Any) -> Iterable[StoreErasure]:
        for store, (reports, how) in self._log.stores.items():
            yield StoreErasure(store, row.wiped_at_ms if reports else None, how)
        if row.kind == ErasedKind.TEMPLATES:
            yield StoreErasure("caches", row.erased_at_ms, "what was read a moment ago is let go of with the erasure")
            told: dict[str, int] = orjson.loads(row.indexes or b"{}")
            awaited = frozenset() if row.complete_at_ms else self._indexes
            for name in sorted(awaited | told.keys()):
                for store in ("memory", "segments", "snapshots"):
                    yield StoreErasure(f"{store} of {name}", told.get(name), "the index holds no row that had ended")
        destroyed_at_ms = self._log.keyring.destroyed_at_ms(row.gallery_id) if row.gallery_id else None
        if destroyed_at_ms is not None:
            yield StoreErasure("key", destroyed_at_ms, "destroyed with the gallery: sealed copies open for nobody")
        how = "destroyed by their own clock; a restored one obeys the erasure ledger before it is searched"
        yield StoreErasure("backups", None, how, row.backups_until_ms)


# --- statements and rows -------------------------------------------------------------------------

_ALL = select(erasure_receipt).order_by(erasure_receipt.c.receipt_id)
_OPEN = _ALL.where(erasure_receipt.c.complete_at_ms.is_(None))


def _open(connection: Connection) -> Any:
    return connection.execute(_OPEN)


def _oldest(rows: Iterable[Any]) -> int | None:
    return min((int(row.erased_at_ms) for row in rows), default=None)


def _of_gallery(wanted: Select[Any], gallery_id: str) -> Select[Any]:
    return wanted.where(erasure_receipt.c.gallery_id == gallery_id) if gallery_id else wanted


def _count(connection: Connection, chosen: Select[Any]) -> int:
    return connection.execute(select(func.count()).select_from(chosen.subquery())).scalar() or 0


def _erased_of(connection: Connection, gallery_id: str, subject_id: str) -> dict[str, list[int]]:
    """The entries of a subject whose templates were erased, by gallery."""
    wanted = select(entry.c.gallery_id, entry.c.sequence).where(IS_ERASED, entry.c.subject_id == subject_id)
    found: dict[str, list[int]] = {}
    for one, sequence in connection.execute(wanted):
        if not gallery_id or one == gallery_id:
            found.setdefault(one, []).append(sequence)
    return found


def _covers(row: Any, sequences: Sequence[int]) -> bool:
    return any(first <= one <= last for first, last in orjson.loads(row.sequences) for one in sequences)


def _reported(row: Any, indexes: Mapping[str, int], at_ms: int) -> dict[str, int] | None:
    """When which index reported, with what `indexes` reports now; None if this changes nothing of the receipt."""
    before: dict[str, int] = orjson.loads(row.indexes or b"{}")
    if row.kind != ErasedKind.TEMPLATES:
        return before if row.wiped_at_ms is not None else None
    now = {name: at_ms for name, through in indexes.items() if through >= row.head and name not in before}
    told = {**before, **now}
    return told if now or (row.wiped_at_ms is not None and indexes.keys() <= told.keys()) else None
