"""`matcher synthesise`: templates of people who do not exist."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from matcher_service.commands.options import AsJson


def synthesise(
    file: Annotated[Path, typer.Argument(help="The .npz file to write.")],
    people: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    captures: Annotated[int, typer.Option(min=1, help="Templates of each.")] = 2,
    like: Annotated[
        Path | None, typer.Option(help="A labelled .npz of real templates whose score moments are to be had.")
    ] = None,
    dimension: Annotated[int, typer.Option(min=2, help="Without --like.")] = 512,
    genuine_median: Annotated[float, typer.Option(help="Without --like: median score of one person's two.")] = 0.7,
    group: Annotated[list[str] | None, typer.Option(help="A group of people; repeat for more.")] = None,
    group_likeness: Annotated[float, typer.Option(help="How much higher people of one group score, on average.")] = 0.0,
    hub_share: Annotated[float, typer.Option(help="The share of people who are like many.")] = 0.0,
    hub_lean: Annotated[float, typer.Option(help="By how much such people lean towards the middle.")] = 0.3,
    seed: Annotated[int, typer.Option(help="The same seed makes the same people.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Make up templates for tests of size. Every row is marked synthetic, and evaluation reports it apart.

    Real impostor scores have heavier tails (relatives, look-alikes, one person under two names). A false-match rate
    measured on these is evidence about this program, not about people; `matcher calibrate` refuses them.
    """
    import numpy as np

    from matcher_service.commands.output import print_fields, print_json
    from matcher_service.evaluation import synthetic
    from matcher_service.evaluation.labelled import load_labelled

    real = None
    if like is None:
        generator = synthetic.plain(dimension, genuine_median)
    else:
        found = load_labelled(like)
        centre = found.templates.mean(axis=0, dtype=np.float64).astype(np.float32)
        apart = found.templates - centre
        lengths = np.linalg.norm(apart, axis=1)
        units = (apart / lengths[:, None]).astype(np.float32)
        generator = synthetic.fit(units, found.subjects, centre, float(lengths.mean()))
        real = synthetic.moments(units, found.subjects)
    wish = synthetic.Wish(people, captures, tuple(group or ()), group_likeness, hub_share, hub_lean)
    made = synthetic.generate(generator, wish, np.random.default_rng(seed))
    columns: dict[str, Any] = {
        "templates": made.templates,
        "subject": made.subjects,
        "subject_ids": made.subjects,
        "reference_ids": np.asarray([f"{name}-{row:08d}" for row, name in enumerate(made.subjects.tolist())]),
        "synthetic": made.synthetic,
    }
    if made.has_groups:
        columns["group"] = made.groups
    with file.open("wb") as sink:
        np.savez(sink, **columns)
    document: dict[str, object] = {
        "file": str(file),
        "templates": len(made),
        "people": people,
        "dimension": generator.dimension,
        "shrinkage": generator.shrinkage,
        "quality_spread": generator.quality_spread,
        "seed": seed,
    }
    if captures > 1 and people > 1:
        apart = made.templates - generator.centre.astype(np.float32)
        units = (apart / np.linalg.norm(apart, axis=1, keepdims=True)).astype(np.float32)
        document["scores_synthetic"] = synthetic.moments(units, made.subjects)._asdict()
    if real is not None:
        document["scores_real"] = real._asdict()
    (print_json if as_json else print_fields)(document)
