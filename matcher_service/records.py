"""Catalogue values, and alerts, to the JSON that is stored of them and back. Pure.

The format only ever grows: readers pass over keys that they do not know.

Arrays stand as base64 of little-endian float32, row after row.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import orjson

from matcher_service.errors import DataDamaged
from matcher_service.terms import (
    Alert,
    ApproveWatchlist,
    Candidate,
    Case,
    Category,
    ChangeThreshold,
    Deployment,
    EdgeCredential,
    Float32,
    Gallery,
    GalleryKind,
    GenuineTable,
    Limits,
    Proposal,
    ProposalAction,
    RateChange,
    ScoreTable,
    SpaceId,
    SpaceMap,
    TemplateSpace,
    ThresholdEvidence,
    Watchlist,
)

Decoded = TypeVar("Decoded")


def _sensible(what: str) -> Callable[[Callable[[bytes], Decoded]], Callable[[bytes], Decoded]]:
    """Turns what a senseless record raises into DataDamaged."""

    def around(decode: Callable[[bytes], Decoded]) -> Callable[[bytes], Decoded]:
        @functools.wraps(decode)
        def checked(record: bytes) -> Decoded:
            try:
                return decode(record)
            except (KeyError, TypeError, ValueError) as error:
                raise DataDamaged(
                    f"a log entry holds no sensible {what}: {error!r}",
                    hint="restore the log from its backup; this release may also be older than the log",
                ) from error

        return checked

    return around


def encode_gallery(gallery: Gallery) -> bytes:
    return orjson.dumps(gallery_dict(gallery))


def gallery_dict(gallery: Gallery) -> dict[str, Any]:
    return {
        "gallery_id": gallery.gallery_id,
        "kind": gallery.kind.value,
        "controller": gallery.controller,
        "lawful_basis": gallery.lawful_basis,
        "purpose": gallery.purpose,
        "retention_ms": gallery.retention_ms,
        "space": space_id_dict(gallery.space),
        "threshold": gallery.threshold,
        "created_at_ms": gallery.created_at_ms,
        "retention_rule": gallery.retention_rule,
        "review_interval_ms": gallery.review_interval_ms,
        "source": gallery.source,
        "quality_min": gallery.quality_min,
        "resembles_max": gallery.resembles_max,
        "size_max": gallery.size_max,
        "adjudicators": gallery.adjudicators,
        "watchlist": None if gallery.watchlist is None else dataclasses.asdict(gallery.watchlist),
        "evidence": evidence_dict(gallery.evidence),
    }


def evidence_dict(evidence: ThresholdEvidence | None) -> dict[str, Any] | None:
    if evidence is None:
        return None
    return {
        "threshold": evidence.threshold,
        "one_false_alert_in": evidence.one_false_alert_in,
        "references": evidence.references,
        "calibration_sequence": evidence.calibration_sequence,
        "method": evidence.method,
        "confidence": evidence.confidence,
        **{name: _limits_dict(getattr(evidence, name)) for name in ("needed", "fpir", "fnir")},
        "not_supported": evidence.not_supported,
    }


def _limits_dict(limits: Limits | None) -> dict[str, float] | None:
    return None if limits is None else limits._asdict()


def _evidence(found: Any) -> ThresholdEvidence | None:
    if found is None:
        return None
    return ThresholdEvidence(
        threshold=found["threshold"],
        one_false_alert_in=found["one_false_alert_in"],
        references=found["references"],
        calibration_sequence=found["calibration_sequence"],
        method=found["method"],
        confidence=found["confidence"],
        needed=_limits(found["needed"]),
        fpir=_limits(found["fpir"]),
        fnir=_limits(found["fnir"]),
        not_supported=found["not_supported"],
    )


def _limits(found: Any) -> Limits | None:
    return None if found is None else Limits(found["estimate"], found["low"], found["high"])


@_sensible("gallery")
def decode_gallery(record: bytes) -> Gallery:
    """Raises DataDamaged if the record makes no sense; so do the other decoders."""
    found = orjson.loads(record)
    return Gallery(
        gallery_id=found["gallery_id"],
        kind=GalleryKind(found["kind"]),
        controller=found["controller"],
        lawful_basis=found["lawful_basis"],
        purpose=found["purpose"],
        retention_ms=found["retention_ms"],
        space=_space_id(found["space"]),
        threshold=found["threshold"],
        created_at_ms=found["created_at_ms"],
        # Absent from records of the first release.
        retention_rule=found.get("retention_rule", ""),
        review_interval_ms=found.get("review_interval_ms", 0),
        source=found.get("source", ""),
        quality_min=found.get("quality_min", 0.0),
        resembles_max=found.get("resembles_max", 0),
        size_max=found.get("size_max", 0),
        adjudicators=found.get("adjudicators", 1),
        watchlist=_watchlist(found.get("watchlist")),
        evidence=_evidence(found.get("evidence")),
    )


def _watchlist(found: Any) -> Watchlist | None:
    if found is None:
        return None
    categories = tuple(Category(one) for one in found["categories"])
    return Watchlist(found["deployment_id"], categories, found["author"], found["approved_by"])


def encode_approval(approval: ApproveWatchlist) -> bytes:
    """Record of WATCHLIST_APPROVED."""
    return orjson.dumps(approval._asdict())


@_sensible("approval")
def decode_approval(record: bytes) -> tuple[str, str]:
    """(gallery_id, who approved it; "": nobody any more)."""
    found = orjson.loads(record)
    return str(found["gallery_id"]), str(found["approved_by"]) if found["approved"] else ""


def approved(gallery: Gallery, approved_by: str) -> Gallery:
    """The gallery as an approval of its watchlist, or the end of one, leaves it."""
    if gallery.watchlist is None:
        raise ValueError("only a watchlist is approved")
    return dataclasses.replace(gallery, watchlist=dataclasses.replace(gallery.watchlist, approved_by=approved_by))


def space_id_dict(space: SpaceId) -> dict[str, Any]:
    return {"name": space.name, "version": space.version, "dimension": space.dimension}


def encode_space(space: TemplateSpace) -> bytes:
    return orjson.dumps(space_dict(space))


def space_dict(space: TemplateSpace) -> dict[str, Any]:
    table = space.score_table
    return {
        "space": space_id_dict(space.id),
        "centre": _array_text(space.centre),
        "maps": [{"source": space_id_dict(one.source), "matrix": _array_text(one.matrix)} for one in space.maps],
        "score_table": None
        if table is None
        else {
            "scores": list(table.scores),
            "rates": list(table.rates),
            "method": table.method,
            "estimates": list(table.estimates),
            "low_rates": list(table.low_rates),
            "confidence": table.confidence,
            "genuine": None if table.genuine is None else dataclasses.asdict(table.genuine),
        },
    }


@_sensible("template space")
def decode_space(record: bytes) -> TemplateSpace:
    found = orjson.loads(record)
    space_id = _space_id(found["space"])
    maps = []
    for one in found["maps"]:
        source = _space_id(one["source"])
        maps.append(SpaceMap(source, _array(one["matrix"], (space_id.dimension, source.dimension))))
    table = found["score_table"]
    return TemplateSpace(
        id=space_id,
        centre=_array(found["centre"], (space_id.dimension,)),
        maps=tuple(maps),
        score_table=None
        if table is None
        else ScoreTable(
            tuple(table["scores"]),
            tuple(table["rates"]),
            table["method"],
            # Absent from records of the first release.
            tuple(table.get("estimates", ())),
            tuple(table.get("low_rates", ())),
            table.get("confidence", 0.0),
            _genuine_table(table.get("genuine")),
        ),
    )


def _genuine_table(found: Any) -> GenuineTable | None:
    if found is None:
        return None
    columns = {name: tuple(found[name]) for name in ("scores", "estimates", "low_rates", "high_rates")}
    return GenuineTable(
        **columns, confidence=found["confidence"], comparisons=found["comparisons"], subjects=found["subjects"]
    )


def encode_deployment(deployment: Deployment) -> bytes:
    return orjson.dumps(deployment_dict(deployment))


def deployment_dict(deployment: Deployment) -> dict[str, Any]:
    return {
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
        "cameras": list(deployment.cameras),
        "legal_authority": deployment.legal_authority,
        "necessity": deployment.necessity,
        "threshold": deployment.threshold,
        "alert_retention_ms": deployment.alert_retention_ms,
    }


@_sensible("deployment")
def decode_deployment(record: bytes) -> Deployment:
    found = orjson.loads(record)
    return Deployment(
        deployment_id=found["deployment_id"],
        gallery_ids=tuple(found["gallery_ids"]),
        opens_at_ms=found["opens_at_ms"],
        closes_at_ms=found["closes_at_ms"],
        probe_age_ms_max=found["probe_age_ms_max"],
        authorised_by=found["authorised_by"],
        reason=found["reason"],
        place=found["place"],
        rank_max=found["rank_max"],
        ended_at_ms=found["ended_at_ms"],
        # Absent from records of the first release.
        cameras=tuple(found.get("cameras", ())),
        legal_authority=found.get("legal_authority", ""),
        necessity=found.get("necessity", ""),
        threshold=found.get("threshold"),
        alert_retention_ms=found.get("alert_retention_ms", 0),
    )


def encode_case(case: Case) -> bytes:
    return orjson.dumps(case_dict(case))


def case_dict(case: Case) -> dict[str, Any]:
    return {
        "case_reference": case.case_reference,
        "gallery_ids": list(case.gallery_ids),
        "opens_at_ms": case.opens_at_ms,
        "closes_at_ms": case.closes_at_ms,
        "requested_by": case.requested_by,
        "purpose": case.purpose,
        "rank_max": case.rank_max,
        "ended_at_ms": case.ended_at_ms,
        "immigration_authority": case.immigration_authority,
    }


@_sensible("case")
def decode_case(record: bytes) -> Case:
    found = orjson.loads(record)
    return Case(
        case_reference=found["case_reference"],
        gallery_ids=tuple(found["gallery_ids"]),
        opens_at_ms=found["opens_at_ms"],
        closes_at_ms=found["closes_at_ms"],
        requested_by=found["requested_by"],
        purpose=found["purpose"],
        rank_max=found["rank_max"],
        ended_at_ms=found["ended_at_ms"],
        immigration_authority=found.get("immigration_authority", ""),
    )


def encode_threshold_change(change: ChangeThreshold, before: float) -> bytes:
    """Record of THRESHOLD_CHANGED; `before` is the threshold that it replaces."""
    rates = [one._asdict() for one in change.rates]
    evidence = evidence_dict(change.evidence)
    return orjson.dumps({**change._asdict(), "rates": rates, "evidence": evidence, "threshold_before": before})


@_sensible("change of threshold")
def decode_threshold_change(record: bytes) -> tuple[str, float, ThresholdEvidence | None]:
    """(gallery_id, the threshold from now on, what was known of it)."""
    found = orjson.loads(record)
    return str(found["gallery_id"]), float(found["threshold"]), _evidence(found.get("evidence"))


def with_threshold(gallery: Gallery, threshold: float, evidence: ThresholdEvidence | None) -> Gallery:
    """The gallery as a change of its threshold leaves it."""
    return dataclasses.replace(gallery, threshold=threshold, evidence=evidence)


def encode_credential(credential: EdgeCredential) -> bytes:
    return orjson.dumps({**credential_dict(credential), "secret_sha256": credential.secret_sha256})


def credential_dict(credential: EdgeCredential) -> dict[str, Any]:
    """All but the digest of the secret."""
    return {
        "credential_id": credential.credential_id,
        "deployment_id": credential.deployment_id,
        "issued_by": credential.issued_by,
        "issued_at_ms": credential.issued_at_ms,
        "expires_at_ms": credential.expires_at_ms,
        "has_secret": bool(credential.secret_sha256),
        "certificate": credential.certificate,
        "cameras": list(credential.cameras),
        "probes_per_s": credential.probes_per_s,
        "replaces": credential.replaces,
        "revoked_at_ms": credential.revoked_at_ms,
    }


@_sensible("edge credential")
def decode_credential(record: bytes) -> EdgeCredential:
    found = orjson.loads(record)
    return EdgeCredential(
        credential_id=found["credential_id"],
        deployment_id=found["deployment_id"],
        issued_by=found["issued_by"],
        issued_at_ms=found["issued_at_ms"],
        expires_at_ms=found["expires_at_ms"],
        secret_sha256=found["secret_sha256"],
        certificate=found["certificate"],
        cameras=tuple(found["cameras"]),
        probes_per_s=found["probes_per_s"],
        replaces=found["replaces"],
        revoked_at_ms=found["revoked_at_ms"],
    )


def encode_revocation(credential_id: str, revoked_at_ms: int) -> bytes:
    return orjson.dumps({"credential_id": credential_id, "revoked_at_ms": revoked_at_ms})


@_sensible("revocation")
def decode_revocation(record: bytes) -> tuple[str, int]:
    """(credential_id, revoked_at_ms)."""
    found = orjson.loads(record)
    return str(found["credential_id"]), int(found["revoked_at_ms"])


def encode_proposal(proposal: Proposal) -> bytes:
    return orjson.dumps(proposal_dict(proposal))


def proposal_dict(proposal: Proposal) -> dict[str, Any]:
    return {
        "proposal_id": proposal.proposal_id,
        "action": proposal.action.value,
        "gallery_id": proposal.gallery_id,
        "reason": proposal.reason,
        "proposed_by": proposal.proposed_by,
        "proposed_at_ms": proposal.proposed_at_ms,
        "expires_at_ms": proposal.expires_at_ms,
        "threshold": proposal.threshold,
        "rates": [one._asdict() for one in proposal.rates],
        "reference_ids": list(proposal.reference_ids),
        "closed_as": proposal.closed_as,
        "closed_by": proposal.closed_by,
        "evidence": evidence_dict(proposal.evidence),
    }


@_sensible("proposal")
def decode_proposal(record: bytes) -> Proposal:
    found = orjson.loads(record)
    return Proposal(
        proposal_id=found["proposal_id"],
        action=ProposalAction(found["action"]),
        gallery_id=found["gallery_id"],
        reason=found["reason"],
        proposed_by=found["proposed_by"],
        proposed_at_ms=found["proposed_at_ms"],
        expires_at_ms=found["expires_at_ms"],
        threshold=found["threshold"],
        rates=tuple(RateChange(**one) for one in found["rates"]),
        reference_ids=tuple(found["reference_ids"]),
        closed_as=found["closed_as"],
        closed_by=found["closed_by"],
        evidence=_evidence(found.get("evidence")),
    )


def encode_closure(proposal_id: str, closed_as: str, closed_by: str) -> bytes:
    return orjson.dumps({"proposal_id": proposal_id, "closed_as": closed_as, "closed_by": closed_by})


@_sensible("closure of a proposal")
def decode_closure(record: bytes) -> tuple[str, str, str]:
    """(proposal_id, closed_as, closed_by)."""
    found = orjson.loads(record)
    return str(found["proposal_id"]), str(found["closed_as"]), str(found["closed_by"])


def encode_ended(name: str, value: str, ended_at_ms: int) -> bytes:
    """Record of an end. `name` is "gallery_id", "deployment_id" or "case_reference", `value` the id."""
    return orjson.dumps({name: value, "ended_at_ms": ended_at_ms})


@_sensible("end")
def decode_ended(record: bytes) -> tuple[str, int]:
    """(id, ended_at_ms) of GALLERY_DELETED, DEPLOYMENT_ENDED or CASE_ENDED."""
    found = orjson.loads(record)
    names = [name for name in ("gallery_id", "deployment_id", "case_reference") if name in found]
    if len(names) != 1:
        raise ValueError("it names not exactly one thing")
    return str(found[names[0]]), int(found["ended_at_ms"])


def authority_name(deployment_id: str, case_reference: str) -> str:
    """What a deployment's or a case's counters stand under."""
    return f"deployment:{deployment_id}" if deployment_id else f"case:{case_reference}"


def encode_alert(alert: Alert) -> bytes:
    return orjson.dumps(
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


@_sensible("alert")
def decode_alert(record: bytes) -> Alert:
    data = orjson.loads(record)
    return Alert(
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


def _space_id(found: Any) -> SpaceId:
    return SpaceId(found["name"], found["version"], found["dimension"])


def _array_text(array: Float32) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode()


def _array(text: str, shape: tuple[int, ...]) -> Float32:
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32).reshape(shape)
    values.flags.writeable = False
    return values
