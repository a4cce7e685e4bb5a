"""The live feed of alerts: from the flow that raised them to whoever watches.

A watcher that does not read is cut off rather than buffered without bound; the recorded alerts are still there
to be listed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import structlog

from matcher_service.errors import MatcherError, Overloaded, ShuttingDown
from matcher_service.seams import GalleryLog
from matcher_service.terms import Alert

WAITING_ALERTS_MAX = 1024

# How often the log is asked for what other gateways recorded, and how many alerts at a time.
RELAY_EVERY_S = 0.25
RELAYED_AT_ONCE_MAX = 200
# Gateways' clocks agree to within this; more, and an alert of another could be taken for one told long ago.
CLOCKS_DIFFER_MS_MAX = 600_000

_log = structlog.get_logger(__name__)


class AlertFeed:
    def __init__(self) -> None:
        self._watchers: dict[asyncio.Queue[Alert | None], frozenset[str]] = {}
        self._closed = False

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

    def close(self) -> None:
        """End every watch, and those that come later at once: the service is stopping."""
        self._closed = True
        for queue in list(self._watchers):
            queue.put_nowait(None)
        self._watchers.clear()

    async def subscribe(self, deployment_ids: Sequence[str] = ()) -> AsyncIterator[Alert]:
        """Alerts from now on, of these deployments (none: of all). Raises Overloaded when the watcher lags by
        more than WAITING_ALERTS_MAX."""
        queue: asyncio.Queue[Alert | None] = asyncio.Queue(WAITING_ALERTS_MAX + 1)
        if self._closed:
            queue.put_nowait(None)
        else:
            self._watchers[queue] = frozenset(deployment_ids)
        try:
            while True:
                alert = await queue.get()
                if alert is None:
                    if self._closed:
                        raise ShuttingDown("the service is stopping", hint="watch another node, or again later")
                    raise Overloaded(
                        "the watcher fell too far behind", hint="subscribe again, and list what was raised meanwhile"
                    )
                yield alert
        finally:
            self._watchers.pop(queue, None)


class RelayedAlerts(AlertFeed):
    """The feed of one gateway of several: what any of them recorded, as `relay` reads it from the log."""

    def publish(self, alerts: Sequence[Alert]) -> None:
        """Nothing: what was recorded here comes back with what the others recorded."""

    async def relay(self, log: GalleryLog) -> None:
        """Hand on what is recorded from now on, until cancelled. What the log holds while it cannot be read comes
        later."""
        told: dict[str, int] | None = None
        while True:
            try:
                fresh, told = await _recorded_since(log, told)
            except MatcherError as error:
                _log.warning("alerts_delayed", detail=str(error))
            else:
                super().publish(fresh)
            await asyncio.sleep(RELAY_EVERY_S)


async def _recorded_since(log: GalleryLog, told: dict[str, int] | None) -> tuple[list[Alert], dict[str, int]]:
    """What was recorded after all that was `told` (by id, when each was raised; None: nothing is fresh yet), oldest
    first; and what is to be known as told next time. The log lists the newest first, so what is fresh stands before the
    first that is not. Alerts live for different times, so those told may have left the list before older ones."""
    if told and (newest := await log.alerts("", "", 1)) and newest[0].alert_id in told:
        return [], told
    page = await log.alerts("", "", RELAYED_AT_ONCE_MAX)
    known = {one.alert_id: one.raised_at_ms for one in page}
    fresh: list[Alert] = []
    long_told_ms = min(told.values()) - CLOCKS_DIFFER_MS_MAX if told else 0
    while told is not None and page:
        for one in page:
            if one.alert_id in told or one.raised_at_ms < long_told_ms:
                return fresh[::-1], known
            fresh.append(one)
        page = await log.alerts("", page[-1].alert_id, RELAYED_AT_ONCE_MAX)
    return fresh[::-1], known
