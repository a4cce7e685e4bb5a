"""What goes on beside the flows: erasing what is due, tending the index, refreshing the gauges."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

import structlog

from matcher_service.clock import LawfulTime
from matcher_service.errors import AuditUnavailable, DataDamaged, LogUnavailable
from matcher_service.metrics import Metrics
from matcher_service.seams import AuditProofs, Clock, ErasureReceipts, GalleryLog, KeyRotations, Shard
from matcher_service.terms import AuditEvent, ShardStatus

TEND_EVERY_S = 1.0
ERASE_EVERY_S_MAX = 60.0
RECEIPTS_EVERY_S = 2.0
KEYS_EVERY_S = 1.0

_log = structlog.get_logger(__name__)


class ErasedRows(Protocol):
    """Rows of a gallery that left memory and every file of the index."""

    @property
    def gallery_id(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def sequence_min(self) -> int: ...
    @property
    def sequence_max(self) -> int: ...


class Round(Protocol):
    """What one round of tending did, and whether there is more to do at once."""

    @property
    def more(self) -> bool: ...
    @property
    def erased(self) -> Sequence[ErasedRows]: ...


class Erasing(Protocol):
    """Indexes that can say what has left them."""

    async def told_erased(self) -> Mapping[str, int]:
        """Of each index there is, by name, the sequence through which nothing that had ended is left in its memory and
        files; -1 where that is not known now."""
        ...


class Keyed(Protocol):
    """Indexes that can say which keys their files are sealed under."""

    async def told_keys(self) -> Mapping[str, Mapping[str, int] | None]:
        """As `KeyRotations.retire` takes it."""
        ...


class Tended(Protocol):
    """A shard of this process with work of its own to do in the background."""

    async def maintain(self) -> Round:
        """One bounded round of sealing, merging, compaction."""
        ...

    async def status(self) -> ShardStatus: ...


async def erase_when_due(
    log: GalleryLog, time: LawfulTime, clock: Clock, metrics: Metrics, erase_within_s: float
) -> None:
    """Erase withdrawn and expired templates well within the stated time, until cancelled."""
    every_s = min(ERASE_EVERY_S_MAX, erase_within_s / 4)
    while True:
        began = clock.monotonic()
        try:
            metrics.erasure_waiting.set(await log.waiting_for_erasure())
            while erased := await log.erase(time.now_ms()):
                metrics.erased.inc(erased)
            metrics.erasure_waiting.set(await log.waiting_for_erasure())
            metrics.erasure_complete.set(time.now_ms() / 1000)
        except (LogUnavailable, AuditUnavailable) as error:
            _log.error("erasure_delayed", detail=str(error))
        await asyncio.sleep(max(0.0, every_s - (clock.monotonic() - began)))


async def checkpoint_when_due(proofs: AuditProofs, clock: Clock, metrics: Metrics, every_s: float) -> None:
    """Have the audit signed every so often, until cancelled."""
    while True:
        try:
            await proofs.checkpoint()
            metrics.audit_checkpoint.set(clock.wall_ms() / 1000)
        except LogUnavailable as error:
            _log.error("checkpoint_delayed", detail=str(error))
        except DataDamaged as error:
            _log.critical("audit_damaged", detail=str(error))
        await asyncio.sleep(every_s)


async def complete_receipts(receipts: ErasureReceipts, shard: Erasing, metrics: Metrics) -> None:
    """Have erasures reported by every index, and their receipts completed, until cancelled."""
    while True:
        try:
            reports = await receipts.report(await shard.told_erased())
            metrics.erasure_unreported.set((reports.oldest_open_ms or 0) / 1000)
        except LogUnavailable as error:
            _log.error("receipts_delayed", detail=str(error))
        await asyncio.sleep(RECEIPTS_EVERY_S)


async def rotate_keys(rotations: KeyRotations, shard: Keyed, time: LawfulTime, clock: Clock) -> None:
    """Seal anew what lies under older generations of keys, and destroy those when they are free, until cancelled."""
    while True:
        more = False
        try:
            began = clock.monotonic()
            more = await rotations.reseal_some()
            took = clock.monotonic() - began
            if not more:
                await rotations.retire(await shard.told_keys(), time.now_ms())
        except (LogUnavailable, DataDamaged) as error:
            _log.error("key_rotation_delayed", detail=str(error))
        # Half of the time is everybody else's.
        await asyncio.sleep(took if more else KEYS_EVERY_S)


async def tend(shard: Tended, log: GalleryLog, metrics: Metrics) -> None:
    """Tend the shard, put on record what it erased, and publish its size, until cancelled."""
    shown: set[str] = set()
    unrecorded: list[AuditEvent] = []
    while True:
        done = await shard.maintain()
        unrecorded += [_erasure(one) for one in done.erased]
        if unrecorded:
            try:
                await log.record(unrecorded, [])
                unrecorded = []
            except AuditUnavailable as error:
                _log.error("erasure_record_delayed", detail=str(error))
        shown = publish(await shard.status(), metrics, shown)
        await asyncio.sleep(0 if done.more else TEND_EVERY_S)


async def show(shard: Shard, metrics: Metrics) -> None:
    """Publish the size of shards that others tend, until cancelled."""
    shown: set[str] = set()
    while True:
        shown = publish(await shard.status(), metrics, shown)
        await asyncio.sleep(TEND_EVERY_S)


def _erasure(erased: ErasedRows) -> AuditEvent:
    return AuditEvent(
        actor="service",
        action="erased_from_index",
        subject=erased.gallery_id,
        detail={"rows": erased.rows, "sequence_min": erased.sequence_min, "sequence_max": erased.sequence_max},
    )


def publish(status: ShardStatus, metrics: Metrics, shown: set[str]) -> set[str]:
    """Set the gauges per gallery, and remove those of galleries that are gone; returns what is shown now."""
    for gallery_id, live in status.live.items():
        metrics.references_live.labels(gallery_id).set(live)
        metrics.references_dead.labels(gallery_id).set(status.dead.get(gallery_id, 0))
    for gone in shown - set(status.live):
        metrics.references_live.remove(gone)
        metrics.references_dead.remove(gone)
    for device, wrong in status.devices.items():
        metrics.gpu_working.labels(device).set(not wrong)
    for device, (used, most) in status.device_bytes.items():
        metrics.gpu_bytes.labels(device).set(used)
        metrics.gpu_budget_bytes.labels(device).set(most)
    metrics.index_bytes.set(status.bytes_in_memory)
    metrics.segments.set(status.segments)
    return set(status.live)
