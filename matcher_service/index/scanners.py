"""Which scanner a segment gets, and how it is kept in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from matcher_service.index.flat import FlatScanner
from matcher_service.index.rows import Float16
from matcher_service.index.scanner import Scanner


class Scanners(Protocol):
    """Makes scanners, and turns them into arrays and back."""

    def build(self, stored: Float16) -> Scanner:
        """A scanner over rows that nobody has scanned yet."""
        ...

    def arrays(self, scanner: Scanner) -> Mapping[str, NDArray[Any]]:
        """What `load` needs beside the stored rows so as to compute nothing again; {} for a flat scan."""
        ...

    def load(self, stored: Float16, arrays: Mapping[str, NDArray[Any]]) -> Scanner:
        """The scanner that had these arrays. Raises DataDamaged if they make no sense."""
        ...


class FlatScanners:
    """Scans every segment in full."""

    def build(self, stored: Float16) -> Scanner:
        return FlatScanner(stored)

    def arrays(self, scanner: Scanner) -> Mapping[str, NDArray[Any]]:
        return {}

    def load(self, stored: Float16, arrays: Mapping[str, NDArray[Any]]) -> Scanner:
        return FlatScanner(stored)
