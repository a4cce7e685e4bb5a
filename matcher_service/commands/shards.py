"""`matcher shards`: who of a cluster's shards holds which partitions, and moving them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from matcher_service.commands.options import AsJson
from matcher_service.commands.output import print_json, print_rows
from matcher_service.commands.serving import Config

if TYPE_CHECKING:
    from pathlib import Path

    from matcher_service.shards.triton import TritonReplica

shards = typer.Typer(no_args_is_help=True, help="Shards of a cluster: which partitions each holds, and moving them.")

_COLUMNS = ("shard", "replica", "fresh", "partitions", "assigned", "sequence", "live", "megabytes", "refusal")

T = TypeVar("T")


@shards.command("list")
def list_shards(config: Config = None, as_json: AsJson = False) -> None:
    """Every replica that a gateway of these settings would ask, as it is now.

    The exit code is 1 if partitions are held by no fresh replica: answers are incomplete then.
    """
    from matcher_service.partitions import ALL_PARTITIONS, NO_PARTITIONS, named, parse

    rows = _with_replicas(config, _looked_at)
    held = NO_PARTITIONS.union(*(parse(one["partitions"] or "none") for one in rows if one["fresh"]))
    absent = named(ALL_PARTITIONS - held)
    if as_json:
        print_json({"replicas": rows, "missing": absent})
    else:
        print_rows(rows, _COLUMNS, "No shards are configured.")
        typer.echo(f"Held by no fresh replica: {absent}." if absent else "Every partition is held.")
    raise typer.Exit(1 if absent else 0)


@shards.command("move")
def move_partitions(
    partitions: Annotated[str, typer.Argument(help="Which: 0-63, 70.")],
    giver: Annotated[int, typer.Option("--from", help="The shard that owns them: its number in `list`.")],
    taker: Annotated[int, typer.Option("--to", help="The shard that is to own them.")],
    within_s: Annotated[float, typer.Option(help="Give up if they are not replayed within this; nothing is lost.")] = (
        3600.0
    ),
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Move partitions between two shards, all replicas of each, without an incomplete answer.

    The new owner replays them from the log first. Broken off, it does no harm; repeat it. Every gateway must know both
    shards before.
    """
    from matcher_service.clock import SystemClock
    from matcher_service.errors import InvalidInput
    from matcher_service.partitions import named, parse, ranges
    from matcher_service.shards.moving import move

    chosen = parse(partitions)

    async def moved(replicas: list[list[TritonReplica]]) -> None:
        for number, option in ((giver, "--from"), (taker, "--to")):
            if not 0 <= number < len(replicas):
                raise InvalidInput(
                    f"there is no shard {number}", field=option, hint="`matcher shards list` numbers them"
                )
        if giver == taker:
            raise InvalidInput("both are the same shard", field="--to", hint="name two shards")
        await move(chosen, replicas[giver], replicas[taker], SystemClock(), within_s)

    _with_replicas(config, moved)
    if as_json:
        print_json({"partitions": ranges(chosen), "from": giver, "to": taker})
        return
    typer.echo(f"Shard {taker} owns {named(chosen)}; shard {giver} does not any more.")


def _with_replicas(config: Path | None, work: Callable[[list[list[TritonReplica]]], Awaitable[T]]) -> T:
    from matcher_service.clock import SystemClock
    from matcher_service.errors import StartRefused
    from matcher_service.settings import load
    from matcher_service.shards.triton import TritonReplica
    from matcher_service.triton_endpoints import TritonClients, credentials_of

    settings = load(config)
    if not settings.cluster.on:
        raise StartRefused(
            "no cluster is configured", field="cluster.log_url", hint="name the settings of a gateway with --config"
        )

    async def working() -> T:
        clients = TritonClients(credentials_of(settings.triton))
        try:
            clock = SystemClock()
            return await work(
                [[TritonReplica(one, clients, clock) for one in shard] for shard in settings.cluster.shards]
            )
        finally:
            await clients.close()

    return asyncio.run(working())


async def _looked_at(replicas: list[list[TritonReplica]]) -> list[dict[str, Any]]:
    return list(await asyncio.gather(*(_row(number, one) for number, shard in enumerate(replicas) for one in shard)))


async def _row(number: int, replica: TritonReplica) -> dict[str, Any]:
    from matcher_service.clock import SystemClock
    from matcher_service.errors import ShardUnavailable
    from matcher_service.partitions import ranges
    from matcher_service.shards.moving import ANSWER_S_MAX
    from matcher_service.shards.scattered import unfit

    row: dict[str, Any] = {"shard": number, "replica": replica.name, "fresh": False, "partitions": "", "assigned": ""}
    try:
        state = await replica.state(SystemClock().monotonic() + ANSWER_S_MAX)
    except ShardUnavailable as error:
        return row | {"refusal": str(error)}
    return row | {
        "fresh": not unfit(state, 0),
        "partitions": ranges(state.partitions),
        "assigned": ranges(state.assigned),
        "sequence": state.sequence,
        "live": sum(state.live.values()),
        "megabytes": state.bytes_in_memory / 1e6,
        "refusal": state.refusal,
    }
