"""Legal holds: what must not be erased yet, because a court or an inquiry may ask for it. Never searched again."""

from __future__ import annotations

import os
from typing import Any

import orjson
from sqlalchemy import Connection, insert, select, union_all, update

from matcher_service import audit
from matcher_service.errors import Conflict, NotFound
from matcher_service.gallery import seal
from matcher_service.gallery.alert_rows import read_alert
from matcher_service.gallery.held import let_go
from matcher_service.gallery.log import SqlGalleryLog
from matcher_service.gallery.names import check_name
from matcher_service.gallery.schema import alert, entry, erasure, legal_hold, live
from matcher_service.gallery.transaction import WriteTransaction
from matcher_service.terms import Actor, Alert, LegalHold, Reference


class SqlLegalHolds:
    """Implements `seams.LegalHolds`."""

    def __init__(self, log: SqlGalleryLog) -> None:
        self._log = log

    async def place(self, hold: LegalHold, actor: Actor) -> LegalHold:
        check_name(hold.hold_id, "hold_id")
        check_name(hold.subject_id, "subject_id")
        beside = {"requested_by": hold.requested_by, "authorised_by": hold.authorised_by, "reason": hold.reason}

        def work(transaction: WriteTransaction) -> LegalHold:
            known = select(legal_hold.c.hold_id).where(legal_hold.c.hold_id == hold.hold_id)
            if transaction.connection.execute(known).first() is not None:
                raise Conflict(f"hold {hold.hold_id} exists, or existed", field="hold_id", hint="choose another id")
            if hold.gallery_id and hold.gallery_id not in transaction.state.galleries:
                raise NotFound(
                    f"gallery {hold.gallery_id} does not exist", field="gallery_id", hint="list the galleries"
                )
            system, names = self._log.keyring.system, seal.record_names("hold", hold.hold_id)
            sealed = seal.seal(system, os.urandom(seal.NONCE_BYTES), orjson.dumps(beside), names)
            transaction.connection.execute(
                insert(legal_hold).values(
                    hold_id=hold.hold_id,
                    gallery_id=hold.gallery_id,
                    subject_id=hold.subject_id,
                    review_by_ms=hold.review_by_ms,
                    sealed=sealed,
                )
            )
            facts = {"gallery_id": hold.gallery_id, "review_by_ms": hold.review_by_ms}
            detail = audit.canonical_detail({**beside, "subject_id": hold.subject_id})
            transaction.chain(actor.name, "hold.placed", hold.hold_id, facts, detail)
            return hold

        return await self._log.transact(work)

    async def release(self, hold_id: str, reason: str, by: str, actor: Actor) -> None:
        def work(transaction: WriteTransaction) -> None:
            ended = (
                update(legal_hold)
                .where(legal_hold.c.hold_id == hold_id, legal_hold.c.released_at_ms.is_(None))
                .values(released_at_ms=transaction.at_ms)
            )
            if not transaction.connection.execute(ended).rowcount:
                raise NotFound(f"no hold {hold_id} stands", field="hold_id", hint="list the holds")
            let_go(transaction.connection, hold_id)
            transaction.chain(
                actor.name, "hold.released", hold_id, {}, audit.canonical_detail({"by": by, "reason": reason})
            )

        await self._log.transact(work)

    async def holds(self) -> list[LegalHold]:
        system = self._log.keyring.system
        wanted = select(legal_hold).order_by(legal_hold.c.hold_id)
        rows = await self._log.query(lambda connection: connection.execute(wanted).all())
        found: list[LegalHold] = []
        for row in rows:
            beside: dict[str, Any] = orjson.loads(seal.unseal_record(system, row.sealed, "hold", row.hold_id))
            found.append(
                LegalHold(
                    hold_id=row.hold_id,
                    gallery_id=row.gallery_id,
                    subject_id=row.subject_id,
                    review_by_ms=row.review_by_ms,
                    released_at_ms=row.released_at_ms,
                    **beside,
                )
            )
        return found

    async def kept(self, subject_id: str) -> tuple[list[Reference], list[Alert]]:
        system = self._log.keyring.system
        withdrawn = select(erasure.c.sequence).join(entry, entry.c.sequence == erasure.c.sequence)
        expired = select(live.c.sequence).where(live.c.expires_at_ms <= self._log.now_ms())
        ended = union_all(
            withdrawn.where(entry.c.subject_id == subject_id), expired.where(live.c.subject_id == subject_id)
        )
        columns = (entry.c.gallery_id, entry.c.reference_id, entry.c.subject_id, entry.c.sequence, entry.c.at_ms)
        references = (
            select(*columns, entry.c.expires_at_ms, entry.c.attributes)
            .where(entry.c.sequence.in_(ended), entry.c.sealed.is_not(None))
            .order_by(entry.c.sequence)
        )
        alerts = select(alert.c.alert_id, alert.c.sealed, alert.c.attributes).where(alert.c.held.is_not(None))

        def query(connection: Connection) -> tuple[list[Reference], list[Alert]]:
            held = [
                Reference(gallery_id, reference_id, subject, sequence, at_ms, expires_at_ms, attributes or b"")
                for gallery_id, reference_id, subject, sequence, at_ms, expires_at_ms, attributes in (
                    connection.execute(references)
                )
            ]
            told = (read_alert(system, *row) for row in connection.execute(alerts.order_by(alert.c.position)))
            of_subject = [one for one in told if any(each.subject_id == subject_id for each in one.candidates)]
            return held, of_subject

        return await self._log.query(query)
