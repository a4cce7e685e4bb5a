"""Law 5: the log's file is synced before the enrolment is acknowledged. SIGKILL alone cannot show a missing
sync, since the kernel keeps what a killed process wrote; the system calls show it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import grpc
import numpy as np
import pytest

from matcher_service.wire import matcher_pb2 as pb
from matcher_service.wire import matcher_pb2_grpc as pb_grpc
from tests.fault.test_kill_server import DIMENSION, SPACE, prepare
from tests.served_process import served

MARK = "synced-before-receipt"


async def test_law_5_the_log_is_synced_before_the_receipt_leaves(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        assert not os.environ.get("CI"), "strace must be installed where this runs for the record"
        pytest.skip("strace is not installed (Debian package strace)")
    trace = tmp_path / "trace"
    calls = "write,writev,sendmsg,sendto,pwrite64,fsync,fdatasync"
    tracer = ("strace", "-f", "-y", "-s", "4096", "-e", f"trace={calls}", "-o", str(trace))
    with served(tmp_path / "data", tmp_path / "log", *tracer) as server:
        prepare(server)
        request = pb.EnrolRequest(
            gallery_id="g",
            space=pb.TemplateSpace(name=SPACE.name, version=SPACE.version, dimension=SPACE.dimension),
            dtype=pb.FLOAT32,
            templates=np.ones((1, DIMENSION), "<f4").tobytes(),
            reference_ids=[MARK],
            subject_ids=["somebody"],
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            # Not in columns, which do not name the reference.
            call = pb_grpc.MatcherStub(channel).Enrol(metadata=(("authorization", f"Bearer {server.token}"),))  # type: ignore[no-untyped-call]
            await call.write(request)
            reply = await call.read()
            await call.done_writing()
        assert [receipt.outcome for receipt in reply.receipts] == [pb.ENROLLED]
    lines = trace.read_text(errors="replace").splitlines()

    def last_before(pattern: str, end: int) -> int:
        return max((at for at, line in enumerate(lines[:end]) if re.search(pattern, line)), default=-1)

    # The receipt names the reference, so the bytes on the socket show when it left.
    receipt = min(
        at
        for at, line in enumerate(lines)
        if MARK in line and re.search(r"(sendmsg|writev?)\(\d+<[^>]*socket", line.replace("TCP", "socket"))
    )
    written = last_before(r"pwrite64\(\d+<[^>]*-wal>", receipt)
    synced = last_before(r"(fdatasync|fsync)\(\d+<[^>]*-wal>\)", receipt)
    assert written >= 0
    assert written < synced < receipt, "the write-ahead log was not synced between its write and the receipt"
