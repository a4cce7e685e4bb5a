"""Law 5: the log's file is synced before the enrolment is acknowledged. SIGKILL alone cannot show a missing
sync, since the kernel keeps what a killed process wrote; the system calls show it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from matcher_service.client import MatcherClient, ReceiptOutcome, References
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
        async with MatcherClient(f"127.0.0.1:{server.grpc_port}", server.token) as client:
            receipts = await client.enrol(
                References(
                    gallery_id="g",
                    space=SPACE,
                    reference_ids=[MARK],
                    subject_ids=["somebody"],
                    templates=np.ones((1, DIMENSION), np.float32),
                )
            )
        assert receipts[0].outcome is ReceiptOutcome.ENROLLED
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
