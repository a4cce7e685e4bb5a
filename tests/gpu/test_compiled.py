"""The compiler makes of the kernel what it is meant for: int8 products on Hopper's tensor cores, nothing spilled.

It needs no GPU: the kernel is compiled for one that need not be here."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.system() != "Linux", reason="the compiler's tools come for Linux")
def test_each_shape_is_int8_tensor_core_code_without_spills_and_within_a_multiprocessor() -> None:
    # A process of its own, in which the kernel is compiled rather than interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_kernel", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    shapes = json.loads(ran.stdout)
    assert [one["probes"] for one in shapes] == [16, 64, 128]
    for one in shapes:
        assert one["product"] == f"wgmma.mma_async.sync.aligned.m64n{one['probes']}k32.s32.s8.s8"
        assert one["stack_bytes"] == 0
        assert one["programs"] >= 1
    # To read codes as fast as memory gives them, several programs must wait for theirs at once.
    assert shapes[0]["programs"] >= 3
