"""How a credential behaves over many messages: its rate, replays, climbing, and cases in their order.

One station of the read flow, between policy and admission. Everything it keeps is bounded, in memory, and about
credentials, streams, cases and disclosed candidates; nothing of a probe that found nobody (law 6).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from matcher_service.access.climbing import COOL_DOWN_S, Climbing
from matcher_service.access.rates import Rates
from matcher_service.access.sequences import Sequences
from matcher_service.errors import Forbidden, Overloaded
from matcher_service.metrics import Metrics
from matcher_service.seams import Clock
from matcher_service.settings import AccessSettings
from matcher_service.terms import Actor, AuditEvent, Cause, Decision, GalleryKind, ProbeMessage

PROBES_BURST_S = 4.0
CASE_BURST_S = 3600.0
CASES_MAX = 4096


class Conduct:
    def __init__(self, settings: AccessSettings, clock: Clock, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._probes = Rates(clock, PROBES_BURST_S, "this credential's rate")
        self._case_probes = Rates(clock, CASE_BURST_S, "the limit of retrospective searches in an hour")
        self._sequences = Sequences(clock)
        self._climbing = Climbing(clock)
        self._custody_searched: OrderedDict[str, None] = OrderedDict()

    def admit(self, message: ProbeMessage, kinds: Collection[GalleryKind], custody_first: bool) -> None:
        """Judge a message that policy allows, which searches galleries of these kinds; `custody_first` if it is of a
        case that has a custody gallery.

        Raises Overloaded (OVERLOADED, or COOLING_DOWN after a climb), TooLarge, Conflict (REPLAYED), InvalidInput,
        or Forbidden for an immigration gallery before custody.
        """
        actor, count = message.actor, len(message.probe_ids)
        if cooling_s := self._climbing.cooling_s(actor.name):
            raise _cooling_down(cooling_s)
        if custody_first and GalleryKind.IMMIGRATION in kinds:
            self._require_custody_first(message.case_reference, kinds)
        if actor.probes_per_s:
            self._probes.take(actor.name, count, actor.probes_per_s)
        if message.case_reference and actor.person:
            per_s = self._settings.case_probes_per_h_max / CASE_BURST_S
            self._case_probes.take(f"case {message.case_reference}", count, per_s)
            self._case_probes.take(f"actor {actor.name}", count, per_s)
        # Last: what is refused above may come again under the same number.
        if message.stream_nonce or message.stream_sequence or actor.credential_id:
            self._sequences.accept(actor, message.stream_nonce, message.stream_sequence)

    def completed(self, message: ProbeMessage, kinds: Collection[GalleryKind]) -> None:
        """Note a case search that was answered in full."""
        if not message.case_reference:
            return
        for kind in kinds:
            self._metrics.case_probes.labels(kind.value).inc(len(message.probe_ids))
        if GalleryKind.CUSTODY in kinds:
            self._custody_searched[message.case_reference] = None
            self._custody_searched.move_to_end(message.case_reference)
            if len(self._custody_searched) > CASES_MAX:
                self._custody_searched.popitem(last=False)

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

    def _require_custody_first(self, case_reference: str, kinds: Collection[GalleryKind]) -> None:
        if GalleryKind.CUSTODY in kinds or case_reference not in self._custody_searched:
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
