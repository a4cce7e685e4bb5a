"""The report as one HTML page without anything outside it. Its first screen is for somebody who has to decide, and is
not a statistician.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from matcher_service.evaluation.evaluation import Evaluation
from matcher_service.evaluation.intervals import Rate
from matcher_service.evaluation.plots import Plot
from matcher_service.evaluation.verdict import Answer, Verdict
from matcher_service.evidence_in_words import one_in

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b2733; margin: 0 auto; max-width: 62rem; padding: 1.2rem; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0 0 .6rem; color: #51606e; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
.verdict { border-left: .5rem solid; padding: .7rem 1.1rem; border-radius: .3rem; }
.verdict p { margin: .3rem 0 0; }
.headline { font-size: 1.5rem; font-weight: 700; line-height: 1.25; }
.verdict.Yes { border-color: #2c7a3f; background: #eef7f0; }
.verdict.No { border-color: #b3391f; background: #fbefec; }
.verdict.Not { border-color: #b07a10; background: #fdf6e7; }
.verdict ul { margin: .5rem 0 0; padding-left: 1.2rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: .95rem; }
td, th { text-align: left; vertical-align: top; padding: .45rem .6rem; border-bottom: 1px solid #e4e8ec; }
.answer { font-weight: 700; white-space: nowrap; }
.answer.Yes { color: #2c7a3f; } .answer.No { color: #b3391f; } .answer.Not { color: #8a5d05; }
.settle { color: #51606e; } .settle::before { content: "To settle it: "; font-weight: 600; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 0 0 1.6rem; } figcaption { color: #51606e; font-size: .95rem; }
figure svg { width: 100%; height: auto; max-width: 44rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 0 1.5rem; }
small, .quiet { color: #51606e; }
"""


def html(evaluation: Evaluation, verdict: Verdict, plots: Sequence[Plot]) -> str:
    plan = evaluation.plan
    parts = [
        "<!doctype html>",
        '<html lang="en-GB"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(plan.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(plan.title)}</h1>",
        f'<div class="verdict {_class(verdict.answer)}"><div class="headline">{escape(verdict.headline)}</div>',
        f"<p>{escape(verdict.meaning)}</p>{_list(verdict.expected)}</div>",
        _questions(verdict),
        _words(evaluation),
        "<h2>At the threshold</h2>",
        _rates(evaluation),
        _promise(evaluation),
        "<h2>Plots</h2><div class='plots'>",
        *(_figure(one) for one in plots),
        "</div>",
        _groups(evaluation),
        _approximate(evaluation),
        _method(evaluation),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(one)}</li>' for one in sentences)}</ul>" if sentences else ""


def _class(answer: Answer) -> str:
    return answer.value.split()[0]


def _questions(verdict: Verdict) -> str:
    rows = []
    for one in verdict.questions:
        settle = f'<div class="settle">{escape(one.settle)}</div>' if one.settle else ""
        rows.append(
            f'<tr><td>{escape(one.question)}</td><td class="answer {_class(one.answer)}">{one.answer.value}</td>'
            f"<td>{escape(one.evidence)}{settle}</td></tr>"
        )
    return "<table>" + "".join(rows) + "</table>"


def _words(evaluation: Evaluation) -> str:
    searches = evaluation.searches
    people = len(set(searches.subjects.tolist()))
    made_up = (
        f", of whom {searches.enrolled_synthetic:,} are made up by a program" if searches.enrolled_synthetic else ""
    )
    return (
        f'<p class="quiet">A <b>false alert</b> names somebody who is not in the gallery. A <b>missed</b> person is in '
        f"the gallery and is not found. Tested: {len(searches):,} searches with pictures of {people:,} different "
        f"people against a gallery of {searches.enrolled:,}{made_up}. What counts is the number of different people: "
        "ten pictures of one person are far less evidence than one picture of each of ten.</p>"
    )


def _rates(evaluation: Evaluation) -> str:
    named: list[tuple[str, Rate | None]] = [
        ("False alerts (FPIR)", evaluation.fpir),
        ("&nbsp; of which: people never enrolled", evaluation.fpir_of_strangers),
        ("&nbsp; among real references alone", evaluation.real_fpir),
        ("Missed people (FNIR)", evaluation.fnir),
        ("&nbsp; among real references alone", evaluation.real_fnir),
        ("Not processed", evaluation.failure_to_process),
    ]
    rows = "".join(_rate_row(label, rate) for label, rate in named if rate is not None)
    confidence = f"{evaluation.plan.confidence:.0%}"
    return (
        f"<table><tr><th></th><th>Seen</th><th>Rate</th><th>{confidence} limits</th><th>Different people</th>"
        f"<th>Worth independent searches</th></tr>{rows}</table>"
    )


def _rate_row(label: str, rate: Rate) -> str:
    if not rate.is_measured:
        return f"<tr><td>{label}</td><td colspan=5>not tested</td></tr>"
    return (
        f'<tr class="number"><td>{label}</td><td>{rate.events:,} of {rate.trials:,}</td><td>{_percent(rate.estimate)}'
        f"</td><td>{_percent(rate.low)} to {_percent(rate.high)} (at most {one_in(rate.high)})</td>"
        f"<td>{rate.subjects:,}</td><td>{rate.effective_trials:,.0f}</td></tr>"
    )


def _promise(evaluation: Evaluation) -> str:
    promised = evaluation.promised
    if promised is None:
        return "<p>The template space has no score table: nothing was promised before this test.</p>"
    reach = (
        f"it promises the {one_in(promised.fpir_wanted)} asked for up to {promised.references_max:,} people"
        if promised.references_max
        else f"it does not promise the {one_in(promised.fpir_wanted)} asked for at any size"
    )
    fnir = promised.fnir
    missed = (
        "It does not say how many people are missed."
        if fnir is None
        else f"It put missed people at {_percent(fnir.estimate)} ({_percent(fnir.low)} to {_percent(fnir.high)}), if "
        "each has one reference."
    )
    on_record = evaluation.plan.on_record
    return (
        f"<p>Before this test, the calibration of the template space put false alerts at this threshold and size at "
        f"{_percent(promised.fpir_estimate)} ({_percent(promised.fpir_low)} to {_percent(promised.fpir_high)}); "
        f"{reach}. {missed}</p>"
        + (f"<p>On record with the gallery:</p>{_list(on_record)}" if on_record else "")
        + f"<p><small>{escape(evaluation.table.method if evaluation.table else '')}</small></p>"
    )


def _figure(plot: Plot) -> str:
    return (
        f'<figure id="{plot.name}"><h3>{escape(plot.title)}</h3>{_own_names(plot)}'
        f"<figcaption>{escape(plot.words)}</figcaption></figure>"
    )


def _own_names(plot: Plot) -> str:
    """Names within the drawings of one page must differ."""
    text = plot.svg
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{plot.name}-")
    return text


def _groups(evaluation: Evaluation) -> str:
    if not evaluation.differentials:
        return ""
    tables = []
    for one in evaluation.differentials:
        rows = "".join(
            f'<tr class="number"><td>{escape(group.group)}</td><td>{group.rate.events:,} of {group.rate.trials:,}</td>'
            f"<td>{_percent(group.rate.estimate)} ({_percent(group.rate.low)} to {_percent(group.rate.high)})</td>"
            f"<td>{_times(group.ratio.estimate)} ({_times(group.ratio.low)} to {_times(group.ratio.high)})</td>"
            f"<td>{_times(group.detectable_ratio)}</td><td>{group.finding.value}</td></tr>"
            for group in one.groups
        )
        label = {"FPIR": "False alerts (FPIR)", "FNIR": "Missed people (FNIR)"}[one.measure]
        tables.append(
            f"<h3>{label}: {one.finding.value}</h3><table><tr><th>Group</th><th>Seen</th><th>Rate, limits</th>"
            "<th>Ratio to the others, limits</th><th>Least ratio this sample would show</th><th></th></tr>"
            f"{rows}</table>"
        )
    return "<h2>By group of people</h2>" + "".join(tables)


def _approximate(evaluation: Evaluation) -> str:
    if not evaluation.approximate:
        return ""
    rows = "".join(
        f'<tr class="number"><td>{escape(one.setting)}</td><td>{one.rate.events:,} of {one.rate.trials:,}</td>'
        f"<td>{_percent(one.rate.estimate)} ({_percent(one.rate.low)} to {_percent(one.rate.high)})</td></tr>"
        for one in evaluation.approximate
    )
    return (
        "<h2>What approximate search would have lost</h2><p>This service searches exactly. The same templates in "
        f"approximate indexes:</p><table><tr><th>Index</th><th>Lost</th><th>Share, limits</th></tr>{rows}</table>"
    )


def _method(evaluation: Evaluation) -> str:
    plan, searches = evaluation.plan, evaluation.searches
    credit = f"<p>{escape(plan.credit)}</p>" if plan.credit else ""
    return (
        "<h2>How this was measured</h2><p class='quiet'>Every search went through the running service, under an "
        f"audited case. Gallery {escape(plan.gallery)}, template space {escape(plan.space)}; nothing below a score of "
        f"{searches.floor:.3f} and no more than {searches.rank_max} candidates were answered. Unmated searches are "
        "those of people who are not enrolled, and those of enrolled people with their own record set aside, which an "
        "exact search answers alike. Rates have Clopper-Pearson limits at the number of independent searches they are "
        "worth (Korn and Graubard); with events in fewer than ten people each person counts once. FPIR against size is "
        "computed over random parts of the gallery, its limits by resampling people "
        f"(seed {plan.seed}). A missed person includes one whose search was not processed. All numbers are in "
        f"report.json and report.csv beside this page.</p>{credit}"
    )


def _percent(value: float) -> str:
    if value != value:
        return "-"
    return f"{100 * value:.3g}%"


def _times(value: float) -> str:
    if value != value:
        return "-"
    return "unbounded" if value == float("inf") else f"{value:.2g}"
