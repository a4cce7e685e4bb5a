"""A gateway of a cluster knows how old its catalogue is, and waits as law 5 says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import prometheus_client
import pytest

from matcher_service import catalogue_replay
from matcher_service.catalogue import Catalogue
from matcher_service.catalogue_replay import CatalogueReplay
from matcher_service.clock import LawfulTime
from matcher_service.errors import LogUnavailable, MemoryRefused, ReplayBehind
from matcher_service.gallery.log import SqlGalleryLog, open_sqlite_log
from matcher_service.metrics import Metrics
from matcher_service.models.local import LocalModels
from matcher_service.settings import StorageSettings
from matcher_service.terms import (
    Actor,
    CreateGallery,
    Enrol,
    Gallery,
    GalleryKind,
    RegisterSpace,
    SpaceId,
    TemplateSpace,
)
from tests.fake_clock import FakeClock

SPACE = SpaceId("s", 1, 4)
ACTOR = Actor("another gateway")


@dataclass
class Told:
    """What the shards say, as a test sets it."""

    refusal: MemoryRefused | None = None
    unready: str = ""
    applied: asyncio.Event = field(default_factory=asyncio.Event)

    async def applied_by_all(self, sequence: int) -> None:
        await self.applied.wait()

    async def reached(self, sequence: int, deadline: float) -> None:
        pass


class FlakyLog:
    """The log, which can be out of reach."""

    def __init__(self, log: SqlGalleryLog) -> None:
        self._log = log
        self.reachable = True

    def __getattr__(self, name: str) -> Any:
        if not self.reachable:
            raise LogUnavailable("the server is gone")
        return getattr(self._log, name)


class Gateway:
    def __init__(self, log: SqlGalleryLog) -> None:
        self.log = FlakyLog(log)
        self.clock, self.shards, self.catalogue = FakeClock(), Told(), Catalogue()
        metrics = Metrics(prometheus_client.CollectorRegistry())
        self.replay = CatalogueReplay(
            self.log,  # type: ignore[arg-type]
            self.shards,
            self.catalogue,
            LocalModels(),
            LawfulTime(self.clock),
            self.clock,
            metrics,
        )

    async def __aenter__(self) -> Gateway:
        await self.replay.catch_up()
        self.task = asyncio.create_task(self.replay.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def in_s(self, seconds: float) -> float:
        return self.clock.monotonic() + seconds


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[SqlGalleryLog]:
    log = await open_sqlite_log(tmp_path, tmp_path / "keys", StorageSettings(data_dir=tmp_path), FakeClock())
    await log.append([RegisterSpace(TemplateSpace(SPACE, np.zeros(4, np.float32)))], ACTOR)
    yield log
    await log.close()


def creation(gallery_id: str) -> CreateGallery:
    return CreateGallery(Gallery(gallery_id, GalleryKind.CUSTODY, "c", "b", "p", 10**9, SPACE, 0.5))


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_replay, "ASK_EVERY_S", 0.001)


async def test_what_another_gateway_wrote_is_followed(log: SqlGalleryLog) -> None:
    """Catalogue and sequence, references included, though of them nothing is read."""
    async with Gateway(log) as gateway:
        await log.append([creation("g")], ACTOR)
        await log.append([Enrol("g", "r", "s", np.ones(4, "<f2").tobytes())], ACTOR)
        await gateway.replay.reached(3, gateway.in_s(60))
        assert set(gateway.catalogue.galleries) == {"g"}
        assert gateway.replay.applied == 3


async def test_a_catalogue_older_than_its_lease_is_renewed_before_it_is_judged_by(log: SqlGalleryLog) -> None:
    """Law 5: as after the process stood still. What was judged before is to be judged again."""
    async with Gateway(log) as gateway:
        assert not await gateway.replay.renewed(gateway.in_s(60))
        await log.append([creation("g")], ACTOR)
        gateway.clock.advance(0.6)
        assert await gateway.replay.renewed(gateway.in_s(60))
        assert set(gateway.catalogue.galleries) == {"g"}


async def test_without_the_log_nothing_is_judged_by_an_old_catalogue(log: SqlGalleryLog) -> None:
    """It is refused as LogUnavailable at once, other processes are pointed to, and all is well when it is back."""
    async with Gateway(log) as gateway:
        gateway.log.reachable = False
        with pytest.raises(LogUnavailable):
            await gateway.replay.reached(99, gateway.in_s(60))
        assert "cannot be read" in gateway.replay.unready
        assert isinstance(gateway.replay.refusal, LogUnavailable)
        assert not await gateway.replay.renewed(gateway.in_s(60)), "within the lease it is still good"
        gateway.clock.advance(0.6)
        with pytest.raises(LogUnavailable):
            await gateway.replay.renewed(gateway.in_s(60))
        gateway.log.reachable = True
        await asyncio.wait_for(back(gateway), 60)
        assert gateway.replay.refusal is None
        assert gateway.replay.unready == ""


async def back(gateway: Gateway) -> None:
    while True:
        try:
            await gateway.replay.renewed(gateway.in_s(60))
            return
        except LogUnavailable:
            await asyncio.sleep(0)


async def test_a_sequence_that_does_not_come_is_refused_at_the_deadline(log: SqlGalleryLog) -> None:
    async with Gateway(log) as gateway:
        with pytest.raises(ReplayBehind):
            await gateway.replay.reached(99, gateway.in_s(0.02))


async def test_a_withdrawal_is_obeyed_when_every_replica_has_applied_it(log: SqlGalleryLog) -> None:
    """Law 5: and not before; the lease, which ends the wait else, is put out of reach here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(catalogue_replay, "FRESHNESS_LEASE_S", 600.0)
        async with Gateway(log) as gateway:
            waiting = asyncio.create_task(gateway.replay.obeyed(1, gateway.in_s(60), catalogue=False))
            done, _ = await asyncio.wait([waiting], timeout=0.02)
            assert not done
            gateway.shards.applied.set()
            await asyncio.wait_for(waiting, 60)


@pytest.mark.parametrize("catalogue", [True, False])
async def test_with_a_replica_that_is_silent_the_lease_is_waited_out(log: SqlGalleryLog, catalogue: bool) -> None:
    """Law 5: then what it answers counts as missing. A change of the catalogue always waits: gateways are not known."""
    async with Gateway(log) as gateway:
        if catalogue:
            gateway.shards.applied.set()
        began = asyncio.get_running_loop().time()
        await gateway.replay.obeyed(1, gateway.in_s(60), catalogue=catalogue)
        assert asyncio.get_running_loop().time() - began > catalogue_replay.FRESHNESS_LEASE_S


async def test_a_shard_that_is_full_stops_enrolment_but_not_the_gateway(log: SqlGalleryLog) -> None:
    async with Gateway(log) as gateway:
        gateway.shards.refusal = MemoryRefused("full")
        assert gateway.replay.refusal is gateway.shards.refusal
        assert gateway.replay.unready == ""
