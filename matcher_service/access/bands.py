"""What a credential without the scope raw_scores sees of scores: bands. Pure.

With exact scores a face can be rebuilt try by try (hill climbing). A band of STEP still ranks candidates and says how
far above the threshold one lies. A threshold in a request would give the exact score away again, by asking for ever
higher ones, so such a credential may raise it to the edges of bands only.
"""

from __future__ import annotations

import dataclasses
import math

from matcher_service.decisions import Decisions
from matcher_service.errors import InvalidInput
from matcher_service.terms import Actor, Alert, Candidate, Cause, IdentifyReply, Scope

STEP = 0.05


def sees_raw_scores(actor: Actor) -> bool:
    return Scope.RAW_SCORES in actor.scopes


def banded(candidate: Candidate) -> Candidate:
    """The lower edge of its band for a score; for a rate the next power of ten."""
    rate = candidate.false_match_rate
    return candidate._replace(
        score=round(math.floor(candidate.score / STEP + 1e-6) * STEP, 2),
        score_step=STEP,
        false_match_rate=min(1.0, 10.0 ** math.ceil(math.log10(rate) - 1e-9)) if rate > 0 else rate,
    )


def require_an_edge(actor: Actor, threshold: float | None) -> None:
    """Raise InvalidInput for a threshold between two edges from an actor who sees bands."""
    if threshold is None or sees_raw_scores(actor):
        return
    steps = threshold / STEP
    if abs(steps - round(steps)) > 1e-4:
        raise InvalidInput(
            f"the threshold is not a multiple of {STEP:g}",
            field="threshold",
            cause=Cause.INVALID,
            hint="without the scope raw_scores a threshold stands on the edge of a band",
        )


def reply_for(actor: Actor, reply: IdentifyReply) -> IdentifyReply:
    """The reply as this actor may see it."""
    if sees_raw_scores(actor):
        return reply
    found = Decisions.of(reply.decisions)
    if not any(one.candidates for one in found.others.values()):
        return reply
    others = {
        row: one._replace(candidates=tuple(map(banded, one.candidates))) if one.candidates else one
        for row, one in found.others.items()
    }
    return dataclasses.replace(reply, decisions=Decisions(found.probe_ids, found.usual, others))


def alert_for(actor: Actor, alert: Alert) -> Alert:
    """The alert as this actor may see it."""
    if sees_raw_scores(actor):
        return alert
    return dataclasses.replace(alert, candidates=tuple(map(banded, alert.candidates)))
