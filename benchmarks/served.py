"""A service in a process of its own, as a user starts it, and what every benchmark does first: a space, galleries,
a deployment, references. Also the pinning of processes to cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from numpy.typing import NDArray

from matcher_service.client import MatcherClient, Probes, ReceiptOutcome, References
from matcher_service.terms import SpaceId

DAY_MS = 86_400_000
# As old as a deployment may allow, so that messages encoded beforehand stay timely for the whole run.
PROBE_AGE_MS_MAX = 3_600_000
DEPLOYMENT = "bench"
MESSAGE_REFERENCES = 4000
SERVE = ("-m", "matcher_service", "serve")


class Service(NamedTuple):
    """`process_id` 0: another's service, of which nothing but its address is known."""

    process_id: int
    http_port: int
    grpc_port: int
    token: str

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_address(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def cpu_s(self) -> float:
        """Processor time that it has taken so far, in seconds."""
        fields = Path(f"/proc/{self.process_id}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Memory that it holds now."""
        pages = int(Path(f"/proc/{self.process_id}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def pinned(cores: Collection[int] | None) -> Iterator[None]:
    """The calling thread, and what it starts, on these cores meanwhile; None: as it is."""
    before = os.sched_getaffinity(0)
    if cores is not None:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def two_cores() -> tuple[set[int], set[int]] | None:
    """One core for a server and another for its client, or None on a machine of one."""
    cores = sorted(os.sched_getaffinity(0))
    return ({cores[0]}, {cores[1]}) if len(cores) > 1 else None


@contextmanager
def service(
    data_dir: Path,
    *,
    cores: Collection[int] | None = None,
    command: Sequence[str] = SERVE,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Service]:
    """`matcher serve` on free ports, on `cores` only. `settings` are environment variables; `command` is what the
    interpreter runs instead. Raises RuntimeError if it does not start."""
    environment = {
        **os.environ,
        "MATCHER_STORAGE__DATA_DIR": str(data_dir),
        "MATCHER_SERVER__HTTP_PORT": "0",
        "MATCHER_SERVER__GRPC_PORT": "0",
        "PYTHONUNBUFFERED": "1",
        **(settings or {}),
    }
    # A child inherits the cores of the thread that starts it, before it makes threads of its own.
    with pinned(cores):
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment)
    with process:
        assert process.stdout is not None
        ports = []
        try:
            for line in process.stdout:
                words = line.split()
                if words[1:2] in (["HTTP"], ["gRPC"]):
                    ports.append(int(words[2].rsplit(":", 1)[1]))
                if "token" in words:
                    # As the service sees it, which may have a disk of its own there.
                    token_file = Path(f"/proc/{process.pid}/root", *Path(words[-1]).absolute().parts[1:])
                    yield Service(process.pid, ports[0], ports[1], token_file.read_text().strip())
                    break
            else:
                raise RuntimeError("the service did not start; its reason stands above")
        finally:
            # Waited for here: it still has lines to print, and the pipe closes with this block.
            process.terminate()
            process.wait()


def prepare(
    served: Service,
    space: SpaceId,
    galleries: Mapping[str, float],
    *,
    rank_max: int = 100,
    deployment_id: str = DEPLOYMENT,
) -> None:
    """A space, galleries with the threshold of each, and one deployment over them all."""
    now = time.time_ns() // 1_000_000
    named = {"name": space.name, "version": space.version, "dimension": space.dimension}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/spaces", {"space": named, "centre": [0.0] * space.dimension}),
        *(
            (
                "/v1/galleries",
                {
                    "gallery_id": gallery_id,
                    "kind": "custody",
                    "controller": "benchmark",
                    "lawful_basis": "synthetic data",
                    "purpose": "benchmark",
                    "retention_ms": DAY_MS,
                    "space": named,
                    "threshold": threshold,
                },
            )
            for gallery_id, threshold in galleries.items()
        ),
        (
            "/v1/deployments",
            {
                "deployment_id": deployment_id,
                "gallery_ids": list(galleries),
                "opens_at_ms": now - 1000,
                "closes_at_ms": now + DAY_MS,
                "probe_age_ms_max": PROBE_AGE_MS_MAX,
                "authorised_by": "benchmark",
                "reason": "benchmark",
                "rank_max": rank_max,
            },
        ),
    ]
    with httpx.Client(base_url=served.http_address, headers={"Authorization": f"Bearer {served.token}"}) as api:
        for path, body in bodies:
            api.post(path, json=body).raise_for_status()


async def enrol(
    served: Service, space: SpaceId, gallery_id: str, stored: NDArray[Any], *, deployment_id: str = DEPLOYMENT
) -> int:
    """The rows as references r0, r1, ..., one subject each; waits until a search sees them all. Returns the
    sequence of the newest."""

    async def messages() -> AsyncIterator[References]:
        for begin in range(0, len(stored), MESSAGE_REFERENCES):
            rows = stored[begin : begin + MESSAGE_REFERENCES]
            ids = [f"r{at}" for at in range(begin, begin + len(rows))]
            yield References(
                gallery_id=gallery_id, space=space, reference_ids=ids, subject_ids=ids, templates=rows, deadline_s=300
            )

    async with MatcherClient(served.grpc_address, served.token) as client:
        head = 0
        async for receipt in client.enrol_stream(messages()):
            if receipt.outcome is not ReceiptOutcome.ENROLLED:
                raise RuntimeError(f"a reference was refused: {receipt}")
            head = max(head, receipt.sequence)
        await client.identify(
            Probes(
                space=space,
                probe_ids=["last"],
                templates=stored[:1],
                captured_at_ms=[time.time_ns() // 1_000_000],
                deployment_id=deployment_id,
                gallery_ids=[gallery_id],
                min_sequence=head,
                deadline_s=60,
            )
        )
    return head
