"""The live feed of alerts: from the flow that raised them to whoever watches.

A watcher that does not read is cut off rather than buffered without bound; the recorded alerts are still there
to be listed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from matcher_service.errors import Overloaded
from matcher_service.terms import Alert

WAITING_ALERTS_MAX = 1024


class AlertFeed:
    def __init__(self) -> None:
        self._watchers: dict[asyncio.Queue[Alert | None], frozenset[str]] = {}

    def publish(self, alerts: Sequence[Alert]) -> None:
        """Hand recorded alerts to the watchers; never waits."""
        for queue, deployment_ids in list(self._watchers.items()):
            for alert in alerts:
                if deployment_ids and alert.deployment_id not in deployment_ids:
                    continue
                if queue.qsize() >= WAITING_ALERTS_MAX:
                    del self._watchers[queue]
                    queue.put_nowait(None)
                    break
                queue.put_nowait(alert)

    async def subscribe(self, deployment_ids: Sequence[str] = ()) -> AsyncIterator[Alert]:
        """Alerts from now on, of these deployments (none: of all). Raises Overloaded when the watcher lags by
        more than WAITING_ALERTS_MAX."""
        queue: asyncio.Queue[Alert | None] = asyncio.Queue(WAITING_ALERTS_MAX + 1)
        self._watchers[queue] = frozenset(deployment_ids)
        try:
            while True:
                alert = await queue.get()
                if alert is None:
                    raise Overloaded(
                        "the watcher fell too far behind", hint="subscribe again, and list what was raised meanwhile"
                    )
                yield alert
        finally:
            self._watchers.pop(queue, None)
