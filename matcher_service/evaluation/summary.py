"""A report in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from matcher_service.evaluation.evaluation import Evaluation
from matcher_service.evaluation.intervals import Rate
from matcher_service.evaluation.verdict import Answer, Verdict
from matcher_service.evidence_in_words import one_in

_STYLES = {Answer.YES: "green", Answer.NO: "bold red", Answer.NOT_SHOWN: "yellow"}


def show(evaluation: Evaluation, verdict: Verdict, console: Console) -> None:
    """The verdict, its questions, and the figures at the threshold."""
    console.print(Text(verdict.headline, style=f"bold {_STYLES[verdict.answer]}"))
    console.print(Text(verdict.meaning))
    for sentence in verdict.expected:
        console.print(Text(f"  - {sentence}"))
    for one in verdict.questions:
        line = Text("  ")
        line.append(f"{one.answer.value:<9}  ", style=_STYLES[one.answer])
        line.append(one.question, style="bold")
        console.print(line)
        console.print(Text(f"             {one.evidence}"))
        if one.settle:
            console.print(Text(f"             To settle it: {one.settle}"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("at the threshold", "seen", "rate", f"{evaluation.plan.confidence:.0%} limits", "people"):
        table.add_column(column)
    for label, rate in (
        ("false alerts (FPIR)", evaluation.fpir),
        ("  people never enrolled", evaluation.fpir_of_strangers),
        ("  among real references", evaluation.real_fpir),
        ("missed people (FNIR)", evaluation.fnir),
        ("  among real references", evaluation.real_fnir),
        ("not processed", evaluation.failure_to_process),
        *((f"lost by {one.setting}", one.rate) for one in evaluation.approximate),
    ):
        if rate is not None:
            table.add_row(label, *_cells(rate))
    for differential in evaluation.differentials:
        for group in differential.groups:
            table.add_row(f"{differential.measure}, group {group.group}", *_cells(group.rate))
    console.print()
    console.print(table)


def _cells(rate: Rate) -> tuple[str, str, str, str]:
    if not rate.is_measured:
        return "not tested", "", "", ""
    limits = f"{100 * rate.low:.3g}% to {100 * rate.high:.3g}% (at most {one_in(rate.high)})"
    return f"{rate.events:,} of {rate.trials:,}", f"{100 * rate.estimate:.3g}%", limits, f"{rate.subjects:,}"
