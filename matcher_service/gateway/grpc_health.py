"""The standard gRPC health service, answering from the service's own readiness.

Open to callers without a credential, because probes of an orchestrator have none; watchers are few by limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

HEALTH_SERVICE = "grpc.health.v1.Health"
WATCHERS_MAX = 16
WATCH_INTERVAL_S = 0.5

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    def __init__(self, ready: Callable[[], tuple[bool, str]], service_name: str) -> None:
        self._ready = ready
        self._names = frozenset(("", service_name))
        self._closed = asyncio.Event()
        self._watchers = 0

    def close(self) -> None:
        """From now on not serving; watchers are told and let go."""
        self._closed.set()

    def _status(self) -> int:
        serving = not self._closed.is_set() and self._ready()[0]
        return int(_Status.SERVING if serving else _Status.NOT_SERVING)

    async def Check(self, request: Any, context: Any) -> Any:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return _Status(status=self._status())

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if self._watchers >= WATCHERS_MAX:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watchers of the health; use Check")
        self._watchers += 1
        try:
            told = None
            while True:
                # Looked at before the status: whoever is let go has been told.
                closed = self._closed.is_set()
                status = self._status() if request.service in self._names else _Status.SERVICE_UNKNOWN
                if status != told:
                    told = status
                    yield _Status(status=status)
                if closed:
                    return
                try:
                    async with asyncio.timeout(WATCH_INTERVAL_S):
                        await self._closed.wait()
                except TimeoutError:
                    continue
        finally:
            self._watchers -= 1
