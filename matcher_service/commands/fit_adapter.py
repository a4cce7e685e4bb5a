"""`matcher fit-adapter`: learn the linear map between two template spaces from pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matcher_service.commands.options import AsJson
from matcher_service.commands.output import print_fields, print_json

if TYPE_CHECKING:
    from matcher_service.terms import Float32


def fit_adapter(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="An .npz file: source [n, ds], target [n, dt], row i of both from one picture; subject [n] if known."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The .npy file to write the map to: float32 [dt, ds].")],
    method: Annotated[str, typer.Option(help="ridge, near, procrustes, or best: the one that errs least.")] = "best",
    source_centre: Annotated[
        Path | None, typer.Option(help="A .npy file: the registered centre of the source space. Without: the mean.")
    ] = None,
    target_centre: Annotated[
        Path | None, typer.Option(help="A .npy file: the registered centre of the target space. Without: the mean.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Learn the map from one template space to another, in closed form, and measure what it costs.

    Errors are measured on subjects that the map was not fitted on. The map acts on centred templates: give the
    centres that the spaces are registered with. `matcher spaces register` then takes it as --map-from.
    """
    import numpy as np

    from matcher_service.errors import InvalidInput
    from matcher_service.models import fit_adapter as fitting

    if method not in ("ridge", "near", "procrustes", "best"):
        raise InvalidInput(f"{method} is no method", field="method", hint="ridge, near, procrustes or best")
    given = fitting.read_pairs(pairs, _centre(source_centre), _centre(target_centre))
    fit = fitting.fit(given, method)  # type: ignore[arg-type]
    with out.open("wb") as file:
        np.save(file, fit.matrix)
    report: dict[str, Any] = {
        "map": str(out),
        "method": str(fit.choice),
        "pairs": fit.pairs,
        "held_out_by": "subject" if fit.held_out_by_subject else "pair",
        "cosine_median": fit.cosine_median,
        "cosine_low_1pct": fit.cosine_low_1pct,
        "error_rms": fit.error_rms,
        "rank_1_native": _or_none(fit.rank_1_native),
        "rank_1_mapped": _or_none(fit.rank_1_mapped),
        "rank_1_loss": _or_none(fit.rank_1_loss),
        "own_pair_rank_1": fit.own_pair_rank_1,
        "probes": fit.probes,
        "references": fit.references,
    }
    if as_json:
        print_json(report)
        return
    print_fields(report)
    typer.echo(
        "Register the target space again with --map-from SOURCE=" + str(out) + ". Scores of mapped probes are lower: "
        "calibrate thresholds on mapped templates before using them."
    )


def _centre(file: Path | None) -> Float32 | None:
    import numpy as np

    from matcher_service.errors import InvalidInput

    if file is None:
        return None
    try:
        return np.asarray(np.load(file, allow_pickle=False), dtype=np.float32)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read {file}: {error}", field="centre", hint="give a .npy file") from error


def _or_none(value: float) -> float | None:
    return None if value != value else value
