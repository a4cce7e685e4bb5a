"""What the allocator is told, as the system sees it. In a process of its own: settings of the C library stay."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

# Arrays as those of a message, just below what is mapped by itself; then one block of that size.
PROGRAM = """
import json, resource, sys
import numpy as np
from matcher_service import interpreter

def faults(size, times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        np.empty(size, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

interpreter.tune()
faults(1 << 20, 3)
small = faults(1 << 20, 200)
kept = [np.full(1 << 20, 1, np.uint8) for _ in range(40)]
kept.clear()
before = resident()
interpreter.give_back()
print(json.dumps([small, before - resident()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_memory_of_a_message_serves_the_next_one_and_goes_back_with_a_sweep() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    faults, given_back = json.loads(run.stdout)
    # Cleared anew each time, 200 blocks of 256 pages would be 51,200.
    assert faults < 5_000
    assert given_back > 30 << 20
