"""A GPU as this package uses it: one lock and one stream, so that searches and changes follow one another; and
what its failures mean.

Out of memory is a refusal: nothing has changed and the device goes on. Any other failure of the device's runtime
means that what it holds can no longer be trusted or reached: it counts as lost until it is opened anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from matcher_service.errors import MemoryRefused, ShardUnavailable, StartRefused
from matcher_service.index.gpu import kernel

# Of what is free when the device is opened; the rest is for survivors, uploads and other processes' peaks.
_SHARE = 0.9
# The interpreter changes the Triton language itself while it runs a kernel: one at a time.
_interpreting = threading.Lock()


class Device:
    """One GPU by its name, `cuda:0`, or `cpu` for the kernel's interpreter. Raises StartRefused if there is no such
    device, or if it cannot run the kernel."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.torch = _found(name)
        self.lost = ""
        self._lock = threading.RLock()
        self._stream = torch.cuda.Stream(self.torch) if self.torch.type == "cuda" else None

    @contextmanager
    def work(self) -> Iterator[None]:
        """To be held by whoever uses the device. Raises ShardUnavailable if it is or gets lost, MemoryRefused if
        it is out of memory."""
        with self._lock, self._on_stream():
            if self.lost:
                raise ShardUnavailable(f"{self.name} is lost: {self.lost}", hint="it is opened anew in the background")
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise MemoryRefused(
                    f"{self.name} is out of memory",
                    field="index.gpu_bytes_max",
                    hint="lower it, so that more is left for searches, or add a device",
                ) from error
            except RuntimeError as error:
                self.lost = str(error).partition("\n")[0] or type(error).__name__
                raise ShardUnavailable(
                    f"{self.name} failed: {self.lost}", hint="see nvidia-smi; the CPU answers meanwhile"
                ) from error

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def allocate(self, size: int) -> torch.Tensor:
        """So many bytes of int8, not initialised."""
        return torch.empty(size, dtype=torch.int8, device=self.torch)

    def tile_for(self, probes: int) -> kernel.Tile:
        """The kernel's shape for so many probes."""
        if self.torch.type == "cpu":
            return kernel.tile_for(probes, 1 << 20)
        held = torch.cuda.get_device_properties(self.torch).shared_memory_per_block_optin
        return kernel.tile_for(probes, int(held))

    def free_bytes(self) -> int:
        """How much of the device's memory may be taken for codes."""
        if self.torch.type == "cpu":
            return int(_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
        return int(_SHARE * torch.cuda.mem_get_info(self.torch)[0])

    def reopen(self) -> None:
        """Try whether the device works again. Raises ShardUnavailable if not."""
        self.lost = ""
        with self.work():
            self.allocate(1 << 20).fill_(1).sum().item()

    def launch(
        self,
        tile: kernel.Tile,
        codes: torch.Tensor,
        slabs: kernel.Slabs,
        probes: kernel.Probes,
        found: kernel.Found,
        rows_per_slab: int,
        tiles: torch.Tensor | None = None,
    ) -> None:
        """See `kernel.launch`."""
        with torch.cuda.device(self.torch) if self.torch.type == "cuda" else _interpreting:
            kernel.launch(tile, codes, slabs, probes, found, rows_per_slab, tiles)


def device_names() -> tuple[str, ...]:
    """The GPUs of this machine."""
    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


def _found(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartRefused(f"{name} is no device", field="index.gpu_devices", hint="cuda:0, for example") from error
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise StartRefused(
                "the GPU scanner needs a GPU", field="index.scanner", hint='set index.scanner = "cpu" on this machine'
            )
    elif device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise StartRefused(
            f"this machine has no {name}",
            field="index.gpu_devices",
            hint=f"it has {', '.join(device_names()) or 'no GPU; see nvidia-smi'}",
        )
    elif torch.cuda.get_device_capability(device) < (8, 0):
        raise StartRefused(
            f"{name} is older than the kernel needs (compute capability 8.0)",
            field="index.scanner",
            hint='set index.scanner = "gpu-faiss" or "cpu"',
        )
    return device
