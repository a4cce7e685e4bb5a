"""Who may search what, and why not. Pure: a message and the catalogue in, a plan or a refusal out.

Every refusal names the field and what to do. The rules are versioned: POLICY_VERSION goes into every reply
and every alert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matcher_service.catalogue import Catalogue
from matcher_service.errors import Conflict, Forbidden, Gone, InvalidInput, MatcherError, NotFound, StaleProbe
from matcher_service.models.score_calibrator import check_table
from matcher_service.models.template_adapter import check_space
from matcher_service.terms import (
    Case,
    Cause,
    ChangeThreshold,
    CreateCase,
    CreateDeployment,
    CreateGallery,
    Deployment,
    Float32,
    Gallery,
    ProbeMessage,
    RegisterSpace,
    SpaceId,
    Write,
)

POLICY_VERSION = "1"

# An edge clock may run this far ahead; beyond it a capture time in the future would defeat the age limit.
CAPTURE_AHEAD_MS_MAX = 5_000

# Hard ceilings that no configuration lifts.
RETENTION_MS_MAX = 10 * 365 * 86_400_000
DEPLOYMENT_MS_MAX = 31 * 86_400_000
CASE_MS_MAX = 365 * 86_400_000
PROBE_AGE_MS_MAX = 3_600_000


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """What one message may do: galleries in id order, the threshold of each, and the limits that hold."""

    gallery_ids: tuple[str, ...]
    thresholds: tuple[float, ...]
    source: SpaceId
    target: SpaceId
    rank_max: int
    probe_age_ms_max: int | None


def plan(message: ProbeMessage, catalogue: Catalogue, now_ms: int) -> SearchPlan:
    """Judge the message's authority, galleries, threshold and space at `now_ms`.

    Raises Forbidden, NotFound, Gone or InvalidInput.
    """
    authority = _authority(message, catalogue, now_ms)
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
        thresholds=tuple(_threshold(message.threshold, gallery) for gallery in galleries),
        source=message.space,
        target=target,
        rank_max=message.rank_max,
        probe_age_ms_max=authority.probe_age_ms_max if isinstance(authority, Deployment) else None,
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
    if authority is None:
        raise NotFound(f"no such {field} {name!r}", field=field, hint="create it first, or check its spelling")
    if authority.ended_at_ms is not None or now_ms >= authority.closes_at_ms:
        raise Gone(f"{field} {name!r} has ended", field=field, hint="search under a current authority")
    if now_ms < authority.opens_at_ms:
        raise Forbidden(f"{field} {name!r} has not begun", field=field, hint="wait for the start of its window")
    return authority


def _galleries(message: ProbeMessage, authority: Deployment | Case, catalogue: Catalogue) -> list[Gallery]:
    named = message.gallery_ids or tuple(
        gallery_id for gallery_id in authority.gallery_ids if gallery_id not in catalogue.deleted_galleries
    )
    galleries = []
    for gallery_id in sorted(set(named)):
        if gallery_id not in authority.gallery_ids:
            # The same answer whether or not such a gallery exists: its existence is not the caller's to learn.
            raise Forbidden(
                f"gallery {gallery_id!r} is not among those that the authority allows",
                field="gallery_ids",
                cause=Cause.UNKNOWN_GALLERY,
                hint=f"it allows {', '.join(sorted(authority.gallery_ids))}",
            )
        galleries.append(gallery_named(gallery_id, catalogue, field="gallery_ids"))
    if not galleries:
        raise Gone(
            "every gallery of the authority has been deleted",
            field="gallery_ids",
            cause=Cause.UNKNOWN_GALLERY,
            hint="create an authority over the galleries that exist",
        )
    return galleries


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
    raise NotFound(
        f"no gallery {gallery_id!r}",
        field=field,
        cause=Cause.UNKNOWN_GALLERY,
        hint="list the galleries, or create it",
    )


def _threshold(asked: float | None, gallery: Gallery) -> float:
    if asked is None:
        return gallery.threshold
    # As float32, which is what the wire carries: a threshold read from a reply and sent back must hold.
    if np.float32(asked) < np.float32(gallery.threshold):
        raise InvalidInput(
            f"threshold {asked:g} is below the {gallery.threshold:g} of gallery {gallery.gallery_id}",
            field="threshold",
            cause=Cause.THRESHOLD_BELOW_FLOOR,
            hint="a request may only raise a threshold: leave it out, or ask for a higher one",
        )
    return max(asked, gallery.threshold)


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
    usable = np.asarray(np.isfinite(templates).all(axis=1))
    refusals: dict[int, MatcherError] = {
        int(row): InvalidInput(
            "the template holds NaN or infinity",
            field=f"templates[{row}]",
            cause=Cause.NOT_FINITE,
            hint="send finite numbers only",
        )
        for row in np.flatnonzero(~usable)
    }
    some = np.asarray(templates.any(axis=1))
    for row in np.flatnonzero(usable & ~some):
        refusals[int(row)] = zero_template(int(row))
    return JudgedRows(usable & some, refusals)


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


# --- writes ----------------------------------------------------------------------------------------


def judge_change(write: Write, catalogue: Catalogue, id_bytes_max: int, dimension_max: int, now_ms: int) -> None:
    """Judge a catalogue write before it is offered to the log; raises InvalidInput, NotFound or Conflict."""
    match write:
        case CreateGallery(gallery):
            _judge_gallery(gallery, catalogue, id_bytes_max)
        case CreateDeployment(deployment):
            _judge_window(
                deployment, deployment.deployment_id, "deployment_id", DEPLOYMENT_MS_MAX, now_ms, id_bytes_max
            )
            _require_text(deployment.authorised_by, "authorised_by", id_bytes_max)
            _require_text(deployment.reason, "reason", 4096)
            if not 1 <= deployment.probe_age_ms_max <= PROBE_AGE_MS_MAX:
                raise InvalidInput(
                    f"{deployment.probe_age_ms_max} is not between 1 and {PROBE_AGE_MS_MAX}",
                    field="probe_age_ms_max",
                    hint="say how old a live probe may be",
                )
            _require_unused(deployment.deployment_id, catalogue.deployments, "deployment_id")
            _require_galleries(deployment.gallery_ids, catalogue)
        case CreateCase(case):
            _judge_window(case, case.case_reference, "case_reference", CASE_MS_MAX, now_ms, id_bytes_max)
            _require_text(case.requested_by, "requested_by", id_bytes_max)
            _require_text(case.purpose, "purpose", 4096)
            _require_unused(case.case_reference, catalogue.cases, "case_reference")
            _require_galleries(case.gallery_ids, catalogue)
        case ChangeThreshold():
            _judge_threshold_change(write, catalogue, id_bytes_max)
        case RegisterSpace(space):
            _require_text(space.id.name, "name", id_bytes_max)
            if not 2 <= space.id.dimension <= dimension_max:
                raise InvalidInput(
                    f"{space.id.dimension} is not between 2 and {dimension_max}",
                    field="dimension",
                    cause=Cause.WRONG_DIMENSION,
                    hint="give the length of the model's templates",
                )
            check_space(space)
            if space.score_table is not None:
                check_table(space.score_table)
        case _:
            pass


def _judge_gallery(gallery: Gallery, catalogue: Catalogue, id_bytes_max: int) -> None:
    require_id(gallery.gallery_id, "gallery_id", id_bytes_max)
    for field in ("controller", "lawful_basis", "purpose"):
        _require_text(getattr(gallery, field), field, 4096)
    if not 1 <= gallery.retention_ms <= RETENTION_MS_MAX:
        raise InvalidInput(
            f"{gallery.retention_ms} is not between 1 and {RETENTION_MS_MAX} ms",
            field="retention_ms",
            hint="say for how long a reference may be kept",
        )
    if not -1.0 <= gallery.threshold <= 1.0:
        raise InvalidInput(
            f"{gallery.threshold:g} is not between -1 and 1",
            field="threshold",
            hint="a score is a cosine; set the threshold from a target false-match rate",
        )
    if gallery.space not in catalogue.spaces:
        raise NotFound(
            f"template space {gallery.space} is not registered",
            field="space",
            cause=Cause.WRONG_SPACE,
            hint="register the space with its centre first",
        )


def _judge_threshold_change(change: ChangeThreshold, catalogue: Catalogue, id_bytes_max: int) -> None:
    gallery = gallery_named(change.gallery_id, catalogue)
    if not -1.0 <= change.threshold <= 1.0:
        raise InvalidInput(
            f"{change.threshold:g} is not between -1 and 1", field="threshold", hint="a score is a cosine"
        )
    if change.threshold == gallery.threshold:
        raise Conflict(f"the threshold is {change.threshold:g} already", field="threshold", hint="nothing to change")
    _require_text(change.reason, "reason", 4096)
    _require_text(change.proposed_by, "proposed_by", id_bytes_max)
    _require_text(change.approved_by, "approved_by", id_bytes_max)
    for row, one in enumerate(change.rates):
        if one.measure not in ("FPIR", "FNIR") or not (0 <= one.before <= 1 and 0 <= one.after <= 1):
            raise InvalidInput(
                "not an error rate before and after", field=f"rates[{row}]", hint="give FPIR or FNIR, from 0 to 1"
            )
    told = {one.measure for one in change.rates if not one.group}
    if told != {"FPIR", "FNIR"}:
        raise InvalidInput(
            "a threshold changes both error rates, and both must be told",
            field="rates",
            hint="give FPIR and FNIR over all people before and after, as `matcher evaluate` measures them",
        )


def _judge_window(
    authority: Deployment | Case, name: str, field: str, ms_max: int, now_ms: int, id_bytes_max: int
) -> None:
    require_id(name, field, id_bytes_max)
    length = authority.closes_at_ms - authority.opens_at_ms
    if not 0 < length <= ms_max or authority.closes_at_ms <= now_ms:
        raise InvalidInput(
            f"the window must end in the future, after it opens, and span at most {ms_max // 86_400_000} days",
            field="closes_at_ms",
            hint="give opens_at_ms and closes_at_ms in milliseconds since 1970",
        )
    if authority.rank_max < 1 or authority.rank_max > 1000:
        raise InvalidInput(
            f"{authority.rank_max} is not between 1 and 1000",
            field="rank_max",
            cause=Cause.RANK_MAX,
            hint="say how many candidates a search may return",
        )


def _require_galleries(gallery_ids: Sequence[str], catalogue: Catalogue) -> None:
    if not gallery_ids:
        raise InvalidInput("no gallery named", field="gallery_ids", cause=Cause.EMPTY, hint="name at least one")
    for gallery_id in gallery_ids:
        gallery_named(gallery_id, catalogue, field="gallery_ids")


def _require_unused(name: str, taken: object, field: str) -> None:
    if name in taken:  # type: ignore[operator]
        raise Conflict(f"{name!r} exists already", field=field, hint="choose another; an authority is never rewritten")


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


def _require_text(value: str, field: str, bytes_max: int) -> None:
    if not value.strip() or len(value.encode()) > bytes_max:
        raise InvalidInput(
            "must say something" if not value.strip() else f"longer than {bytes_max} bytes",
            field=field,
            hint="a gallery, deployment or case cannot exist without it",
        )


def require_ids(values: Sequence[str], field: str, id_bytes_max: int) -> dict[int, MatcherError]:
    """Refusals, by row, of the identifiers that are not usable."""
    refusals: dict[int, MatcherError] = {}
    for row, value in enumerate(values):
        try:
            require_id(value, f"{field}[{row}]", id_bytes_max)
        except InvalidInput as refusal:
            refusals[row] = refusal
    return refusals


def floors(plan: SearchPlan, probes: int) -> Float32:
    """The thresholds of the plan for each probe, float32 [probes, galleries], none rounded down."""
    row = np.asarray(plan.thresholds, dtype=np.float32)
    low = row.astype(np.float64) < np.asarray(plan.thresholds)
    row[low] = np.nextafter(row[low], np.float32(np.inf))
    return np.broadcast_to(row, (probes, row.size))
