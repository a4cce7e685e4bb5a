"""From wire messages to values."""

from __future__ import annotations

from matcher_service.client.values import ReceiptOutcome, Receipts, ReferenceReceipt, References
from matcher_service.terms import Alert, Candidate, Decision, IdentifyReply, Outcome, SpaceId
from matcher_service.wire import matcher_pb2 as pb


def receipt_value(references: References, key: str, row: int, wire: pb.Receipt, elapsed_s: float) -> ReferenceReceipt:
    return ReferenceReceipt(
        wire.reference_id,
        _receipt_outcome(wire.outcome),
        wire.sequence,
        wire.cause,
        wire.detail,
        wire.field,
        row,
        references.message_id,
        key,
        elapsed_s,
    )


def _receipt_outcome(wire: int) -> ReceiptOutcome:
    return ReceiptOutcome(pb.EnrolOutcome.Name(wire))  # type: ignore[arg-type]


def receipts_in_columns(references: References, key: str, reply: pb.EnrolReply, elapsed_s: float) -> Receipts:
    """Receipts of a reply in columns; those of the refused rows are in order."""
    told = list(reply.outcomes)
    by_number = {number: _receipt_outcome(number) for number in set(told)}
    refused = (row for row, number in enumerate(told) if number == pb.REFUSED) if reply.receipts else ()
    return Receipts(
        references,
        key,
        [by_number[number] for number in told],
        list(reply.sequences),
        {
            row: receipt_value(references, key, row, wire, elapsed_s)
            for row, wire in zip(refused, reply.receipts, strict=True)
        },
        elapsed_s,
    )


def space_value(space: pb.TemplateSpace) -> SpaceId:
    return SpaceId(space.name, space.version, space.dimension)


def candidate_value(wire: pb.Candidate) -> Candidate:
    return Candidate(
        wire.subject_id,
        wire.reference_id,
        wire.gallery_id,
        wire.score,
        wire.rank,
        wire.false_match_rate,
        wire.score_step,
    )


def decision_value(wire: pb.Decision) -> Decision:
    return Decision(
        wire.probe_id,
        _OUTCOMES[wire.outcome],
        tuple(candidate_value(one) for one in wire.candidates) if wire.candidates else (),
        wire.cause,
        wire.detail,
        wire.field,
        wire.retry_after_ms,
        wire.alert_id,
    )


# A newer service may answer with an outcome that this client does not know: never an alert missed in
# silence, so it counts as incomplete.
class _Outcomes(dict[int, Outcome]):
    def __missing__(self, number: int) -> Outcome:
        return Outcome.INCOMPLETE


_OUTCOMES = _Outcomes(
    {
        pb.ALERT: Outcome.ALERT,
        pb.NO_CANDIDATE: Outcome.NO_CANDIDATE,
        pb.INCOMPLETE: Outcome.INCOMPLETE,
        pb.REJECTED: Outcome.REJECTED,
    }
)


def identify_reply(wire: pb.IdentifyReply) -> IdentifyReply:
    return IdentifyReply(
        decisions=tuple(decision_value(one) for one in wire.decisions),
        sequence=wire.sequence,
        space=space_value(wire.space),
        policy_version=wire.policy_version,
        thresholds={one.gallery_id: one.threshold for one in wire.thresholds},
        missing=tuple(wire.missing),
        message_id=wire.message_id,
    )


def alert_value(wire: pb.Alert) -> Alert:
    return Alert(
        alert_id=wire.alert_id,
        probe_id=wire.probe_id,
        deployment_id=wire.deployment_id,
        case_reference=wire.case_reference,
        raised_at_ms=wire.raised_at_ms,
        captured_at_ms=wire.captured_at_ms,
        candidates=tuple(candidate_value(one) for one in wire.candidates),
        thresholds={one.gallery_id: one.threshold for one in wire.thresholds},
        sequence=wire.sequence,
        policy_version=wire.policy_version,
        complete=wire.complete,
    )
