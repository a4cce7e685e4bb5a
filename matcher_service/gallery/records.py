"""The JSON of catalogue entries: what `LogEntry.record` holds, and how to read it back. Pure.

Readers ignore keys that they do not know, so that a newer writer may add some. Vectors and matrices are base64 of
little-endian float32, row after row.

    SPACE_REGISTERED      a TemplateSpace       decode_space
    GALLERY_CREATED       a Gallery             decode_gallery
    GALLERY_DELETED       {"gallery_id"}        decode_ended
    DEPLOYMENT_CREATED    a Deployment          decode_deployment
    DEPLOYMENT_ENDED      {"deployment_id", "ended_at_ms"}    decode_ended
    CASE_CREATED          a Case                decode_case
    CASE_ENDED            {"case_reference", "ended_at_ms"}   decode_ended
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import orjson

from matcher_service.errors import DataDamaged
from matcher_service.terms import (
    Alert,
    Candidate,
    Case,
    Deployment,
    Float32,
    Gallery,
    GalleryKind,
    ScoreTable,
    SpaceId,
    SpaceMap,
    TemplateSpace,
)

T = TypeVar("T")


def encode_space(space: TemplateSpace) -> bytes:
    table = space.score_table
    return _dumps(
        {
            "id": _space_id(space.id),
            "centre": _array(space.centre),
            "maps": [{"source": _space_id(one.source), "matrix": _array(one.matrix)} for one in space.maps],
            "score_table": table and {"scores": list(table.scores), "rates": list(table.rates), "method": table.method},
        }
    )


def decode_space(record: bytes) -> TemplateSpace:
    """Raises DataDamaged if the bytes are no space; so do the other decoders."""

    def build(data: Any) -> TemplateSpace:
        space_id = _read_space_id(data["id"])
        table = data["score_table"]
        return TemplateSpace(
            id=space_id,
            centre=_read_array(data["centre"], (space_id.dimension,)),
            maps=tuple(_read_map(one, space_id.dimension) for one in data["maps"]),
            score_table=table and ScoreTable(tuple(table["scores"]), tuple(table["rates"]), table["method"]),
        )

    return _read("template space", record, build)


def encode_gallery(gallery: Gallery) -> bytes:
    return _dumps(
        {
            "gallery_id": gallery.gallery_id,
            "kind": gallery.kind.value,
            "controller": gallery.controller,
            "lawful_basis": gallery.lawful_basis,
            "purpose": gallery.purpose,
            "retention_ms": gallery.retention_ms,
            "space": _space_id(gallery.space),
            "threshold": gallery.threshold,
            "created_at_ms": gallery.created_at_ms,
        }
    )


def decode_gallery(record: bytes) -> Gallery:
    return _read(
        "gallery",
        record,
        lambda data: Gallery(
            gallery_id=data["gallery_id"],
            kind=GalleryKind(data["kind"]),
            controller=data["controller"],
            lawful_basis=data["lawful_basis"],
            purpose=data["purpose"],
            retention_ms=data["retention_ms"],
            space=_read_space_id(data["space"]),
            threshold=data["threshold"],
            created_at_ms=data["created_at_ms"],
        ),
    )


def encode_deployment(deployment: Deployment) -> bytes:
    return _dumps(
        {
            "deployment_id": deployment.deployment_id,
            "gallery_ids": list(deployment.gallery_ids),
            "opens_at_ms": deployment.opens_at_ms,
            "closes_at_ms": deployment.closes_at_ms,
            "probe_age_ms_max": deployment.probe_age_ms_max,
            "authorised_by": deployment.authorised_by,
            "reason": deployment.reason,
            "place": deployment.place,
            "rank_max": deployment.rank_max,
            "ended_at_ms": deployment.ended_at_ms,
        }
    )


def decode_deployment(record: bytes) -> Deployment:
    return _read(
        "deployment",
        record,
        lambda data: Deployment(
            deployment_id=data["deployment_id"],
            gallery_ids=tuple(data["gallery_ids"]),
            opens_at_ms=data["opens_at_ms"],
            closes_at_ms=data["closes_at_ms"],
            probe_age_ms_max=data["probe_age_ms_max"],
            authorised_by=data["authorised_by"],
            reason=data["reason"],
            place=data["place"],
            rank_max=data["rank_max"],
            ended_at_ms=data["ended_at_ms"],
        ),
    )


def encode_case(case: Case) -> bytes:
    return _dumps(
        {
            "case_reference": case.case_reference,
            "gallery_ids": list(case.gallery_ids),
            "opens_at_ms": case.opens_at_ms,
            "closes_at_ms": case.closes_at_ms,
            "requested_by": case.requested_by,
            "purpose": case.purpose,
            "rank_max": case.rank_max,
            "ended_at_ms": case.ended_at_ms,
        }
    )


def decode_case(record: bytes) -> Case:
    return _read(
        "case",
        record,
        lambda data: Case(
            case_reference=data["case_reference"],
            gallery_ids=tuple(data["gallery_ids"]),
            opens_at_ms=data["opens_at_ms"],
            closes_at_ms=data["closes_at_ms"],
            requested_by=data["requested_by"],
            purpose=data["purpose"],
            rank_max=data["rank_max"],
            ended_at_ms=data["ended_at_ms"],
        ),
    )


def encode_ended(name: str, value: str, ended_at_ms: int) -> bytes:
    """Record of an end. `name` is "gallery_id", "deployment_id" or "case_reference", `value` the id."""
    return _dumps({name: value, "ended_at_ms": ended_at_ms})


def decode_ended(record: bytes) -> tuple[str, int]:
    """(id, ended_at_ms) of GALLERY_DELETED, DEPLOYMENT_ENDED or CASE_ENDED."""

    def build(data: Any) -> tuple[str, int]:
        names = [name for name in ("gallery_id", "deployment_id", "case_reference") if name in data]
        if len(names) != 1:
            raise ValueError("it names not exactly one thing")
        return str(data[names[0]]), int(data["ended_at_ms"])

    return _read("end", record, build)


def encode_alert(alert: Alert) -> bytes:
    return _dumps(
        {
            "alert_id": alert.alert_id,
            "probe_id": alert.probe_id,
            "deployment_id": alert.deployment_id,
            "case_reference": alert.case_reference,
            "raised_at_ms": alert.raised_at_ms,
            "captured_at_ms": alert.captured_at_ms,
            "candidates": [_candidate(one) for one in alert.candidates],
            "thresholds": {name: float(value) for name, value in alert.thresholds.items()},
            "sequence": alert.sequence,
            "policy_version": alert.policy_version,
            "complete": alert.complete,
        }
    )


def decode_alert(record: bytes) -> Alert:
    return _read(
        "alert",
        record,
        lambda data: Alert(
            alert_id=data["alert_id"],
            probe_id=data["probe_id"],
            deployment_id=data["deployment_id"],
            case_reference=data["case_reference"],
            raised_at_ms=data["raised_at_ms"],
            captured_at_ms=data["captured_at_ms"],
            candidates=tuple(_read_candidate(one) for one in data["candidates"]),
            thresholds=dict(data["thresholds"]),
            sequence=data["sequence"],
            policy_version=data["policy_version"],
            complete=data["complete"],
        ),
    )


def _candidate(candidate: Candidate) -> dict[str, object]:
    # A space without a score table has no rate: NaN, for which JSON has no number.
    rate = float(candidate.false_match_rate)
    return {
        "subject_id": candidate.subject_id,
        "reference_id": candidate.reference_id,
        "gallery_id": candidate.gallery_id,
        "score": float(candidate.score),
        "rank": int(candidate.rank),
        "false_match_rate": None if np.isnan(rate) else rate,
    }


def _read_candidate(data: Any) -> Candidate:
    rate = data["false_match_rate"]
    return Candidate(
        subject_id=data["subject_id"],
        reference_id=data["reference_id"],
        gallery_id=data["gallery_id"],
        score=data["score"],
        rank=data["rank"],
        false_match_rate=float("nan") if rate is None else rate,
    )


def _space_id(space: SpaceId) -> dict[str, object]:
    return {"name": space.name, "version": space.version, "dimension": space.dimension}


def _read_space_id(data: Any) -> SpaceId:
    return SpaceId(data["name"], data["version"], data["dimension"])


def _read_map(data: Any, dimension: int) -> SpaceMap:
    source = _read_space_id(data["source"])
    return SpaceMap(source, _read_array(data["matrix"], (dimension, source.dimension)))


def _array(values: Float32) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def _read_array(text: str, shape: tuple[int, ...]) -> Float32:
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32).reshape(shape)
    values.flags.writeable = False
    return values


def _dumps(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY)


def _read(what: str, record: bytes, build: Callable[[Any], T]) -> T:
    try:
        return build(orjson.loads(record))
    except (ValueError, KeyError, TypeError) as unfit:
        raise DataDamaged(f"a stored record is no {what}: {unfit!r}", hint="restore the database") from unfit
