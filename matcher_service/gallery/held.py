"""What a legal hold that stands keeps from being erased: references, alerts of the person, and what the audit tells of
either beside its chain. What is kept beyond its time is out of use: nothing lists it but an answer to the person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from sqlalchemy import ColumnElement, Connection, exists, or_, select, update

from matcher_service import audit
from matcher_service.errors import Conflict
from matcher_service.gallery import seal
from matcher_service.gallery.schema import alert, audit_record, entry, legal_hold
from matcher_service.gallery.transaction import SERVICE, WriteTransaction


class Standing(NamedTuple):
    """A hold that stands; `gallery_id` "": on every gallery."""

    hold_id: str
    gallery_id: str
    subject_id: str

    def covers(self, candidate: Mapping[str, Any]) -> bool:
        of_gallery = self.gallery_id in ("", candidate["gallery_id"])
        return of_gallery and candidate["subject_id"] == self.subject_id


def standing(connection: Connection) -> list[Standing]:
    wanted = select(legal_hold.c.hold_id, legal_hold.c.gallery_id, legal_hold.c.subject_id)
    in_order = wanted.where(legal_hold.c.released_at_ms.is_(None)).order_by(legal_hold.c.hold_id)
    return [Standing(*row) for row in connection.execute(in_order)]


def is_held() -> ColumnElement[bool]:
    """Of an entry: whether a hold that stands covers it."""
    return exists().where(
        legal_hold.c.released_at_ms.is_(None),
        legal_hold.c.subject_id == entry.c.subject_id,
        or_(legal_hold.c.gallery_id == "", legal_hold.c.gallery_id == entry.c.gallery_id),
    )


def keep_alerts(transaction: WriteTransaction, due: Iterable[int], holds: Sequence[Standing]) -> set[int]:
    """Of alerts that are due (their positions), mark those that a hold covers; they are returned."""
    columns = (alert.c.position, alert.c.alert_id, alert.c.sealed)
    rows = transaction.connection.execute(select(*columns).where(alert.c.position.in_(list(due)))).all()
    kept: dict[int, str] = {}
    for position, alert_id, sealed in rows:
        content = orjson.loads(seal.unseal_record(transaction.keyring.system, sealed, "alert", alert_id))
        hold = next((one for one in holds if _any_covered(one, content["candidates"])), None)
        if hold is not None:
            kept[position] = hold.hold_id
            marked = update(alert).where(alert.c.position == position).values(held=hold.hold_id)
            transaction.connection.execute(marked)
    _tell(transaction, "alerts", kept.values())
    return set(kept)


def keep_details(transaction: WriteTransaction, due: Iterable[int], holds: Sequence[Standing]) -> set[int]:
    """The same of audit records whose detail is due, after the alerts: a detail is kept that names the person, tells of
    an entry of theirs, or belongs to an alert that is kept."""
    columns = (audit_record.c.position, audit_record.c.chained, audit_record.c.sealed)
    rows = transaction.connection.execute(select(*columns).where(audit_record.c.position.in_(list(due)))).all()
    kept: dict[int, str] = {}
    for position, chained, sealed in rows:
        if sealed is None:
            continue
        content = seal.unseal_record(transaction.keyring.system, sealed, "audit", str(position))
        record, detail = orjson.loads(chained), orjson.loads(content[audit.SALT_BYTES :])
        hold_id = _hold_over(transaction.connection, record, detail, holds)
        if hold_id is not None:
            kept[position] = hold_id
            marked = update(audit_record).where(audit_record.c.position == position).values(held=hold_id)
            transaction.connection.execute(marked)
    _tell(transaction, "details", kept.values())
    return set(kept)


def let_go(connection: Connection, hold_id: str) -> None:
    """Let what a hold that was released has kept be looked at again by erasure, which another hold may stop."""
    for table in (alert, audit_record):
        connection.execute(update(table).where(table.c.held == hold_id).values(held=None))


def require_unheld(transaction: WriteTransaction, gallery_id: str) -> None:
    """Raise Conflict for the deletion of a gallery, and of its key, that holds something under a legal hold."""
    held = select(entry.c.sequence).where(entry.c.gallery_id == gallery_id, entry.c.sealed.is_not(None), is_held())
    if transaction.connection.execute(select(legal_hold.c.hold_id).limit(1)).first() is None:
        return
    transaction.flush()
    if transaction.connection.execute(held.limit(1)).first() is not None:
        raise Conflict(
            f"a legal hold stands on what gallery {gallery_id} holds",
            field="gallery_id",
            hint="it is deleted when the hold has been released; withdraw its references to end searches",
        )


def _hold_over(
    connection: Connection, record: Mapping[str, Any], detail: Mapping[str, Any], holds: Sequence[Standing]
) -> str | None:
    of_alert = select(alert.c.held).where(alert.c.alert_id == record["subject"], alert.c.held.is_not(None))
    if (by_alert := connection.execute(of_alert).scalar()) is not None:
        return str(by_alert)
    spans = record["facts"].get("sequences", ())
    for one in holds:
        # Who asked what of a person is of no one gallery.
        if detail.get("subject_id") == one.subject_id or _any_covered(one, detail.get("candidates", ())):
            return one.hold_id
        if any(_is_about(connection, one, first, last) for first, last in spans):
            return one.hold_id
    return None


def _any_covered(hold: Standing, candidates: Any) -> bool:
    return isinstance(candidates, list | tuple) and any(hold.covers(one) for one in candidates)


def _is_about(connection: Connection, hold: Standing, first: int, last: int) -> bool:
    own = select(entry.c.sequence).where(entry.c.sequence.between(first, last), entry.c.subject_id == hold.subject_id)
    if hold.gallery_id:
        own = own.where(entry.c.gallery_id == hold.gallery_id)
    return connection.execute(own.limit(1)).first() is not None


def _tell(transaction: WriteTransaction, what: str, hold_ids: Iterable[str]) -> None:
    """Put on record that something outlives its time, and under which hold."""
    for hold_id, count in sorted(Counter(hold_ids).items()):
        transaction.chain(SERVICE.name, "hold.kept", hold_id, {what: count})
