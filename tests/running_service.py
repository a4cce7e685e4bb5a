"""A whole service in the test's own event loop, and a real client to it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matcher_service.bootstrap import Running, running
from matcher_service.client import MatcherClient, ProbeAnswer, Probes, ReferenceReceipt, References, Tls
from matcher_service.seams import Clock
from matcher_service.settings import Settings, load
from matcher_service.terms import (
    Actor,
    Case,
    CreateCase,
    CreateDeployment,
    CreateGallery,
    Deployment,
    Gallery,
    GalleryKind,
    RegisterSpace,
    SpaceId,
    TemplateSpace,
)

TESTER = Actor("tester")
DAY_MS = 86_400_000


def settings_for(data_dir: Path, **sections: dict[str, Any]) -> Settings:
    """Free ports, the given data directory, and whatever else a test sets."""
    server = {"http_port": 0, "grpc_port": 0, **sections.pop("server", {})}
    storage = {"data_dir": data_dir, **sections.pop("storage", {})}
    return load(server=server, storage=storage, **sections)


@dataclass
class WholeService:
    """A running service with a client, and the few things most tests do first."""

    running: Running
    client: MatcherClient

    async def space(self, dimension: int, centre: NDArray[np.float32] | None = None) -> SpaceId:
        space = SpaceId("test", 1, dimension)
        held = np.zeros(dimension, np.float32) if centre is None else centre
        await self.running.service.change(RegisterSpace(TemplateSpace(space, held)), TESTER)
        return space

    async def gallery(
        self, gallery_id: str, space: SpaceId, threshold: float = 0.5, retention_ms: int = 30 * DAY_MS
    ) -> None:
        gallery = Gallery(
            gallery_id, GalleryKind.CUSTODY, "a force", "PACE 1984 s.64A", "a test", retention_ms, space, threshold
        )
        await self.running.service.change(CreateGallery(gallery), TESTER)

    async def deployment(self, *gallery_ids: str, deployment_id: str = "op", rank_max: int = 100) -> str:
        now = time.time_ns() // 1_000_000
        deployment = Deployment(
            deployment_id, gallery_ids, now - 1000, now + DAY_MS, 60_000, "Insp. Reed", "a test", "here", rank_max
        )
        await self.running.service.change(CreateDeployment(deployment), TESTER)
        return deployment_id

    async def case(self, *gallery_ids: str, case_reference: str = "case-1") -> str:
        now = time.time_ns() // 1_000_000
        case = Case(case_reference, gallery_ids, now - 1000, now + DAY_MS, "DC Hall", "a test", 100)
        await self.running.service.change(CreateCase(case), TESTER)
        return case_reference

    async def enrol(
        self,
        gallery_id: str,
        space: SpaceId,
        templates: NDArray[Any],
        reference_ids: Sequence[str],
        subject_ids: Sequence[str] | None = None,
        **more: Any,
    ) -> list[ReferenceReceipt]:
        """In messages of 1,000; waits until searches see it."""

        async def messages() -> AsyncIterator[References]:
            for begin in range(0, len(reference_ids), 1000):
                rows = slice(begin, begin + 1000)
                yield References(
                    gallery_id=gallery_id,
                    space=space,
                    reference_ids=reference_ids[rows],
                    subject_ids=(subject_ids or reference_ids)[rows],
                    templates=templates[rows],
                    **more,
                )

        receipts = [receipt async for receipt in self.client.enrol_stream(messages())]
        return sorted(receipts, key=lambda receipt: receipt.sequence)

    async def ask(self, space: SpaceId, templates: NDArray[Any], size: int = 32, **more: Any) -> dict[str, ProbeAnswer]:
        """Stream the templates as probes p0, p1, ... of deployment `op`; the answers by probe_id."""
        # Longer than a machine under other load needs: what is asked here is not how fast it is.
        more = {"deployment_id": "op", "deadline_s": 60.0} | more
        if more.get("case_reference"):
            more.pop("deployment_id")

        async def messages() -> AsyncIterator[Probes]:
            for begin in range(0, len(templates), size):
                rows = templates[begin : begin + size]
                yield Probes(
                    space=space,
                    probe_ids=[f"p{begin + at}" for at in range(len(rows))],
                    templates=rows,
                    captured_at_ms=[time.time_ns() // 1_000_000] * len(rows),
                    **more,
                )

        return {one.decision.probe_id: one async for one in self.client.identify_stream(messages())}


@asynccontextmanager
async def whole_service(
    data_dir: Path, clock: Clock | None = None, client_tls: Tls | None = None, **sections: dict[str, Any]
) -> AsyncIterator[WholeService]:
    async with running(settings_for(data_dir, **sections), clock) as service:
        async with MatcherClient(f"127.0.0.1:{service.grpc_port}", service.token, tls=client_tls) as client:
            yield WholeService(service, client)
        assert not service.failed.is_set()
