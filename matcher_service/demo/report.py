"""What the demo found, for people and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from matcher_service.demo.calibration import Calibration
from matcher_service.demo.data import CREDIT
from matcher_service.demo.distractors import Moments
from matcher_service.demo.server import Server
from matcher_service.demo.tally import Latency, Tally


@dataclass(frozen=True, slots=True)
class Run:
    """One pass of all probes. `fpir_limit`: upper limit of the share of unmated probes that alert at this threshold
    over these references. `answers_that_differ`: probes answered otherwise when searched for again; always 0."""

    name: str
    references: int
    threshold: float
    fpir_limit: float
    tally: Tally
    latency: Latency
    throughput_probes_per_s: float
    answers_that_differ: int


@dataclass(frozen=True, slots=True)
class Report:
    runs: tuple[Run, ...]
    calibration: Calibration
    fpir_wanted: float
    seed: int
    server: Server
    stays: bool

    @property
    def healthy(self) -> bool:
        """Every probe was answered in full, and the same each time."""
        return all(run.tally.not_answered == 0 and run.answers_that_differ == 0 for run in self.runs)


def show(report: Report, console: Console, *, as_json: bool) -> None:
    if as_json:
        console.out(json.dumps(as_dict(report), indent=2), highlight=False)
        return
    _show_thresholds(report, console)
    console.print(_table(report))
    _show_ends(report, console)


def as_dict(report: Report) -> dict[str, object]:
    calibration = report.calibration
    return {
        "space": calibration.space.id._asdict(),
        "seed": report.seed,
        "credit": CREDIT,
        "fpir_wanted": report.fpir_wanted,
        "score_table_method": calibration.real_table.method,
        "impostor_scores": {
            "real": calibration.real._asdict(),
            "synthetic_to_synthetic": calibration.synthetic_to_synthetic._asdict(),
            "synthetic_to_enrolled_real": calibration.synthetic_to_real._asdict(),
        },
        "distractor_shrinkage": calibration.generator.shrinkage,
        "runs": [asdict(run) for run in report.runs],
        "healthy": report.healthy,
        "server": {
            "stays": report.stays,
            "http": report.server.http_url,
            "grpc": report.server.grpc_address,
            "docs": report.server.docs_url,
            "metrics": report.server.metrics_url,
            "token_file": str(report.server.token_file),
            "commands": list(report.server.commands),
        },
    }


def _show_thresholds(report: Report, console: Console) -> None:
    calibration, runs = report.calibration, report.runs
    real = calibration.real
    plain, raised = runs[0], runs[-1]
    lines = [
        f"Aim: at most {report.fpir_wanted:.0%} of the probes of people who are enrolled nowhere alert. "
        f"{plain.references} real references: threshold {plain.threshold:.3f}, just above the highest of "
        f"{real.comparisons:,} impostor pairs of the enrolled shots. By their 95% limit (false-match rate "
        f"{calibration.real_table.rates[-1]:.1e}) at most {plain.fpir_limit:.1%} alert; the pairs share 35 people, so "
        "the true doubt is larger, and they support no rate near 1e-6."
    ]
    if len(runs) > 1:
        lines += [
            f"With {raised.references - plain.references:,} SYNTHETIC references added, that threshold promises little "
            f"(limit {runs[1].fpir_limit:.0%}), so the requests raise it to {raised.threshold:.3f}, measured on "
            f"another synthetic draw: limit {raised.fpir_limit:.1%}, as good as that model and no better.",
            f"Impostor scores, mean / std / 99.9%: real {_moments(real)}; synthetic to synthetic "
            f"{_moments(calibration.synthetic_to_synthetic)}; synthetic to enrolled real "
            f"{_moments(calibration.synthetic_to_real)} (fitted to those, hence wider: it errs on the safe side).",
        ]
    console.print()
    for line in lines:
        console.print(line, highlight=False)


def _moments(moments: Moments) -> str:
    return f"{moments.mean:+.3f} / {moments.std:.3f} / {moments.quantile_999:.3f}"


def _table(report: Report) -> Table:
    table = Table(title="Shots 6-10 of 40 people, streamed over gRPC", title_justify="left")
    table.add_column("")
    for run in report.runs:
        table.add_column(run.name, justify="right")
    tallies = [run.tally for run in report.runs]
    rows: list[tuple[str, list[str]]] = [
        ("references", [f"{run.references:,}" for run in report.runs]),
        ("threshold", [f"{run.threshold:.3f}" for run in report.runs]),
        ("probes", [str(one.probes) for one in tallies]),
        ("alerts", [str(one.alerts) for one in tallies]),
        ("right person at rank 1", [f"{one.rank_1_right} of {one.mated}" for one in tallies]),
        ("missed mates", [f"{one.missed_mates} of {one.mated}" for one in tallies]),
        ("false alerts, enrolled nowhere", [f"{one.false_alerts_unmated} of {one.unmated}" for one in tallies]),
        ("  expected at most", [f"{run.fpir_limit * run.tally.unmated:.1f}" for run in report.runs]),
        ("false alerts, wrong person", [f"{one.false_alerts_wrong} of {one.mated}" for one in tallies]),
        ("throughput, probes/s", [f"{run.throughput_probes_per_s:,.0f}" for run in report.runs]),
        (
            "latency ms, p50/p95/p99",
            [f"{run.latency.p50_ms:.1f}/{run.latency.p95_ms:.1f}/{run.latency.p99_ms:.1f}" for run in report.runs],
        ),
    ]
    for label, values in rows:
        table.add_row(label, *values)
    return table


def _show_ends(report: Report, console: Console) -> None:
    lines = [
        "Latency: at 100 probes/s, four to a message, from the client's hand to its answer. Throughput: at full speed, "
        "with nearly every probe alerting, so that nearly every one is a durable, audited record.",
        CREDIT,
    ]
    for run in report.runs:
        if run.tally.not_answered or run.answers_that_differ:
            lines.append(
                f"NOT HEALTHY, {run.name}: {run.tally.not_answered} probes without a full answer, "
                f"{run.answers_that_differ} answered otherwise when searched for again. Server log: "
                f"{report.server.log_file}"
            )
    server = report.server
    if report.stays:
        lines += [
            f"Docs     {server.docs_url}",
            f"Metrics  {server.metrics_url}",
            f"gRPC     {server.grpc_address}",
            f"Token    {server.token_file}",
            *(f"Try      {command}" for command in server.commands),
            "Interrupt (Ctrl-C) to stop the server.",
        ]
    else:
        lines += [
            "The server is being stopped. To look around: `matcher demo --stay` keeps it up and prints where its docs "
            "page (/docs) and metrics page (/metrics) are; `matcher --help` lists the other commands.",
        ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=line.startswith("Try"))
