"""How the interpreter is set for a process that searches while it takes in references. Measured; see the comments."""

from __future__ import annotations

import gc
import sys

# New objects between two looks of the garbage collector, and how many of those until it looks at older ones. A batch
# of references is tens of thousands of small objects that die together: with the interpreter's 700 the collector
# took most of the time of an import, and its pauses fell on searches.
GARBAGE_LOOKS = (100_000, 20, 50)

# How long a thread that only runs Python may keep the interpreter from one that waits for it. A search asks for it
# back dozens of times, after each piece of arithmetic; with the interpreter's 5 ms it stood still during an import.
SWITCH_INTERVAL_S = 0.0005


def tune() -> None:
    """For this process; to be called when what it was started with stands."""
    # What stands after the start stays for ever: not to be looked through again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_LOOKS)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
