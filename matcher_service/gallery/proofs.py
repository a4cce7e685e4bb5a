"""Checkpoints of the audit chain and proofs from it, over the log's database."""

from __future__ import annotations

import asyncio

from sqlalchemy import Connection, insert, select

from matcher_service import audit_proofs, merkle
from matcher_service.errors import DataDamaged, NotFound
from matcher_service.gallery.log import SqlGalleryLog
from matcher_service.gallery.schema import audit_checkpoint, audit_record
from matcher_service.gallery.signing import SigningKeys
from matcher_service.gallery.transaction import WriteTransaction
from matcher_service.terms import Actor, Checkpoint

_BLOCK = 10_000


class SqlAuditProofs:
    """Implements `seams.AuditProofs`. `keys` signs; who makes this has opened the log."""

    def __init__(self, log: SqlGalleryLog, keys: SigningKeys) -> None:
        self._log = log
        self._keys = keys

    async def checkpoint(self) -> Checkpoint:
        known, frontier = await self._log.query(_grown)
        if known is not None and known.size == frontier.size:
            return known
        key = self._keys.current

        def store(transaction: WriteTransaction) -> Checkpoint:
            there = transaction.connection.execute(_NEWEST).first()
            if there is not None and there.size >= frontier.size:
                return audit_proofs.decode_checkpoint(there.signed)
            made = audit_proofs.signed_checkpoint(
                frontier.size, frontier.root(), transaction.at_ms, key.public, key.sign
            )
            signed, peaks = audit_proofs.encode_checkpoint(made), b"".join(frontier.peaks)
            transaction.connection.execute(insert(audit_checkpoint).values(size=made.size, signed=signed, peaks=peaks))
            return made

        return await self._log.transact(store)

    async def checkpoints(self, limit: int) -> list[Checkpoint]:
        newest = select(audit_checkpoint.c.signed).order_by(audit_checkpoint.c.size.desc()).limit(limit)
        found = await self._log.query(lambda connection: list(connection.execute(newest).scalars()))
        return [audit_proofs.decode_checkpoint(one) for one in found]

    async def inclusion(self, index: int) -> tuple[Checkpoint, list[str]]:
        newest = await self.checkpoint()
        if not 1 <= index <= newest.size:
            raise NotFound(f"no audit record {index}", field="index", hint=f"from 1 to {newest.size}")
        leaves = await self._log.query(lambda connection: _leaves(connection, 0, newest.size))
        return newest, _hex(merkle.inclusion_proof(leaves, index - 1))

    async def consistency(self, older: int) -> tuple[Checkpoint, list[str]]:
        newest = await self.checkpoint()
        if not 1 <= older <= newest.size:
            raise NotFound(f"the audit never had {older} records", field="older", hint=f"from 1 to {newest.size}")
        leaves = await self._log.query(lambda connection: _leaves(connection, 0, newest.size))
        return newest, _hex(merkle.consistency_proof(leaves, older))

    async def rotate_key(self, reason: str, actor: Actor) -> str:
        before = self._keys.current
        # The old key's last word covers all that it saw.
        await self.checkpoint()
        handover = self._keys.successor()
        facts = {
            "key": handover.key.public.hex(),
            "previous": before.public.hex(),
            "endorsement": handover.endorsement.hex(),
            "reason": reason,
        }
        # First the record, then the key: a key that was recorded and lost harms nothing, a checkpoint under a key
        # that no record leads to could not be trusted.
        await self._log.transact(
            lambda transaction: transaction.chain(actor.name, audit_proofs.KEY_ROTATED, str(handover.key.number), facts)
        )
        await asyncio.to_thread(self._keys.adopt, handover)
        return handover.key.public.hex()


def _grown(connection: Connection) -> tuple[Checkpoint | None, merkle.Frontier]:
    """The newest checkpoint, and the tree that has grown beyond it to the newest record."""
    newest = connection.execute(_NEWEST).first()
    frontier, known = merkle.Frontier(), None
    if newest is not None:
        known = audit_proofs.decode_checkpoint(newest.signed)
        steps = range(0, len(newest.peaks), merkle.HASH_BYTES)
        frontier = merkle.Frontier(newest.size, [newest.peaks[at : at + merkle.HASH_BYTES] for at in steps])
    last = connection.execute(_TAIL).scalar() or 0
    if last < frontier.size:
        raise DataDamaged(
            f"the audit ends at record {last}, and a checkpoint covers {frontier.size}: it was cut",
            hint="keep the database as it is, and compare it with a backup",
        )
    frontier.add(_leaves(connection, frontier.size, last))
    return known, frontier


def _leaves(connection: Connection, after: int, last: int) -> list[bytes]:
    """Hashes of the records after + 1 ... last. Raises DataDamaged if one is missing or no hash."""
    found: list[bytes] = []
    columns = (audit_record.c.position, audit_record.c.hash)
    while after < last:
        wanted = select(*columns).where(audit_record.c.position > after, audit_record.c.position <= last)
        rows = connection.execute(wanted.order_by(audit_record.c.position).limit(_BLOCK)).all()
        for position, text in rows:
            if position != after + 1 or len(text) != 2 * merkle.HASH_BYTES:
                raise _lacking(after + 1)
            found.append(bytes.fromhex(text))
            after = position
        if not rows:
            raise _lacking(after + 1)
    return found


def _lacking(index: int) -> DataDamaged:
    return DataDamaged(
        f"audit record {index} is missing or damaged",
        hint="keep the database as it is, and compare it with a backup",
    )


def _hex(proof: list[bytes]) -> list[str]:
    return [one.hex() for one in proof]


_NEWEST = select(audit_checkpoint).order_by(audit_checkpoint.c.size.desc()).limit(1)
_TAIL = select(audit_record.c.position).order_by(audit_record.c.position.desc()).limit(1)
