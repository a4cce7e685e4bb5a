"""The `matcher` commands. Exit codes: 0 done, 1 refused or not all well, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from matcher_service.commands import (
    access,
    accountability,
    authority,
    backups,
    calibrate,
    canary,
    edge,
    embed,
    evaluate,
    fit_adapter,
    galleries,
    import_references,
    inspection,
    keys,
    migrate,
    recorded,
    references,
    serving,
    shards,
    sizing,
    synthesise,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="An accountable, exact 1:N face-template matcher.",
)
app.command()(serving.serve)
app.command()(serving.settings)
app.command()(edge.edge)
app.command("import")(import_references.import_references)
app.command()(calibrate.calibrate)
app.command()(canary.canary)
app.command()(evaluate.evaluate)
app.command()(synthesise.synthesise)
app.command()(inspection.inspect)
app.command()(backups.backup)
app.command()(backups.restore)
app.command()(sizing.size)
app.command()(migrate.migrate)
app.command()(embed.embed)
app.command("fit-adapter")(fit_adapter.fit_adapter)
app.command("triton-repository")(embed.triton_repository)
app.command()(accountability.report)
app.command("impact-assessment")(accountability.impact_assessment)
references.subjects.command("export")(accountability.export_subject)
app.add_typer(accountability.holds, name="holds")
app.add_typer(accountability.erasures, name="erasures")
app.add_typer(keys.keys, name="keys")
app.add_typer(shards.shards, name="shards")
app.add_typer(galleries.galleries, name="galleries")
app.add_typer(references.references, name="references")
app.add_typer(references.subjects, name="subjects")
app.add_typer(galleries.spaces, name="spaces")
app.add_typer(authority.deployments, name="deployments")
app.add_typer(authority.cases, name="cases")
app.add_typer(galleries.watchlists, name="watchlists")
app.add_typer(access.credentials, name="credentials")
app.add_typer(access.proposals, name="proposals")
app.add_typer(recorded.alerts, name="alerts")
app.add_typer(recorded.audit, name="audit")


@app.command()
def demo(
    references: Annotated[int, typer.Option(help="How many in the end, synthetic ones included.")] = 20_000,
    data_dir: Annotated[
        Path | None, typer.Option(help="A new directory, which is kept. Without: a temporary one.")
    ] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Keep serving after the results, until Ctrl-C.")] = False,
    http_port: Annotated[int, typer.Option(help="0 takes a free one.")] = 0,
    grpc_port: Annotated[int, typer.Option(help="0 takes a free one.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the main job on real templates: enrol, stream as an edge node does, and count right and wrong."""
    from matcher_service.demo import run

    options = run.Options(references, data_dir, stay, as_json, http_port, grpc_port)
    raise typer.Exit(run.demo(options))


def run(arguments: Sequence[str]) -> int:
    """One command line; returns its exit code. An error prints its cause and what to do on standard error."""
    try:
        app(args=list(arguments), prog_name="matcher", standalone_mode=True)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except KeyboardInterrupt:
        typer.echo("matcher: interrupted", err=True)
        return 130
    except Exception as error:
        # Imported here, because a command that only prints its help has no need of it.
        from matcher_service.errors import MatcherError

        if not isinstance(error, MatcherError):
            raise
        where = f"{error.field}: " if error.field else ""
        typer.echo(f"matcher: {error.cause.value}: {where}{error.detail}", err=True)
        if error.hint:
            typer.echo(f"    {error.hint}", err=True)
        return 1
    return 0


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
