"""Expiry and physical erasure: what a write transaction takes out of the log, with its audit."""

from __future__ import annotations

import itertools

from sqlalchemy import delete, select, tuple_, update

from matcher_service import audit, records
from matcher_service.gallery import judgement, lawful
from matcher_service.gallery.case_use import forget_use
from matcher_service.gallery.erasure_rows import open_receipt
from matcher_service.gallery.held import is_held, keep_alerts, keep_details, standing
from matcher_service.gallery.schema import alert, audit_record, enrolment_key, entry, erasure, legal_hold, live
from matcher_service.gallery.transaction import SERVICE, Held, Note, WriteTransaction
from matcher_service.terms import DeleteGallery, EndDeployment, ErasedKind

_EXPIRED = audit.canonical({"reason": "expired"})


def erase(transaction: WriteTransaction, now_ms: int, most: int) -> int:
    """Withdraw what has expired, then erase what is due; at most `most` of each. Returns the templates erased.

    A template is due at a stated time at the latest: nothing is gained by waiting for it, so everything that waits
    and is not held is erased. Also dropped, unless a legal hold keeps them: alerts past their retention, and details
    of the audit past theirs; and idempotency keys past their window. The time is the later of `now_ms` and the log's
    own, so that a clock stepped back keeps nobody.
    """
    now_ms = max(now_ms, transaction.at_ms)
    _destroy_watchlists(transaction, now_ms)
    _withdraw_expired(transaction, now_ms, most)
    transaction.write_notes(SERVICE)
    erased = _erase_templates(transaction, most)
    _erase_alerts(transaction, now_ms, most)
    _erase_details(transaction, now_ms, most)
    _drop_old_keys(transaction, now_ms, most)
    forget_use(transaction.connection, now_ms)
    transaction.write_notes(SERVICE)
    transaction.flush()
    return erased


def _destroy_watchlists(transaction: WriteTransaction, now_ms: int) -> None:
    """End what has outlived its window: deployments with a watchlist, and watchlists whose own retention is over."""
    closed, outlived = lawful.overdue(transaction, now_ms)
    judgement.judge(transaction, [EndDeployment(one) for one in closed])
    left = sorted({one for one in outlived if one in transaction.state.galleries})
    judgement.judge(transaction, [DeleteGallery(one, "the retention of the watchlist is over") for one in left])


def _withdraw_expired(transaction: WriteTransaction, now_ms: int, most: int) -> None:
    expired = select(live).where(live.c.expires_at_ms <= now_ms)
    oldest_first = expired.order_by(live.c.expires_at_ms, live.c.gallery_id, live.c.reference_id).limit(most)
    for gallery_id, reference_id, *rest in transaction.connection.execute(oldest_first).all():
        place, held = (gallery_id, reference_id), Held(*rest)
        transaction.add_held(place, held)
        transaction.note(Note("reference.expired", gallery_id), transaction.withdraw(place, held, _EXPIRED))
    transaction.flush()


def _erase_templates(transaction: WriteTransaction, most: int) -> int:
    connection = transaction.connection
    waiting = select(erasure.c.sequence).where(erasure.c.held.is_(None)).order_by(erasure.c.sequence).limit(most)
    if connection.execute(select(legal_hold.c.hold_id).limit(1)).first() is not None:
        waiting = waiting.join(entry, entry.c.sequence == erasure.c.sequence).where(~is_held())
    chosen = select(waiting.subquery().c.sequence)
    places = select(entry.c.gallery_id, entry.c.sequence).where(entry.c.sequence.in_(chosen))
    erased = connection.execute(places.order_by(entry.c.gallery_id, entry.c.sequence)).all()
    if erased:
        connection.execute(update(entry).where(entry.c.sequence.in_(chosen)).values(sealed=None, attributes=None))
        connection.execute(delete(erasure).where(erasure.c.sequence.in_(chosen)))
    for gallery_id, rows in itertools.groupby(erased, lambda row: str(row.gallery_id)):
        sequences = [int(row.sequence) for row in rows]
        receipt_id, spans = open_receipt(transaction, ErasedKind.TEMPLATES, len(sequences), gallery_id, sequences)
        facts = {"count": len(sequences), "sequences": spans, "receipt": receipt_id}
        transaction.chain(SERVICE.name, "template.erased", gallery_id, facts)
    return len(erased)


def _erase_alerts(transaction: WriteTransaction, now_ms: int, most: int) -> None:
    connection = transaction.connection
    holds = standing(connection)
    columns = (alert.c.position, alert.c.alert_id, alert.c.deployment_id)
    past = select(*columns).where(alert.c.erase_at_ms <= now_ms, alert.c.held.is_(None))
    outlived = connection.execute(past.order_by(alert.c.position).limit(most)).all()
    kept = keep_alerts(transaction, [row.position for row in outlived], holds) if holds and outlived else set()
    for position, alert_id, deployment_id in outlived:
        if position not in kept:
            connection.execute(delete(alert).where(alert.c.position == position))
            transaction.chain(SERVICE.name, "alert.erased", alert_id, {})
            if deployment_id:
                transaction.count(records.authority_name(deployment_id, ""), "alerts_erased", 1)
    if len(outlived) > len(kept):
        open_receipt(transaction, ErasedKind.ALERTS, len(outlived) - len(kept))


def _erase_details(transaction: WriteTransaction, now_ms: int, most: int) -> None:
    connection = transaction.connection
    past = select(audit_record.c.position).where(audit_record.c.erase_at_ms <= now_ms, audit_record.c.held.is_(None))
    told = past.order_by(audit_record.c.position).limit(most)
    holds = standing(connection)
    if not holds:
        chosen = audit_record.c.position.in_(select(told.subquery().c.position))
    else:
        due = list(connection.execute(told).scalars())
        chosen = audit_record.c.position.in_(set(due) - keep_details(transaction, due, holds))
    erased = connection.execute(update(audit_record).where(chosen).values(sealed=None, erase_at_ms=None)).rowcount
    if erased:
        open_receipt(transaction, ErasedKind.AUDIT_DETAIL, erased)


def _drop_old_keys(transaction: WriteTransaction, now_ms: int, most: int) -> None:
    columns = (enrolment_key.c.gallery_id, enrolment_key.c.idempotency_key)
    old = select(*columns).where(enrolment_key.c.at_ms <= now_ms - transaction.terms.idempotency_window_ms)
    chosen = old.order_by(enrolment_key.c.at_ms).limit(most).subquery()
    transaction.connection.execute(delete(enrolment_key).where(tuple_(*columns).in_(select(*chosen.c))))
