"""Judgement of the writes by which references gain and lose their lawful ground, watchlists included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from sqlalchemy import func, select

from matcher_service import audit, records
from matcher_service.errors import Conflict, Gone, InvalidInput, NotFound
from matcher_service.gallery.names import check_name
from matcher_service.gallery.persons import same_person
from matcher_service.gallery.schema import entry, live
from matcher_service.gallery.transaction import Held, Note, Place, WriteTransaction
from matcher_service.terms import (
    ApproveWatchlist,
    Cause,
    EndGround,
    Enrol,
    EntryKind,
    Gallery,
    GalleryKind,
    Receipt,
    ReviewReference,
    WriteOutcome,
)


def approve_watchlist(transaction: WriteTransaction, write: ApproveWatchlist) -> Receipt:
    gallery = transaction.state.galleries[write.gallery_id]
    watchlist = gallery.watchlist
    if watchlist is None:
        raise Conflict(
            f"gallery {write.gallery_id} is no watchlist", field="gallery_id", hint="only watchlists are approved"
        )
    if bool(watchlist.approved_by) == write.approved:
        state = "approved already" if write.approved else "not approved"
        raise Conflict(f"watchlist {write.gallery_id} is {state}", field="gallery_id", hint="nothing to change")
    if write.approved and same_person(watchlist.author, write.approved_by):
        raise InvalidInput(
            "the author of a watchlist cannot approve it",
            field="approved_by",
            hint="an authorising officer other than its author approves it",
        )
    action = "watchlist.approved" if write.approved else "watchlist.reopened"
    detail = audit.canonical_detail({"by": write.approved_by, "reason": write.reason})
    note = Note(action, write.gallery_id, detail)
    sequence = transaction.change_catalogue(
        EntryKind.WATCHLIST_APPROVED, write.gallery_id, records.encode_approval(write), note
    )
    return Receipt(WriteOutcome.DONE, sequence)


def end_ground(transaction: WriteTransaction, write: EndGround) -> Receipt:
    """Withdraw what a subject has in the gallery, or in every custody gallery. As with a subject's withdrawal, that
    somebody asked is on record also if nothing was held."""
    check_name(write.subject_id, "subject_id")
    galleries = transaction.state.galleries
    custody = [one.gallery_id for one in galleries.values() if one.kind is GalleryKind.CUSTODY]
    reason = {"ground_ended": write.ground.value, "reason": write.reason}
    attributes = audit.canonical(reason)
    note = Note("ground.ended", write.gallery_id, audit.canonical({**reason, "subject_id": write.subject_id}))
    transaction.note(note)
    transaction.flush()
    held = select(live).where(
        live.c.subject_id == write.subject_id,
        live.c.expires_at_ms > transaction.at_ms,
        live.c.gallery_id.in_([write.gallery_id] if write.gallery_id else custody),
    )
    ended: list[Place] = []
    in_order = held.order_by(live.c.gallery_id, live.c.reference_id)
    for gallery_id, reference_id, *rest in transaction.connection.execute(in_order).all():
        place, one = (gallery_id, reference_id), Held(*rest)
        transaction.add_held(place, one)
        transaction.note(note, transaction.withdraw(place, one, attributes))
        ended.append(place)
    return Receipt(WriteOutcome.DONE, transaction.sequence, tuple(ended))


def review_reference(transaction: WriteTransaction, write: ReviewReference, nonce: bytes) -> Receipt:
    """Enrol the held template again, until the next review."""
    place = (write.gallery_id, write.reference_id)
    gallery = transaction.state.galleries[write.gallery_id]
    transaction.flush()
    row = transaction.connection.execute(
        select(*live.c, entry.c.sealed, entry.c.attributes)
        .join(entry, entry.c.sequence == live.c.sequence)
        .where(live.c.gallery_id == write.gallery_id, live.c.reference_id == write.reference_id)
    ).first()
    if row is None or row.expires_at_ms <= transaction.at_ms or row.sealed is None:
        raise NotFound(
            f"reference {write.reference_id} is not live in gallery {write.gallery_id}",
            field="reference_id",
            hint="one whose review is overdue is gone: enrol it again, if its ground stands",
        )
    _require_review_date(write.review_by_ms, gallery, transaction.at_ms)
    template = transaction.unsealed(row.sealed, write.gallery_id, write.reference_id, row.sequence)
    attributes = {"first_enrolled_at_ms": row.enrolled_at_ms, **json.loads(row.attributes or b"{}")}
    attributes["review_by_ms"] = write.review_by_ms
    # The retention counts from the first enrolment, and a date that was asked for stays: a review lengthens neither.
    latest_ms = attributes["first_enrolled_at_ms"] + gallery.retention_ms
    expires_at_ms = min(write.review_by_ms, latest_ms, attributes.get("expires_at_ms", latest_ms))
    held = Held(row.subject_id, row.sequence, row.enrolled_at_ms, row.expires_at_ms)
    transaction.add_held(place, held)
    again = Enrol(
        gallery_id=write.gallery_id,
        reference_id=write.reference_id,
        subject_id=row.subject_id,
        template=template,
        replace=True,
        attributes=audit.canonical(attributes),
    )
    sequence = transaction.enrol(again, expires_at_ms, nonce)
    detail = {"by": write.reviewed_by, "reason": write.reason, "review_by_ms": write.review_by_ms}
    transaction.note(Note("reference.reviewed", write.gallery_id, audit.canonical(detail)), sequence)
    return Receipt(WriteOutcome.REPLACED, sequence)


def _require_review_date(review_by_ms: int, gallery: Gallery, at_ms: int) -> None:
    if not at_ms < review_by_ms <= at_ms + gallery.review_interval_ms:
        raise InvalidInput(
            "the next review lies in the past, or further off than the gallery's review interval",
            field="review_by_ms",
            hint=f"between now and {gallery.review_interval_ms} ms from now",
        )


def require_own_watchlists(galleries: Mapping[str, Gallery], gallery_ids: Sequence[str], deployment_id: str) -> None:
    """Raise InvalidInput if one of the galleries is the watchlist of another deployment than this ("": of any)."""
    for gallery_id in gallery_ids:
        watchlist = galleries[gallery_id].watchlist
        if watchlist is not None and watchlist.deployment_id != deployment_id:
            raise InvalidInput(
                f"watchlist {gallery_id} was built for deployment {watchlist.deployment_id} alone",
                field="gallery_ids",
                hint="a watchlist is searched under its own deployment only; build another one",
            )


def require_open(gallery: Gallery) -> None:
    """Raise Conflict for an enrolment into a watchlist that is approved as it stands."""
    if gallery.watchlist is not None and gallery.watchlist.approved_by:
        raise Conflict(
            f"watchlist {gallery.gallery_id} is approved as it stands",
            field="gallery_id",
            hint="reopen it, enrol, and have it approved again",
        )


def require_room(gallery: Gallery, live_now: int) -> None:
    """Raise Conflict for an enrolment beyond what the gallery's threshold was calibrated for."""
    if gallery.size_max and live_now >= gallery.size_max:
        raise Conflict(
            f"gallery {gallery.gallery_id} is full: its threshold was calibrated for {gallery.size_max} references",
            field="reference_ids",
            cause=Cause.GALLERY_FULL,
            hint="withdraw references, or calibrate a threshold for a larger gallery and create one",
        )


def count_watchlist(transaction: WriteTransaction, gallery: Gallery) -> None:
    """Before a watchlist is destroyed, remember for the report how many were on it, and under which categories."""
    if gallery.watchlist is None:
        return
    transaction.flush()
    authority = records.authority_name(gallery.watchlist.deployment_id, "")
    held = select(entry.c.attributes).join(live, live.c.sequence == entry.c.sequence)
    for attributes in transaction.connection.execute(held.where(live.c.gallery_id == gallery.gallery_id)).scalars():
        transaction.count(authority, "watchlist_entries", 1)
        transaction.count(authority, f"category_{json.loads(attributes or b'{}').get('category', '')}", 1)


def count_live(transaction: WriteTransaction, gallery_id: str) -> int:
    transaction.flush()
    wanted = select(func.count()).select_from(live).where(live.c.gallery_id == gallery_id)
    return int(transaction.connection.execute(wanted).scalar_one())


def ended_with(transaction: WriteTransaction, deployment_id: str) -> list[str]:
    """The watchlists that end with a deployment."""
    galleries = transaction.state.galleries.values()
    return sorted(one.gallery_id for one in galleries if one.watchlist and one.watchlist.deployment_id == deployment_id)


def overdue(transaction: WriteTransaction, now_ms: int) -> tuple[Sequence[str], Sequence[str]]:
    """(deployments with a watchlist whose window has closed, watchlists that have outlived their own retention)."""
    state = transaction.state
    watchlists = [one for one in state.galleries.values() if one.watchlist is not None]
    outlived = [one.gallery_id for one in watchlists if one.created_at_ms + one.retention_ms <= now_ms]
    named = {one.watchlist.deployment_id for one in watchlists if one.watchlist is not None}
    # Those whose deployment ended while a legal hold stood on them wait for its release.
    outlived += [
        one.gallery_id for one in watchlists if one.watchlist and state.deployments.get(one.watchlist.deployment_id)
    ]
    closed = [one for one in sorted(named) if state.closes_at_ms.get(one, now_ms + 1) <= now_ms]
    return closed, outlived


def require_lawful_gallery(gallery: Gallery, deployments: Mapping[str, bool]) -> None:
    """Raise InvalidInput or Gone for a gallery whose terms contradict themselves."""
    if (gallery.kind is GalleryKind.WATCHLIST) != (gallery.watchlist is not None):
        raise InvalidInput(
            "a watchlist is built for one deployment, and nothing else is",
            field="watchlist",
            hint="give a gallery of kind watchlist its deployment_id, categories and author",
        )
    if gallery.watchlist is not None:
        if gallery.watchlist.approved_by:
            raise InvalidInput("a new watchlist is not approved", field="watchlist.approved_by", hint="leave it out")
        if deployments.get(gallery.watchlist.deployment_id, False):
            raise Gone(
                f"deployment {gallery.watchlist.deployment_id} has ended",
                field="watchlist.deployment_id",
                hint="build a watchlist for a deployment to come",
            )
