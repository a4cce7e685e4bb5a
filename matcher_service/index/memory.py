"""How much memory the index may hold, and what a block of entries would add."""

from __future__ import annotations

import os
from pathlib import Path

_SHARE = 0.7
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

# Per row beyond its template and ids: sequence, expiry, subject hash, end, hash index and offsets (at most 40 bytes),
# and the filter's codes with their row numbers at 512 dimensions (195 bytes).
ROW_BYTES = 235


def budget_bytes(memory_bytes_max: int) -> int:
    """The budget in bytes: as set, or 70% of what the machine or its control group allows."""
    return memory_bytes_max or int(_SHARE * machine_bytes())


def machine_bytes() -> int:
    """Physical memory, or the control group's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for text in map(_text, _CGROUP_LIMITS) if text.isdigit()]
    return min([physical, *limits])


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
