"""Faults of the embedded form, made on purpose under load: the right alert, and only that, waits and then fires in a
real Prometheus with the real rules. `make drills` runs them in real time."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from benchmarks import served
from matcher_service.client import MatcherClient
from matcher_service.errors import MatcherError
from matcher_service.gallery.sqlite import FILE_NAME
from tests.ops.drilling import DIMENSION, OF_THE_MACHINE, PACE, SPACE, Drill, Edge, enrol, minutes, searched
from tests.ops.prometheus_server import scraping
from tests.running_service import WholeService, whole_service

pytestmark = pytest.mark.timeout(300 + 60 * int(minutes(1)))

ROWS = np.random.default_rng(7).normal(size=(300, DIMENSION)).astype(np.float32)
DISK_BYTES = 64 << 20


async def prepared(service: WholeService) -> None:
    space = await service.space(DIMENSION)
    assert space == SPACE
    await service.gallery("g", space, threshold=0.9)
    await service.deployment("g")
    await service.enrol("g", space, ROWS, [f"r{at}" for at in range(len(ROWS))])


async def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    async with whole_service(tmp_path / "service") as service:
        await prepared(service)
        async with scraping(tmp_path / "prometheus", service.running.http_port, pace=PACE) as prometheus:
            drill, edge = Drill(prometheus), Edge(service.client, ROWS[0], alerting=4)
            async with searched(edge):
                await drill.calm()
                other = sqlite3.connect(tmp_path / "service" / FILE_NAME, isolation_level=None)
                try:
                    other.execute("BEGIN IMMEDIATE")
                    # Who would raise an alert is not disclosed without its record.
                    await drill.raises({"MatcherLogUnavailable"}, {"MatcherCompletenessBurnsFast"})
                finally:
                    other.close()
                await drill.ends({"MatcherLogUnavailable"})
            assert edge.answers["INCOMPLETE"] > 0


async def test_a_replay_that_stands_still(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = {"http_port": port}
    many = np.random.default_rng(8).normal(size=(20_000, DIMENSION)).astype(np.float32)
    async with scraping(tmp_path / "prometheus", port, pace=PACE) as prometheus:
        drill = Drill(prometheus)
        async with whole_service(tmp_path / "service", server=server, index={"memory_bytes_max": 1_000_000}) as service:
            await prepared(service)
            edge = Edge(service.client, ROWS[0])
            async with searched(edge):
                await drill.calm()
                # More in the log than its memory can take in.
                with suppress(MatcherError):
                    for begin in range(0, len(many), 4000):
                        names = [f"m{at}" for at in range(begin, begin + 4000)]
                        await enrol(service.client, names, many[begin : begin + 4000])
                await drill.raises({"MatcherReplayBehind"}, {"MatcherCompletenessBurnsFast"})
            assert edge.answers["INCOMPLETE"] > 0
        async with (
            whole_service(tmp_path / "service", server=server) as service,
            searched(Edge(service.client, ROWS[0])),
        ):
            await drill.ends({"MatcherReplayBehind"})


def mounted(folder: Path) -> list[str]:
    """What the interpreter runs for `matcher serve` on a disk of its own; skips where this machine allows none."""
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o size={DISK_BYTES} tmpfs {folder}"
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this kernel lets nobody mount a disk in a namespace of their own")
    inside = f"{mount} && exec {sys.executable} -m matcher_service serve"
    return ["-c", f"import os; os.execv({unshare!r}, ['unshare', '-rm', 'sh', '-c', {inside!r}])"]


class Disk:
    """The disk of a process that has one of its own, seen from outside."""

    def __init__(self, process_id: int, folder: Path) -> None:
        self._folder = Path(f"/proc/{process_id}/root{folder}")
        self._ballast = self._folder / "ballast"

    def leave(self, share: float) -> None:
        """Fill it until so much of it is free."""
        state = os.statvfs(self._folder)
        fill = (state.f_bavail - int(state.f_blocks * share)) * state.f_frsize
        with self._ballast.open("ab", buffering=0) as ballast:
            for _ in range(max(0, fill) // 65_536):
                ballast.write(bytes(65_536))

    def fill(self) -> None:
        with suppress(OSError), self._ballast.open("ab", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))

    def empty(self) -> None:
        self._ballast.unlink()


async def test_a_disk_that_fills(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    command = mounted(tmp_path / "disk")
    with served.service(tmp_path / "disk" / "data", command=command) as process:
        served.prepare(process, SPACE, {"g": 0.9}, deployment_id="op")
        disk = Disk(process.process_id, tmp_path / "disk")
        async with (
            MatcherClient(process.grpc_address, process.token) as client,
            scraping(tmp_path / "prometheus", process.http_port, pace=PACE) as prometheus,
        ):
            await enrol(client, [f"r{at}" for at in range(len(ROWS))], ROWS)
            drill = Drill(prometheus, OF_THE_MACHINE - {"MatcherDiskFull", "MatcherDiskNearlyFull"})
            async with searched(Edge(client, ROWS[0])):
                await drill.calm()
                disk.leave(0.12)
                await drill.raises({"MatcherDiskNearlyFull"})
                disk.leave(0.03)
                await drill.raises({"MatcherDiskFull"})
                disk.fill()
                importing = asyncio.create_task(keep_enrolling(client))
                await drill.raises({"MatcherDiskFull", "MatcherLogUnavailable"}, {"MatcherAvailabilityBurnsFast"})
                disk.empty()
                # It goes on by itself.
                await drill.ends({"MatcherDiskFull", "MatcherLogUnavailable"})
                importing.cancel()
                await asyncio.gather(importing, return_exceptions=True)
                await enrol(client, ["last"], ROWS[:1])


async def keep_enrolling(client: MatcherClient) -> None:
    """Message after message, whatever becomes of each."""
    rows, turn = np.random.default_rng(9).normal(size=(1000, DIMENSION)).astype(np.float32), 0
    while True:
        turn += 1
        with suppress(MatcherError):
            await enrol(client, [f"{turn}-{at}" for at in range(len(rows))], rows)
        await asyncio.sleep(0.05)
