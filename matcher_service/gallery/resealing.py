"""Rotation of the keys of galleries: a new generation, everything sealed anew under it, the old ones destroyed.

1. `rotate` makes the new generation durable and says in the log's database that it seals from now on. Every
   transaction asks there, so that of all gateways none seals under an older one afterwards.
2. `reseal_some` goes through the log, from its beginning to its head, a bounded number of entries in each transaction,
   while writes and searches go on. How far it came is stored with what it did: a process that is killed loses nothing,
   and whichever comes next goes on there. Index files are sealed anew by those who write them.
3. `retire` destroys the older generations when nothing is sealed under them: all entries are under the newest, no older
   version of them is left in the database, every index says the same of its files, and the backups that hold rows under
   them are destroyed by their own clock, unless it was asked for not to wait for these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from matcher_service.errors import Conflict, LogUnavailable, NotFound
from matcher_service.gallery import seal
from matcher_service.gallery.log import SqlGalleryLog
from matcher_service.gallery.schema import data_key, entry
from matcher_service.gallery.transaction import SERVICE, WriteTransaction
from matcher_service.terms import Actor, GalleryKey

# Of one transaction, behind which all other writes wait.
ENTRIES_AT_ONCE = 8192
TEMPLATES_AT_ONCE = 1024


class SqlKeyRotations:
    """Implements `seams.KeyRotations`."""

    def __init__(self, log: SqlGalleryLog) -> None:
        self._log = log
        self._indexes: Mapping[str, Mapping[str, int] | None] = {}

    async def rotate(self, gallery_id: str, reason: str, backups_too: bool, actor: Actor) -> GalleryKey:
        keyring = self._log.keyring
        now = await self._log.query(lambda connection: _row(connection, gallery_id))
        generation = 2 if now is None else now.generation + 1
        # Not in the transaction, and before it: a key service may take its time, and a generation that nothing is
        # sealed under does no harm.
        if keyring.newest(gallery_id):
            await asyncio.to_thread(keyring.create, gallery_id, generation)

        def work(transaction: WriteTransaction) -> None:
            if gallery_id not in transaction.state.galleries:
                raise NotFound(f"gallery {gallery_id} does not exist", field="gallery_id", hint="list the galleries")
            held = _row(transaction.connection, gallery_id)
            if held is not None and (held.resealed_to is not None or held.generation >= generation):
                raise Conflict(
                    f"the key of gallery {gallery_id} is being rotated",
                    field="gallery_id",
                    hint="wait until everything is sealed anew: matcher keys show",
                )
            keep_ms = 0 if backups_too else transaction.terms.backups_destroyed_within_ms
            values = {
                "generation": generation,
                "rotated_at_ms": transaction.at_ms,
                "resealed_to": 0,
                "resealed": 0,
                "resealed_at_ms": None,
                "retire_at_ms": transaction.at_ms + keep_ms,
                "retired_at_ms": None,
            }
            # What this transaction has sealed already is in the tables under the old generation, and will be found.
            transaction.flush()
            if held is None:
                transaction.connection.execute(insert(data_key).values(gallery_id=gallery_id, **values))
            else:
                row = data_key.c.gallery_id == gallery_id
                transaction.connection.execute(update(data_key).where(row).values(**values))
            transaction.rotated(gallery_id)
            facts = {"generation": generation, "backups_too": backups_too, "reason": reason}
            transaction.chain(actor.name, "key.rotated", gallery_id, facts)

        await self._log.transact(work)
        return await self.key(gallery_id)

    async def key(self, gallery_id: str) -> GalleryKey:
        for one in await self.keys():
            if one.gallery_id == gallery_id:
                return one
        raise NotFound(f"the key of gallery {gallery_id} was never rotated", field="gallery_id")

    async def keys(self) -> list[GalleryKey]:
        def query(connection: Connection) -> list[GalleryKey]:
            head = connection.execute(_HEAD).scalar() or 0
            return [self._told(row, head) for row in connection.execute(select(data_key).order_by("gallery_id"))]

        return await self._log.query(query)

    def _told(self, row: Any, head: int) -> GalleryKey:
        resealing = row.resealed_to is not None
        return GalleryKey(
            gallery_id=row.gallery_id,
            generation=row.generation,
            rotated_at_ms=row.rotated_at_ms,
            resealed=row.resealed,
            share=min(1.0, row.resealed_to / head) if resealing and head else 1.0,
            resealed_at_ms=row.resealed_at_ms,
            waits_for=() if row.retired_at_ms or resealing else tuple(self._behind(row.gallery_id, row.generation)),
            retire_at_ms=row.retire_at_ms,
            retired_at_ms=row.retired_at_ms,
        )

    async def reseal_some(self) -> bool:
        if await self._log.query(lambda connection: _resealing(connection)) is None:
            return False
        return await self._log.transact(_reseal_some)

    async def retire(self, indexes: Mapping[str, Mapping[str, int] | None], now_ms: int) -> Sequence[str]:
        self._indexes = indexes
        waiting = select(data_key).where(data_key.c.resealed_to.is_(None), data_key.c.retired_at_ms.is_(None))
        due = await self._log.query(
            lambda connection: [
                row
                for row in connection.execute(waiting.where(data_key.c.retire_at_ms <= now_ms)).all()
                if not self._behind(row.gallery_id, row.generation)
            ]
        )
        if not due:
            return []
        await self._log.wipe()

        def work(transaction: WriteTransaction) -> list[Any]:
            done = []
            for row in due:
                ended = (
                    update(data_key)
                    .where(
                        data_key.c.gallery_id == row.gallery_id,
                        data_key.c.generation == row.generation,
                        data_key.c.retired_at_ms.is_(None),
                    )
                    .values(retired_at_ms=transaction.at_ms)
                )
                if transaction.connection.execute(ended).rowcount:
                    facts = {"generations_before": row.generation}
                    transaction.chain(SERVICE.name, "key.retired", row.gallery_id, facts)
                    done.append(row)
            return done

        retired = await self._log.transact(work)
        for row in retired:
            # A start destroys them if this process does not come to it.
            await asyncio.to_thread(self._log.keyring.forget, row.gallery_id, row.generation)
        return [row.gallery_id for row in retired]

    async def rewrap(self, actor: Actor) -> tuple[int, str, int]:
        keyring = self._log.keyring

        def galleries(transaction: WriteTransaction) -> list[str]:
            return sorted(transaction.state.galleries)

        known = await self._log.transact(galleries)
        try:
            done = await asyncio.to_thread(keyring.rewrap, known)
        except OSError as broken:
            raise LogUnavailable(
                f"keys cannot be written: {broken.strerror}", hint="check the keys directory; every key is readable"
            ) from broken
        facts = {"keys": done.keys, "by": done.by, "left": done.left}
        await self._log.transact(lambda transaction: transaction.chain(actor.name, "keys.rewrapped", "", facts))
        return done

    def _behind(self, gallery_id: str, generation: int) -> list[str]:
        """The indexes that may still have a file under an older generation."""
        return [
            name
            for name, told in sorted(self._indexes.items())
            if told is None or told.get(gallery_id, generation) < generation
        ]


def _row(connection: Connection, gallery_id: str) -> Any:
    return connection.execute(select(data_key).where(data_key.c.gallery_id == gallery_id)).first()


def _resealing(connection: Connection) -> Any:
    return connection.execute(_NEXT).first()


def _reseal_some(transaction: WriteTransaction) -> bool:
    """One step; whether there may be more to do."""
    connection = transaction.connection
    row = _resealing(connection)
    if row is None:
        return False
    gallery_id = row.gallery_id
    if gallery_id not in transaction.state.galleries:
        # Deleted, with its key.
        ended = {"resealed_to": None, "resealed_at_ms": transaction.at_ms, "retired_at_ms": transaction.at_ms}
        connection.execute(update(data_key).where(data_key.c.gallery_id == gallery_id).values(**ended))
        return True
    transaction.flush()
    upto = min(row.resealed_to + ENTRIES_AT_ONCE, transaction.sequence)
    wanted = (
        select(entry.c.sequence, entry.c.reference_id, entry.c.sealed)
        .where(
            entry.c.sequence > row.resealed_to,
            entry.c.sequence <= upto,
            entry.c.gallery_id == gallery_id,
            entry.c.sealed.is_not(None),
        )
        .order_by(entry.c.sequence)
        .limit(TEMPLATES_AT_ONCE)
    )
    found = connection.execute(wanted).all()
    if len(found) == TEMPLATES_AT_ONCE:
        upto = found[-1].sequence
    under = transaction.sealing(gallery_id)
    old = [one for one in found if seal.generation_of(one.sealed) != under.generation]
    draw = seal.nonces(len(old))
    anew = [
        (
            seal.seal(
                under,
                draw(),
                transaction.unsealed(one.sealed, gallery_id, one.reference_id, one.sequence),
                seal.template_names(gallery_id, one.reference_id, one.sequence),
            ),
            one.sequence,
        )
        for one in old
    ]
    if anew:
        _replace(connection, anew)
    done = upto >= transaction.sequence
    values = {
        "resealed_to": None if done else upto,
        "resealed": row.resealed + len(anew),
        "resealed_at_ms": transaction.at_ms if done else None,
    }
    connection.execute(update(data_key).where(data_key.c.gallery_id == gallery_id).values(**values))
    if done:
        facts = {"generation": row.generation, "templates": values["resealed"], "through": transaction.sequence}
        transaction.chain(SERVICE.name, "key.resealed", gallery_id, facts)
    return True


def _replace(connection: Connection, anew: list[tuple[bytes, int]]) -> None:
    if connection.dialect.name == "postgresql":
        columns = ([sealed for sealed, _ in anew], [sequence for _, sequence in anew])
        connection.exec_driver_sql(_REPLACE_POSTGRES, columns)
    else:
        connection.exec_driver_sql("UPDATE entry SET sealed = ? WHERE sequence = ?", anew)


_HEAD = select(func.max(entry.c.sequence))
_NEXT = select(data_key).where(data_key.c.resealed_to.is_not(None)).order_by(data_key.c.rotated_at_ms).limit(1)
_REPLACE_POSTGRES = (
    "UPDATE entry SET sealed = anew.sealed FROM unnest(%s::bytea[], %s::bigint[]) AS anew (sealed, sequence) "
    "WHERE entry.sequence = anew.sequence"
)
