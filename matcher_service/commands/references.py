"""`matcher references` and `matcher subjects`: what is held, without templates, and its withdrawal."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from matcher_service.commands.http_api import api_to, path_of
from matcher_service.commands.options import HTTP_URL, AsJson, CaFile, Http, Reason, TokenFile
from matcher_service.commands.output import print_fields, print_json, print_rows
from matcher_service.commands.times import in_words, now_ms, time_ms

references = typer.Typer(no_args_is_help=True, help="What is enrolled in a gallery.")
subjects = typer.Typer(no_args_is_help=True, help="Everything held of a subject, over all galleries.")

_COLUMNS = ("gallery_id", "reference_id", "subject_id", "sequence", "enrolled_at_ms", "expires_at_ms")


@references.command("list")
def list_references(
    gallery_id: str,
    after: Annotated[str, typer.Option(help="Only those beyond this reference_id.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Most to list; 0: all.")] = 100,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """List the live references of a gallery in order of reference_id; --json prints one line for each."""
    with api_to(http, token_file, ca_file) as api:
        found = api.pages(path_of("galleries", gallery_id, "references"), "references", "after", limit, after=after)
        if as_json:
            for one in found:
                print_json(one)
        else:
            print_rows(list(found), _COLUMNS[1:], f"Gallery {gallery_id} holds no references.")


@references.command("show")
def show_reference(
    gallery_id: str,
    reference_id: str,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """What is held of a live reference."""
    with api_to(http, token_file, ca_file) as api:
        found = api.get(path_of("galleries", gallery_id, "references", reference_id))
    (print_json if as_json else print_fields)(found)


@references.command("withdraw")
def withdraw_reference(
    gallery_id: str,
    reference_id: str,
    reason: Reason,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """End the searchability of a reference now; its template is erased within the service's stated time."""
    with api_to(http, token_file, ca_file) as api:
        _print_withdrawn(
            api.delete(path_of("galleries", gallery_id, "references", reference_id), reason=reason), as_json
        )


@subjects.command("show")
def show_subject(
    subject_id: str,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Every live reference of a subject."""
    with api_to(http, token_file, ca_file) as api:
        found = api.get(path_of("subjects", subject_id))
    if as_json:
        print_json(found)
    else:
        print_rows(found["references"], _COLUMNS, f"Nothing is held of subject {subject_id}.")


@subjects.command("withdraw")
def withdraw_subject(
    subject_id: str,
    reason: Reason,
    gallery: Annotated[str, typer.Option(help="In this gallery only; without it, in every one.")] = "",
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Withdraw every live reference of a subject."""
    with api_to(http, token_file, ca_file) as api:
        done = api.delete(path_of("subjects", subject_id), reason=reason, gallery_id=gallery)
    _print_withdrawn(done, as_json)


@references.command("review")
def review_reference(
    gallery_id: str,
    reference_id: str,
    review: Annotated[str, typer.Option(help="When its ground is to be looked at next: +90d, or a time.")],
    reviewed_by: Annotated[str, typer.Option(help="Who looked.")],
    reason: Reason,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Keep a reference until its next review, because its lawful ground still stands."""
    until = time_ms(review, "review", now_ms())
    body = {"review_by_ms": until, "reviewed_by": reviewed_by, "reason": reason}
    with api_to(http, token_file, ca_file) as api:
        done = api.post(path_of("galleries", gallery_id, "references", reference_id, "review"), body)
    if as_json:
        print_json(done)
    else:
        typer.echo(f"Kept {reference_id} until {in_words(until)} (sequence {done['sequence']}).")


@subjects.command("ground-ended")
def end_ground(
    subject_id: str,
    ground: Annotated[
        str,
        typer.Argument(help="no_further_action, acquitted, conviction_quashed, deletion_granted or enrolled_in_error."),
    ],
    reason: Reason,
    gallery: Annotated[str, typer.Option(help="In this gallery only; without it, in every custody gallery.")] = "",
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """End the searchability of a subject's references, because their lawful ground has ended."""
    body = {"ground": ground, "reason": reason, "gallery_id": gallery}
    with api_to(http, token_file, ca_file) as api:
        done = api.post(path_of("subjects", subject_id, "ground-ended"), body)
    _print_withdrawn(done, as_json)


def _print_withdrawn(done: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(done)
        return
    for one in done["withdrawn"]:
        typer.echo(f"Withdrew {one['reference_id']} from {one['gallery_id']}.")
    typer.echo(f"{len(done['withdrawn'])} withdrawn (sequence {done['sequence']}).")
