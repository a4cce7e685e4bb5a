"""What becomes of alerts after they were raised, over the log's database."""

from __future__ import annotations

import os

from sqlalchemy import Connection, select, update

from matcher_service import adjudication, audit, records
from matcher_service.errors import NotFound
from matcher_service.gallery import seal
from matcher_service.gallery.alert_rows import encode_adjudications, read_alert
from matcher_service.gallery.log import SqlGalleryLog
from matcher_service.gallery.schema import alert, tally
from matcher_service.gallery.transaction import WriteTransaction
from matcher_service.seams import Counts
from matcher_service.terms import Actor, Adjudication, Alert, Verdict


class SqlAlertRecords:
    """Implements `seams.AlertRecords`."""

    def __init__(self, log: SqlGalleryLog) -> None:
        self._log = log

    async def alert(self, alert_id: str) -> Alert:
        now_ms = self._log.now_ms()
        return await self._log.query(lambda connection: self._read(connection, alert_id, now_ms)[0])

    async def adjudicate(
        self, alert_id: str, verdict: Verdict, by: str, reason: str, evidence_reference: str, actor: Actor
    ) -> Alert:
        def work(transaction: WriteTransaction) -> None:
            connection = transaction.connection
            found, erase_at_ms = self._read(connection, alert_id, transaction.at_ms)
            said = (*found.adjudications, Adjudication(verdict, by, transaction.at_ms, reason, evidence_reference))
            state = adjudication.state_of(said, adjudication.persons_needed(found, transaction.state.galleries))
            sealed = seal.seal(
                self._log.keyring.system,
                os.urandom(seal.NONCE_BYTES),
                encode_adjudications(state, said),
                seal.record_names("adjudication", alert_id),
            )
            connection.execute(update(alert).where(alert.c.alert_id == alert_id).values(attributes=sealed))
            if state is not found.state:
                authority = records.authority_name(found.deployment_id, found.case_reference)
                transaction.count(authority, f"alerts_{found.state.value}", -1)
                transaction.count(authority, f"alerts_{state.value}", 1)
            facts = {"verdict": verdict.value, "state": state.value, "adjudications": len(said)}
            detail = audit.canonical_detail({"by": by, "reason": reason, "evidence_reference": evidence_reference})
            transaction.chain(actor.name, "alert.adjudicated", alert_id, facts, detail, erase_at_ms)

        await self._log.transact(work)
        return await self.alert(alert_id)

    async def add_counts(self, counts: Counts) -> None:
        def work(transaction: WriteTransaction) -> None:
            for (authority, name), by in counts.items():
                transaction.count(authority, name, by)

        if counts:
            await self._log.transact(work)

    async def counts(self, authority: str) -> dict[str, int]:
        wanted = select(tally.c.name, tally.c.count).where(tally.c.authority == authority)
        return await self._log.query(lambda connection: {name: by for name, by in connection.execute(wanted)})

    def _read(self, connection: Connection, alert_id: str, now_ms: int) -> tuple[Alert, int]:
        """The alert, and when it is to be erased. What outlived its time under a legal hold is out of use."""
        wanted = select(alert.c.sealed, alert.c.attributes, alert.c.erase_at_ms)
        row = connection.execute(wanted.where(alert.c.alert_id == alert_id, alert.c.erase_at_ms > now_ms)).first()
        if row is None:
            raise NotFound(
                f"alert {alert_id} is not held", field="alert_id", hint="list the alerts; it may have been erased"
            )
        return read_alert(self._log.keyring.system, alert_id, row.sealed, row.attributes), row.erase_at_ms
