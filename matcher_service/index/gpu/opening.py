"""The GPU scanners that the settings ask for."""

from __future__ import annotations

from matcher_service.errors import StartRefused
from matcher_service.index.gpu.devices import Device, device_names
from matcher_service.index.gpu.scanners import GpuScanners
from matcher_service.index.gpu.slabs import SlabPool
from matcher_service.index.scanners import Scanners
from matcher_service.settings import IndexSettings


def open_gpu_scanners(settings: IndexSettings, cpu: Scanners) -> Scanners:
    """Scanners on the devices of the settings, all of the machine if they name none; `cpu` makes those of rows
    without a place. Raises StartRefused."""
    if settings.scanner == "gpu-faiss":
        from matcher_service.index.gpu.flat_faiss import open_faiss_scanners

        return open_faiss_scanners(cpu)
    names = settings.gpu_devices or device_names()
    if not names:
        raise StartRefused(
            "this machine has no GPU", field="index.scanner", hint="see nvidia-smi, or set index.scanner to cpu"
        )
    return GpuScanners([Device(name) for name in names], lambda device: SlabPool(device, settings.gpu_bytes_max), cpu)
