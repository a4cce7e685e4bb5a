"""From answers to the figures of one run. Pure: ground truth is at hand here, as it never is in operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from matcher_service.terms import Decision, Outcome


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the probes of one run.

    `rank_1_right`: mated probes whose candidate at rank 1 is the right person. `missed_mates`: mated probes answered
    in full without the right person among their candidates. A false alert is an alert of an unmated probe
    (`false_alerts_unmated`), or of a mated one whose candidate at rank 1 is somebody else (`false_alerts_wrong`).
    `not_answered`: rejected or incomplete; 0 in a healthy run.
    """

    probes: int
    mated: int
    unmated: int
    alerts: int
    rank_1_right: int
    missed_mates: int
    false_alerts_unmated: int
    false_alerts_wrong: int
    not_answered: int


def tally(decisions: Mapping[str, Decision], mates: Mapping[str, str | None]) -> Tally:
    """`mates`: for each probe_id the subject_id that is right, None if its subject is enrolled nowhere. A probe
    without a decision counts as not answered."""
    alerts = right = missed = unmated_alerts = wrong = lost = 0
    for probe_id, mate in mates.items():
        decision = decisions.get(probe_id)
        if decision is None or decision.outcome in (Outcome.REJECTED, Outcome.INCOMPLETE):
            lost += 1
            continue
        found = [candidate.subject_id for candidate in decision.candidates]
        is_alert = decision.outcome is Outcome.ALERT
        alerts += is_alert
        if mate is None:
            unmated_alerts += is_alert
            continue
        right += found[:1] == [mate]
        wrong += is_alert and found[:1] != [mate]
        missed += mate not in found
    mated = sum(mate is not None for mate in mates.values())
    return Tally(
        probes=len(mates),
        mated=mated,
        unmated=len(mates) - mated,
        alerts=alerts,
        rank_1_right=right,
        missed_mates=missed,
        false_alerts_unmated=unmated_alerts,
        false_alerts_wrong=wrong,
        not_answered=lost,
    )


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds from handing a probe to the client until its answer, by quantile."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    most_ms: float


def latency(elapsed_s: Sequence[float]) -> Latency:
    """Of at least one probe."""
    p50, p95, p99, most = 1000 * np.quantile(elapsed_s, [0.5, 0.95, 0.99, 1.0], method="higher")
    return Latency(float(p50), float(p95), float(p99), float(most))
