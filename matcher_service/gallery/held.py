"""What a legal hold that stands keeps from being erased."""

from __future__ import annotations

from sqlalchemy import ColumnElement, exists, or_, select

from matcher_service.errors import Conflict
from matcher_service.gallery.schema import entry, legal_hold
from matcher_service.gallery.transaction import WriteTransaction


def is_held() -> ColumnElement[bool]:
    """Of an entry: whether a hold that stands covers it."""
    return exists().where(
        legal_hold.c.released_at_ms.is_(None),
        legal_hold.c.subject_id == entry.c.subject_id,
        or_(legal_hold.c.gallery_id == "", legal_hold.c.gallery_id == entry.c.gallery_id),
    )


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
