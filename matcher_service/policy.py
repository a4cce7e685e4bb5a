"""Who may search what, and why not. Pure: a message and the catalogue in, a plan or a refusal out.

Every refusal names the field and what to do. The rules are versioned: POLICY_VERSION goes into every reply
and every alert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from matcher_service import lawful_galleries
from matcher_service.access import bands
from matcher_service.catalogue import Catalogue
from matcher_service.errors import Forbidden, Gone, InvalidInput, MatcherError, NotFound, StaleProbe
from matcher_service.terms import (
    Actor,
    Alert,
    Case,
    Cause,
    Deployment,
    Float32,
    Gallery,
    GalleryKind,
    ProbeMessage,
    SpaceId,
)

POLICY_VERSION = "1"

# An edge clock may run this far ahead; beyond it a capture time in the future would defeat the age limit.
CAPTURE_AHEAD_MS_MAX = 5_000

# Hard ceilings that no configuration lifts.
RETENTION_MS_MAX = 10 * 365 * 86_400_000
DEPLOYMENT_MS_MAX = 31 * 86_400_000
CASE_MS_MAX = 365 * 86_400_000
PROBE_AGE_MS_MAX = 3_600_000
EDGE_PROBES_PER_S_MAX = 100_000
PROPOSAL_MS_MAX = 7 * 86_400_000
ALERT_RETENTION_MS_MAX = 365 * 86_400_000

# More references than this in one withdrawal, or of one person in an hour, are a bulk withdrawal.
BULK_WITHDRAWAL_REFERENCES = 100
PROPOSED_REFERENCES_MAX = 10_000
CAMERAS_MAX = 256


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """What one message may do: galleries in id order, the threshold of each, and the limits that hold."""

    gallery_ids: tuple[str, ...]
    thresholds: tuple[float, ...]
    source: SpaceId
    target: SpaceId
    rank_max: int
    probe_age_ms_max: int | None
    kinds: frozenset[GalleryKind] = frozenset()
    custody_first: bool = False


def plan(message: ProbeMessage, catalogue: Catalogue, now_ms: int) -> SearchPlan:
    """Judge the message's authority, galleries, threshold and space at `now_ms`.

    Raises Forbidden, NotFound, Gone or InvalidInput.
    """
    authority = _authority(message, catalogue, now_ms)
    _require_camera(message, authority)
    bands.require_an_edge(message.actor, message.threshold)
    galleries = _galleries(message, authority, catalogue)
    target = galleries[0].space
    for gallery in galleries[1:]:
        if gallery.space != target:
            raise InvalidInput(
                f"galleries {galleries[0].gallery_id} and {gallery.gallery_id} are in different template spaces",
                field="gallery_ids",
                cause=Cause.WRONG_SPACE,
                hint="send one request per template space",
            )
    require_comparable(message.space, target, catalogue)
    if message.rank_max > authority.rank_max:
        raise Forbidden(
            f"rank_max {message.rank_max} exceeds the {authority.rank_max} that the authority allows",
            field="rank_max",
            cause=Cause.RANK_MAX,
            hint=f"ask for at most {authority.rank_max} candidates",
        )
    return SearchPlan(
        gallery_ids=tuple(gallery.gallery_id for gallery in galleries),
        thresholds=tuple(_threshold(message.threshold, gallery, authority) for gallery in galleries),
        source=message.space,
        target=target,
        rank_max=message.rank_max,
        probe_age_ms_max=authority.probe_age_ms_max if isinstance(authority, Deployment) else None,
        kinds=frozenset(gallery.kind for gallery in galleries),
        custody_first=isinstance(authority, Case) and _reaches_custody(authority, catalogue),
    )


def _authority(message: ProbeMessage, catalogue: Catalogue, now_ms: int) -> Deployment | Case:
    authority: Deployment | Case | None
    if message.deployment_id:
        field, name = "deployment_id", message.deployment_id
        authority = catalogue.deployments.get(name)
    elif message.case_reference:
        field, name = "case_reference", message.case_reference
        authority = catalogue.cases.get(name)
    else:
        raise InvalidInput(
            "a search needs an authority",
            field="deployment_id",
            hint="name the deployment_id or the case_reference under which you search",
        )
    if authority is None or not may_see(message.actor, authority):
        raise NotFound(f"no such {field} {name!r}", field=field, hint="create it first, or check its spelling")
    if authority.ended_at_ms is not None or now_ms >= authority.closes_at_ms:
        raise Gone(f"{field} {name!r} has ended", field=field, hint="search under a current authority")
    if now_ms < authority.opens_at_ms:
        raise Forbidden(f"{field} {name!r} has not begun", field=field, hint="wait for the start of its window")
    return authority


def may_see(actor: Actor, authority: Deployment | Case) -> bool:
    """Whether a deployment or case exists for this actor: an edge node's is its own, a person's one with a gallery
    that the person has rights over."""
    if actor.deployment_id:
        return isinstance(authority, Deployment) and authority.deployment_id == actor.deployment_id
    return actor.galleries is None or not actor.galleries.isdisjoint(authority.gallery_ids)


def may_see_alert(actor: Actor, alert: Alert) -> bool:
    """Whether an alert exists for this actor: of its own deployment, with candidates of its own galleries only."""
    if actor.deployment_id and alert.deployment_id != actor.deployment_id:
        return False
    return all(actor.has_rights_over(one.gallery_id) for one in alert.candidates)


def require_every_gallery(actor: Actor) -> None:
    """Raise Forbidden for who has rights over some galleries only: the audit is one chain, and shows them all."""
    if actor.galleries is not None:
        raise Forbidden(
            "the audit is one chain over every gallery",
            field="authorization",
            hint="it takes an auditor with rights over all galleries",
        )


def _require_camera(message: ProbeMessage, authority: Deployment | Case) -> None:
    cameras = message.actor.cameras or (authority.cameras if isinstance(authority, Deployment) else ())
    if cameras and message.camera_id not in cameras:
        raise Forbidden(
            f"camera {message.camera_id!r} is not one of the deployment's"
            if message.camera_id
            else "no camera is named",
            field="camera_id",
            hint=f"the deployment was authorised for {', '.join(cameras)}",
        )


def _galleries(message: ProbeMessage, authority: Deployment | Case, catalogue: Catalogue) -> list[Gallery]:
    allowed = [one for one in authority.gallery_ids if message.actor.has_rights_over(one)]
    standing = [one for one in allowed if one not in catalogue.deleted_galleries]
    named = message.gallery_ids or [one for one in standing if _unasked(one, authority, catalogue)] or standing
    galleries = []
    for gallery_id in sorted(set(named)):
        if gallery_id not in allowed:
            # The same answer whether or not such a gallery exists: its existence is not the caller's to learn.
            raise Forbidden(
                f"gallery {gallery_id!r} is not among those that the authority allows",
                field="gallery_ids",
                cause=Cause.UNKNOWN_GALLERY,
                hint=f"it allows {', '.join(sorted(allowed))}",
            )
        gallery = gallery_named(gallery_id, catalogue, field="gallery_ids")
        lawful_galleries.require_approved(gallery)
        if gallery.kind is GalleryKind.IMMIGRATION and isinstance(authority, Case):
            _require_immigration_authority(authority)
        galleries.append(gallery)
    if not galleries:
        raise Gone(
            "every gallery of the authority has been deleted",
            field="gallery_ids",
            cause=Cause.UNKNOWN_GALLERY,
            hint="create an authority over the galleries that exist",
        )
    return galleries


def _unasked(gallery_id: str, authority: Deployment | Case, catalogue: Catalogue) -> bool:
    """Whether a search that names no gallery goes there: a case's into an immigration gallery only when asked, or where
    it has no other."""
    gallery = catalogue.galleries.get(gallery_id)
    return isinstance(authority, Deployment) or gallery is None or gallery.kind is not GalleryKind.IMMIGRATION


def _reaches_custody(case: Case, catalogue: Catalogue) -> bool:
    held = (catalogue.galleries.get(one) for one in case.gallery_ids)
    return any(one is not None and one.kind is GalleryKind.CUSTODY for one in held)


def _require_immigration_authority(case: Case) -> None:
    if not case.immigration_authority:
        raise Forbidden(
            f"case {case.case_reference!r} has no authority for an immigration gallery",
            field="gallery_ids",
            hint="create a case that states its immigration_authority",
        )


def gallery_of(actor: Actor, gallery_id: str, catalogue: Catalogue, *, field: str = "gallery_id") -> Gallery:
    """The gallery, for an actor who has rights over it; for anybody else as if it never was."""
    if not actor.has_rights_over(gallery_id):
        raise no_gallery(gallery_id, field)
    return gallery_named(gallery_id, catalogue, field=field)


def gallery_named(gallery_id: str, catalogue: Catalogue, *, field: str = "gallery_id") -> Gallery:
    """The gallery of that id; raises Gone if it was deleted, NotFound if it never was."""
    gallery = catalogue.galleries.get(gallery_id)
    if gallery is not None:
        return gallery
    if gallery_id in catalogue.deleted_galleries:
        raise Gone(
            f"gallery {gallery_id!r} has been deleted",
            field=field,
            cause=Cause.UNKNOWN_GALLERY,
            hint="its references are withdrawn; name another gallery",
        )
    raise no_gallery(gallery_id, field)


def no_gallery(gallery_id: str, field: str) -> NotFound:
    return NotFound(
        f"no gallery {gallery_id!r}",
        field=field,
        cause=Cause.UNKNOWN_GALLERY,
        hint="list the galleries, or create it",
    )


def _threshold(asked: float | None, gallery: Gallery, authority: Deployment | Case) -> float:
    least = gallery.threshold
    if isinstance(authority, Deployment) and authority.threshold is not None:
        least = max(least, authority.threshold)
    if asked is None:
        return least
    # As float32, which is what the wire carries: a threshold read from a reply and sent back must hold.
    if np.float32(asked) < np.float32(least):
        raise InvalidInput(
            f"threshold {asked:g} is below the {least:g} of gallery {gallery.gallery_id}",
            field="threshold",
            cause=Cause.THRESHOLD_BELOW_FLOOR,
            hint="a request may only raise a threshold: leave it out, or ask for a higher one",
        )
    return max(asked, least)


def require_comparable(source: SpaceId, target: SpaceId, catalogue: Catalogue) -> None:
    """Raise InvalidInput (WRONG_DIMENSION or WRONG_SPACE) unless templates of `source` can enter `target`."""
    if source == target:
        return
    if source[:2] == target[:2]:
        raise InvalidInput(
            f"dimension {source.dimension}, but {target.name}/{target.version} has {target.dimension}",
            field="space.dimension",
            cause=Cause.WRONG_DIMENSION,
            hint=f"send templates of dimension {target.dimension}",
        )
    space = catalogue.spaces.get(target)
    mapped = {one.source for one in space.maps} if space is not None else set()
    if source not in mapped or source not in catalogue.spaces:
        raise InvalidInput(
            f"templates of {source} cannot be compared in {target}",
            field="space",
            cause=Cause.WRONG_SPACE,
            hint=f"compute templates with {target.name}/{target.version}, or register a map into it",
        )


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """`usable` bool [n]; `refusals` for the others, by row."""

    usable: NDArray[np.bool_]
    refusals: dict[int, MatcherError]

    @property
    def count(self) -> int:
        return int(self.usable.size) - len(self.refusals)


def judge_templates(templates: Float32) -> JudgedRows:
    """Rows [n, d] that are neither infinite, nor NaN, nor zero."""
    # Of each row the greatest magnitude, which is NaN or infinite if anything in it is: two passes, without a copy.
    peaks = np.maximum(templates.max(axis=1, initial=0.0), -templates.min(axis=1, initial=0.0))
    usable = np.asarray((peaks > 0) & (peaks < np.inf))
    if usable.all():
        return JudgedRows(usable, {})
    refusals: dict[int, MatcherError] = {
        int(row): InvalidInput(
            "the template holds NaN or infinity",
            field=f"templates[{row}]",
            cause=Cause.NOT_FINITE,
            hint="send finite numbers only",
        )
        for row in np.flatnonzero(~np.isfinite(peaks))
    }
    for row in np.flatnonzero(peaks == 0):
        refusals[int(row)] = zero_template(int(row))
    return JudgedRows(usable, refusals)


def zero_template(row: int) -> InvalidInput:
    """The refusal of a template that has no direction, as sent or after its space's centre was subtracted."""
    return InvalidInput(
        "the template is zero and has no direction",
        field=f"templates[{row}]",
        cause=Cause.ZERO_TEMPLATE,
        hint="no face was encoded: do not send it",
    )


def judge_probes(message: ProbeMessage, plan: SearchPlan, now_ms: int) -> JudgedRows:
    """As judge_templates, and for live probes the age at capture against the deployment's limit."""
    judged = judge_templates(message.templates)
    if plan.probe_age_ms_max is None:
        return judged
    age_ms = now_ms - message.captured_at_ms
    timely: NDArray[np.bool_] = (age_ms <= plan.probe_age_ms_max) & (age_ms >= -CAPTURE_AHEAD_MS_MAX)
    if timely.all():
        return judged
    refusals = dict(judged.refusals)
    for row in np.flatnonzero(judged.usable & ~timely):
        refusals[int(row)] = _untimely(int(row), int(age_ms[row]), plan.probe_age_ms_max)
    return JudgedRows(judged.usable & timely, refusals)


def _untimely(row: int, age_ms: int, age_ms_max: int) -> MatcherError:
    field = f"captured_at_ms[{row}]"
    if age_ms < 0:
        return InvalidInput(f"captured {-age_ms} ms in the future", field=field, hint="set the clock of the edge node")
    return StaleProbe(
        f"captured {age_ms} ms ago; the deployment allows {age_ms_max} ms",
        field=field,
        hint="send probes as they are captured; an old one never alerts as live",
    )


def require_id(value: str, field: str, id_bytes_max: int) -> None:
    """An identifier: 1 to id_bytes_max bytes of UTF-8, without control characters, slashes or outer blanks."""
    if (
        not value
        or len(value.encode()) > id_bytes_max
        or not value.isprintable()
        or "/" in value
        or value != value.strip()
    ):
        raise InvalidInput(
            f"not a usable identifier: {value[:40]!r}",
            field=field,
            hint=f"use 1 to {id_bytes_max} bytes of printable text without slashes or outer blanks",
        )


def require_ids(values: Sequence[str], field: str, id_bytes_max: int) -> dict[int, MatcherError]:
    """Refusals, by row, of the identifiers that are not usable."""
    joined = "".join(values)
    # The common case costs no Python per row: in ASCII characters are bytes, and there is no blank but the space.
    plain = joined.isascii() and joined.isprintable() and " " not in joined and "/" not in joined
    if plain and all(values) and max(map(len, values), default=0) <= id_bytes_max:
        return {}
    refusals: dict[int, MatcherError] = {}
    for row, value in enumerate(values):
        try:
            require_id(value, f"{field}[{row}]", id_bytes_max)
        except InvalidInput as refusal:
            refusals[row] = refusal
    return refusals


def floors(plan: SearchPlan, probes: int) -> Float32:
    """The thresholds of the plan for each probe, float32 [probes, galleries], none rounded down."""
    return _floors(plan.thresholds)[None].repeat(probes, axis=0)


@lru_cache(maxsize=256)
def _floors(thresholds: tuple[float, ...]) -> Float32:
    row = np.asarray(thresholds, dtype=np.float32)
    low = row.astype(np.float64) < np.asarray(thresholds)
    row[low] = np.nextafter(row[low], np.float32(np.inf))
    return row
