"""The flows' answers to wire messages. Pure.

A decision without a candidate costs one small message of two fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matcher_service.decision import rejection
from matcher_service.decisions import NOBODY, Decisions
from matcher_service.errors import MatcherError
from matcher_service.receipts import EnrolReceipts
from matcher_service.terms import (
    Alert,
    Candidate,
    Decision,
    IdentifyReply,
    Outcome,
    Receipt,
    SpaceId,
    WriteOutcome,
)
from matcher_service.wire import matcher_pb2 as pb

# A refused message's identifiers are echoed up to this many; beyond it, echoing would let a small request make
# a large answer, and one decision with an empty probe_id stands for the whole message.
ECHOED_PROBES_MAX = 16_384

_OUTCOMES = {
    Outcome.ALERT: pb.ALERT,
    Outcome.NO_CANDIDATE: pb.NO_CANDIDATE,
    Outcome.INCOMPLETE: pb.INCOMPLETE,
    Outcome.REJECTED: pb.REJECTED,
}
_WRITE_OUTCOMES = {
    WriteOutcome.ENROLLED: pb.ENROLLED,
    WriteOutcome.REPLACED: pb.REPLACED,
    WriteOutcome.REPEATED: pb.REPEATED,
}


def identify_reply(reply: IdentifyReply) -> pb.IdentifyReply:
    found, make = Decisions.of(reply.decisions), pb.Decision
    if found.usual == NOBODY:
        decisions = [make(probe_id=one, outcome=pb.NO_CANDIDATE) for one in found.probe_ids]
        for row, one in found.others.items():
            decisions[row] = _decision(one)
    else:
        decisions = [_decision(one) for one in found]
    return pb.IdentifyReply(
        decisions=decisions,
        sequence=reply.sequence,
        space=_space(reply.space),
        policy_version=reply.policy_version,
        thresholds=_thresholds(reply.thresholds),
        missing=reply.missing,
        message_id=reply.message_id,
    )


def refused_identify(request: pb.IdentifyRequest | None, refusal: MatcherError) -> pb.IdentifyReply:
    """Every probe of the message REJECTED with the refusal. Where its probes cannot be told (no message, no
    probe, too many to echo), one decision with an empty probe_id stands for the whole message."""
    if request is None:
        return pb.IdentifyReply(decisions=[_decision(rejection("", refusal))])
    probe_ids: Sequence[str] = request.probe_ids
    if not 0 < len(probe_ids) <= ECHOED_PROBES_MAX:
        probe_ids = [""]
    return pb.IdentifyReply(
        decisions=[_decision(rejection(one, refusal)) for one in probe_ids], message_id=request.message_id
    )


def _decision(decision: Decision) -> pb.Decision:
    return pb.Decision(
        probe_id=decision.probe_id,
        outcome=_OUTCOMES[decision.outcome],
        candidates=[_candidate(one) for one in decision.candidates],
        cause=decision.cause,
        detail=decision.detail,
        field=decision.field,
        retry_after_ms=decision.retry_after_ms,
        alert_id=decision.alert_id,
    )


def enrol_reply(
    reference_ids: Sequence[str],
    receipts: Sequence[Receipt | MatcherError],
    message_id: str,
    *,
    in_columns: bool = False,
) -> pb.EnrolReply:
    """One receipt per reference, in order; `sequence` is the greatest that was committed. In columns there are receipts
    of the refused only."""
    columns = EnrolReceipts.of(receipts)
    newest = int(columns.sequences.max(initial=0))
    if not in_columns:
        every = [_receipt(one, receipt) for one, receipt in zip(reference_ids, receipts, strict=True)]
        return pb.EnrolReply(message_id=message_id, receipts=every, sequence=newest)
    outcomes: list[pb.EnrolOutcome.ValueType] = [pb.ENROLLED] * len(columns)
    for row, outcome in columns.others.items():
        outcomes[row] = _WRITE_OUTCOMES[outcome]
    for row in columns.refusals:
        outcomes[row] = pb.REFUSED
    return pb.EnrolReply(
        message_id=message_id,
        outcomes=outcomes,
        sequences=columns.sequences.tolist(),
        receipts=[_receipt(reference_ids[row], refusal) for row, refusal in sorted(columns.refusals.items())],
        sequence=newest,
    )


def _receipt(reference_id: str, receipt: Receipt | MatcherError) -> pb.Receipt:
    if isinstance(receipt, MatcherError):
        return pb.Receipt(
            reference_id=reference_id,
            outcome=pb.REFUSED,
            cause=receipt.cause,
            detail=in_words(receipt),
            field=receipt.field,
        )
    return pb.Receipt(reference_id=reference_id, outcome=_WRITE_OUTCOMES[receipt.outcome], sequence=receipt.sequence)


def refused_enrol(request: pb.EnrolRequest | None, refusal: MatcherError) -> pb.EnrolReply:
    """The message as a whole refused; nothing of it was written."""
    return pb.EnrolReply(
        message_id=request.message_id if request else "",
        cause=refusal.cause,
        detail=in_words(refusal),
        field=refusal.field,
        retry_after_ms=refusal.retry_after_ms or 0,
    )


def in_words(refusal: MatcherError) -> str:
    """What happened and what to do, for messages that have one text field."""
    return f"{refusal.detail}; {refusal.hint}" if refusal.hint else refusal.detail


def withdraw_reply(receipt: Receipt) -> pb.WithdrawReply:
    return pb.WithdrawReply(
        withdrawn_reference_ids=[reference_id for _, reference_id in receipt.reference_ids], sequence=receipt.sequence
    )


def alert(alert: Alert) -> pb.Alert:
    return pb.Alert(
        alert_id=alert.alert_id,
        probe_id=alert.probe_id,
        deployment_id=alert.deployment_id,
        case_reference=alert.case_reference,
        raised_at_ms=alert.raised_at_ms,
        captured_at_ms=alert.captured_at_ms,
        candidates=[_candidate(one) for one in alert.candidates],
        thresholds=_thresholds(alert.thresholds),
        sequence=alert.sequence,
        policy_version=alert.policy_version,
        complete=alert.complete,
    )


def _candidate(candidate: Candidate) -> pb.Candidate:
    return pb.Candidate(
        subject_id=candidate.subject_id,
        reference_id=candidate.reference_id,
        gallery_id=candidate.gallery_id,
        score=candidate.score,
        rank=candidate.rank,
        false_match_rate=candidate.false_match_rate,
        score_step=candidate.score_step,
    )


def _space(space: SpaceId) -> pb.TemplateSpace:
    return pb.TemplateSpace(name=space.name, version=space.version, dimension=space.dimension)


def _thresholds(thresholds: Mapping[str, float]) -> list[pb.GalleryThreshold]:
    return [pb.GalleryThreshold(gallery_id=one, threshold=threshold) for one, threshold in thresholds.items()]
