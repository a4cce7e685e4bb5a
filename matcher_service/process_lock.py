"""One process per data directory, by a locked file that says whose it is."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matcher_service.errors import StartRefused

LOCK_FILE = "lock"


@contextmanager
def held(data_dir: Path) -> Iterator[None]:
    """Create the directory (mode 0700) if need be and hold its lock; raises StartRefused if another holds it.

    The kernel gives the lock back when the process dies, however it dies.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(data_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartRefused(
            f"cannot use data directory {data_dir}: {error.strerror}", hint="check storage.data_dir and its rights"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 64).decode(errors="replace").strip() or "unknown"
            raise StartRefused(
                f"data directory {data_dir} is in use by process {owner}",
                hint="stop that process, or choose another storage.data_dir",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
