"""The plots of a report, as PNG and as SVG text. Needs matplotlib (extra `evaluate`)."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from matcher_service.errors import StartRefused
from matcher_service.evaluation.evaluation import Evaluation
from matcher_service.evaluation.intervals import RateCurve
from matcher_service.terms import Float64

_INK, _FALSE, _MISS, _QUIET = "#1b2733", "#b3391f", "#1f5fa8", "#8a94a0"
_SIZE_IN = (6.4, 4.2)
_PNG_DPI = 96


class Plot:
    """One plot: `name` (of its files), `title`, `words` (what to see in it), `png` bytes, `svg` text."""

    __slots__ = ("name", "png", "svg", "title", "words")

    def __init__(self, name: str, title: str, words: str, png: bytes, svg: str) -> None:
        self.name, self.title, self.words, self.png, self.svg = name, title, words, png, svg


def plots(evaluation: Evaluation) -> list[Plot]:
    """Raises StartRefused without matplotlib."""
    wanted: list[tuple[str, str, str, Callable[[Evaluation, Any], None]]] = [
        (
            "errors-by-threshold",
            "False alerts and missed people, by threshold",
            "Raising the threshold (to the right) gives fewer false alerts and more missed people. The bands are the "
            "limits within which the true rates lie.",
            _errors,
        ),
        (
            "det",
            "Missed people against false alerts (DET)",
            "Each point of the line is a threshold. Nearer to the lower left corner is better. The cross is the "
            "threshold that is judged, with the limits of both rates.",
            _det,
        ),
        (
            "cmc",
            "How often the right person is among the first candidates (CMC)",
            "At rank 1 the right person is the first candidate. No threshold is applied beyond the lowest score "
            "answered.",
            _cmc,
        ),
        (
            "scores",
            "Scores of the right person, and of the best other person",
            "Where the two overlap, every threshold errs one way or the other.",
            _scores,
        ),
        (
            "fpir-by-size",
            "False alerts against the number of people in the gallery",
            "The same threshold alerts wrongly more often, the more people are in the gallery.",
            _sizes,
        ),
    ]
    if evaluation.differentials:
        wanted.append(
            (
                "groups",
                "Error rates by group of people",
                "Bars are the limits within which the true rates lie. Where bars overlap, a difference may be chance.",
                _groups,
            )
        )
    if evaluation.approximate:
        wanted.append(
            (
                "approximate",
                "What approximate search would have lost",
                "The share of the people found by this exact search whom an approximate index does not find.",
                _approximate,
            )
        )
    return [_drawn(evaluation, *one) for one in wanted]


def _drawn(evaluation: Evaluation, name: str, title: str, words: str, draw: Callable[[Evaluation, Any], None]) -> Plot:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise StartRefused(
            "the report's plots need matplotlib",
            hint="install the extra: pip install 'matcher-service[evaluate]', or ask for no report",
        ) from error
    style: Any = {
        "font.size": 9.5,
        "font.family": "sans-serif",
        "axes.edgecolor": _QUIET,
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.grid": True,
        "grid.color": "#e4e8ec",
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "path.simplify": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZE_IN, layout="constrained")
        draw(evaluation, figure.subplots())
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    text = svg.getvalue()
    return Plot(name, title, words, png.getvalue(), text[text.index("<svg") :])


def _errors(evaluation: Evaluation, axes: Any) -> None:
    for curve, colour, label in (
        (evaluation.fpir_curve, _FALSE, "false alerts (FPIR)"),
        (evaluation.fnir_curve, _MISS, "missed people (FNIR)"),
    ):
        _band(axes, evaluation.scores, curve, colour, label, least=_least(evaluation))
    axes.axvline(evaluation.plan.threshold, color=_INK, lw=1)
    _note(
        axes,
        f" threshold {evaluation.plan.threshold:.3f}",
        (evaluation.plan.threshold, 0.96),
        ("data", "axes fraction"),
    )
    axes.axhline(evaluation.plan.fpir_wanted, color=_FALSE, lw=1, ls=":")
    wanted = (0.005, evaluation.plan.fpir_wanted * 1.03)
    _note(axes, "most false alerts asked for", wanted, ("axes fraction", "data"), color=_FALSE)
    _rate_axis(axes, "y", _least(evaluation))
    axes.set_xlabel("score at which the threshold is set")
    axes.set_ylabel("share of searches")
    axes.legend(loc="lower left")


def _det(evaluation: Evaluation, axes: Any) -> None:
    least = _least(evaluation)
    for curve, style, label in (
        (evaluation.fnir_curve, "-", f"mate among the first {evaluation.searches.rank_max}"),
        (evaluation.fnir_rank_1, "--", "mate at rank 1"),
    ):
        known = (evaluation.fpir_curve.estimates > 0) | (curve.estimates > 0)
        axes.plot(
            np.maximum(evaluation.fpir_curve.estimates[known], least),
            np.maximum(curve.estimates[known], least),
            style,
            color=_INK,
            lw=1.4,
            label=label,
        )
    false_alerts, missed = evaluation.fpir, evaluation.fnir
    axes.errorbar(
        [max(false_alerts.estimate, least)],
        [max(missed.estimate, least)],
        xerr=[
            [max(0.0, false_alerts.estimate - false_alerts.low)],
            [false_alerts.high - max(false_alerts.estimate, least)],
        ],
        yerr=[[max(0.0, missed.estimate - missed.low)], [missed.high - max(missed.estimate, least)]],
        fmt="o",
        color=_FALSE,
        capsize=3,
        label=f"threshold {evaluation.plan.threshold:.3f}, with its limits",
    )
    _rate_axis(axes, "x", least)
    _rate_axis(axes, "y", least)
    _note(axes, "none missed", (0.7, least * 1.03), ("axes fraction", "data"))
    _note(axes, "no false alert", (least * 1.05, 0.55), ("data", "axes fraction"), rotation=90)
    axes.set_xlabel("false alerts: share of searches for people not in the gallery (FPIR)")
    axes.set_ylabel("missed: share of searches for people in it (FNIR)")
    axes.legend(loc="upper right")


def _cmc(evaluation: Evaluation, axes: Any) -> None:
    _band(axes, evaluation.ranks.astype(np.float64), evaluation.cmc, _MISS, "right person at this rank or better")
    lowest = float(np.nanmin(evaluation.cmc.low)) if evaluation.cmc.trials else 0.0
    axes.set_ylim(max(0.0, lowest - 0.05), 1.005)
    axes.set_xscale("log")
    axes.set_xticks([one for one in (1, 2, 5, 10, 20, 50, 100) if one <= evaluation.ranks[-1]])
    axes.xaxis.set_major_formatter(_plain_number)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(_percent)
    axes.set_xlabel("rank")
    axes.set_ylabel("share of searches for people in the gallery")
    axes.legend(loc="lower right")


def _scores(evaluation: Evaluation, axes: Any) -> None:
    edges = evaluation.histogram_edges
    for counts, colour, label in (
        (evaluation.other_histogram, _FALSE, "best other person"),
        (evaluation.mate_histogram, _MISS, "right person"),
    ):
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.45)
        axes.stairs(counts, edges, color=colour, lw=1, label=label)
    axes.axvline(evaluation.plan.threshold, color=_INK, lw=1, label=f"threshold {evaluation.plan.threshold:.3f}")
    axes.set_xlabel("score")
    axes.set_ylabel("searches")
    axes.legend(loc="upper left")
    axes.yaxis.get_major_locator().set_params(integer=True)


def _sizes(evaluation: Evaluation, axes: Any) -> None:
    sizes = evaluation.sizes
    least = 1.0 / (10.0 * max(evaluation.fpir.trials, 1))
    people = sizes.sizes.astype(np.float64)
    axes.fill_between(
        people, np.maximum(sizes.low, least), np.maximum(sizes.high, least), color=_FALSE, alpha=0.18, lw=0
    )
    seen = sizes.estimates > 0
    axes.plot(people[seen], sizes.estimates[seen], color=_FALSE, label="this test, over parts of its gallery")
    if not seen.any():
        axes.plot([], [], color=_FALSE, alpha=0.4, lw=6, label="this test: none seen, limit")
    promised = evaluation.promised
    if promised is not None and evaluation.table is not None:
        beyond = np.geomspace(1, max(10.0 * people[-1], 100.0), 60)
        # All references of a person count, so the promise over this gallery is spread over its people.
        per_person = np.log1p(-min(promised.fpir_high, 1.0 - 1e-12)) / max(evaluation.searches.enrolled, 1)
        limit = -np.expm1(per_person * beyond)
        axes.plot(beyond, limit, color=_INK, ls="--", lw=1.2, label="upper limit promised by the calibration")
    axes.axhline(evaluation.plan.fpir_wanted, color=_QUIET, lw=1, ls=":", label="most asked for")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_plain_number)
    _rate_axis(axes, "y", least)
    axes.set_xlabel("people in the gallery")
    axes.set_ylabel("false alerts: share of searches (FPIR)")
    axes.legend(loc="lower right")


def _groups(evaluation: Evaluation, axes: Any) -> None:
    names = [group.group for group in evaluation.differentials[0].groups]
    for offset, one, colour in zip((-0.12, 0.12), evaluation.differentials, (_FALSE, _MISS), strict=True):
        rates = [group.rate for group in one.groups]
        at = np.arange(len(rates)) + offset
        middle = np.asarray([rate.estimate if rate.is_measured else np.nan for rate in rates])
        axes.errorbar(
            middle,
            at,
            xerr=[
                [max(0.0, one - rate.low) for one, rate in zip(middle, rates, strict=True)],
                [max(0.0, rate.high - one) for one, rate in zip(middle, rates, strict=True)],
            ],
            fmt="o",
            color=colour,
            capsize=3,
            label={"FPIR": "false alerts (FPIR)", "FNIR": "missed people (FNIR)"}[one.measure],
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_percent)
    axes.set_xlabel("share of searches")
    axes.legend(loc="best")


def _approximate(evaluation: Evaluation, axes: Any) -> None:
    found = evaluation.approximate
    at = np.arange(len(found))
    lost = np.asarray([one.rate.estimate for one in found])
    axes.barh(
        at,
        lost,
        xerr=[
            [one.rate.estimate - one.rate.low for one in found],
            [one.rate.high - one.rate.estimate for one in found],
        ],
        color=_FALSE,
        alpha=0.6,
        capsize=3,
    )
    axes.set_yticks(at, [one.setting for one in found])
    axes.invert_yaxis()
    axes.set_xlim(0, max(0.01, *(one.rate.high for one in found)) * 1.05)
    axes.xaxis.set_major_formatter(_percent)
    axes.set_xlabel("share of findable people that is not found")


def _band(axes: Any, points: Float64, curve: RateCurve, colour: str, label: str, least: float = 0.0) -> None:
    axes.fill_between(
        points, np.maximum(curve.low, least), np.maximum(curve.high, least), color=colour, alpha=0.18, lw=0
    )
    # A rate of which no event was seen has no place on a logarithmic axis; its limit is the band.
    seen = curve.estimates > 0
    axes.plot(points[seen], curve.estimates[seen], color=colour, lw=1.6, label=label)


def _note(axes: Any, text: str, at: tuple[float, float], coordinates: tuple[str, str], **more: Any) -> None:
    """A few words in the plot; left out where they would lie outside it."""
    noted = axes.annotate(text, at, xycoords=coordinates, va="bottom", fontsize=8, annotation_clip=True, **more)
    noted.set_in_layout(False)


def _least(evaluation: Evaluation) -> float:
    return float(0.5 / max(evaluation.fpir.trials, evaluation.fnir.trials, 1))


def _rate_axis(axes: Any, which: str, least: float) -> None:
    getattr(axes, f"set_{which}scale")("log")
    # What was never seen is drawn at the least, just inside the frame.
    getattr(axes, f"set_{which}lim")(least * 0.8, 1.15)
    getattr(axes, f"{which}axis").set_major_formatter(_percent)


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g}%"


def _plain_number(value: float, _: object = None) -> str:
    return f"{value:,.0f}"
