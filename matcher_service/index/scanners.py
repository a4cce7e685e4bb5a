"""Which scanner a segment gets, and how it is kept in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import StartRefused
from matcher_service.index.fastscan import FastScanScanners
from matcher_service.index.scanner import Growing, Scanner
from matcher_service.settings import IndexSettings


class Scanners(Protocol):
    """Makes scanners, and turns them into arrays and back."""

    def build(self, stored: NDArray[np.float16]) -> Scanner:
        """A scanner over rows that nobody has scanned yet."""
        ...

    def arrays(self, scanner: Scanner) -> Mapping[str, NDArray[Any]]:
        """What `load` needs beside the stored rows so as to compute nothing again; {} for a full scan."""
        ...

    def load(self, stored: NDArray[np.float16], arrays: Mapping[str, NDArray[Any]]) -> Scanner:
        """The scanner that had these arrays. Raises DataDamaged if they make no sense."""
        ...

    def growing(self, dimension: int) -> Growing | None:
        """A device for rows that keep coming in; None: they are scanned in full."""
        ...

    def tend(self) -> bool:
        """One bounded round of upkeep of its own, and whether there is more to do at once."""
        ...

    def condition(self) -> Mapping[str, str]:
        """Of each device in use, what is wrong with it; empty if it works."""
        ...

    def memory(self) -> Mapping[str, tuple[int, int]]:
        """Of each device whose memory is counted, the bytes that hold codes, and those that may."""
        ...

    def close(self) -> None: ...


class BySize(FastScanScanners):
    """Full scans for few rows, coded ones where they pay."""

    def growing(self, dimension: int) -> Growing | None:
        return None

    def tend(self) -> bool:
        return False

    def condition(self) -> Mapping[str, str]:
        return {}

    def memory(self) -> Mapping[str, tuple[int, int]]:
        return {}


def scanners_for(settings: IndexSettings) -> Scanners:
    """The scanners that the settings choose. Raises StartRefused if this machine cannot have them."""
    cpu = BySize(settings.threads or len(os.sched_getaffinity(0)))
    if settings.scanner == "cpu":
        return cpu
    try:
        # Imported here, because only the extra `gpu` brings what it needs.
        from matcher_service.index.gpu.opening import open_gpu_scanners
    except ImportError as error:
        raise StartRefused(
            f"the GPU scanner needs {error.name}",
            field="index.scanner",
            hint="install the extra `gpu` on a machine with a GPU, or set it to cpu",
        ) from error
    return open_gpu_scanners(settings, cpu)
