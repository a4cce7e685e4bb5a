"""What cases and persons have used of what they are allowed, as counters of the log's database.

A name's use leaks away at the rate that it is allowed, so that no more than an hour's worth is ever held against it.
The counters change inside the log's write transaction, of which there is one at a time over all gateways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sqlalchemy import Connection, delete, insert, select, update

from matcher_service import records
from matcher_service.gallery.schema import tally
from matcher_service.gallery.transaction import WriteTransaction

if TYPE_CHECKING:
    from matcher_service.gallery.log import SqlGalleryLog

HOUR_MS = 3_600_000

_USED, _USED_AT = "used_milli", "used_at_ms"
_CUSTODY = "custody_searches"


class SqlCaseUse:
    """Implements `seams.CaseUse`."""

    def __init__(self, log: SqlGalleryLog) -> None:
        self._log = log

    async def take(self, names: Sequence[str], count: int, per_h: int) -> int:
        def work(transaction: WriteTransaction) -> int:
            connection, at_ms = transaction.connection, transaction.at_ms
            used = {name: _left(_counters(connection, name), at_ms, per_h) for name in names}
            over = max(used.values()) + 1000 * count - 1000 * per_h
            if over > 0:
                return math.ceil(over * HOUR_MS / (1000 * per_h))
            for name, milli in used.items():
                _set(connection, name, {_USED: milli + 1000 * count, _USED_AT: at_ms})
            return 0

        return await self._log.transact(work)

    async def note_custody(self, case_reference: str) -> None:
        # Once is enough, and looking costs no synced write.
        if not await self.searched_custody(case_reference):
            name = records.authority_name("", case_reference)
            await self._log.transact(lambda transaction: transaction.count(name, _CUSTODY, 1))

    async def searched_custody(self, case_reference: str) -> bool:
        name = records.authority_name("", case_reference)
        return await self._log.query(lambda connection: _CUSTODY in _counters(connection, name))


def forget_use(connection: Connection, now_ms: int) -> None:
    """Drop what has leaked away: who searched an hour ago is held against nobody."""
    old = select(tally.c.authority).where(tally.c.name == _USED_AT, tally.c.count <= now_ms - HOUR_MS)
    names = list(connection.execute(old).scalars())
    if names:
        connection.execute(delete(tally).where(tally.c.authority.in_(names), tally.c.name.in_((_USED, _USED_AT))))


def _left(counters: Mapping[str, int], at_ms: int, per_h: int) -> int:
    """Thousandths of a probe that are still held against a name."""
    elapsed_ms = max(0, at_ms - counters.get(_USED_AT, at_ms))
    return max(0, counters.get(_USED, 0) - elapsed_ms * per_h * 1000 // HOUR_MS)


def _counters(connection: Connection, name: str) -> dict[str, int]:
    found = connection.execute(select(tally.c.name, tally.c.count).where(tally.c.authority == name))
    return {str(one): int(count) for one, count in found}


def _set(connection: Connection, name: str, values: Mapping[str, int]) -> None:
    for one, value in values.items():
        there = update(tally).where(tally.c.authority == name, tally.c.name == one).values(count=value)
        if not connection.execute(there).rowcount:
            connection.execute(insert(tally).values(authority=name, name=one, count=value))
