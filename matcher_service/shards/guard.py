"""Ends a server whose shard was killed.

Triton's Python backend runs a model in a process of its own and does not start that again: after the kernel took it
for want of memory, the server would stay up and ready, and refuse every request until somebody looks. Ended, it is
started again by whatever keeps it running, and the shard recovers by itself.

The guard is a child of the shard's process that waits at the end of a pipe. It holds the server by a descriptor and
not by its number, which another process may have by then.
"""

from __future__ import annotations

import os
import signal
import time

# In order first: other models of the server may have something to finish.
_PATIENCE_S = 15.0


class Guard:
    """Begins when made, in the shard's process; `release` before that ends in order. `server` is the server's process
    id. On a system without such descriptors it guards nothing."""

    def __init__(self, server: int) -> None:
        self._pid = 0
        if not hasattr(os, "pidfd_open"):
            return
        held = os.pidfd_open(server)
        waits, self._tells = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            # Nothing of the shard's process may run on in this one, whatever happens.
            try:
                _watch(waits, held)
            finally:
                os._exit(0)
        os.close(waits)
        os.close(held)

    def release(self) -> None:
        """The end that follows is intended; repeatable."""
        if self._pid:
            os.write(self._tells, b"x")
            os.close(self._tells)
            os.waitpid(self._pid, 0)
            self._pid = 0


def _watch(waits: int, server: int) -> None:
    low, high = sorted((waits, server))
    os.closerange(0, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, os.sysconf("SC_OPEN_MAX"))
    if os.read(waits, 1):
        return
    for which in (signal.SIGTERM, signal.SIGKILL):
        try:
            signal.pidfd_send_signal(server, which)
        except ProcessLookupError:
            return
        time.sleep(_PATIENCE_S)
