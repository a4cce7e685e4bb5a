"""Whether a threshold is defensible, in words for somebody who is not a statistician. Pure.

It is defensible if every question has the answer yes; not defensible if one has the answer no; otherwise the test has
not shown it, and says what would.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple

from matcher_service.evaluation.demographics import RATIO_OF_CONCERN, Differential, Finding
from matcher_service.evaluation.evaluation import Evaluation
from matcher_service.evaluation.intervals import Rate
from matcher_service.evidence_in_words import one_in

FAILURES_MAX = 0.01


class Answer(StrEnum):
    YES = "Yes"
    NO = "No"
    NOT_SHOWN = "Not shown"


class Question(NamedTuple):
    """A question, its answer, the evidence in a sentence or two, and what would settle it ("" if it is settled)."""

    question: str
    answer: Answer
    evidence: str
    settle: str = ""


class Verdict(NamedTuple):
    """`expected`: the two error rates as numbers of people, a sentence each."""

    answer: Answer
    headline: str
    meaning: str
    questions: tuple[Question, ...]
    expected: tuple[str, ...] = ()


def judge(evaluation: Evaluation) -> Verdict:
    return _judged(evaluation)._replace(expected=_expected(evaluation))


def _judged(evaluation: Evaluation) -> Verdict:
    questions = (
        _false_alerts(evaluation),
        _missed(evaluation),
        _groups(evaluation),
        _answered(evaluation),
        *(() if not evaluation.has_synthetic else (_real_people(evaluation),)),
    )
    answers = [one.answer for one in questions]
    threshold = f"Threshold {evaluation.plan.threshold:.3f}"
    real = evaluation.searches.enrolled - evaluation.searches.enrolled_synthetic
    size = f"a gallery of {real:,} {'real ' if evaluation.has_synthetic else ''}people"
    if Answer.NO in answers:
        wrong = next(one for one in questions if one.answer is Answer.NO)
        return Verdict(
            Answer.NO,
            f"{threshold} is NOT defensible for {size}.",
            f"Do not use it as it is. The reason: {_lower_first(wrong.question)} No. {wrong.evidence}",
            questions,
        )
    if Answer.NOT_SHOWN in answers:
        open_questions = [one for one in questions if one.answer is Answer.NOT_SHOWN]
        return Verdict(
            Answer.NOT_SHOWN,
            f"{threshold} is NOT YET defensible for {size}: this test does not show it.",
            (
                "With the made-up people it alerts too often; among real ones nothing speaks against it, but "
                if _fails_with_synthetic(evaluation)
                else "Nothing seen here speaks against the threshold, but "
            )
            + (
                f"{len(open_questions)} of {len(questions)} questions stay"
                if len(open_questions) > 1
                else "one question stays"
            )
            + " open below. If somebody were wrongly stopped, this test alone would not justify the setting.",
            questions,
        )
    return Verdict(
        Answer.YES,
        f"{threshold} is defensible for {size}.",
        "This test shows that it meets what was asked of it. It holds for galleries up to this size, for this camera "
        "quality and this model; test again when one of them changes.",
        questions,
    )


def _expected(evaluation: Evaluation) -> tuple[str, ...]:
    """What the rates mean for people who walk past, in numbers that need no division."""
    asked = evaluation.plan
    told = (
        (
            "who are not in the gallery",
            "wrongly alerted on",
            evaluation.real_fpir or evaluation.fpir,
            asked.fpir_wanted,
        ),
        ("who are in the gallery", "missed", evaluation.real_fnir or evaluation.fnir, asked.fnir_wanted),
    )
    return tuple(_in_people(who, what, rate, wanted) for who, what, rate, wanted in told if rate.is_measured)


def _in_people(who: str, what: str, rate: Rate, wanted: float | None) -> str:
    least = min(one for one in (rate.estimate, rate.high, wanted or 1.0) if one > 0)
    people = next((one for one in (100, 1_000, 10_000, 100_000) if least * one >= 1), 1_000_000)
    seen, most = round(rate.estimate * people), math.ceil(rate.high * people)
    allowed = "" if wanted is None else f" Asked for: at most {round(wanted * people):,}."
    return (
        f"Of {people:,} people {who}, expect {'none' if seen == 0 else f'about {seen:,}'} to be {what}; "
        f"this test cannot rule out {most:,}.{allowed}"
    )


def _false_alerts(evaluation: Evaluation) -> Question:
    plan = evaluation.plan
    rate = evaluation.real_fpir or evaluation.fpir
    question = f"Of people who are not in the gallery, does it wrongly alert on at most {one_in(plan.fpir_wanted)}?"
    seen = (
        f"{rate.events:,} of {rate.trials:,} searches for people not in the gallery gave a false alert "
        f"({rate.subjects:,} different people)."
    )
    if not rate.is_measured:
        return Question(question, Answer.NOT_SHOWN, "Nobody outside the gallery was searched for.", "Search for such.")
    bounds = f" The true rate is, with {plan.confidence:.0%} confidence, {_between(rate)}."
    if rate.high <= plan.fpir_wanted:
        return Question(question, Answer.YES, seen + bounds)
    if rate.low > plan.fpir_wanted:
        return Question(question, Answer.NO, seen + bounds, "Raise the threshold, or search a smaller gallery.")
    needed = math.ceil(-math.log((1 - plan.confidence) / 2) / plan.fpir_wanted)
    return Question(
        question,
        Answer.NOT_SHOWN,
        seen + bounds,
        f"Even without a single false alert it would take at least {needed:,} different people who are not in the "
        "gallery to show it; or raise the threshold."
        if rate.subjects < needed
        else "Test with more people who are not in the gallery, or raise the threshold.",
    )


def _missed(evaluation: Evaluation) -> Question:
    plan, rate = evaluation.plan, evaluation.real_fnir or evaluation.fnir
    if not rate.is_measured:
        return Question("Does it find the people who are in the gallery?", Answer.NOT_SHOWN, "Nobody was searched for.")
    seen = (
        f"{rate.events:,} of {rate.trials:,} searches for people in the gallery missed them "
        f"({rate.subjects:,} different people). The true rate is, with {plan.confidence:.0%} confidence, "
        f"{_between(rate)}."
    )
    wanted = plan.fnir_wanted
    if wanted is None:
        return Question(
            "Is it known how many people in the gallery it misses?", Answer.YES, seen + " No limit was set for this."
        )
    question = f"Of people who are in the gallery, does it miss at most {one_in(wanted)}?"
    if rate.high <= wanted:
        return Question(question, Answer.YES, seen)
    if rate.low > wanted:
        return Question(question, Answer.NO, seen, "Lower the threshold, or use better pictures.")
    return Question(question, Answer.NOT_SHOWN, seen, "Test with more people who are in the gallery.")


def _groups(evaluation: Evaluation) -> Question:
    question = "Do errors fall alike on different groups of people?"
    if not evaluation.differentials:
        return Question(
            question,
            Answer.NOT_SHOWN,
            "The test set does not say which group anybody belongs to, so a difference could not have been seen.",
            "Label the test set with the groups that the equality duty asks about, and test again.",
        )
    shown = [one for one in evaluation.differentials if one.finding is Finding.DIFFERENT]
    if shown:
        return Question(
            question,
            Answer.NO,
            " ".join(_difference(one) for one in shown),
            "Find the cause, or set a threshold at which the difference is not there. Do not use it meanwhile.",
        )
    wanted = {"FPIR": evaluation.plan.fpir_wanted, "FNIR": evaluation.plan.fnir_wanted}
    # A ratio of two tiny rates takes millions of people to show. What protects each group is that its own rate is
    # within what was asked of all.
    unclear = [
        one
        for one in evaluation.differentials
        if one.finding is Finding.CANNOT_TELL and not _within(one, wanted[one.measure])
    ]
    if unclear:
        least = min(group.detectable_ratio for one in unclear for group in one.groups)
        what = "no ratio at all" if math.isinf(least) else f"only one of {least:.1f} times or more"
        return Question(
            question,
            Answer.NOT_SHOWN,
            "No difference was seen, but these numbers of people could not have shown even a "
            f"{RATIO_OF_CONCERN:.0f}-fold one ({what}).",
            "Test with more people of each group.",
        )
    return Question(
        question,
        Answer.YES,
        f"No difference was seen among {len(evaluation.differentials[0].groups)} groups; and either a "
        f"{RATIO_OF_CONCERN:.0f}-fold one would have been seen, or each group's own rate is within what was asked.",
    )


def _within(one: Differential, wanted: float | None) -> bool:
    return wanted is not None and all(group.rate.high <= wanted for group in one.groups)


def _difference(one: Differential) -> str:
    what = {"FPIR": "wrongly alerted on", "FNIR": "missed"}[one.measure]
    worst = max((group for group in one.groups if group.finding is Finding.DIFFERENT), key=lambda g: g.rate.estimate)
    return (
        f"People of group {worst.group!r} are {what} {worst.ratio.estimate:.1f} times as often as the others "
        f"({one_in(worst.rate.estimate)} against {one_in(worst.others.estimate)}; "
        f"at least {worst.ratio.low:.1f} times)."
    )


def _answered(evaluation: Evaluation) -> Question:
    rate = evaluation.failure_to_process
    seen = f"{rate.events:,} of {rate.trials:,} searches were refused or not answered in full."
    return Question(
        "Did the service answer every search?",
        Answer.YES if rate.estimate <= FAILURES_MAX else Answer.NO,
        seen,
        "" if rate.estimate <= FAILURES_MAX else "Find out why: an unanswered search is a missed person.",
    )


def _real_people(evaluation: Evaluation) -> Question:
    searches = evaluation.searches
    return Question(
        "Was it tested on real people alone?",
        Answer.NOT_SHOWN,
        f"{searches.enrolled_synthetic:,} of the {searches.enrolled:,} people in the gallery are made up by a program. "
        "The answers above are those among real people. With both, "
        f"{evaluation.fpir.events:,} of {evaluation.fpir.trials:,} searches gave a false alert"
        + (", which is more than was asked" if _fails_with_synthetic(evaluation) else "")
        + ": evidence about the program, and a hint of what a gallery of this size would do.",
        "Test against a gallery of real people of this size.",
    )


def _fails_with_synthetic(evaluation: Evaluation) -> bool:
    return evaluation.has_synthetic and evaluation.fpir.low > evaluation.plan.fpir_wanted


def _between(rate: Rate) -> str:
    if rate.events == 0:
        return f"below {one_in(rate.high)}"
    if rate.low < rate.high / 50:
        return f"at most {one_in(rate.high)}"
    return f"between {one_in(rate.low)} and {one_in(rate.high)}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
