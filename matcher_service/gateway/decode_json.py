"""JSON bodies to the same values as protobuf messages, through the same checks. Pure.

NaN and infinities are read, also as the bare words that many encoders write, and judged like those in bytes:
in a template they reject that probe only.
"""

from __future__ import annotations

import binascii
import math
import re
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from matcher_service.errors import InvalidInput, MatcherError
from matcher_service.gateway import decode
from matcher_service.gateway.json_bodies import (
    Body,
    CaseBody,
    DeploymentBody,
    EnrolBody,
    GalleryBody,
    GenuineTableBody,
    IdentifyBody,
    ScoreTableBody,
    SpaceBody,
    TemplateSpaceBody,
    ThresholdBody,
)
from matcher_service.settings import LimitSettings
from matcher_service.terms import (
    Actor,
    Case,
    Cause,
    ChangeThreshold,
    CreateGallery,
    Deployment,
    Dtype,
    EnrolMessage,
    Float32,
    Gallery,
    GenuineTable,
    Grounds,
    ProbeMessage,
    RateChange,
    ScoreTable,
    SpaceId,
    SpaceMap,
    TemplateSpace,
    Watchlist,
)

AnyBody = TypeVar("AnyBody", bound=Body)
T = TypeVar("T")

# A caller chooses the names of unknown fields; what is repeated of them is bounded.
FIELD_NAME_MAX = 200

_NUMBERS_HINT = "send a list of numbers, or base64 of little-endian values"


def body(kind: type[AnyBody], data: bytes) -> AnyBody:
    """Raises InvalidInput naming the first field at fault; never repeats what was sent."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise from_validation(error) from None


def from_validation(error: ValidationError) -> InvalidInput:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return of_kind(first["type"], first["loc"], first["msg"])


def of_kind(kind: str, location: Sequence[str | int], message: str) -> InvalidInput:
    """A pydantic complaint in our terms."""
    field = path(location)
    if kind == "json_invalid":
        return InvalidInput(message, cause=Cause.MALFORMED, hint="send one JSON object in UTF-8")
    if kind == "extra_forbidden":
        return InvalidInput(
            "no such field", field=field, cause=Cause.UNKNOWN_FIELD, hint="remove it, or check its spelling at /docs"
        )
    if field == "dtype":
        return InvalidInput(
            "the dtype is not known", field=field, cause=Cause.UNKNOWN_DTYPE, hint="use float32 or float16"
        )
    if kind == "missing":
        return InvalidInput("is required", field=field, hint="add the field; /docs shows the whole body")
    return InvalidInput(message, field=field, hint="/docs shows the whole body")


def path(location: Sequence[str | int]) -> str:
    """('probes', 3, 'template') to probes[3].template."""
    parts = [f"[{one}]" if isinstance(one, int) else f".{one}" for one in location]
    return "".join(parts).removeprefix(".")[:FIELD_NAME_MAX]


# Where a field of the wire messages stands in a JSON body: one object per row instead of parallel columns.
_COLUMN = re.compile(
    r"(templates|captured_at_ms|probe_ids|reference_ids|subject_ids|expires_at_ms"
    r"|sources|lawful_bases|reviews_by_ms|categories|reasons|qualities)\[(\d+)\]"
)
_IN_A_ROW = {
    "templates": "template",
    "probe_ids": "probe_id",
    "reference_ids": "reference_id",
    "subject_ids": "subject_id",
    "sources": "source",
    "lawful_bases": "lawful_basis",
    "reviews_by_ms": "review_by_ms",
    "categories": "category",
    "reasons": "reason",
    "qualities": "quality",
}


def field_in_body(field: str, rows: str) -> str:
    """templates[3] as a JSON body names it: probes[3].template, where `rows` is probes or references."""
    column = _COLUMN.fullmatch(field)
    if column is None:
        return field
    return f"{rows}[{column[2]}].{_IN_A_ROW.get(column[1], column[1])}"


@contextmanager
def naming_fields_of(rows: str) -> Iterator[None]:
    """Refusals that pass through name their field as the JSON body does."""
    try:
        yield
    except MatcherError as refusal:
        refusal.field = field_in_body(refusal.field, rows)
        raise


def probe_message(data: bytes, limits: LimitSettings, actor: Actor, received_at: float) -> ProbeMessage:
    """Raises InvalidInput or TooLarge for the whole message."""
    sent = body(IdentifyBody, data)
    probe_ids = [one.probe_id for one in sent.probes]
    decode.check_row_ids(probe_ids, "probes", limits, limits.probes_per_message_max, ".probe_id")
    decode.check_unique(probe_ids, "probes", Cause.DUPLICATE_PROBE_ID, ".probe_id")
    space = decode.checked_space(_space(sent.space), limits)
    return decode.checked_probe_message(
        limits,
        actor=actor,
        space=space,
        probe_ids=probe_ids,
        templates=_rows([one.template for one in sent.probes], "probes", Dtype(sent.dtype), space.dimension),
        captured_at_ms=np.array([one.captured_at_ms for one in sent.probes], dtype=np.int64),
        deployment_id=sent.deployment_id,
        case_reference=sent.case_reference,
        gallery_ids=tuple(sent.gallery_ids),
        threshold=sent.threshold,
        rank_max=sent.rank_max,
        min_sequence=sent.min_sequence,
        deadline_ms=sent.deadline_ms,
        message_id=sent.message_id,
        traceparent=sent.traceparent,
        camera_id=sent.camera_id,
        stream_nonce=_bytes(sent.stream_nonce, "stream_nonce"),
        stream_sequence=sent.stream_sequence,
        received_at=received_at,
        remaining_s=None,
    )


def enrol_message(
    data: bytes, gallery_id: str, limits: LimitSettings, actor: Actor, received_at: float
) -> EnrolMessage:
    """Raises InvalidInput or TooLarge for the whole message."""
    sent = body(EnrolBody, data)
    reference_ids = [one.reference_id for one in sent.references]
    subject_ids = [one.subject_id for one in sent.references]
    rows_max = limits.references_per_message_max
    decode.check_row_ids(reference_ids, "references", limits, rows_max, ".reference_id")
    decode.check_unique(reference_ids, "references", Cause.INVALID, ".reference_id")
    decode.check_row_ids(subject_ids, "references", limits, rows_max, ".subject_id")
    space = decode.checked_space(_space(sent.space), limits)
    return decode.checked_enrol_message(
        limits,
        actor=actor,
        gallery_id=gallery_id,
        space=space,
        reference_ids=reference_ids,
        subject_ids=subject_ids,
        templates=_rows([one.template for one in sent.references], "references", Dtype(sent.dtype), space.dimension),
        expires_at_ms=np.array([one.expires_at_ms for one in sent.references], dtype=np.int64),
        idempotency_key=sent.idempotency_key,
        replace=sent.replace,
        message_id=sent.message_id,
        received_at=received_at,
        remaining_s=None,
        grounds=_grounds(sent),
    )


def _grounds(sent: EnrolBody) -> Grounds:
    rows = sent.references
    columns = Grounds(
        source=sent.source,
        lawful_basis=sent.lawful_basis,
        review_by_ms=sent.review_by_ms,
        category=sent.category,
        reason=sent.reason,
        sources=_column([one.source for one in rows]),
        lawful_bases=_column([one.lawful_basis for one in rows]),
        reviews_by_ms=_column([one.review_by_ms for one in rows]),
        categories=_column([one.category for one in rows]),
        reasons=_column([one.reason for one in rows]),
        qualities=tuple(math.nan if one.quality is None else one.quality for one in rows)
        if any(one.quality is not None for one in rows)
        else (),
    )
    return decode.checked_grounds(columns, len(rows))


def _column(values: list[T]) -> tuple[T, ...]:
    """Nothing for a column that says nothing."""
    return tuple(values) if any(values) else ()


def gallery(data: bytes, author: str = "") -> CreateGallery:
    """The gallery; its threshold is NaN if a target is given for it. `author` is who signed in: the author of a
    watchlist is then that person, whatever the body says."""
    sent = body(GalleryBody, data)
    if (sent.threshold is None) == (sent.one_false_alert_in == 0):
        raise InvalidInput(
            "a gallery needs a threshold or a target for it",
            field="threshold",
            hint="give threshold, or one_false_alert_in with size_max",
        )
    held = Gallery(
        gallery_id=sent.gallery_id,
        kind=sent.kind,
        controller=sent.controller,
        lawful_basis=sent.lawful_basis,
        purpose=sent.purpose,
        retention_ms=sent.retention_ms,
        space=_space(sent.space),
        threshold=float("nan") if sent.threshold is None else sent.threshold,
        retention_rule=sent.retention_rule,
        review_interval_ms=sent.review_interval_ms,
        source=sent.source,
        quality_min=sent.quality_min,
        resembles_max=sent.resembles_max,
        size_max=sent.size_max,
        adjudicators=sent.adjudicators,
        watchlist=None
        if sent.watchlist is None
        else Watchlist(sent.watchlist.deployment_id, tuple(sent.watchlist.categories), author or sent.watchlist.author),
    )
    return CreateGallery(held, sent.one_false_alert_in)


def threshold_change(data: bytes, gallery_id: str) -> ChangeThreshold:
    sent = body(ThresholdBody, data)
    return ChangeThreshold(
        gallery_id=gallery_id,
        threshold=sent.threshold,
        reason=sent.reason,
        proposed_by=sent.proposed_by,
        approved_by=sent.approved_by,
        rates=tuple(RateChange(one.measure, one.group, one.before, one.after) for one in sent.rates),
    )


def template_space(data: bytes, limits: LimitSettings) -> TemplateSpace:
    sent = body(TemplateSpaceBody, data)
    space = decode.checked_space(_space(sent.space), limits)
    maps = []
    for at, one in enumerate(sent.maps):
        source = decode.checked_space(_space(one.source), limits, f"maps[{at}].source")
        values = _numbers(one.matrix, f"maps[{at}].matrix", Dtype.FLOAT32, space.dimension * source.dimension)
        maps.append(SpaceMap(source, values.reshape(space.dimension, source.dimension)))
    return TemplateSpace(
        id=space,
        centre=_numbers(sent.centre, "centre", Dtype.FLOAT32, space.dimension),
        maps=tuple(maps),
        score_table=None if sent.score_table is None else _score_table(sent.score_table),
    )


def _score_table(sent: ScoreTableBody) -> ScoreTable:
    scores, rates = np.array(sent.scores), np.array(sent.rates)
    if not (
        0 < len(scores) == len(rates)
        and np.isfinite(scores).all()
        and (np.diff(scores) > 0).all()
        and (np.diff(rates) <= 0).all()
        and ((rates > 0) & (rates <= 1)).all()
    ):
        raise InvalidInput(
            "not a score table",
            field="score_table",
            hint="give as many scores, ascending, as rates, non-increasing and in (0, 1]",
        )
    for field in ("estimates", "low_rates"):
        values = np.array(getattr(sent, field))
        if len(values) not in (0, len(scores)) or not ((values >= 0) & (values <= 1)).all():
            raise InvalidInput(
                "not rates at the table's scores",
                field=f"score_table.{field}",
                hint="leave it out, or give as many rates in [0, 1] as scores",
            )
    return ScoreTable(
        tuple(sent.scores),
        tuple(sent.rates),
        sent.method,
        tuple(sent.estimates),
        tuple(sent.low_rates),
        sent.confidence,
        None if sent.genuine is None else _genuine_table(sent.genuine),
    )


def _genuine_table(sent: GenuineTableBody) -> GenuineTable:
    return GenuineTable(
        tuple(sent.scores),
        tuple(sent.estimates),
        tuple(sent.low_rates),
        tuple(sent.high_rates),
        sent.confidence,
        sent.comparisons,
        sent.subjects,
    )


def deployment(data: bytes, now_ms: int, alert_retention_ms: int) -> Deployment:
    """`alert_retention_ms` is that of a deployment that names none: its record says it, whatever is set later."""
    sent = body(DeploymentBody, data)
    return Deployment(
        deployment_id=sent.deployment_id,
        gallery_ids=tuple(sent.gallery_ids),
        opens_at_ms=now_ms if sent.opens_at_ms is None else sent.opens_at_ms,
        closes_at_ms=sent.closes_at_ms,
        probe_age_ms_max=sent.probe_age_ms_max,
        authorised_by=sent.authorised_by,
        reason=sent.reason,
        place=sent.place,
        rank_max=sent.rank_max,
        cameras=tuple(sent.cameras),
        legal_authority=sent.legal_authority,
        necessity=sent.necessity,
        threshold=sent.threshold,
        alert_retention_ms=sent.alert_retention_ms or alert_retention_ms,
    )


def case(data: bytes, now_ms: int) -> Case:
    sent = body(CaseBody, data)
    return Case(
        case_reference=sent.case_reference,
        gallery_ids=tuple(sent.gallery_ids),
        opens_at_ms=now_ms if sent.opens_at_ms is None else sent.opens_at_ms,
        closes_at_ms=sent.closes_at_ms,
        requested_by=sent.requested_by,
        purpose=sent.purpose,
        rank_max=sent.rank_max,
        immigration_authority=sent.immigration_authority,
    )


def _bytes(text: str, field: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput("not base64", field=field, cause=Cause.MALFORMED, hint="send the bytes in base64") from error


def _space(sent: SpaceBody) -> SpaceId:
    return SpaceId(sent.name, sent.version, sent.dimension)


def _rows(templates: Sequence[Any], field: str, dtype: Dtype, dimension: int) -> Float32:
    """float32 [rows, dimension] of templates that each stand alone in the body."""
    rows = np.empty((len(templates), dimension), dtype=np.float32)
    for row, template in enumerate(templates):
        rows[row] = _numbers(template, f"{field}[{row}].template", dtype, dimension)
    return rows


def _numbers(sent: Any, field: str, dtype: Dtype, count: int) -> Float32:
    """float32 [count] of base64 bytes of `dtype`, or of a list of numbers, whose own precision is kept."""
    if isinstance(sent, str):
        try:
            data = b64decode(sent, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidInput("not base64", field=field, cause=Cause.MALFORMED, hint=_NUMBERS_HINT) from error
        row: Float32 = decode.templates_of(data, dtype, 1, count, field)[0]
        return row
    # Exact types: a bool is an int to Python, and numpy would read text and null as numbers.
    if not isinstance(sent, list) or not set(map(type, sent)) <= {int, float}:
        raise InvalidInput("not a list of numbers", field=field, hint=_NUMBERS_HINT)
    if len(sent) != count:
        raise InvalidInput(
            f"{len(sent)} numbers where the space's dimension asks for {count}",
            field=field,
            cause=Cause.WRONG_DIMENSION,
            hint="send as many numbers as the declared dimension",
        )
    try:
        with np.errstate(over="ignore"):  # beyond float32 is infinity, which rejects that row
            return np.array(sent, dtype=np.float32)
    except OverflowError:
        return np.full(count, np.inf, dtype=np.float32)
