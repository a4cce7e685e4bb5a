"""What trained people made of an alert. Pure.

An alert says that a reference resembles a face; only people say whether it is the person, and the words for it are
confirmed, rejected and inconclusive. Nobody's word is overwritten: a later one of the same person counts instead of
the earlier, and both stay on record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matcher_service.terms import Adjudication, Alert, AlertState, Gallery


def persons_needed(alert: Alert, galleries: Mapping[str, Gallery]) -> int:
    """How many people must adjudicate the alert: the most that one of its galleries asks for."""
    asked = (galleries[one.gallery_id].adjudicators for one in alert.candidates if one.gallery_id in galleries)
    return max(asked, default=1)


def state_of(adjudications: Sequence[Adjudication], persons: int) -> AlertState:
    """Open until enough different people have said something; inconclusive if they do not all say the same."""
    last = {" ".join(one.by.split()).casefold(): one.verdict for one in adjudications}
    if len(last) < persons:
        return AlertState.OPEN
    verdicts = set(last.values())
    return AlertState(verdicts.pop().value) if len(verdicts) == 1 else AlertState.INCONCLUSIVE
