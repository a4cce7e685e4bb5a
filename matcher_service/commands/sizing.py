"""`matcher size`: how much memory, disk and how many cores a number of references and probes needs."""

from __future__ import annotations

from typing import Annotated

import typer

from matcher_service.commands.options import AsJson
from matcher_service.commands.output import print_json


def size(
    references: Annotated[int, typer.Option(min=1, help="References in all galleries that are searched.")],
    probes_per_s: Annotated[float, typer.Option(min=0.0, help="Probes in a second, at the busiest.")],
    measured_queries_per_s: Annotated[
        float,
        typer.Option(min=0.001, help="What `python -m benchmarks.search` printed for your threshold and batch."),
    ],
    measured_references: Annotated[int, typer.Option(min=1, help="Its --references.")] = 1_000_000,
    measured_cores: Annotated[int, typer.Option(min=1, help="The cores of the machine it ran on.")] = 2,
    dimension: Annotated[int, typer.Option(min=2, help="Of the templates.")] = 512,
    busy_share: Annotated[float, typer.Option(min=0.01, max=1.0, help="How busy a core may be at the busiest.")] = 0.5,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of each shard.")] = 2,
    memory_gib_per_node: Annotated[float, typer.Option(min=1.0, help="Memory of a node.")] = 64.0,
    cores_per_node: Annotated[int, typer.Option(min=1, help="Cores of a node.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Reckon memory, disk, cores, shards and gateways from measured figures.

    Searching costs in proportion to the references, so a rate measured at one size holds for others. It depends on the
    threshold, the batch and the machine: measure it there. Arithmetic, not a promise.
    """
    from matcher_service.sizing import Load
    from matcher_service.sizing import size as sized

    load = Load(
        references=references,
        dimension=dimension,
        probes_per_s=probes_per_s,
        comparisons_per_core_s=measured_queries_per_s * measured_references / measured_cores,
        busy_share=busy_share,
        replicas=replicas,
        memory_bytes_per_node=int(memory_gib_per_node * 2**30),
        cores_per_node=cores_per_node,
    )
    found = sized(load)
    if as_json:
        print_json({"load": load._asdict(), "size": found._asdict()})
        return
    for what, value, why in (
        ("index in memory", _gib(found.index_bytes), f"{found.index_bytes // references} bytes a reference"),
        ("while it is rewritten", _gib(found.rewrite_bytes), "once more for the largest segment"),
        ("memory in all", _gib(found.memory_bytes), "the index takes at most 70% of it"),
        (
            "log",
            _gib(found.log_bytes),
            f"{found.log_bytes // references} bytes a reference, without the audit, which grows",
        ),
        ("segment files", _gib(found.segment_file_bytes), "written anew beside the old ones"),
        ("disk in all", _gib(found.disk_bytes), "with room for both"),
        ("cores that search", f"{found.search_cores:.1f}", f"at most {busy_share:.0%} busy"),
        ("cores of gateways", f"{found.gateway_cores:.1f}", f"at most {busy_share:.0%} busy"),
        ("shards", str(found.shards), f"{found.shards_for_memory} for memory, {found.shards_for_cores} for cores"),
        ("shards with replicas", str(found.shards_all), f"{replicas} of each"),
        ("gateways", str(found.gateways_all), "at least one for each replica"),
    ):
        typer.echo(f"{what:>22}  {value:>12}  {why}")
    enough = "enough (embedded form)." if found.fits_one_process else "not enough: cluster form."
    typer.echo(f"One process is {enough}")


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
