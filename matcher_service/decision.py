"""From candidates to decisions. Pure.

A candidate at or above the threshold makes an ALERT even when parts are missing; INCOMPLETE means no candidate
and something missing (law 4). Without a written audit nothing is disclosed (law 7).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from matcher_service.batching import Found
from matcher_service.decisions import NOBODY, Decisions
from matcher_service.errors import MatcherError
from matcher_service.terms import (
    Alert,
    Candidate,
    Cause,
    Decision,
    Outcome,
    ProbeMessage,
)


def rejection(probe_id: str, refusal: MatcherError) -> Decision:
    """The one answer of a probe that was refused."""
    detail = f"{refusal.detail}; {refusal.hint}" if refusal.hint else refusal.detail
    return Decision(
        probe_id,
        Outcome.REJECTED,
        cause=refusal.cause,
        detail=detail,
        field=refusal.field,
        retry_after_ms=refusal.retry_after_ms or 0,
    )


def candidates_of(found: Found, gallery_ids: Sequence[str], probe: int) -> tuple[Candidate, ...]:
    """Candidates of one probe in rank order."""
    result = found.result
    first, last = int(result.offsets[probe]), int(result.offsets[probe + 1])
    return tuple(
        Candidate(
            subject_id=result.subject_ids[at],
            reference_id=result.reference_ids[at],
            gallery_id=gallery_ids[int(result.gallery[at])],
            score=float(result.scores[at]),
            rank=at - first + 1,
            false_match_rate=float(found.rates[at]),
        )
        for at in range(first, last)
    )


def decide(
    probe_ids: Sequence[str],
    found: Found,
    gallery_ids: Sequence[str],
    missing: bool,
    new_alert_id: Callable[[], str],
) -> Decisions:
    """One decision per searched probe, in order. `missing`: some part of the galleries did not answer."""
    result = found.result
    usual = Decision("", Outcome.INCOMPLETE, cause=Cause.SHARD_UNAVAILABLE) if missing else NOBODY
    alerts: dict[int, Decision] = {}
    if result.scores.size:
        counts = result.offsets[1:] - result.offsets[:-1]
        for probe in counts.nonzero()[0].tolist():
            alerts[probe] = Decision(
                probe_ids[probe],
                Outcome.ALERT,
                candidates_of(found, gallery_ids, probe),
                alert_id=new_alert_id(),
            )
    return Decisions(probe_ids, usual, alerts)


def among_refused(
    probe_ids: Sequence[str], refusals: Mapping[int, MatcherError], searched: Decisions, rows: Sequence[int]
) -> Decisions:
    """The decisions of a message some of whose probes were refused, by row; `rows` are those of the searched."""
    others = {row: rejection(probe_ids[row], refusal) for row, refusal in refusals.items()}
    others |= {rows[at]: one for at, one in searched.others.items()}
    return Decisions(probe_ids, searched.usual, dict(sorted(others.items())))


def with_repeatable_ids(message: ProbeMessage, decisions: Decisions) -> Decisions:
    """The decisions with alert ids that a probe has again if its stream sends it again and the same is found.

    The candidates and their scores are part of what is hashed: another finding is another alert, so no alert can be
    hidden behind an earlier one's id. The nonce, which only the edge node knows, keeps the digest from being guessed.
    """
    others = {
        row: one._replace(alert_id=_repeatable_id(message, row, one)) if one.outcome is Outcome.ALERT else one
        for row, one in decisions.others.items()
    }
    return Decisions(decisions.probe_ids, decisions.usual, others)


def _repeatable_id(message: ProbeMessage, row: int, decision: Decision) -> str:
    captured_at_ms = int(message.captured_at_ms[row])
    digest = hashlib.sha256(message.stream_nonce)
    for part in (
        message.actor.name,
        message.deployment_id,
        message.case_reference,
        decision.probe_id,
        str(captured_at_ms),
        *(f"{one.gallery_id}\0{one.reference_id}\0{one.score!r}" for one in decision.candidates),
    ):
        text = part.encode()
        digest.update(len(text).to_bytes(4, "big") + text)
    return f"{min(max(captured_at_ms, 0), 2**48 - 1):012x}-{digest.hexdigest()[:16]}"


def alert_records(
    message: ProbeMessage,
    decisions: Decisions,
    thresholds: Mapping[str, float],
    sequence: int,
    policy_version: str,
    complete: bool,
    raised_at_ms: int,
) -> list[Alert]:
    """What is recorded of the decisions that alert; nothing of the others. `decisions` is parallel to the
    message's probes."""
    return [
        Alert(
            alert_id=decision.alert_id,
            probe_id=decision.probe_id,
            deployment_id=message.deployment_id,
            case_reference=message.case_reference,
            raised_at_ms=raised_at_ms,
            captured_at_ms=int(message.captured_at_ms[row]),
            candidates=decision.candidates,
            thresholds=thresholds,
            sequence=sequence,
            policy_version=policy_version,
            complete=complete,
        )
        for row, decision in decisions.others.items()
        if decision.outcome is Outcome.ALERT
    ]


def withheld(decisions: Decisions, cause: Cause) -> Decisions:
    """The decisions when their audit could not be written: no candidates, and INCOMPLETE but for the refused."""
    return Decisions(
        decisions.probe_ids,
        _withheld(decisions.usual, cause),
        {row: _withheld(one, cause) for row, one in decisions.others.items()},
    )


def _withheld(decision: Decision, cause: Cause) -> Decision:
    if decision.outcome is Outcome.REJECTED:
        return decision
    return Decision(decision.probe_id, Outcome.INCOMPLETE, cause=cause, detail="the audit could not be written")
