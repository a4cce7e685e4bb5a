"""Wire messages to the values of the flows. Pure; checks form only, never authority.

Templates go from bytes to an array view in bulk and never through Python numbers. Every refusal names the
field, the cause and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from matcher_service.errors import InvalidInput, TooLarge
from matcher_service.halves import widened
from matcher_service.settings import LimitSettings
from matcher_service.terms import (
    Actor,
    Cause,
    Dtype,
    EnrolMessage,
    Float32,
    Grounds,
    Int64,
    ProbeMessage,
    SpaceId,
)
from matcher_service.wire import matcher_pb2 as pb

Message = TypeVar("Message", pb.IdentifyRequest, pb.EnrolRequest, pb.WithdrawRequest, pb.WatchAlertsRequest)

GALLERIES_PER_MESSAGE_MAX = 256
TRACEPARENT_BYTES_MAX = 128
GROUND_BYTES_MAX = 1024
NO_GROUNDS = Grounds()

_DTYPES = {pb.FLOAT32: Dtype.FLOAT32, pb.FLOAT16: Dtype.FLOAT16}
_LITTLE_ENDIAN: dict[Dtype, np.dtype[Any]] = {Dtype.FLOAT32: np.dtype("<f4"), Dtype.FLOAT16: np.dtype("<f2")}


def parse(kind: type[Message], data: bytes) -> Message:
    """A protobuf message from its bytes; raises InvalidInput (MALFORMED)."""
    try:
        return kind.FromString(data)
    except Exception as error:  # protobuf's DecodeError, and UnicodeDecodeError for a string that is not UTF-8
        raise InvalidInput(
            f"the message is not a matcher.v1.{kind.DESCRIPTOR.name}",
            cause=Cause.MALFORMED,
            hint="encode it with the published matcher.proto; strings are UTF-8",
        ) from error


def probe_message(
    request: pb.IdentifyRequest,
    limits: LimitSettings,
    actor: Actor,
    received_at: float,
    remaining_s: float | None = None,
) -> ProbeMessage:
    """`remaining_s` is what the transport's own deadline leaves (None: it has none).

    Raises InvalidInput or TooLarge for the whole message.
    """
    probe_ids = list(request.probe_ids)
    check_row_ids(probe_ids, "probe_ids", limits, limits.probes_per_message_max)
    check_unique(probe_ids, "probe_ids", Cause.DUPLICATE_PROBE_ID)
    space = space_of(request.space, request.HasField("space"), limits)
    templates = templates_of(request.templates, _dtype(request.dtype), len(probe_ids), space.dimension)
    return checked_probe_message(
        limits,
        actor=actor,
        space=space,
        probe_ids=probe_ids,
        templates=templates,
        captured_at_ms=_times(request.captured_at_ms, len(probe_ids), "captured_at_ms"),
        deployment_id=request.deployment_id,
        case_reference=request.case_reference,
        gallery_ids=tuple(request.gallery_ids),
        threshold=request.threshold if request.HasField("threshold") else None,
        rank_max=request.rank_max,
        min_sequence=request.min_sequence,
        deadline_ms=request.deadline_ms,
        message_id=request.message_id,
        traceparent=request.traceparent,
        camera_id=request.camera_id,
        stream_nonce=request.stream_nonce,
        stream_sequence=request.stream_sequence,
        received_at=received_at,
        remaining_s=remaining_s,
    )


def checked_probe_message(
    limits: LimitSettings,
    *,
    actor: Actor,
    space: SpaceId,
    probe_ids: Sequence[str],
    templates: Float32,
    captured_at_ms: Int64,
    deployment_id: str,
    case_reference: str,
    gallery_ids: tuple[str, ...],
    threshold: float | None,
    rank_max: int,
    min_sequence: int,
    deadline_ms: int,
    message_id: str,
    traceparent: str,
    camera_id: str,
    stream_nonce: bytes,
    stream_sequence: int,
    received_at: float,
    remaining_s: float | None,
) -> ProbeMessage:
    """The checks that both codecs share, on what stands once per message."""
    if bool(deployment_id) == bool(case_reference):
        raise InvalidInput(
            "both a deployment and a case are named" if deployment_id else "neither a deployment nor a case is named",
            field="deployment_id",
            hint="name exactly one of deployment_id and case_reference: a search needs one authority",
        )
    check_id(deployment_id or case_reference, "deployment_id" if deployment_id else "case_reference", limits)
    if len(gallery_ids) > GALLERIES_PER_MESSAGE_MAX:
        raise TooLarge(
            f"{len(gallery_ids)} galleries; a message may name {GALLERIES_PER_MESSAGE_MAX}",
            field="gallery_ids",
            cause=Cause.TOO_MANY,
            hint="name fewer galleries, or none for all that the authority allows",
        )
    for gallery_id in gallery_ids:
        check_id(gallery_id, "gallery_ids", limits)
    check_unique(gallery_ids, "gallery_ids", Cause.INVALID)
    # Written so that NaN fails.
    if threshold is not None and not -1.0 <= threshold <= 1.0:
        raise InvalidInput(
            "the threshold is not between -1 and 1", field="threshold", hint="a score is a cosine; leave it out "
            "to use the galleries' own thresholds"
        )  # fmt: skip
    if not 0 <= rank_max <= limits.rank_max_max:
        raise InvalidInput(
            f"rank_max {rank_max} is not between 1 and {limits.rank_max_max}",
            field="rank_max",
            cause=Cause.RANK_MAX,
            hint=f"ask for at most {limits.rank_max_max} candidates; 0 means 1",
        )
    check_echoed(message_id, "message_id", limits.id_bytes_max)
    check_echoed(traceparent, "traceparent", TRACEPARENT_BYTES_MAX)
    if camera_id:
        check_id(camera_id, "camera_id", limits)
    return ProbeMessage(
        actor=actor,
        space=space,
        probe_ids=probe_ids,
        templates=templates,
        captured_at_ms=captured_at_ms,
        deployment_id=deployment_id,
        case_reference=case_reference,
        gallery_ids=gallery_ids,
        threshold=threshold,
        rank_max=rank_max or 1,
        min_sequence=min_sequence,
        received_at=received_at,
        deadline=deadline_at(deadline_ms, limits, received_at, remaining_s),
        message_id=message_id,
        traceparent=traceparent,
        camera_id=camera_id,
        stream_nonce=stream_nonce,
        stream_sequence=stream_sequence,
    )


def enrol_message(
    request: pb.EnrolRequest,
    limits: LimitSettings,
    actor: Actor,
    received_at: float,
    remaining_s: float | None = None,
) -> EnrolMessage:
    """Raises InvalidInput or TooLarge for the whole message."""
    reference_ids, subject_ids = list(request.reference_ids), list(request.subject_ids)
    check_row_ids(reference_ids, "reference_ids", limits, limits.references_per_message_max)
    check_unique(reference_ids, "reference_ids", Cause.INVALID)
    check_parallel(len(subject_ids), len(reference_ids), "subject_ids")
    check_row_ids(subject_ids, "subject_ids", limits, limits.references_per_message_max)
    space = space_of(request.space, request.HasField("space"), limits)
    templates = templates_of(request.templates, _dtype(request.dtype), len(reference_ids), space.dimension)
    if request.expires_at_ms:
        expires_at_ms = _times(request.expires_at_ms, len(reference_ids), "expires_at_ms")
    else:
        expires_at_ms = np.zeros(len(reference_ids), np.int64)
    return checked_enrol_message(
        limits,
        actor=actor,
        gallery_id=request.gallery_id,
        space=space,
        reference_ids=reference_ids,
        subject_ids=subject_ids,
        templates=templates,
        expires_at_ms=expires_at_ms,
        idempotency_key=request.idempotency_key,
        replace=request.replace,
        message_id=request.message_id,
        received_at=received_at,
        remaining_s=remaining_s,
        grounds=_grounds(request.grounds, len(reference_ids)) if request.HasField("grounds") else NO_GROUNDS,
    )


def _grounds(sent: pb.Grounds, count: int) -> Grounds:
    return checked_grounds(
        Grounds(
            source=sent.source,
            lawful_basis=sent.lawful_basis,
            review_by_ms=sent.review_by_ms,
            category=sent.category,
            reason=sent.reason,
            sources=tuple(sent.sources),
            lawful_bases=tuple(sent.lawful_bases),
            reviews_by_ms=tuple(sent.reviews_by_ms),
            categories=tuple(sent.categories),
            reasons=tuple(sent.reasons),
            qualities=tuple(sent.qualities),
        ),
        count,
    )


def checked_grounds(grounds: Grounds, count: int) -> Grounds:
    """Raises InvalidInput for a column that is not parallel to the references, or a text that is too long."""
    for field in ("sources", "lawful_bases", "reviews_by_ms", "categories", "reasons", "qualities"):
        column = getattr(grounds, field)
        if column:
            check_parallel(len(column), count, f"grounds.{field}")
    for field in ("source", "lawful_basis", "category", "reason"):
        _check_text(getattr(grounds, field), f"grounds.{field}")
    for field in ("sources", "lawful_bases", "categories", "reasons"):
        for row, text in enumerate(getattr(grounds, field)):
            _check_text(text, f"{field}[{row}]")
    for row, review_by_ms in enumerate((grounds.review_by_ms, *grounds.reviews_by_ms)):
        if review_by_ms < 0:
            field = f"reviews_by_ms[{row - 1}]" if row else "grounds.review_by_ms"
            raise InvalidInput("a time before 1970", field=field, hint="milliseconds since 1970-01-01T00:00:00Z")
    return grounds


def _check_text(text: str, field: str) -> None:
    if len(text) > GROUND_BYTES_MAX or (not text.isascii() and len(text.encode(errors="replace")) > GROUND_BYTES_MAX):
        raise InvalidInput("the text is too long", field=field, hint=f"at most {GROUND_BYTES_MAX} bytes")


def checked_enrol_message(
    limits: LimitSettings,
    *,
    actor: Actor,
    gallery_id: str,
    space: SpaceId,
    reference_ids: Sequence[str],
    subject_ids: Sequence[str],
    templates: Float32,
    expires_at_ms: Int64,
    idempotency_key: str,
    replace: bool,
    message_id: str,
    received_at: float,
    remaining_s: float | None,
    grounds: Grounds = NO_GROUNDS,
) -> EnrolMessage:
    """The checks that both codecs share."""
    check_id(gallery_id, "gallery_id", limits)
    check_echoed(idempotency_key, "idempotency_key", limits.id_bytes_max)
    check_echoed(message_id, "message_id", limits.id_bytes_max)
    return EnrolMessage(
        actor=actor,
        gallery_id=gallery_id,
        space=space,
        reference_ids=reference_ids,
        subject_ids=subject_ids,
        templates=templates,
        expires_at_ms=expires_at_ms,
        idempotency_key=idempotency_key,
        replace=replace,
        received_at=received_at,
        # A durable write is worth waiting for: only the transport's deadline shortens the longest one.
        deadline=deadline_at(limits.deadline_ms_max, limits, received_at, remaining_s),
        message_id=message_id,
        grounds=grounds,
    )


def withdrawal(request: pb.WithdrawRequest, limits: LimitSettings) -> tuple[str, Sequence[str], str, str]:
    """(gallery_id, reference_ids, subject_id, reason): exactly one of references and subject is set."""
    what = request.WhichOneof("what")
    if what is None:
        raise InvalidInput(
            "nothing to withdraw is named", field="what", hint="name references of a gallery, or a subject_id"
        )
    reference_ids = list(request.references.reference_ids)
    if what == "references":
        check_id(request.gallery_id, "gallery_id", limits)
        check_row_ids(reference_ids, "references.reference_ids", limits, limits.references_per_message_max)
    else:
        check_id(request.subject_id, "subject_id", limits)
        if request.gallery_id:
            check_id(request.gallery_id, "gallery_id", limits)
    check_reason(request.reason)
    return request.gallery_id, reference_ids, request.subject_id, request.reason


# --- checks on parts of a message --------------------------------------------------------------------


def templates_of(data: bytes, dtype: Dtype, rows: int, dimension: int, field: str = "templates") -> Float32:
    """float32 [rows, dimension]: a read-only view of float32 bytes, a widened copy of float16 bytes.

    Raises InvalidInput (WRONG_LENGTH) unless there are rows x dimension values.
    """
    wire = _LITTLE_ENDIAN[dtype]
    wanted = rows * dimension * wire.itemsize
    if len(data) != wanted:
        raise InvalidInput(
            f"{len(data)} bytes; {rows} x {dimension} x {dtype} are {wanted}",
            field=field,
            cause=Cause.WRONG_LENGTH,
            hint="send one little-endian row of the declared dimension and dtype per identifier",
        )
    values = np.frombuffer(data, wire).reshape(rows, dimension)
    if dtype is Dtype.FLOAT16 and values.dtype.isnative:
        return widened(values)
    return values.astype(np.float32, copy=False)


def _times(sent: Sequence[int], rows: int, field: str) -> Int64:
    """int64 [rows] of a parallel field of times of day."""
    check_parallel(len(sent), rows, field)
    times = np.fromiter(sent, np.int64, rows)
    if (times < 0).any():
        raise InvalidInput(
            "a time before 1970", field=f"{field}[{int((times < 0).argmax())}]", hint="give milliseconds since 1970"
        )
    return times


def space_of(space: pb.TemplateSpace, present: bool, limits: LimitSettings) -> SpaceId:
    return checked_space(SpaceId(space.name, space.version, space.dimension) if present else None, limits)


def checked_space(space: SpaceId | None, limits: LimitSettings, field: str = "space") -> SpaceId:
    if space is None or not space.name:
        raise InvalidInput(
            "no template space is named",
            field=f"{field}.name" if space else field,
            cause=Cause.WRONG_SPACE,
            hint="say with name, version and dimension which model made the templates",
        )
    check_id(space.name, f"{field}.name", limits)
    if not 1 <= space.dimension <= limits.dimension_max:
        raise InvalidInput(
            f"dimension {space.dimension} is not between 1 and {limits.dimension_max}",
            field=f"{field}.dimension",
            cause=Cause.WRONG_DIMENSION,
            hint="give the number of values of one template",
        )
    return space


def _dtype(number: int) -> Dtype:
    dtype = _DTYPES.get(number)  # type: ignore[call-overload]
    if dtype is None:
        raise InvalidInput(
            f"dtype {number} is not known" if number else "no dtype is given",
            field="dtype",
            cause=Cause.UNKNOWN_DTYPE,
            hint="use FLOAT32 or FLOAT16, little-endian",
        )
    return Dtype(dtype)


def check_row_ids(ids: Sequence[str], field: str, limits: LimitSettings, count_max: int, part: str = "") -> None:
    """Raises for none, too many, or an identifier that is empty, too long or not printable, naming the row as
    field[row]part."""
    if not ids:
        raise InvalidInput("the message is empty", field=field, cause=Cause.EMPTY, hint="send at least one row")
    if len(ids) > count_max:
        raise TooLarge(
            f"{len(ids)} rows; a message may hold {count_max}",
            field=field,
            cause=Cause.TOO_MANY,
            hint=f"send messages of at most {count_max} rows",
        )
    joined = "".join(ids)
    # The common case costs no Python per row: in ASCII, characters are bytes.
    if joined.isascii() and joined.isprintable() and all(ids) and max(map(len, ids)) <= limits.id_bytes_max:
        return
    for row, one in enumerate(ids):
        check_id(one, f"{field}[{row}]{part}", limits)


def check_id(value: str, field: str, limits: LimitSettings) -> None:
    if value and value.isprintable() and len(value.encode()) <= limits.id_bytes_max:
        return
    raise InvalidInput(
        "an identifier is empty" if not value else "an identifier is too long or not printable",
        field=field,
        hint=f"use 1 to {limits.id_bytes_max} bytes of printable text",
    )


def check_echoed(value: str, field: str, bytes_max: int) -> None:
    if len(value) * 4 > bytes_max and len(value.encode()) > bytes_max:
        raise InvalidInput(f"longer than {bytes_max} bytes", field=field, hint=f"use at most {bytes_max} bytes")


def check_reason(reason: str) -> None:
    if not reason.strip() or len(reason) > 1024:
        raise InvalidInput(
            "no reason is given" if not reason.strip() else "longer than 1024 characters",
            field="reason",
            hint="say why, in up to 1024 characters: it goes into the audit",
        )


def check_unique(ids: Sequence[str], field: str, cause: Cause, part: str = "") -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    for row, one in enumerate(ids):
        if one in seen:
            raise InvalidInput(
                "an identifier stands twice in the message",
                field=f"{field}[{row}]{part}",
                cause=cause,
                hint="make the identifiers of one message unique, so that the answers can be told apart",
            )
        seen.add(one)


def check_parallel(count: int, rows: int, field: str) -> None:
    if count != rows:
        raise InvalidInput(
            f"{count} values for {rows} rows", field=field, cause=Cause.INVALID, hint="give one value per row"
        )


def deadline_at(deadline_ms: int, limits: LimitSettings, received_at: float, remaining_s: float | None) -> float:
    """Monotonic seconds: the lesser of what the message asks for and what the transport leaves."""
    if not 0 <= deadline_ms <= limits.deadline_ms_max:
        raise InvalidInput(
            f"deadline_ms {deadline_ms} is not between 1 and {limits.deadline_ms_max}",
            field="deadline_ms",
            hint=f"ask for at most {limits.deadline_ms_max} ms; 0 means {limits.deadline_ms_default} ms",
        )
    asked_s = (deadline_ms or limits.deadline_ms_default) / 1000
    return received_at + (asked_s if remaining_s is None else min(asked_s, remaining_s))
