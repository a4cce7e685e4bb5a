"""Error rates follow from answers as their definitions say, and groups, sizes and verdicts follow from them."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from matcher_service.evaluation import figures, report
from matcher_service.evaluation.approximate import mates_lost
from matcher_service.evaluation.demographics import Finding, differentials
from matcher_service.evaluation.evaluation import Plan, evaluate
from matcher_service.evaluation.intervals import Rate
from matcher_service.evaluation.labelled import labelled
from matcher_service.evaluation.plots import plots
from matcher_service.evaluation.searches import (
    Searches,
    cmc,
    failure_to_process,
    fnir_curve,
    fpir_by_size,
    fpir_curve,
    searches_of,
)
from matcher_service.evaluation.verdict import Answer, _in_people, judge
from matcher_service.evidence_in_words import one_in
from matcher_service.terms import Candidate, Decision, Outcome

SEED = 19795


def decision(probe_id: str, *candidates: tuple[str, float]) -> Decision:
    found = tuple(
        Candidate(subject, f"ref-{subject}", "g", score, rank, 0.0)
        for rank, (subject, score) in enumerate(candidates, start=1)
    )
    return Decision(probe_id, Outcome.ALERT if found else Outcome.NO_CANDIDATE, found)


def small() -> Searches:
    """Five probes: found at rank 1, found at rank 2, not found, of a stranger, refused."""
    probes = labelled(np.ones((5, 2)), ["a", "b", "c", "x", "d"])
    decisions = {
        "0": decision("0", ("a", 0.9), ("b", 0.3)),
        "1": decision("1", ("c", 0.6), ("b", 0.5)),
        "2": decision("2", ("a", 0.4)),
        "3": decision("3", ("made-up", 0.7), ("a", 0.2)),
        "4": Decision("4", Outcome.REJECTED, cause="OVERLOADED"),
    }
    return searches_of(
        decisions,
        ["0", "1", "2", "3", "4"],
        probes,
        enrolled={"a", "b", "c", "d", "made-up"},
        synthetic={"made-up"},
        references=5,
        floor=-1.0,
        rank_max=10,
    )


def test_each_probe_counts_as_its_answer_says():
    found = small()
    scores = np.array([0.35, 0.55, 0.65])
    # Mates: a at .9, b at .5, c not found, d refused.
    assert fnir_curve(found, scores, 0.95).events.tolist() == [2, 3, 3]
    assert fnir_curve(found, scores, 0.95, rank=1).events.tolist() == [3, 3, 3]
    # Best others: b at .3, c at .6, a at .4, the made-up person at .7; the refused probe is no search.
    false_alerts = fpir_curve(found, scores, 0.95)
    assert (false_alerts.events.tolist(), false_alerts.trials) == ([3, 2, 1], 4)
    strangers = fpir_curve(found, scores, 0.95, set_aside=False)
    assert (strangers.events.tolist(), strangers.trials) == ([1, 1, 1], 1)
    assert cmc(found, 0.95)[1].events.tolist()[:3] == [1, 2, 2]
    assert (failure_to_process(found, 0.95).events, failure_to_process(found, 0.95).trials) == (1, 5)


def test_synthetic_references_can_be_set_aside_and_ranks_close_up():
    found = small()
    real = found.among_real()
    assert fpir_curve(real, np.array([0.35, 0.65]), 0.95).events.tolist() == [2, 0]
    assert (real.enrolled, found.enrolled_synthetic, real.enrolled_synthetic) == (4, 1, 0)
    behind = searches_of(
        {"0": decision("0", ("made-up", 0.9), ("b", 0.8), ("a", 0.7))},
        ["0"],
        labelled(np.ones((1, 2)), ["a"]),
        enrolled={"a", "b", "made-up"},
        synthetic={"made-up"},
        references=3,
        floor=-1.0,
        rank_max=10,
    )
    assert behind.mate_rank.tolist() == [3]
    assert behind.among_real().mate_rank.tolist() == [2]


def simulated(
    rng: np.random.Generator, people: int, enrolled: int, *, groups: dict[str, float] | None = None, each: int = 1
) -> Searches:
    """A gallery of `enrolled`; `people` probes of enrolled people and as many of strangers. `groups`: by how much the
    false scores of each are raised."""
    names = list(groups or {"": 0.0})
    count = 2 * people
    belongs = np.repeat(np.arange(count) % len(names), each)
    raised = np.asarray([(groups or {"": 0.0})[name] for name in names])[belongs]
    rows = count * each
    others = np.sort(rng.normal(0.0, 0.15, (rows, 40)) + raised[:, None], axis=1)[:, ::-1]
    subject = np.repeat(np.arange(count), each)
    is_mated = subject < people
    mate = np.where(is_mated, np.minimum(rng.normal(0.75, 0.1, rows), 0.99), -np.inf)
    return Searches(
        subjects=np.asarray([f"p{one}" for one in subject]),
        groups=np.asarray(names)[belongs],
        is_mated=is_mated,
        is_failed=np.zeros(rows, dtype=bool),
        mate_score=mate,
        mate_rank=np.where(is_mated, 1 + (others > mate[:, None]).sum(axis=1), 0),
        offsets=np.arange(rows + 1) * 40,
        other_scores=others.ravel(),
        other_synthetic=np.zeros(rows * 40, dtype=bool),
        floor=-1.0,
        rank_max=50,
        enrolled=enrolled,
        enrolled_synthetic=0,
        references=enrolled,
    )


def test_fpir_over_a_part_of_the_gallery_is_what_drawing_such_parts_gives():
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    found = simulated(rng, 150, 40)
    threshold = 0.3
    curve = fpir_by_size(found, threshold, 0.95, rng)
    scores = found.other_scores.reshape(-1, 40)
    for size in (1, int(curve.sizes[len(curve.sizes) // 2]), 40):
        drawn = [(scores[:, rng.choice(40, size, replace=False)] >= threshold).any(axis=1).mean() for _ in range(150)]
        at = int(np.flatnonzero(curve.sizes == size)[0])
        assert curve.estimates[at] == pytest.approx(np.mean(drawn), abs=5 * np.std(drawn) / np.sqrt(150) + 1e-9)
        assert curve.low[at] <= curve.estimates[at] <= curve.high[at]
    assert curve.cut_short == 0


def test_fpir_by_size_says_when_lists_were_cut_and_does_not_resample_a_handful():
    rng = np.random.default_rng(SEED)
    found = simulated(rng, 50, 5000)
    cut = replace(found, rank_max=40)
    assert fpir_by_size(cut, -0.9, 0.95, rng).cut_short == len(found)
    rare = fpir_by_size(found, 0.99, 0.95, rng)
    assert rare.high[-1] == pytest.approx(fpir_curve(found, np.array([0.99]), 0.95).at(0).high)


# --- groups ------------------------------------------------------------------------------------------------


def test_a_group_that_is_wrongly_alerted_on_more_often_is_found_and_the_ratio_is_held():
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    found = simulated(rng, 1500, 1000, groups={"A": 0.0, "B": 0.06})
    false_alerts, missed = differentials(found, 0.5, 0.95)
    assert false_alerts.finding is Finding.DIFFERENT
    by_name = {one.group: one for one in false_alerts.groups}
    assert by_name["B"].ratio.low > 1.5
    assert missed.finding is not Finding.DIFFERENT


def test_equal_groups_differ_in_at_most_5_of_100_tests():
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    different = 0
    for _ in range(40):
        found = simulated(rng, 200, 1000, groups={"A": 0.0, "B": 0.0, "C": 0.0})
        different += differentials(found, 0.35, 0.95)[0].finding is Finding.DIFFERENT
    assert different / 40 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 40)


def test_a_sample_that_could_not_have_shown_a_twofold_difference_says_so():
    rng = np.random.default_rng(SEED)
    few = differentials(simulated(rng, 20, 100, groups={"A": 0.0, "B": 0.0}), 0.45, 0.95)[0]
    many = differentials(simulated(rng, 4000, 100, groups={"A": 0.0, "B": 0.0}), 0.35, 0.95)[0]
    assert few.finding is Finding.CANNOT_TELL
    assert many.finding is Finding.NOT_SHOWN
    assert max(one.detectable_ratio for one in many.groups) < 2.0


def test_one_label_is_no_comparison():
    assert differentials(simulated(np.random.default_rng(SEED), 20, 100, groups={"A": 0.0}), 0.4, 0.95) == ()


# --- verdict and figures -----------------------------------------------------------------------------------


def plan(threshold: float, fpir: float, **more: object) -> Plan:
    return Plan("a test", "g", "s/1 (2-d)", threshold, fpir, **more)  # type: ignore[arg-type]


def test_a_threshold_is_defensible_only_if_every_question_is_answered_with_yes():
    rng = np.random.default_rng(SEED)
    found = simulated(rng, 4000, 1000, groups={"A": 0.0, "B": 0.0})
    # At 0.42 about one search in ten alerts falsely.
    good = judge(evaluate(found, plan(0.42, 0.2, fnir_wanted=0.01)))
    assert (good.answer, {one.answer for one in good.questions}) == (Answer.YES, {Answer.YES})
    assert "is defensible" in good.headline
    assert judge(evaluate(found, plan(0.42, 0.001))).answer is Answer.NO
    assert judge(evaluate(found, plan(0.42, 0.2, fnir_wanted=1e-5))).answer is not Answer.YES
    unlabelled = judge(evaluate(replace(found, groups=np.full(len(found), "")), plan(0.42, 0.2)))
    assert unlabelled.answer is Answer.NOT_SHOWN
    assert any("group" in one.question for one in unlabelled.questions if one.answer is Answer.NOT_SHOWN)


def test_no_false_alert_among_few_people_does_not_make_a_threshold_defensible():
    verdict = judge(evaluate(simulated(np.random.default_rng(SEED), 20, 100), plan(0.9, 0.001)))
    assert verdict.answer is Answer.NOT_SHOWN
    assert "different people" in verdict.questions[0].settle


def test_a_difference_between_groups_makes_a_threshold_indefensible_however_few_its_errors():
    found = simulated(np.random.default_rng(SEED), 3000, 1000, groups={"A": 0.0, "B": 0.06})
    verdict = judge(evaluate(found, plan(0.5, 0.5)))
    assert verdict.answer is Answer.NO
    assert "'B'" in verdict.meaning


def test_made_up_references_never_count_as_people():
    found = simulated(np.random.default_rng(SEED), 3000, 1000, groups={"A": 0.0, "B": 0.0})
    rng = np.random.default_rng(SEED)
    mixed = replace(found, other_synthetic=rng.random(len(found.other_scores)) < 0.5, enrolled_synthetic=500)
    result = evaluate(mixed, plan(0.42, 0.2))
    assert result.real_fpir is not None
    assert result.real_fpir.events < result.fpir.events
    verdict = judge(result)
    assert verdict.answer is Answer.NOT_SHOWN
    assert any("made up" in one.evidence for one in verdict.questions)
    assert "500 real people" in verdict.headline
    # A filler that makes it alert too often is a warning, whatever the real ones say.
    few_real = replace(mixed, other_synthetic=rng.random(len(found.other_scores)) < 0.98, enrolled_synthetic=980)
    warned = judge(evaluate(few_real, plan(0.42, 0.05)))
    assert warned.answer is Answer.NOT_SHOWN
    assert "alerts too often" in warned.meaning


@pytest.mark.parametrize(
    ("rate", "words"), [(0.0, "none"), (1.0, "all"), (0.52, "52%"), (0.1, "1 in 10"), (1 / 5723, "1 in 5,700")]
)
def test_rates_are_told_as_people_tell_them(rate: float, words: str):
    assert one_in(rate) == words


@pytest.mark.parametrize(
    ("rate", "wanted", "words"),
    [
        (
            Rate(3, 200, 40, 40.0, 0.015, 4e-5, 0.115, 0.95),
            0.05,
            "Of 100 people out there, expect about 2 to be seen; this test cannot rule out 12. Asked for: at most 5.",
        ),
        (
            Rate(0, 200, 40, 40.0, 0.0, 0.0, 0.0881, 0.95),
            None,
            "Of 100 people out there, expect none to be seen; this test cannot rule out 9.",
        ),
        (
            Rate(30, 10**5, 9000, 9000.0, 3e-4, 2e-4, 6.01e-4, 0.95),
            0.001,
            "Of 10,000 people out there, expect about 3 to be seen; this test cannot rule out 7. "
            "Asked for: at most 10.",
        ),
    ],
)
def test_rates_are_told_as_numbers_of_people(rate: Rate, wanted: float | None, words: str):
    assert _in_people("out there", "seen", rate, wanted) == words


def test_every_curve_and_rate_stands_in_the_json_and_in_the_csv_with_its_limits():
    found = simulated(np.random.default_rng(SEED), 100, 60, groups={"A": 0.0, "B": 0.02}, each=2)
    result = evaluate(found, plan(0.4, 0.1))
    document = json.loads(figures.as_json(result, judge(result)))
    rows = list(csv.DictReader(io.StringIO(figures.as_csv(result))))
    at = {(row["measure"], row["of"]): row for row in rows}
    assert float(at["FPIR", "all"]["estimate"]) == pytest.approx(document["at_threshold"]["FPIR"]["estimate"], rel=1e-5)
    assert {row["measure"] for row in rows} >= {
        "FPIR", "FNIR", "FPIR_by_threshold", "FNIR_by_threshold", "hit_rate_by_rank", "FPIR_by_size",
        "failure_to_process", "FPIR_ratio_to_others", "FPIR_detectable_ratio",
    }  # fmt: skip
    points = [row for row in rows if row["measure"] == "FPIR_by_threshold"]
    assert len(points) == len(document["curves"]["threshold"])
    assert all(float(row["low"]) <= float(row["estimate"]) <= float(row["high"]) for row in points)
    assert sum(document["histograms"]["mates"]) == 200


# --- approximate search ------------------------------------------------------------------------------------


def test_approximate_indexes_lose_mates_that_an_exact_scan_finds():
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    references = rng.standard_normal((4000, 96), dtype=np.float32)
    references /= np.linalg.norm(references, axis=1, keepdims=True)
    names = np.asarray([f"p{one}" for one in range(4000)])
    chosen = rng.choice(4000, 300, replace=False)
    apart = rng.standard_normal((300, 96)).astype(np.float32)
    apart /= np.linalg.norm(apart, axis=1, keepdims=True)
    probes = 0.62 * references[chosen] + 0.78 * apart
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    lost = mates_lost(references, names, probes, names[chosen], threshold=0.45, rank_max=5, confidence=0.95)
    by_setting = {one.setting: one.rate for one in lost}
    print({name: rate.estimate for name, rate in by_setting.items()})
    hnsw = [rate.estimate for name, rate in by_setting.items() if name.startswith("HNSW")]
    ivf = [rate.estimate for name, rate in by_setting.items() if name.startswith("IVF")]
    assert hnsw == sorted(hnsw, reverse=True)
    assert ivf == sorted(ivf, reverse=True)
    assert hnsw[0] > 0.0
    assert ivf[0] > 0.2


@pytest.mark.parametrize(
    "case", ["nobody answered", "nobody enrolled", "everybody enrolled", "one probe", "no candidate"]
)
def test_a_report_comes_out_of_every_kind_of_test(case: str):
    rng = np.random.default_rng(SEED)
    found = simulated(rng, 10, 30, groups={"A": 0.0, "B": 0.0})
    if case == "nobody answered":
        empty = np.zeros(len(found) + 1, dtype=np.int64)
        found = replace(
            found,
            is_failed=np.ones(len(found), dtype=bool),
            mate_score=np.full(len(found), -np.inf),
            mate_rank=np.zeros(len(found), dtype=np.int64),
            offsets=empty,
            other_scores=np.zeros(0),
            other_synthetic=np.zeros(0, dtype=bool),
        )
    elif case == "no candidate":
        found = replace(found, offsets=np.zeros(len(found) + 1, dtype=np.int64), other_scores=np.zeros(0),
                        other_synthetic=np.zeros(0, dtype=bool))  # fmt: skip
    elif case == "nobody enrolled":
        found = replace(found, is_mated=np.zeros(len(found), dtype=bool))
    elif case == "everybody enrolled":
        found = replace(found, is_mated=np.ones(len(found), dtype=bool))
    else:
        one = slice(0, 1)
        found = replace(
            found, subjects=found.subjects[one], groups=found.groups[one], is_mated=found.is_mated[one],
            is_failed=found.is_failed[one], mate_score=found.mate_score[one], mate_rank=found.mate_rank[one],
            offsets=found.offsets[:2], other_scores=found.other_scores[:40], other_synthetic=found.other_synthetic[:40],
        )  # fmt: skip
    result = evaluate(found, plan(0.4, 0.01))
    verdict = judge(result)
    drawn = plots(result) if case in ("nobody answered", "one probe") else []
    page = report.html(result, verdict, drawn)
    assert verdict.answer is not Answer.YES
    assert verdict.headline in page
    json.loads(figures.as_json(result, verdict))
    assert figures.as_csv(result).count("\n") > 100
