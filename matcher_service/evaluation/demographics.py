"""Whether errors fall alike on groups of people, and whether the sample could show it if they did not.

After ISO/IEC 19795-10: rates per group with their uncertainty, the differential, and the power of the test. A
difference that was not shown is not equality; what ratio the sample would have shown is said beside it. Groups are
labels of the labelled set; the service stores none and infers none.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service.evaluation.intervals import Rate, Ratio, clustered_rate, detectable_ratio, rate_ratio
from matcher_service.evaluation.searches import Searches, by_subject, unmated

# A ratio that a sample should be able to show before "not shown" comforts anybody.
RATIO_OF_CONCERN = 2.0
POWER = 0.8


class Finding(StrEnum):
    DIFFERENT = "a difference is shown"
    NOT_SHOWN = "no difference is shown, and a twofold one would have been"
    CANNOT_TELL = "the sample cannot show a twofold difference"


class GroupRate(NamedTuple):
    """One error rate of one group: its ratio to that of everybody else, and the least ratio that the sample would show
    with 80% power. Limits of the ratio are widened for the number of groups compared."""

    group: str
    rate: Rate
    others: Rate
    ratio: Ratio
    detectable_ratio: float
    finding: Finding


class Differential(NamedTuple):
    """`measure`: "FPIR" or "FNIR" at the threshold. `worst_to_best`: the highest rate of a group over the lowest."""

    measure: str
    groups: tuple[GroupRate, ...]
    worst_to_best: float

    @property
    def finding(self) -> Finding:
        found = [one.finding for one in self.groups]
        if Finding.DIFFERENT in found:
            return Finding.DIFFERENT
        return Finding.CANNOT_TELL if Finding.CANNOT_TELL in found else Finding.NOT_SHOWN


def differentials(searches: Searches, threshold: float, confidence: float) -> tuple[Differential, ...]:
    """FPIR and FNIR by group at a threshold; () unless at least two groups are labelled."""
    names = [one for one in np.unique(searches.groups).tolist() if one]
    if len(names) < 2:
        return ()
    false_alert = searches.best_other >= threshold
    missed = ~((searches.mate_rank > 0) & (searches.mate_score >= threshold))
    return (
        _differential("FPIR", searches, unmated(searches), false_alert, names, confidence),
        _differential("FNIR", searches, searches.is_mated, missed, names, confidence),
    )


def _differential(
    measure: str,
    searches: Searches,
    concerned: NDArray[np.bool_],
    happened: NDArray[np.bool_],
    names: list[str],
    confidence: float,
) -> Differential:
    # Bonferroni: with many groups one would differ by chance.
    each = 1.0 - (1.0 - confidence) / len(names)
    found = []
    for name in names:
        mine = concerned & (searches.groups == name)
        rest = concerned & (searches.groups != name) & (searches.groups != "")
        rate, others = (_rate(searches, which, happened, confidence) for which in (mine, rest))
        ratio = rate_ratio(rate, others, each)
        base = others.estimate if others.events > 0 else others.high
        least = detectable_ratio(base, rate.effective_trials, others.effective_trials, power=POWER, confidence=each)
        if ratio.low > 1.0 or ratio.high < 1.0:
            finding = Finding.DIFFERENT
        else:
            finding = Finding.NOT_SHOWN if least <= RATIO_OF_CONCERN else Finding.CANNOT_TELL
        found.append(GroupRate(name, rate, others, ratio, least, finding))
    rates = [one.rate.estimate for one in found if one.rate.is_measured]
    if not rates or max(rates) == 0.0:
        spread = float("nan")
    else:
        spread = max(rates) / min(rates) if min(rates) > 0 else float("inf")
    return Differential(measure, tuple(found), spread)


def _rate(
    searches: Searches,
    which: NDArray[np.bool_],
    happened: NDArray[np.bool_],
    confidence: float,
) -> Rate:
    group = by_subject(searches, which)
    return clustered_rate(group.events(happened[group.rows, None])[:, 0], group.trials, confidence)
