"""`matcher keys`: rotating the keys of galleries, and what wraps them."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from matcher_service.commands.asking import Answer, asking
from matcher_service.commands.http_api import HttpApi, path_of
from matcher_service.commands.options import Reason
from matcher_service.commands.output import print_rows

keys = typer.Typer(no_args_is_help=True, help="Keys of galleries, and what wraps them.")

_COLUMNS = (
    "gallery_id", "generation", "rotated_at_ms", "share", "resealed", "resealed_at_ms", "waits_for", "retire_at_ms",
    "retired_at_ms",
)  # fmt: skip
_LOOK_EVERY_S = 0.5


@keys.command("list")
@asking
def list_keys(api: HttpApi) -> Answer:
    """Every gallery whose key was rotated, and how far that has come."""
    found = api.get(path_of("keys"))
    rows = [{**one, "waits_for": ", ".join(one["waits_for"]) or None} for one in found["keys"]]
    return Answer(found, lambda: print_rows(rows, _COLUMNS, "No key was ever rotated."))


@keys.command("rotate")
@asking
def rotate_key(
    api: HttpApi,
    gallery: Annotated[str, typer.Argument(help="The gallery whose key is rotated.")],
    reason: Reason,
    backups_too: Annotated[
        bool,
        typer.Option(
            "--backups-too", help="Destroy the old key without waiting for backups: they cannot be restored then."
        ),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show the progress until everything is sealed anew.")] = False,
) -> Answer:
    """Seal a gallery under a new key, from now on and, in the background, all that it holds."""
    told = api.post(path_of("galleries", gallery, "key"), None, reason=reason, backups_too=str(backups_too).lower())
    while wait and told["resealed_at_ms"] is None:
        seen = f"{told['share']:.0%} of the log gone through, {told['resealed']} templates sealed anew"
        typer.echo(seen, err=True)
        time.sleep(_LOOK_EVERY_S)
        told = _key_of(api, gallery)
    state = "is sealed anew" if told["resealed_at_ms"] is not None else "is being sealed anew"
    return Answer(told, f"Gallery {gallery} {state} under generation {told['generation']} of its key.")


@keys.command("rewrap")
@asking
def rewrap_keys(api: HttpApi) -> Answer:
    """Wrap every key anew: by a new master key, or by the key service, as the settings say."""
    done = api.post(path_of("keys", "rewrap"), None)
    shown = f"{done['keys']} keys wrapped anew by {done['by']}."
    if done["left"]:
        shown += f"\n{done['left']} keys of no known gallery are left under the master key before, which stays."
    return Answer(done, shown)


def _key_of(api: HttpApi, gallery: str) -> Any:
    return next(one for one in api.get(path_of("keys"))["keys"] if one["gallery_id"] == gallery)
