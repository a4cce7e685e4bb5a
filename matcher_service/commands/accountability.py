"""`matcher report`, `matcher holds`, `matcher subjects export`: what is owed to the public, to courts and to people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matcher_service.commands.asking import Answer, asking, lists
from matcher_service.commands.http_api import HttpApi, path_of
from matcher_service.commands.options import Reason
from matcher_service.commands.output import print_fields, print_rows
from matcher_service.commands.times import now_ms, time_ms

erasures = typer.Typer(no_args_is_help=True, help="Receipts of what was erased: out of which store, and when.")
holds = typer.Typer(no_args_is_help=True, help="Legal holds: what must not be erased yet.")


@asking
def report(
    api: HttpApi,
    deployment: Annotated[str, typer.Argument(help="The deployment to report on.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json; made if there is none.")],
) -> Answer:
    """Write what a force publishes of a deployment: faces, alerts, outcomes, watchlist, thresholds, erasure."""
    import json

    from matcher_service import deployment_report
    from matcher_service.errors import InvalidInput

    made = api.get(path_of("deployments", deployment, "report"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        (out / "report.html").write_text(deployment_report.page(made), encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write to {out}: {error.strerror}", field="out", hint="check the path") from error
    return Answer(made, f"Wrote {out / 'report.html'} and {out / 'report.json'}.")


@asking
def export_subject(api: HttpApi, subject_id: str, reason: Reason) -> Answer:
    """Everything held of a subject and what was done with it, for a request for access."""
    held = api.get(path_of("subjects", subject_id, "export"), reason=reason)
    return Answer(held, lambda: print_fields(held))


@asking
def impact_assessment(api: HttpApi) -> Answer:
    """The inputs of an impact assessment: galleries and their terms, clocks, ceilings, who may do what."""
    found = api.get(path_of("impact-assessment"))
    return Answer(found, lambda: print_fields(found))


@holds.command("place")
@asking
def place_hold(
    api: HttpApi,
    subject_id: str,
    requested_by: Annotated[str, typer.Option(help="Who asked for it: a court, an inquiry, a defence.")],
    authorised_by: Annotated[str, typer.Option(help="The officer who authorises it.")],
    review: Annotated[str, typer.Option(help="When it is looked at again: +90d, or a time; within a year.")],
    reason: Reason,
    gallery: Annotated[str, typer.Option(help="In this gallery only; without it, in every one.")] = "",
) -> Answer:
    """Keep what is held of a subject from being erased. It is not searched for that."""
    body = {
        "subject_id": subject_id,
        "requested_by": requested_by,
        "authorised_by": authorised_by,
        "review_by_ms": time_ms(review, "review", now_ms()),
        "reason": reason,
        "gallery_id": gallery,
    }
    done = api.post(path_of("holds"), body)
    return Answer(done, f"Hold {done['hold_id']} stands.")


holds.command("list")(
    lists(
        "holds",
        ("hold_id", "subject_id", "gallery_id", "authorised_by", "review_by_ms", "released_at_ms", "overdue"),
        "There are no legal holds.",
        "Every legal hold there was, and which of them are overdue for review.",
    )
)


@holds.command("release")
@asking
def release_hold(
    api: HttpApi,
    hold_id: str,
    released_by: Annotated[str, typer.Option(help="Who releases it.")],
    reason: Reason,
) -> Answer:
    """End a hold; what is due is erased within the service's stated time."""
    done = api.post(path_of("holds", hold_id, "release"), {"reason": reason, "released_by": released_by})
    return Answer(done, f"Hold {hold_id} is released.")


@erasures.command("list")
@asking
def list_erasures(
    api: HttpApi,
    gallery: Annotated[str, typer.Option(help="Of this gallery only.")] = "",
    subject: Annotated[str, typer.Option(help="Only erasures of this subject's templates.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most to list.")] = 100,
    after: Annotated[int, typer.Option(min=0, help="Go on behind this receipt.")] = 0,
) -> Answer:
    """List the receipts of erasures, and what still waits to be erased."""
    found = api.get(path_of("erasures"), gallery_id=gallery, subject_id=subject, after=after, limit=limit)

    def show() -> None:
        columns = ("receipt_id", "kind", "gallery_id", "erased", "erased_at_ms", "complete_at_ms")
        print_rows(found["receipts"], columns, "Nothing has been erased.")
        if found["waiting"] is not None:
            waiting = "{templates} templates wait to be erased, {held} of them under a hold."
            typer.echo(waiting.format(**found["waiting"]))

    return Answer(found, show)


@erasures.command("show")
@asking
def show_erasure(api: HttpApi, receipt: Annotated[int, typer.Argument(help="Number of the receipt.")]) -> Answer:
    """One receipt: what was erased, and since when each store holds nothing of it."""
    found = api.get(path_of("erasures", str(receipt)))

    def show() -> None:
        print_fields({name: value for name, value in found.items() if name != "stores"})
        print_rows(found["stores"], ("store", "at_ms", "until_at_ms", "how"), "")

    return Answer(found, show)
