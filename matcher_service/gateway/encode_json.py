"""The flows' answers as JSON documents; field names are those of the wire messages. Pure.

A rate that is not calibrated (NaN) is written as null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matcher_service import grounds
from matcher_service.errors import MatcherError
from matcher_service.gateway.decode_json import field_in_body
from matcher_service.gateway.encode import in_words
from matcher_service.records import space_id_dict
from matcher_service.terms import Alert, Candidate, Decision, Gallery, IdentifyReply, Outcome, Receipt, Reference

Document = dict[str, Any]


def problem(refusal: MatcherError, status: int, title: str) -> Document:
    """An RFC 9457 problem document."""
    document: Document = {
        "type": f"urn:matcher:problem:{refusal.cause.lower()}",
        "title": title,
        "status": status,
        "detail": refusal.detail,
        "cause": refusal.cause,
        "field": refusal.field,
        "hint": refusal.hint,
        "retryable": refusal.retryable,
    }
    if refusal.retry_after_ms is not None:
        document["retry_after_ms"] = refusal.retry_after_ms
    return document


def identify_reply(reply: IdentifyReply, rows: str = "") -> Document:
    """`rows`: what the JSON request called its rows, so that refusals name their field as it did; "" if the
    request was no JSON."""
    return {
        "decisions": [_decision(one, rows) for one in reply.decisions],
        "complete": reply.complete,
        "missing": list(reply.missing),
        "sequence": reply.sequence,
        "space": space_id_dict(reply.space),
        "policy_version": reply.policy_version,
        "thresholds": _thresholds(reply.thresholds),
        "message_id": reply.message_id,
    }


def _decision(decision: Decision, rows: str) -> Document:
    document: Document = {"probe_id": decision.probe_id, "outcome": decision.outcome}
    if decision.outcome is Outcome.ALERT:
        document["alert_id"] = decision.alert_id
        document["candidates"] = [_candidate(one) for one in decision.candidates]
    if decision.cause:
        document |= {"cause": decision.cause, "detail": decision.detail, "field": _named(decision.field, rows)}
    if decision.retry_after_ms:
        document["retry_after_ms"] = decision.retry_after_ms
    return document


def enrol_reply(
    reference_ids: Sequence[str], receipts: Sequence[Receipt | MatcherError], message_id: str, rows: str = ""
) -> Document:
    """`rows` as for identify_reply."""
    return {
        "message_id": message_id,
        "sequence": max((one.sequence for one in receipts if isinstance(one, Receipt)), default=0),
        "receipts": [_receipt(one, receipt, rows) for one, receipt in zip(reference_ids, receipts, strict=True)],
    }


def _receipt(reference_id: str, receipt: Receipt | MatcherError, rows: str) -> Document:
    if isinstance(receipt, MatcherError):
        return {
            "reference_id": reference_id,
            "outcome": "REFUSED",
            "cause": receipt.cause,
            "detail": in_words(receipt),
            "field": _named(receipt.field, rows),
        }
    return {"reference_id": reference_id, "outcome": receipt.outcome, "sequence": receipt.sequence}


def _named(field: str, rows: str) -> str:
    return field_in_body(field, rows) if rows else field


def withdrawn(receipt: Receipt) -> Document:
    return {
        "sequence": receipt.sequence,
        "withdrawn": [
            {"gallery_id": gallery_id, "reference_id": reference_id}
            for gallery_id, reference_id in receipt.reference_ids
        ],
    }


def reference(reference: Reference, gallery: Gallery | None) -> Document:
    """What is held of a reference, and what it rests on; its template never leaves."""
    document = reference._asdict()
    del document["attributes"]
    return document | grounds.described(reference, gallery)


def alert(alert: Alert) -> Document:
    return {
        "alert_id": alert.alert_id,
        "probe_id": alert.probe_id,
        "deployment_id": alert.deployment_id,
        "case_reference": alert.case_reference,
        "raised_at_ms": alert.raised_at_ms,
        "captured_at_ms": alert.captured_at_ms,
        "candidates": [_candidate(one) for one in alert.candidates],
        "thresholds": _thresholds(alert.thresholds),
        "sequence": alert.sequence,
        "policy_version": alert.policy_version,
        "complete": alert.complete,
        "state": alert.state,
        "adjudications": [one._asdict() for one in alert.adjudications],
    }


def _candidate(candidate: Candidate) -> Document:
    document = candidate._asdict()
    if not candidate.score_step:
        del document["score_step"]
    return document


def _thresholds(thresholds: Mapping[str, float]) -> list[Document]:
    return [{"gallery_id": one, "threshold": threshold} for one, threshold in thresholds.items()]
