"""The compiler makes of the kernel what it is meant for: int8 products on Hopper's tensor cores, nothing spilled.

It needs no GPU: the kernel is compiled for one that need not be here."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest


def outcomes(capability: int) -> list[dict[str, Any]]:
    """In a process of its own, in which the kernel is compiled rather than interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_kernel", "--json", "--capability", str(capability)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    assert [one["probes"] for one in found] == [16, 64, 128]
    assert all(one["stack_bytes"] == 0 for one in found)
    return found


@pytest.mark.skipif(platform.system() != "Linux", reason="the compiler's tools come for Linux")
def test_each_shape_is_hoppers_int8_product_without_spills_and_within_a_multiprocessor() -> None:
    shapes = outcomes(90)
    for one in shapes:
        assert one["product"] == f"wgmma.mma_async.sync.aligned.m64n{one['probes']}k32.s32.s8.s8"
        assert one["programs"] >= 1
    # To read codes as fast as memory gives them, several programs must wait for theirs at once.
    assert shapes[0]["programs"] >= 3


@pytest.mark.skipif(platform.system() != "Linux", reason="the compiler's tools come for Linux")
def test_smaller_gpus_have_shapes_that_fit_their_shared_memory() -> None:
    few, some, many = outcomes(80)
    assert all("k32.row.col.satfinite.s32.s8.s8.s32" in one["product"] for one in (few, some, many))
    assert max(few["shared_bytes"], some["shared_bytes"]) <= 101_376  # capability 8.6 and 8.9
    assert many["shared_bytes"] <= 140_000 <= 166_912  # capability 8.0
