"""What a threshold should be seen to do in a test: false alerts and missed mates. Pure."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom

from matcher_service.evaluation.comparisons import Comparisons
from matcher_service.evaluation.intervals import Rate, clustered_rate
from matcher_service.models.promise import Promise


def false_alerts(promised: Promise, unmated_probes: int, confidence: float = 0.95) -> tuple[int, int]:
    """Between how many false alerts so many unmated probes should give, if the promise holds."""
    tail = (1.0 - confidence) / 2.0
    return (
        int(binom.ppf(tail, unmated_probes, promised.fpir_low)),
        int(binom.ppf(1.0 - tail, unmated_probes, promised.fpir_high)),
    )


def false_non_match_rate(comparisons: Comparisons, threshold: float, confidence: float = 0.95) -> Rate:
    """The share of comparisons of one person with themselves that score below the threshold; subjects are resampled
    as wholes. No genuine comparisons: limits 0 and 1."""
    subjects, code = np.unique(comparisons.genuine_subject, return_inverse=True)
    missed = np.bincount(code, weights=comparisons.genuine < threshold, minlength=len(subjects))
    return clustered_rate(missed, np.bincount(code, minlength=len(subjects)), confidence)
