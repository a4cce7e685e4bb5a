"""`matcher calibrate`: from a labelled set to the score table of a template space."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matcher_service.commands.options import HTTP_URL, AsJson, CaFile, Http, TokenFile, space_from

if TYPE_CHECKING:
    from rich.console import Console

    from matcher_service.evaluation.calibration import Calibration


def calibrate(
    space: Annotated[str, typer.Argument(help="NAME/VERSION/DIMENSION, for example arcface/3/512.")],
    file: Annotated[
        Path, typer.Argument(help="An .npz file: templates [n, d], subject [n]; optionally group and synthetic [n].")
    ],
    source: Annotated[str, typer.Option(help="Whose templates these are, in words; it is stored with the table.")],
    fpir: Annotated[
        float, typer.Option(help="The share of unmated probes that may alert, for the thresholds shown: 0.001.")
    ] = 0.01,
    references: Annotated[list[int] | None, typer.Option(help="Gallery size to show; repeat for more.")] = None,
    confidence: Annotated[float, typer.Option(help="Of every interval.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of dealing subjects into clusters.")] = 1,
    new: Annotated[
        bool, typer.Option("--new", help="Register the space, with the mean of this set as centre.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and show; store nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write every number to this JSON file.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="An earlier --out file: say whether the scores are still of that kind.")
    ] = None,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure how alike different people are in a template space, and store the table of false-match rates.

    The table is registered with the space through the service, so it goes into the log and the audit chain. Group
    labels are used here and stored nowhere. Synthetic rows are refused: they say nothing about people. With --against
    the impostor scores are tested for drift (another camera, model build or population); the exit code is then 1, and
    the table is stored all the same unless --dry-run.
    """
    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from matcher_service import records
    from matcher_service.commands.http_api import api_to, path_of
    from matcher_service.commands.labelled_files import adapted, registered_space
    from matcher_service.commands.output import print_json
    from matcher_service.errors import InvalidInput
    from matcher_service.evaluation.calibration import calibrate as measured
    from matcher_service.evaluation.calibration import drift_from
    from matcher_service.evaluation.labelled import load_labelled
    from matcher_service.terms import TemplateSpace

    found = load_labelled(file)
    if found.synthetic.any():
        raise InvalidInput(
            f"{int(found.synthetic.sum()):,} of {len(found):,} templates are synthetic",
            field="synthetic",
            hint="a false-match rate can only be measured on templates of real people",
        )
    wanted = space_from(space)
    with api_to(http, token_file, ca_file) as api:
        if new:
            # Each person counts once, however many pictures there are of them.
            _, code = np.unique(found.subjects, return_inverse=True)
            weight = 1.0 / np.bincount(code)[code]
            centre = (found.templates * weight[:, None]).sum(axis=0, dtype=np.float64) / weight.sum()
            registered = TemplateSpace(wanted, centre.astype(np.float32))
        else:
            registered = registered_space(api, wanted)
        units = adapted(found, registered)
        with Progress(
            TextColumn("comparisons"), BarColumn(), TextColumn("{task.completed:,.0f}"), TimeRemainingColumn(),
            console=Console(stderr=True),
        ) as progress:  # fmt: skip
            bar = progress.add_task("", total=len(units) * (len(units) - 1) // 2)
            result = measured(
                units,
                found,
                source=source,
                fpir_wanted=fpir,
                sizes=references or [100, 1_000, 10_000, 100_000, 1_000_000],
                confidence=confidence,
                seed=seed,
                advance=lambda count: progress.advance(bar, count),
            )
            progress.update(bar, completed=len(units) * (len(units) - 1) // 2)
        document = result.document() | {"space": wanted._asdict(), "registered_at_sequence": None}
        moved = None if against is None else drift_from(_earlier(against), document)
        document["drift"] = moved and moved._asdict()
        if not dry_run:
            calibrated = dataclasses.replace(registered, score_table=result.table)
            document["registered_at_sequence"] = api.post(path_of("spaces"), records.space_dict(calibrated))["sequence"]
    if out is not None:
        out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(document)
    else:
        _show(result, document, Console(width=None if sys.stdout.isatty() else 120))

    raise typer.Exit(1 if moved is not None and moved.is_drift else 0)


def _earlier(path: Path) -> dict[str, Any]:
    from matcher_service.errors import InvalidInput

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read {path}: {error}", field="against", hint="check the path") from error
    return found if isinstance(found, dict) else {}


def _show(result: Calibration, document: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    tail = result.tail
    console.print(result.table.method + ".", markup=False, highlight=False)
    for one in tail.rejected:
        console.print(
            f"Rejected by the data: a generalised Pareto tail above {one.threshold:.4f} (p = {one.p_value:.2g}).",
            highlight=False,
        )
    console.print(
        f"The highest score of two different people was {tail.highest:.4f}. No rate is claimed below "
        f"{tail.supported_rate:.1e}, at any score.",
        highlight=False,
    )
    table = Table(
        title=f"Thresholds for at most {result.fpir_wanted:.3g} of unmated probes alerting", title_justify="left",
        box=None, pad_edge=False,
    )  # fmt: skip
    for column in ("references", "threshold", "FPIR expected", "limits", "same-person comparisons missed"):
        table.add_column(column, justify="right")
    for choice in document["thresholds"]:
        if choice["threshold"] is None:
            table.add_row(f"{choice['references']:,}", "not supported", "", "", "")
            continue
        missed = choice["false_non_match_rate"]
        table.add_row(
            f"{choice['references']:,}",
            f"{choice['threshold']:.4f}",
            f"{choice['fpir_estimate']:.2g}",
            f"{choice['fpir_low']:.2g} to {choice['fpir_high']:.2g}",
            f"{missed['estimate']:.2%} ({missed['low']:.2%} to {missed['high']:.2%})" if missed else "-",
        )
    console.print(table)
    console.print(
        f"This set can promise {result.fpir_wanted:.3g} for galleries of up to {result.references_max:,} references. "
        "Larger ones need templates of more people.",
        highlight=False,
    )
    for group in document["groups"]:
        console.print(
            f"Group {group['group']}: of comparisons of different people within it, {group['estimate']:.2g} "
            f"({group['low']:.2g} to {group['high']:.2g}) reach {group['at_score']:.3f}; over all, "
            f"{group['over_all']:.2g} do.",
            highlight=False,
            markup=False,
        )
    if document["drift"]:
        moved = document["drift"]
        told = "HAVE CHANGED" if moved["is_drift"] else "have not changed, as far as this set can tell"
        console.print(
            f"Against the earlier calibration, impostor scores {told} (distance of the distributions "
            f"{moved['distance']:.3f}, p = {moved['p_value']:.2g})."
            + ("" if moved["is_measured"] else " There are too few comparisons to tell."),
            highlight=False,
        )
    sequence = document["registered_at_sequence"]
    console.print("Nothing was stored." if sequence is None else f"The table is stored (sequence {sequence}).")
