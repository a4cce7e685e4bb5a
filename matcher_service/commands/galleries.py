"""`matcher galleries`, `matcher watchlists`, `matcher spaces`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from matcher_service.commands.asking import Answer, asking, lists, shows
from matcher_service.commands.http_api import HttpApi, path_of
from matcher_service.commands.options import Reason, space_from
from matcher_service.commands.output import Document, print_fields, print_rows
from matcher_service.commands.times import duration_ms
from matcher_service.evidence_in_words import in_words

galleries = typer.Typer(no_args_is_help=True, help="Named sets of references under one lawful basis.")
watchlists = typer.Typer(no_args_is_help=True, help="The short-lived galleries of a deployment.")
spaces = typer.Typer(no_args_is_help=True, help="Template spaces: model, version, dimension, centre.")

_COLUMNS = ("gallery_id", "kind", "space", "threshold", "retention_ms", "controller", "lawful_basis")
_SPACE = "NAME/VERSION/DIMENSION, for example arcface/3/512."

ReviewInterval = Annotated[str, typer.Option(help="Until a reference is reviewed: 90d, 52w. Without: the retention.")]
RetentionRule = Annotated[str, typer.Option(help="The rule that retention and review come from, in words.")]
QualityMin = Annotated[float, typer.Option(help="Least quality of a reference, from 0 to 1; 0: none is asked for.")]
ResemblesMax = Annotated[
    int, typer.Option(help="Refuse a reference that resembles more other subjects than this; 0: no check.")
]
Threshold = Annotated[
    float | None, typer.Option(help="Least score that is a candidate, in [-1, 1]; or --one-false-alert-in.")
]
OneFalseAlertIn = Annotated[
    int,
    typer.Option(
        help="At most one of so many unmated probes may alert while --size-max are held: the threshold for which the "
        "calibration of the space promises this."
    ),
]
Adjudicators = Annotated[int, typer.Option(min=1, max=2, help="People who must judge an alert.")]


def _told(done: Document) -> str:
    """A gallery's threshold, with what is on record of it."""
    return "\n  ".join([f"Threshold {done['threshold']:.4f}.", *in_words(done["evidence"])])


def _describe(found: Document) -> None:
    print_fields({name: value for name, value in found.items() if name not in ("evidence", "evidence_now")})
    typer.echo(_told(found))
    now = found["evidence_now"]
    if now is not None:
        anew = f"The template space has been calibrated anew since. By calibration {now['calibration_sequence']}:"
        typer.echo("\n  ".join([anew, *in_words(now)]))


galleries.command("list")(
    lists("galleries", _COLUMNS, "There are no galleries; `matcher galleries create` makes one.", "List the galleries.")
)


@galleries.command("create")
@asking
def create_gallery(
    api: HttpApi,
    gallery_id: str,
    kind: Annotated[str, typer.Option(help="custody or immigration.")],
    controller: Annotated[str, typer.Option(help="Who is answerable for the data.")],
    lawful_basis: Annotated[str, typer.Option(help="On which it is kept and searched.")],
    purpose: Annotated[str, typer.Option(help="What it is for.")],
    retention: Annotated[str, typer.Option(help="Longest life of a reference: 12h, 30d, 52w.")],
    space: Annotated[str, typer.Option(help=_SPACE)],
    threshold: Threshold = None,
    one_false_alert_in: OneFalseAlertIn = 0,
    review_interval: ReviewInterval = "",
    retention_rule: RetentionRule = "",
    source: Annotated[str, typer.Option(help="Where references come from that do not say.")] = "",
    quality_min: QualityMin = 0.0,
    resembles_max: ResemblesMax = 0,
    size_max: Annotated[int, typer.Option(help="References that the threshold was calibrated for; 0: any.")] = 0,
    adjudicators: Adjudicators = 1,
) -> Answer:
    """Create a gallery in a registered template space; for a watchlist see `matcher watchlists create`."""
    body: dict[str, Any] = {
        "gallery_id": gallery_id,
        "review_interval_ms": duration_ms(review_interval, "review_interval") if review_interval else 0,
        "retention_rule": retention_rule,
        "source": source,
        "quality_min": quality_min,
        "resembles_max": resembles_max,
        "size_max": size_max,
        "adjudicators": adjudicators,
        "kind": kind,
        "controller": controller,
        "lawful_basis": lawful_basis,
        "purpose": purpose,
        "retention_ms": duration_ms(retention, "retention"),
        "space": space_from(space)._asdict(),
        "threshold": threshold,
        "one_false_alert_in": one_false_alert_in,
    }
    done = api.post(path_of("galleries"), body)
    return Answer(done, f"Created gallery {gallery_id} (sequence {done['sequence']}).\n{_told(done)}")


galleries.command("show")(shows("galleries", "gallery_id", "Describe a gallery.", _describe))


@galleries.command("threshold")
@asking
def change_threshold(
    api: HttpApi,
    gallery_id: str,
    threshold: Annotated[float, typer.Argument(help="Least score that is a candidate from now on, in [-1, 1].")],
    before: Annotated[Path, typer.Option(help="report.json of `matcher evaluate` at the threshold until now.")],
    after: Annotated[Path, typer.Option(help="report.json of `matcher evaluate` at the new threshold.")],
    proposed_by: Annotated[str, typer.Option(help="Who proposes it.")],
    approved_by: Annotated[str, typer.Option(help="Who approves it: a second person.")],
    reason: Reason,
) -> Answer:
    """Change a gallery's threshold, with what it does to the error rates, by group where both reports tell groups."""
    from matcher_service.commands.threshold_evidence import rate_changes

    now = api.get(path_of("galleries", gallery_id))["threshold"]
    rates = rate_changes(before, now, after, threshold)
    body = {
        "threshold": threshold,
        "reason": reason,
        "proposed_by": proposed_by,
        "approved_by": approved_by,
        "rates": rates,
    }
    done = api.post(path_of("galleries", gallery_id, "threshold"), body)

    def shown() -> None:
        print_rows(rates, ("measure", "group", "before", "after"), "")
        sequence = done["sequence"]
        typer.echo(f"Threshold of {gallery_id}: {now:g} before, {threshold:g} from now on (sequence {sequence}).")
        typer.echo(_told(done))

    return Answer({**done, "threshold_before": now, "rates": rates}, shown)


@galleries.command("delete")
@asking
def delete_gallery(
    api: HttpApi,
    gallery_id: str,
    reason: Reason,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> Answer:
    """Withdraw every reference of a gallery and destroy its key. Its id is never used again."""
    if not yes:
        typer.confirm(f"Delete gallery {gallery_id} and everything in it, for good?", abort=True, err=True)
    done = api.delete(path_of("galleries", gallery_id), reason=reason)
    return Answer(done, f"Deleted gallery {gallery_id} (sequence {done['sequence']}).")


watchlists.command("list")(lists("watchlists", _COLUMNS, "There are no watchlists.", "List the watchlists."))
watchlists.command("show")(shows("watchlists", "gallery_id", "Describe a watchlist.", _describe))


@watchlists.command("create")
@asking
def create_watchlist(
    api: HttpApi,
    gallery_id: str,
    deployment: Annotated[str, typer.Option(help="The deployment that it is built for.")],
    category: Annotated[list[str], typer.Option(help="Of the closed list (see /docs); repeat for more.")],
    author: Annotated[str, typer.Option(help="Who built it.")],
    controller: Annotated[str, typer.Option(help="Who is answerable for the data.")],
    lawful_basis: Annotated[str, typer.Option(help="On which it is searched.")],
    purpose: Annotated[str, typer.Option(help="What it is for.")],
    retention: Annotated[str, typer.Option(help="It is destroyed after this at the latest: 12h, 3d.")],
    size_max: Annotated[int, typer.Option(help="How many people its threshold was calibrated for.")],
    space: Annotated[str, typer.Option(help=_SPACE)],
    threshold: Threshold = None,
    one_false_alert_in: OneFalseAlertIn = 0,
    quality_min: QualityMin = 0.0,
    resembles_max: ResemblesMax = 0,
    adjudicators: Adjudicators = 1,
) -> Answer:
    """Build a watchlist for one deployment. Nothing is searched in it until somebody else has approved it."""
    body: dict[str, Any] = {
        "gallery_id": gallery_id,
        "kind": "watchlist",
        "controller": controller,
        "lawful_basis": lawful_basis,
        "purpose": purpose,
        "retention_ms": duration_ms(retention, "retention"),
        "space": space_from(space)._asdict(),
        "threshold": threshold,
        "one_false_alert_in": one_false_alert_in,
        "quality_min": quality_min,
        "resembles_max": resembles_max,
        "size_max": size_max,
        "adjudicators": adjudicators,
        "watchlist": {"deployment_id": deployment, "categories": category, "author": author},
    }
    done = api.post(path_of("galleries"), body)
    built = f"Built watchlist {gallery_id} (sequence {done['sequence']}); it waits for approval."
    return Answer(done, f"{built}\n{_told(done)}")


@watchlists.command("approve")
@asking
def approve_watchlist(
    api: HttpApi,
    gallery_id: str,
    approved_by: Annotated[str, typer.Option(help="An authorising officer other than its author.")],
    reason: Reason,
    reopen: Annotated[bool, typer.Option("--reopen", help="Instead stop it being searched, to change it.")] = False,
) -> Answer:
    """Let a watchlist be searched. While it is approved nobody is added to it."""
    body = {"approved_by": approved_by, "reason": reason, "approved": not reopen}
    done = api.post(path_of("watchlists", gallery_id, "approval"), body)
    state = "is approved" if done["approved"] else "is open to change, and not searched"
    return Answer(done, f"Watchlist {gallery_id} {state} (sequence {done['sequence']}).\n{_told(done)}")


spaces.command("list")(
    lists("spaces", ("name", "version", "dimension"), "There are no template spaces.", "List the template spaces.")
)


@spaces.command("register")
@asking
def register_space(
    api: HttpApi,
    space: Annotated[str, typer.Argument(help=_SPACE)],
    centre: Annotated[str, typer.Option(help="A .npy file of the mean template, or the word zero.")],
    map_from: Annotated[
        list[str] | None, typer.Option(help="SPACE=FILE.npy: the linear map [dimension, dimension of SPACE].")
    ] = None,
    score_table: Annotated[
        Path | None, typer.Option(help="JSON file: scores (ascending), rates (false-match rates), method.")
    ] = None,
) -> Answer:
    """Register a template space with its centre. Another centre is another version."""
    import json

    from matcher_service.errors import InvalidInput

    named = space_from(space)
    body: dict[str, Any] = {
        "space": named._asdict(),
        "centre": _numbers(centre, "centre", (named.dimension,)),
        "maps": [],
    }
    for one in map_from or []:
        source_name, _, file = one.partition("=")
        source = space_from(source_name)
        matrix = _numbers(file, "map_from", (named.dimension, source.dimension))
        body["maps"].append({"source": source._asdict(), "matrix": matrix})
    if score_table is not None:
        try:
            body["score_table"] = json.loads(score_table.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidInput(f"cannot read {score_table}: {error}", field="score_table", hint="give JSON") from error
    done = api.post(path_of("spaces"), body)
    return Answer(done, f"Registered template space {named} (sequence {done['sequence']}).")


def _numbers(file: str, field: str, shape: tuple[int, ...]) -> str:
    """Base64 of the little-endian float32 values of a .npy file, or of zeros."""
    import base64

    import numpy as np

    from matcher_service.errors import InvalidInput

    if file == "zero" and field == "centre":
        values = np.zeros(shape, "<f4")
    else:
        try:
            values = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"cannot read {file}: {error}", field=field, hint="save it with numpy.save") from error
        if values.shape != shape or values.dtype.kind != "f":
            raise InvalidInput(f"{file} is {values.dtype} {values.shape}", field=field, hint=f"save floats {shape}")
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()
