"""Everything that one labelled test says of one threshold. Pure: answers in, figures out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from matcher_service.evaluation.approximate import Lost
from matcher_service.evaluation.demographics import Differential, differentials
from matcher_service.evaluation.intervals import Rate, RateCurve
from matcher_service.evaluation.searches import (
    Searches,
    SizeCurve,
    cmc,
    failure_to_process,
    fnir_curve,
    fpir_by_size,
    fpir_curve,
    thresholds,
)
from matcher_service.models.promise import Promise, promise
from matcher_service.terms import Float64, Int64, ScoreTable

BINS = 80


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked of the test. `fpir_wanted`: the share of unmated searches that may alert. `fnir_wanted`: the share
    of mated searches that may be missed; None: none was set. `on_record`: what the gallery has on record of the
    threshold, in sentences."""

    title: str
    gallery: str
    space: str
    threshold: float
    fpir_wanted: float
    fnir_wanted: float | None = None
    confidence: float = 0.95
    seed: int = 1
    credit: str = ""
    on_record: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`fpir` and `fnir` at the threshold; with `real` those over real references alone if some are made up, else None.

    Curves run over `scores` [p]; `ranks` [r] belong to `cmc`. `histogram_edges` [b+1] belong to `mate_histogram` and
    `other_histogram`: scores of mates, and of the best candidate that is somebody else. `promised`: what the space's
    score table says of the threshold at this size, if it has one.
    """

    plan: Plan
    searches: Searches
    fpir: Rate
    fpir_of_strangers: Rate
    fnir: Rate
    real_fpir: Rate | None
    real_fnir: Rate | None
    failure_to_process: Rate
    scores: Float64
    fpir_curve: RateCurve
    fnir_curve: RateCurve
    fnir_rank_1: RateCurve
    ranks: Int64
    cmc: RateCurve
    sizes: SizeCurve
    histogram_edges: Float64
    mate_histogram: Int64
    other_histogram: Int64
    differentials: tuple[Differential, ...]
    promised: Promise | None
    table: ScoreTable | None
    approximate: tuple[Lost, ...] = ()

    @property
    def has_synthetic(self) -> bool:
        return self.searches.enrolled_synthetic > 0


def evaluate(
    searches: Searches, plan: Plan, table: ScoreTable | None = None, approximate: tuple[Lost, ...] = ()
) -> Evaluation:
    """The figures at `plan.threshold`, and the curves over all that was answered."""
    confidence = plan.confidence
    scores = thresholds(searches, plan.threshold)
    at = int(np.searchsorted(scores, plan.threshold))
    false_alerts, missed = fpir_curve(searches, scores, confidence), fnir_curve(searches, scores, confidence)
    one = np.asarray([plan.threshold])
    strangers = fpir_curve(searches, one, confidence, set_aside=False).at(0)
    real = searches.among_real() if searches.enrolled_synthetic else None
    ranks, by_rank = cmc(searches, confidence)
    finite = [values[np.isfinite(values)] for values in (searches.mate_score, searches.best_other)]
    edges = np.linspace(float(scores[0]), float(scores[-1]), BINS + 1)
    return Evaluation(
        plan=plan,
        searches=searches,
        fpir=false_alerts.at(at),
        fpir_of_strangers=strangers,
        fnir=missed.at(at),
        real_fpir=None if real is None else fpir_curve(real, one, confidence).at(0),
        real_fnir=None if real is None else fnir_curve(real, one, confidence).at(0),
        failure_to_process=failure_to_process(searches, confidence),
        scores=scores,
        fpir_curve=false_alerts,
        fnir_curve=missed,
        fnir_rank_1=fnir_curve(searches, scores, confidence, rank=1),
        ranks=ranks,
        cmc=by_rank,
        sizes=fpir_by_size(searches, plan.threshold, confidence, np.random.default_rng(plan.seed)),
        histogram_edges=edges,
        mate_histogram=np.histogram(finite[0], edges)[0].astype(np.int64),
        other_histogram=np.histogram(finite[1], edges)[0].astype(np.int64),
        differentials=differentials(searches, plan.threshold, confidence),
        promised=None
        if table is None
        else promise(table, plan.threshold, plan.fpir_wanted, max(searches.references, 1)),
        table=table,
        approximate=approximate,
    )
