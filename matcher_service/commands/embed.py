"""`matcher embed`: the templates of a folder of pictures. `matcher triton-repository`: the models for a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matcher_service.commands.options import AsJson
from matcher_service.commands.output import print_fields, print_json, print_rows

if TYPE_CHECKING:
    from matcher_service.models.embedder.outcome import Embedding

SUFFIXES = (".jpg", ".jpeg", ".png")
REFUSALS_SHOWN = 20


def embed(
    folder: Annotated[Path, typer.Argument(help="Of JPEG and PNG files. Those in subfolders are of one subject each.")],
    out: Annotated[Path, typer.Argument(help="The .npz file to write.")],
    card: Annotated[str, typer.Option(help="A built-in model card, or the path of a card file.")] = "dlib-resnet29",
    files_dir: Annotated[
        Path | None, typer.Option(help="Folder with the card's files. Without: the package of the extra `embedder`.")
    ] = None,
    crops: Annotated[bool, typer.Option("--crops", help="The pictures are faces as a detector cuts them out.")] = False,
    quality_min: Annotated[float, typer.Option(min=0.0, max=1.0, help="Leave out faces of less quality.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Turn a folder of pictures into templates, one row per picture that shows one usable face.

    The file holds templates, reference_ids (the path within FOLDER without its ending), subject_ids (the subfolder,
    else the reference), quality and the name of the template space; `matcher import` reads it. Pictures that gave
    no template are told with the reason; the exit code is then 1.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from matcher_service.errors import InvalidInput
    from matcher_service.models.embedder.embed import open_embedder
    from matcher_service.models.embedder.outcome import Form

    pictures = sorted(one for one in folder.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file())
    if not pictures:
        raise InvalidInput(f"{folder} has no pictures", field="folder", hint=f"files ending in {', '.join(SUFFIXES)}")
    names = [one.relative_to(folder).with_suffix("").as_posix() for one in pictures]
    if twice := sorted({one for one in names if names.count(one) > 1}):
        raise InvalidInput(f"{twice[0]} is the name of several pictures", field="folder", hint="rename all but one")
    embedder = open_embedder(card, files_dir)
    found: list[tuple[str, str, Embedding]] = []
    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(pictures))
        for name, picture in zip(names, pictures, strict=True):
            (one,) = embedder.embed([picture.read_bytes()], Form.CROP if crops else Form.PHOTOGRAPH)
            found.append((name, name.partition("/")[0], one))
            progress.advance(task)

    kept = [one for one in found if one[2].template is not None and one[2].quality >= quality_min]
    _write(out, kept, str(embedder.card.space), embedder.card.space.dimension)
    left_out = [
        {"picture": name, "judgement": one.judgement.value if one.template is None else "LOW_QUALITY",
         "detail": one.detail or f"quality {one.quality:.2f}"}
        for name, _, one in found
        if one.template is None or one.quality < quality_min
    ]  # fmt: skip
    report = {"templates": len(kept), "left_out": len(left_out), "file": str(out), "space": str(embedder.card.space)}
    if as_json:
        print_json({**report, "refusals": left_out})
    else:
        print_fields(report)
        print_rows(left_out[:REFUSALS_SHOWN], ("picture", "judgement", "detail"), "Every picture gave a template.")
        if len(left_out) > REFUSALS_SHOWN:
            typer.echo(f"and {len(left_out) - REFUSALS_SHOWN} more; --json lists them all")
    if left_out:
        raise typer.Exit(1)


def _write(out: Path, kept: list[tuple[str, str, Embedding]], space: str, dimension: int) -> None:
    import numpy as np

    templates = np.array([one.template for _, _, one in kept], dtype=np.float32).reshape(-1, dimension)
    with out.open("wb") as file:
        np.savez(
            file,
            templates=templates,
            reference_ids=np.array([name for name, _, _ in kept], dtype=np.str_),
            subject_ids=np.array([subject for _, subject, _ in kept], dtype=np.str_),
            quality=np.array([one.quality for _, _, one in kept], dtype=np.float32),
            space=np.array(space),
        )


def triton_repository(
    into: Annotated[Path, typer.Argument(help="A new folder.")],
    source: Annotated[Path, typer.Option(help="The model repository of a checkout.")] = Path("triton_models"),
    on_gpu: Annotated[bool, typer.Option("--gpu", help="Keep the instances that gain from a GPU on it.")] = False,
    instances: Annotated[int, typer.Option(min=1, help="Of each model.")] = 1,
    card: Annotated[str, typer.Option(help="Model card of face_embedder.")] = "dlib-resnet29",
    files_dir: Annotated[Path | None, typer.Option(help="Folder with the card's files, as the server sees it.")] = None,
    without_embedder: Annotated[bool, typer.Option("--without-embedder", help="Leave face_embedder out.")] = False,
    shard: Annotated[
        list[str] | None, typer.Option(help="NAME=PARTITIONS, such as a=0-127: a gallery shard; may be repeated.")
    ] = None,
    volumes: Annotated[
        Path | None, typer.Option(help="Folder, as the server sees it, with a folder for each shard; with --shard.")
    ] = None,
    only_shards: Annotated[bool, typer.Option("--only-shards", help="Leave the other models out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the model repository for one kind of Triton server; without --gpu for one on a CPU."""
    from matcher_service.models import repository

    left_out = repository.MODELS if only_shards else ("face_embedder",) if without_embedder else ()
    models = [one for one in repository.MODELS if one not in left_out]
    parameters = {"card": card, "files_dir": str(files_dir or "")}
    shards = _shards(shard or [], volumes)
    repository.assemble(
        source, into, models=models, on_gpu=on_gpu, instances=instances, parameters=parameters, shards=shards
    )
    made = [*models, *shards]
    if as_json:
        print_json({"repository": str(into), "models": made})
    else:
        typer.echo(f"{into}: {', '.join(made)}")


def _shards(asked: list[str], volumes: Path | None) -> dict[str, dict[str, str]]:
    """Parameters of each shard by its name. Raises InvalidInput."""
    from matcher_service.errors import InvalidInput
    from matcher_service.partitions import parse, ranges

    shards = {}
    for one in asked:
        name, given, partitions = one.partition("=")
        if not given or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in shards:
            raise InvalidInput(f"{one!r} names no shard of its own", field="--shard", hint="such as a=0-127")
        owned = parse(partitions)
        if not owned:
            raise InvalidInput(f"{one!r} gives the shard no partition", field="--shard", hint="such as a=0-127")
        shards[name] = {
            "partitions": ranges(owned),
            "data_dir": str(volumes / name) if volumes is not None else "",
        }
    return shards
