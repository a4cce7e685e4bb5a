"""What each reference of a message rests on: judged, turned into dates, and put into what the log keeps. Pure.

A reference that says nothing of itself rests on what its gallery says: its source, its lawful basis, its review
interval. Then nothing is stored beside it either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

from matcher_service.errors import Gone, InvalidInput, MatcherError
from matcher_service.terms import Category, Cause, EnrolMessage, Gallery, GalleryKind, Grounds, Int64, Reference

TEXT_BYTES_MAX = 1024

_NOTHING = Grounds()
_FOR_EVER = np.iinfo(np.int64).max


class Standing(NamedTuple):
    """`expires_at_ms` int64 [n], with the review dates in it; `attributes` for each row, or empty; what speaks against
    rows."""

    expires_at_ms: Int64
    attributes: Sequence[bytes]
    refusals: dict[int, MatcherError]


def judged(message: EnrolMessage, gallery: Gallery, now_ms: int) -> Standing:
    """A review that is due ends a reference as its expiry does, so both become one date, the earlier."""
    grounds, count = message.grounds, len(message.reference_ids)
    if grounds == _NOTHING and not gallery.quality_min and gallery.watchlist is None:
        return Standing(message.expires_at_ms, (), {})
    refusals: dict[int, MatcherError] = {}
    _judge_quality(grounds, gallery, count, refusals)
    reviews = _column(grounds.reviews_by_ms, grounds.review_by_ms, count)
    review_by_ms: Int64 = np.asarray(reviews, np.int64)
    given = review_by_ms > 0
    for row in np.flatnonzero(given & (review_by_ms <= now_ms)).tolist():
        refusals[row] = Gone(
            "its review is overdue: there is no retained ground to search it",
            field=f"reviews_by_ms[{row}]",
            cause=Cause.EXPIRED,
            hint="review it, and give the date of the next review",
        )
    for row in np.flatnonzero(given & (review_by_ms > now_ms + gallery.review_interval_ms)).tolist():
        refusals[row] = InvalidInput(
            "its review is further off than the gallery's review interval",
            field=f"reviews_by_ms[{row}]",
            hint=f"at most {gallery.review_interval_ms} ms from now",
        )
    if gallery.watchlist is not None:
        _judge_entries(grounds, gallery.watchlist.categories, count, refusals)
    expires: Int64 = np.where(message.expires_at_ms > 0, message.expires_at_ms, _FOR_EVER)
    first: Int64 = np.minimum(expires, np.where(given, review_by_ms, _FOR_EVER))
    return Standing(
        np.where(first == _FOR_EVER, 0, first), _attributes(grounds, review_by_ms, message.expires_at_ms), refusals
    )


def _judge_quality(grounds: Grounds, gallery: Gallery, count: int, refusals: dict[int, MatcherError]) -> None:
    if not gallery.quality_min:
        return
    qualities = np.asarray(_column(grounds.qualities, float("nan"), count), np.float32)
    # NaN, an unknown quality, is not at least anything. As float32, which is what the wire carries.
    for row in np.flatnonzero(~(qualities >= np.float32(gallery.quality_min))).tolist():
        known = f"quality {qualities[row]:.3g}" if qualities[row] == qualities[row] else "no quality"
        refusals[row] = InvalidInput(
            f"{known}; gallery {gallery.gallery_id} asks for at least {gallery.quality_min:g}",
            field=f"qualities[{row}]",
            cause=Cause.LOW_QUALITY,
            hint="enrol a better picture: no threshold makes up for a poor reference",
        )


def _judge_entries(
    grounds: Grounds, categories: Sequence[Category], count: int, refusals: dict[int, MatcherError]
) -> None:
    """Everybody on a watchlist is there for a reason of the closed list, and their picture has a lawful source."""
    allowed = {one.value for one in categories}
    for name, field, values in (
        ("category", "categories", _column(grounds.categories, grounds.category, count)),
        ("reason", "reasons", _column(grounds.reasons, grounds.reason, count)),
        ("source", "sources", _column(grounds.sources, grounds.source, count)),
    ):
        for row, value in enumerate(values):
            if not str(value).strip():
                refusals[row] = InvalidInput(
                    f"an entry of a watchlist without a {name}",
                    field=f"{field}[{row}]",
                    hint="every entry has a category, a reason and a lawful source",
                )
            elif field == "categories" and value not in allowed:
                refusals[row] = InvalidInput(
                    f"{value!r} is no category of this watchlist",
                    field=f"{field}[{row}]",
                    hint=f"it was built for {', '.join(sorted(allowed))}",
                )


def _column(column: Sequence[Any], default: Any, count: int) -> Sequence[Any]:
    """The column with the message's value where it is empty."""
    return [one or default for one in column] if column else [default] * count


def _attributes(grounds: Grounds, review_by_ms: Int64, expires_at_ms: Int64) -> Sequence[bytes]:
    count = len(review_by_ms)
    texts = {
        "source": _column(grounds.sources, grounds.source, count),
        "lawful_basis": _column(grounds.lawful_bases, grounds.lawful_basis, count),
        "category": _column(grounds.categories, grounds.category, count),
        "reason": _column(grounds.reasons, grounds.reason, count),
        "review_by_ms": review_by_ms.tolist(),
        # A date of its own, which no review moves.
        "expires_at_ms": expires_at_ms.tolist(),
    }
    if grounds.qualities:
        texts["quality"] = [None if one != one else round(float(one), 4) for one in grounds.qualities]
    told = {name: column for name, column in texts.items() if any(one or one == 0.0 for one in column)}
    same = all(column.count(column[0]) == count for column in map(list, told.values()))
    rows = [{name: column[row] for name, column in told.items() if column[row]} for row in range(1 if same else count)]
    encoded = [orjson.dumps(row) if row else b"" for row in rows]
    return encoded * count if same else encoded


def described(reference: Reference, gallery: Gallery | None) -> dict[str, Any]:
    """What a reference rests on, its gallery's word standing where it has none of its own. `review_by_ms` is when its
    ground is to be looked at again, and until when it is searched at most."""
    own: dict[str, Any] = orjson.loads(reference.attributes) if reference.attributes else {}
    interval_ms = gallery.review_interval_ms if gallery else 0
    return {
        "source": own.get("source") or (source_of(gallery) if gallery else ""),
        "lawful_basis": own.get("lawful_basis") or (gallery.lawful_basis if gallery else ""),
        "review_by_ms": own.get("review_by_ms") or reference.enrolled_at_ms + interval_ms,
        "quality": own.get("quality"),
        **{name: own[name] for name in ("category", "reason") if name in own},
    }


def source_of(gallery: Gallery) -> str:
    """Where its references come from if they do not say: on a watchlist each of them says."""
    if gallery.source or gallery.kind is GalleryKind.WATCHLIST:
        return gallery.source
    return f"records of {gallery.controller}"
