"""How a credential behaves over many messages: its rate, replays, climbing, and cases in their order.

One station of the read flow, between policy and admission. Everything it keeps is bounded, and about credentials,
streams, cases and disclosed candidates; nothing of a probe that found nobody (law 6). What limits searches under cases
is in the log, since nobody shall come round it by another gateway or a restart. The rest is in memory: it is judged for
every message of a live stream, and docs/ACCESS.md says what several gateways make of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from matcher_service.access.climbing import COOL_DOWN_S, Climbing
from matcher_service.access.rates import Rates
from matcher_service.access.sequences import Sequences
from matcher_service.errors import Forbidden, Overloaded, TooLarge
from matcher_service.metrics import Metrics
from matcher_service.seams import CaseUse, Clock
from matcher_service.settings import AccessSettings
from matcher_service.terms import Actor, AuditEvent, Cause, Decision, GalleryKind, ProbeMessage

PROBES_BURST_S = 4.0


class Conduct:
    def __init__(self, settings: AccessSettings, clock: Clock, metrics: Metrics, case_use: CaseUse) -> None:
        self._settings = settings
        self._metrics = metrics
        self._case_use = case_use
        self._probes = Rates(clock, PROBES_BURST_S, "this credential's rate")
        self._sequences = Sequences(clock)
        self._climbing = Climbing(clock)

    def admit(self, message: ProbeMessage) -> None:
        """Judge a message that policy allows.

        Raises Overloaded (OVERLOADED, or COOLING_DOWN after a climb), TooLarge, Conflict (REPLAYED) or InvalidInput.
        """
        actor, count = message.actor, len(message.probe_ids)
        self._require_calm(actor)
        if actor.probes_per_s:
            self._probes.take(actor.name, count, actor.probes_per_s)
        # Last: what is refused above may come again under the same number.
        if message.stream_nonce or message.stream_sequence or actor.credential_id:
            self._sequences.accept(actor, message.stream_nonce, message.stream_sequence)

    async def admit_case(self, message: ProbeMessage, kinds: Collection[GalleryKind], custody_first: bool) -> None:
        """The same of a message under a case, which searches galleries of these kinds; `custody_first` if the case has
        a custody gallery.

        Raises Forbidden for an immigration gallery before custody, TooLarge or Overloaded for more than a case, or a
        person, may search for in an hour, LogUnavailable if that cannot be known.
        """
        actor, count = message.actor, len(message.probe_ids)
        self._require_calm(actor)
        if custody_first and GalleryKind.IMMIGRATION in kinds:
            await self._require_custody_first(message.case_reference, kinds)
        if not actor.person:
            return
        per_h = self._settings.case_probes_per_h_max
        if count > per_h:
            raise TooLarge(
                f"{count} at once, where a case allows {per_h} in an hour", hint=f"send at most {per_h} in a message"
            )
        wait_ms = await self._case_use.take((f"case:{message.case_reference}", f"person:{actor.name}"), count, per_h)
        if wait_ms:
            raise Overloaded(
                "more than the limit of retrospective searches in an hour allows",
                hint="a case is not for searching everyone: send again after retry_after_ms",
                retry_after_ms=wait_ms,
            )

    async def completed(self, message: ProbeMessage, kinds: Collection[GalleryKind]) -> None:
        """Note a case search that was answered in full."""
        if not message.case_reference:
            return
        for kind in kinds:
            self._metrics.case_probes.labels(kind.value).inc(len(message.probe_ids))
        if GalleryKind.CUSTODY in kinds:
            await self._case_use.note_custody(message.case_reference)

    def disclosed(self, actor: Actor, decisions: Sequence[Decision]) -> AuditEvent | None:
        """Note what is about to be disclosed; the event to record if it is one step too many of a climb."""
        climbs = False
        for one in decisions:
            if one.candidates:
                climbs |= self._climbing.note(actor.name, one.candidates)
        if not climbs:
            return None
        self._metrics.climbs.inc()
        return AuditEvent(
            actor=actor.name,
            action="credential.cooling_down",
            subject=actor.name,
            detail={"why": "its candidates climb on one subject", "for_s": COOL_DOWN_S},
        )

    def _require_calm(self, actor: Actor) -> None:
        if cooling_s := self._climbing.cooling_s(actor.name):
            raise _cooling_down(cooling_s)

    async def _require_custody_first(self, case_reference: str, kinds: Collection[GalleryKind]) -> None:
        if GalleryKind.CUSTODY in kinds or not await self._case_use.searched_custody(case_reference):
            raise Forbidden(
                "an immigration gallery is searched after custody, and by itself",
                field="gallery_ids",
                hint="search the case's custody galleries first, then name the immigration gallery alone",
            )


def _cooling_down(seconds: float) -> Overloaded:
    return Overloaded(
        "this credential's probes climb on one subject; it is answered nothing for a while",
        cause=Cause.COOLING_DOWN,
        hint="the pause is in the audit; ask the authorising officer",
        retry_after_ms=int(seconds * 1000) + 1,
    )
