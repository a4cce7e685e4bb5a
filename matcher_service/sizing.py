"""How much of everything a number of references and probes needs. Arithmetic on measured figures; pure.

Bytes a reference are those of this release's formats, counted at 512 and 128 dimensions with identifiers of about 20
bytes. How fast a core compares is a figure of the machine and the threshold: `python -m benchmarks.search` measures it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from matcher_service.errors import InvalidInput

# Beside the stored template: sequence, expiry, ends, identifiers, the filter's codes and their factors.
INDEX_ROW_BYTES = 256
# Beside the sealed template: nonce and tag, names, the row among the live, its audit.
LOG_ROW_BYTES = 490
SEGMENT_FILE_ROW_BYTES = 245
SEGMENT_ROWS_MAX = 1_000_000
PROCESS_BYTES = 10**9
# The write-ahead log of an import grows as large as what it has taken in since the last checkpoint.
LOG_REWRITE_SHARE = 1.0
# The part of a container's memory that the index takes unless told otherwise.
INDEX_SHARE = 0.7


class Load(NamedTuple):
    """`comparisons_per_core_s`: references that one core compares with a probe in a second, at the threshold and the
    batch in use. `busy_share`: how busy a core may be at the highest load. `gateway_probes_per_core_s`: what one
    gateway takes in with the search free."""

    references: int
    dimension: int
    probes_per_s: float
    comparisons_per_core_s: float
    gateway_probes_per_core_s: float = 50_000.0
    busy_share: float = 0.5
    replicas: int = 2
    memory_bytes_per_node: int = 64 * 2**30
    cores_per_node: int = 16


class Size(NamedTuple):
    """Of one copy of everything, unless it says `all`. Bytes, cores, counts."""

    index_bytes: int
    rewrite_bytes: int
    memory_bytes: int
    log_bytes: int
    segment_file_bytes: int
    disk_bytes: int
    search_cores: float
    gateway_cores: float
    shards_for_memory: int
    shards_for_cores: int
    shards: int
    shards_all: int
    gateways_all: int
    fits_one_process: bool


def size(load: Load) -> Size:
    """Raises InvalidInput for a load that makes no sense."""
    for field, value, most in (
        ("references", load.references, None),
        ("dimension", load.dimension, None),
        ("comparisons_per_core_s", load.comparisons_per_core_s, None),
        ("gateway_probes_per_core_s", load.gateway_probes_per_core_s, None),
        ("busy_share", load.busy_share, 1.0),
        ("replicas", load.replicas, None),
        ("cores_per_node", load.cores_per_node, None),
    ):
        if not value > 0 or (most is not None and value > most):
            raise InvalidInput(f"{value} makes no sense", field=field, hint="give a number above 0")
    if load.probes_per_s < 0:
        raise InvalidInput("fewer than no probes", field="probes_per_s")
    stored = 2 * load.dimension
    index = load.references * (stored + INDEX_ROW_BYTES)
    rewrite = min(load.references, SEGMENT_ROWS_MAX) * (stored + INDEX_ROW_BYTES)
    memory = math.ceil((index + rewrite) / INDEX_SHARE) + PROCESS_BYTES
    log = load.references * (stored + LOG_ROW_BYTES)
    files = load.references * (stored + SEGMENT_FILE_ROW_BYTES)
    search_cores = load.probes_per_s * load.references / load.comparisons_per_core_s / load.busy_share
    gateway_cores = load.probes_per_s / load.gateway_probes_per_core_s / load.busy_share
    room = INDEX_SHARE * (load.memory_bytes_per_node - PROCESS_BYTES)
    row = stored + INDEX_ROW_BYTES
    # A shard rewrites one segment at a time, of its own rows.
    rows_of_a_node = max(0.0, room / row - min(SEGMENT_ROWS_MAX, room / row / 2))
    if rows_of_a_node < 1:
        raise InvalidInput(
            "a node has no room for references beside the process",
            field="memory_bytes_per_node",
            hint=f"give more than {PROCESS_BYTES / 2**30:.1f} GiB",
        )
    for_memory = math.ceil(load.references / rows_of_a_node)
    for_cores = max(1, math.ceil(search_cores / load.cores_per_node))
    shards = max(for_memory, for_cores)
    return Size(
        index_bytes=index,
        rewrite_bytes=rewrite,
        memory_bytes=memory,
        log_bytes=log,
        segment_file_bytes=files,
        # Segment files are written anew beside the old ones.
        disk_bytes=math.ceil(log * (1 + LOG_REWRITE_SHARE) + 2 * files),
        search_cores=search_cores,
        gateway_cores=gateway_cores,
        shards_for_memory=for_memory,
        shards_for_cores=for_cores,
        shards=shards,
        shards_all=shards * load.replicas,
        gateways_all=max(load.replicas, math.ceil(gateway_cores)),
        fits_one_process=shards == 1 and search_cores + gateway_cores <= load.cores_per_node,
    )
