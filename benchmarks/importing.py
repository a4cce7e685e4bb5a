"""How fast references go in, durable and searchable, and what that does to searches:
`python -m benchmarks.importing --help`.

A real service in a process of its own; one client enrols synthetic references over the gRPC stream, as `matcher
import` does, while another sends small messages of unmated probes at a steady pace. The same probes are sent before
and after the import, so the three latencies are from one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.served import Service, prepare, service
from matcher_service.client import MatcherClient, Probes, ReceiptOutcome, Receipts, References
from matcher_service.terms import SpaceId

MESSAGE_REFERENCES = 1000
MESSAGE_PROBES = 4
PROBE_EVERY_S = 0.05


async def latencies(
    client: MatcherClient, space: SpaceId, probes: NDArray[np.float32], until: asyncio.Event, min_sequence: int = 0
) -> list[float]:
    """Milliseconds from sending to the answer, one per message, sent at a steady pace until told to stop."""
    found = []
    while not until.is_set():
        began = time.monotonic()
        reply = await client.identify(
            Probes(
                space=space,
                probe_ids=[str(at) for at in range(MESSAGE_PROBES)],
                templates=probes,
                captured_at_ms=[time.time_ns() // 1_000_000] * MESSAGE_PROBES,
                deployment_id="bench",
                deadline_s=30,
            )
        )
        assert reply.complete
        found.append((time.monotonic() - began) * 1000)
        await asyncio.sleep(max(0.0, PROBE_EVERY_S - (time.monotonic() - began)))
    return found


async def for_a_while(
    client: MatcherClient, space: SpaceId, probes: NDArray[np.float32], seconds: float
) -> list[float]:
    over = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, over.set)
    return await latencies(client, space, probes, over)


async def measure(
    served: Service, references: int, dimension: int, settled_s: float, alone: bool, progress: Progress
) -> dict[str, float]:
    space = SpaceId("bench", 1, dimension)
    prepare(served, space, {"bench": 0.4})
    source = np.random.default_rng(7)
    probes = source.normal(size=(MESSAGE_PROBES, dimension)).astype(np.float32)
    # Drawn beforehand and repeated with a shift, so that drawing does not compete with the service for the cores.
    drawn = source.normal(size=(min(references, 100_000), dimension)).astype(np.float16)
    task = progress.add_task("enrolling", total=references)

    async def messages() -> AsyncIterator[References]:
        for begin in range(0, references, MESSAGE_REFERENCES):
            ids = [f"r{at}" for at in range(begin, min(begin + MESSAGE_REFERENCES, references))]
            first = begin % len(drawn)
            templates = np.roll(drawn[first : first + len(ids)], begin // len(drawn), axis=1)
            yield References(
                gallery_id="bench", space=space, reference_ids=ids, subject_ids=ids, templates=templates, deadline_s=300
            )

    async with (
        MatcherClient(f"127.0.0.1:{served.grpc_port}", served.token) as importing,
        MatcherClient(f"127.0.0.1:{served.grpc_port}", served.token) as probing,
    ):
        before = [] if alone else await for_a_while(probing, space, probes, settled_s)
        over = asyncio.Event()
        if alone:
            over.set()
        watched = asyncio.create_task(latencies(probing, space, probes, over))
        cpu_before, own_cpu_before = served.cpu_s(), time.process_time()
        began = time.monotonic()
        head = 0
        async for receipts in importing.enrol_messages(messages()):
            assert isinstance(receipts, Receipts), receipts
            assert set(receipts.outcomes) == {ReceiptOutcome.ENROLLED}, receipts.refusals
            head = max(head, *receipts.sequences)
            progress.advance(task, len(receipts))
        durable_s = time.monotonic() - began
        await importing.identify(
            Probes(
                space=space,
                probe_ids=["last"],
                templates=probes[:1],
                captured_at_ms=[time.time_ns() // 1_000_000],
                deployment_id="bench",
                min_sequence=head,
                deadline_s=60,
            )
        )
        searchable_s = time.monotonic() - began
        cpu_s, own_cpu_s = served.cpu_s() - cpu_before, time.process_time() - own_cpu_before
        over.set()
        during = await watched
        after = [] if alone else await for_a_while(probing, space, probes, settled_s)
    result: dict[str, float] = {
        "references": references,
        "dimension": dimension,
        "durable_references_per_second": references / durable_s,
        "searchable_references_per_second": references / searchable_s,
        "service_cpu_us_per_reference": cpu_s / references * 1e6,
        "client_cpu_us_per_reference": own_cpu_s / references * 1e6,
    }
    for name, values in (("empty", before), ("during", during), ("after", after)):
        if values:
            for percent in (50, 99):
                result[f"search_ms_p{percent}_{name}"] = float(np.percentile(values, percent))
            result[f"search_ms_max_{name}"] = max(values)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--settled-s", type=float, default=5.0, help="seconds of searches before and after the import")
    parser.add_argument("--alone", action="store_true", help="no searches beside the import, nor before and after it")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=console) as progress,
        service(Path(folder)) as served,
    ):
        result = asyncio.run(
            measure(served, options.references, options.dimension, options.settled_s, options.alone, progress)
        )
    if options.json:
        print(json.dumps(result))
        return
    table = Table(title=f"{options.references:,} references of {options.dimension} dimensions, synthetic")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in result.items():
        table.add_row(name, f"{value:,.1f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


if __name__ == "__main__":
    main()
