"""How interpreter and allocator are set for a process that searches while it takes in references. Measured; see the
comments."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys

# New objects between two looks of the garbage collector, and how many of those until it looks at older ones. A batch
# of references is tens of thousands of small objects that die together: with the interpreter's 700 the collector
# took most of the time of an import, and its pauses fell on searches.
GARBAGE_LOOKS = (100_000, 20, 50)

# Counted so, a service without imports hardly ever looks. What is left of closed streams refers to itself, sockets too;
# open files crept up. A look at everything that came since the start takes milliseconds.
GARBAGE_EVERY_S = 20.0

# How long a thread that only runs Python may keep the interpreter from one that waits for it. A search asks for it
# back dozens of times, after each piece of arithmetic; with the interpreter's 5 ms it stood still during an import. The
# codes of new rows, too, are made twice as soon as with half a millisecond.
SWITCH_INTERVAL_S = 0.0002

# Blocks from this size on are mapped by themselves and go back to the system when they are freed. The C library's own
# threshold rises to the largest block ever freed; then a rewritten segment leaves its hole among what outlives it, and
# a gallery of 10,000 under steady change grew by two megabytes a minute. Larger than what a search takes for itself.
LARGE_BLOCK_BYTES = 4 << 20
_M_MMAP_THRESHOLD = -3

# Free memory at the end of a heap that is kept for what comes next. A threshold for large blocks that is set makes the
# C library give back all but 128 KiB at once: the arrays of every message were memory that the system had to clear
# first, a tenth of the processor time of an import. `sweep` gives it back.
KEPT_FREE_BYTES = 64 << 20
_M_TRIM_THRESHOLD = -1

_C_LIBRARY = ctypes.CDLL(None)


def tune() -> None:
    """For this process; to be called when what it was started with stands."""
    # What stands after the start stays for ever: not to be looked through again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_LOOKS)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # glibc has it; a C library without it has no such thresholds.
    mallopt = getattr(_C_LIBRARY, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_FREE_BYTES)


async def sweep() -> None:
    """Look at all garbage every so often, until cancelled, and give back what is free.

    An allocator does not clear what it frees, and templates of probes stood in it. The system clears what it is given
    back: every free page, of which the blocks of a message's templates have one at least.
    """
    while True:
        await asyncio.sleep(GARBAGE_EVERY_S)
        gc.collect()
        # Not in the loop's thread: a heap that has grown takes a while, and calls to C let go of the interpreter.
        await asyncio.to_thread(give_back)


def give_back() -> None:
    """Let the system have every free page, where the C library can."""
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)
