"""What a gallery must say of itself before it may exist, and the ceilings that no configuration lifts. Pure.

Sources: the notes beside each row of docs/ACCOUNTABILITY.md.
"""

from __future__ import annotations

from matcher_service.errors import Forbidden, InvalidInput
from matcher_service.terms import ApproveWatchlist, Cause, EndGround, Gallery, GalleryKind, ReviewReference

DAY_MS = 86_400_000

# The first review of custody images is due after six years at the latest.
REVIEW_INTERVAL_MS_MAX = 6 * 366 * DAY_MS
# A watchlist lives no longer than the longest deployment.
WATCHLIST_MS_MAX = 31 * DAY_MS
WATCHLIST_SIZE_MAX = 100_000
RESEMBLES_MAX = 1000


def judge_terms(gallery: Gallery, text_bytes_max: int = 4096) -> None:
    """Raise InvalidInput naming the term that is missing or beyond its ceiling."""
    interval_ms = gallery.review_interval_ms
    if not 1 <= interval_ms <= min(gallery.retention_ms, REVIEW_INTERVAL_MS_MAX):
        raise _out_of_range(
            interval_ms,
            "review_interval_ms",
            f"say after how long each reference is reviewed, at most its retention and {REVIEW_INTERVAL_MS_MAX} ms",
        )
    for field in ("retention_rule", "source"):
        if len(getattr(gallery, field).encode(errors="replace")) > text_bytes_max:
            raise _out_of_range("the text", field, f"at most {text_bytes_max} bytes")
    if not 0.0 <= gallery.quality_min <= 1.0:
        raise _out_of_range(gallery.quality_min, "quality_min", "a quality is from 0 to 1")
    if not 0 <= gallery.resembles_max <= RESEMBLES_MAX:
        raise _out_of_range(gallery.resembles_max, "resembles_max", f"from 1 to {RESEMBLES_MAX}; 0 makes no check")
    if gallery.size_max < 0:
        raise _out_of_range(gallery.size_max, "size_max", "how many references the threshold was calibrated for")
    if gallery.adjudicators not in (1, 2):
        raise _out_of_range(gallery.adjudicators, "adjudicators", "one person, or two")
    if gallery.kind is GalleryKind.WATCHLIST or gallery.watchlist is not None:
        _judge_watchlist(gallery)


def _judge_watchlist(gallery: Gallery) -> None:
    watchlist = gallery.watchlist
    if watchlist is None or gallery.kind is not GalleryKind.WATCHLIST:
        raise InvalidInput(
            "a watchlist is built for one deployment, and nothing else is",
            field="watchlist",
            hint="give a gallery of kind watchlist its deployment_id, categories and author, and no other gallery any",
        )
    if not watchlist.deployment_id:
        raise InvalidInput("it names no deployment", field="watchlist.deployment_id", hint="one deployment, to come")
    if not watchlist.author.strip():
        raise InvalidInput("it has no author", field="watchlist.author", hint="say who built it")
    if not watchlist.categories:
        raise InvalidInput("it has no category", field="watchlist.categories", hint="name those it is built from")
    if gallery.retention_ms > WATCHLIST_MS_MAX:
        raise _out_of_range(gallery.retention_ms, "retention_ms", f"a watchlist lives at most {WATCHLIST_MS_MAX} ms")
    if not 1 <= gallery.size_max <= WATCHLIST_SIZE_MAX:
        raise _out_of_range(
            gallery.size_max,
            "size_max",
            f"how many people its threshold was calibrated for, 1 to {WATCHLIST_SIZE_MAX}",
        )


def require_approved(gallery: Gallery) -> None:
    """Raise Forbidden for a search in a watchlist that nobody but its author stands for."""
    if gallery.kind is GalleryKind.WATCHLIST and (gallery.watchlist is None or not gallery.watchlist.approved_by):
        raise Forbidden(
            f"watchlist {gallery.gallery_id} has not been approved",
            field="gallery_ids",
            cause=Cause.NOT_APPROVED,
            hint="an authorising officer other than its author approves it before it is searched",
        )


def judge_words(write: ApproveWatchlist | EndGround | ReviewReference) -> None:
    """Raise InvalidInput for a write without its reason, or without the person who stands for it."""
    if not write.reason.strip() or len(write.reason.encode(errors="replace")) > 4096:
        raise InvalidInput("a reason is needed", field="reason", hint="say why, in at most 4096 bytes")
    for field in ("approved_by", "reviewed_by"):
        if not getattr(write, field, "somebody").strip():
            raise InvalidInput("nobody is named", field=field, hint="name the person who decided")


def _out_of_range(value: object, field: str, hint: str) -> InvalidInput:
    return InvalidInput(f"{value} is out of range", field=field, hint=hint)
