"""What else searches exactly on a GPU, behind one interface: the best `count` rows of each probe, best first.

Each rival holds the same rows. One that cannot run here says why, and the benchmark prints that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]
Rows = NDArray[np.int64]

# Products of a tile held at once, in values: 512 MiB of float16.
_TILE_VALUES = 1 << 28


class Rival(NamedTuple):
    """`find(probes, count)` gives int64 [n, count], or is None: then `why` says what is missing."""

    name: str
    find: Callable[[Float32, int], Rows] | None
    why: str = ""


def rivals(stored: Float16, device: torch.device) -> Iterator[Rival]:
    """One after another; each is let go before the next is built."""
    builders: tuple[tuple[str, int, Callable[[Float16, torch.device], Callable[[Float32, int], Rows]]], ...] = (
        ("torch float16 product + top-k in tiles", 2, _torch),
        ("FAISS GPU flat float16", 2, lambda rows, on: _faiss(rows, on, True)),
        ("FAISS GPU flat float32", 4, lambda rows, on: _faiss(rows, on, False)),
        ("cuVS brute force float16", 2, _cuvs),
    )
    for name, bytes_each, build in builders:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30
        # The rows, a tile of products and its selection.
        needed = bytes_each * stored.size + (4 << 30 if device.type == "cuda" else 0)
        if needed > free:
            yield Rival(name, None, f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
            continue
        try:
            yield Rival(name, build(stored, device))
        except (ImportError, AttributeError, RuntimeError) as error:
            yield Rival(name, None, str(error).partition("\n")[0])


def _torch(stored: Float16, device: torch.device) -> Callable[[Float32, int], Rows]:
    kind = torch.float16 if device.type == "cuda" else torch.float32
    rows = torch.empty(stored.shape, dtype=kind, device=device)
    for start in range(0, len(stored), 1 << 18):
        rows[start : start + (1 << 18)] = torch.from_numpy(stored[start : start + (1 << 18)]).to(device)

    def find(probes: Float32, count: int) -> Rows:
        wanted = torch.from_numpy(probes).to(device).to(kind)
        tile = max(count, _TILE_VALUES // len(probes))
        best: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        for start in range(0, len(rows), tile):
            top = torch.topk(wanted @ rows[start : start + tile].T, min(count, len(rows) - start), dim=1)
            best.append(top.values)
            places.append(top.indices + start)
        chosen = torch.topk(torch.cat(best, dim=1), count, dim=1).indices
        return np.asarray(torch.gather(torch.cat(places, dim=1), 1, chosen).cpu().numpy(), np.int64)

    return find


def _faiss(stored: Float16, device: torch.device, halves: bool) -> Callable[[Float32, int], Rows]:
    faiss: Any = importlib.import_module("faiss")
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise ImportError("this FAISS has no GPU")
    resources = faiss.StandardGpuResources()
    config = faiss.GpuIndexFlatConfig()
    config.device, config.useFloat16 = device.index or 0, halves
    index = faiss.GpuIndexFlatIP(resources, stored.shape[1], config)
    # All at once would need the rows as float32 on the host; in parts each `add` copies the index: reserve first.
    if hasattr(index, "reserve"):
        index.reserve(len(stored))
    for start in range(0, len(stored), 1 << 20):
        index.add(stored[start : start + (1 << 20)].astype(np.float32))
    return lambda probes, count, keep=resources: np.asarray(index.search(probes, count)[1], np.int64)  # type: ignore[misc]


def _cuvs(stored: Float16, device: torch.device) -> Callable[[Float32, int], Rows]:
    brute_force: Any = importlib.import_module("cuvs.neighbors.brute_force")
    rows = torch.from_numpy(stored).to(device)
    index = brute_force.build(rows, metric="inner_product")

    def find(probes: Float32, count: int) -> Rows:
        wanted = torch.from_numpy(probes).to(device).to(torch.float16)
        neighbours = brute_force.search(index, wanted, count)[1]
        return np.asarray(torch.as_tensor(neighbours, device=device).cpu().numpy(), np.int64)

    return find
