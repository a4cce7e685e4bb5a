"""Every number of a report, as JSON and as rows of CSV. Pure."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator
from typing import Any

from matcher_service.evaluation.evaluation import Evaluation
from matcher_service.evaluation.intervals import Rate, RateCurve
from matcher_service.evaluation.verdict import Verdict

COLUMNS = ("measure", "of", "at", "estimate", "low", "high", "events", "trials", "subjects", "effective_trials")
Row = tuple[str, str, float | str, float, float, float, int | str, int | str, int | str, float | str]


def rows(evaluation: Evaluation) -> Iterator[Row]:
    """One per number with its interval."""
    threshold = evaluation.plan.threshold
    for measure, rate in (
        ("FPIR", evaluation.fpir),
        ("FPIR_of_people_never_enrolled", evaluation.fpir_of_strangers),
        ("FNIR", evaluation.fnir),
        ("FPIR_real_references", evaluation.real_fpir),
        ("FNIR_real_references", evaluation.real_fnir),
        ("failure_to_process", evaluation.failure_to_process),
    ):
        if rate is not None:
            yield _row(measure, "all", threshold, rate)
    for differential in evaluation.differentials:
        for group in differential.groups:
            yield _row(differential.measure, group.group, threshold, group.rate)
            ratio = group.ratio
            yield (
                f"{differential.measure}_ratio_to_others", group.group, threshold,
                ratio.estimate, ratio.low, ratio.high, "", "", "", "",
            )  # fmt: skip
            yield (
                f"{differential.measure}_detectable_ratio", group.group, threshold,
                group.detectable_ratio, math.nan, math.nan, "", "", "", "",
            )  # fmt: skip
    for measure, points, curve in (
        ("FPIR_by_threshold", evaluation.scores, evaluation.fpir_curve),
        ("FNIR_by_threshold", evaluation.scores, evaluation.fnir_curve),
        ("FNIR_rank_1_by_threshold", evaluation.scores, evaluation.fnir_rank_1),
        ("hit_rate_by_rank", evaluation.ranks, evaluation.cmc),
    ):
        for at, point in enumerate(points.tolist()):
            yield _row(measure, "all", point, curve.at(at))
    sizes = evaluation.sizes
    for at, size in enumerate(sizes.sizes.tolist()):
        yield (
            "FPIR_by_size", "all", size, float(sizes.estimates[at]), float(sizes.low[at]), float(sizes.high[at]),
            "", "", "", "",
        )  # fmt: skip
    for one in evaluation.approximate:
        yield _row("mates_lost", one.setting, threshold, one.rate)


def as_csv(evaluation: Evaluation) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_short(one) for one in row] for row in rows(evaluation))
    return text.getvalue()


def as_json(evaluation: Evaluation, verdict: Verdict) -> str:
    """One document; NaN and infinity stand as null."""
    return json.dumps(_plain(document(evaluation, verdict)), indent=1, ensure_ascii=False)


def document(evaluation: Evaluation, verdict: Verdict) -> dict[str, Any]:
    plan, searches, promised = evaluation.plan, evaluation.searches, evaluation.promised
    return {
        "verdict": {
            "answer": verdict.answer.value,
            "headline": verdict.headline,
            "meaning": verdict.meaning,
            "expected": list(verdict.expected),
            "questions": [one._asdict() for one in verdict.questions],
        },
        "plan": {name: getattr(plan, name) for name in plan.__slots__},
        "probes": len(searches),
        "mated_probes": int(searches.is_mated.sum()),
        "enrolled_people": searches.enrolled,
        "enrolled_synthetic_people": searches.enrolled_synthetic,
        "answered_from_score": searches.floor,
        "rank_max": searches.rank_max,
        "at_threshold": {
            "FPIR": _rate(evaluation.fpir),
            "FPIR_of_people_never_enrolled": _rate(evaluation.fpir_of_strangers),
            "FNIR": _rate(evaluation.fnir),
            "FPIR_real_references": evaluation.real_fpir and _rate(evaluation.real_fpir),
            "FNIR_real_references": evaluation.real_fnir and _rate(evaluation.real_fnir),
            "failure_to_process": _rate(evaluation.failure_to_process),
        },
        "promised_by_calibration": None
        if promised is None
        else {**dataclasses.asdict(promised), "fnir": promised.fnir and promised.fnir._asdict()},
        "score_table_method": evaluation.table.method if evaluation.table else None,
        "groups": [
            {
                "measure": one.measure,
                "finding": one.finding.value,
                "worst_to_best": one.worst_to_best,
                "groups": [
                    {
                        "group": group.group,
                        "rate": _rate(group.rate),
                        "others": _rate(group.others),
                        "ratio": group.ratio._asdict(),
                        "detectable_ratio": group.detectable_ratio,
                        "finding": group.finding.value,
                    }
                    for group in one.groups
                ],
            }
            for one in evaluation.differentials
        ],
        "curves": {
            "threshold": evaluation.scores.tolist(),
            "FPIR": _curve(evaluation.fpir_curve),
            "FNIR": _curve(evaluation.fnir_curve),
            "FNIR_rank_1": _curve(evaluation.fnir_rank_1),
        },
        "cmc": {"rank": evaluation.ranks.tolist(), **_curve(evaluation.cmc)},
        "fpir_by_size": {
            "people": evaluation.sizes.sizes.tolist(),
            "estimates": evaluation.sizes.estimates.tolist(),
            "low": evaluation.sizes.low.tolist(),
            "high": evaluation.sizes.high.tolist(),
            "cut_short": evaluation.sizes.cut_short,
        },
        "histograms": {
            "edges": evaluation.histogram_edges.tolist(),
            "mates": evaluation.mate_histogram.tolist(),
            "best_other": evaluation.other_histogram.tolist(),
        },
        "approximate": [{"setting": one.setting, "lost": _rate(one.rate)} for one in evaluation.approximate],
    }


def _row(measure: str, of: str, at: float, rate: Rate) -> Row:
    return (
        measure, of, at, rate.estimate, rate.low, rate.high,
        rate.events, rate.trials, rate.subjects, rate.effective_trials,
    )  # fmt: skip


def _rate(rate: Rate) -> dict[str, Any]:
    return rate._asdict()


def _curve(curve: RateCurve) -> dict[str, Any]:
    return {"estimates": curve.estimates.tolist(), "low": curve.low.tolist(), "high": curve.high.tolist()}


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
