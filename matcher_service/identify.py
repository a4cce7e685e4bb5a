"""The read flow: policy > admission > batching > template_adapter > shards > score_calibrator > decision >
audit > reply. Stations in order; each does its own work elsewhere.

Law 6: nothing of a probe without a candidate outlives its reply. This module logs nothing per probe, and the
metrics it touches are counters by outcome and unlabelled histograms.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import structlog

from matcher_service import decision, logs, policy
from matcher_service.access.conduct import Conduct
from matcher_service.admission import Admission, Permit
from matcher_service.alerts import AlertFeed
from matcher_service.batching import Batch, Batcher, Found, Lane
from matcher_service.catalogue import Catalogue
from matcher_service.clock import LawfulTime
from matcher_service.decisions import NOBODY, Decisions
from matcher_service.errors import AuditUnavailable, MatcherError
from matcher_service.live_scores import LiveScores
from matcher_service.metrics import Metrics
from matcher_service.replay import Following
from matcher_service.seams import Clock, GalleryLog, Models, Shard
from matcher_service.stations import Station
from matcher_service.tallies import Tallies
from matcher_service.terms import (
    Alert,
    AuditEvent,
    Cause,
    IdentifyReply,
    Outcome,
    ProbeMessage,
    SearchRequest,
)
from matcher_service.traces import Traces

RECORDED_ALERTS_MAX = 4096

_log = structlog.get_logger(__name__)


class Searching:
    """What the batcher runs for each batch: adapt, search, calibrate."""

    def __init__(
        self, models: Models, shard: Shard, time: LawfulTime, clock: Clock, metrics: Metrics, traces: Traces
    ) -> None:
        self._models = models
        self._shard = shard
        self._time = time
        self._at_adapter = Station("template_adapter", metrics, clock, traces)
        self._at_shards = Station("shards", metrics, clock, traces)
        self._at_calibrator = Station("score_calibrator", metrics, clock, traces)
        self._certified = metrics.certificates.labels("certified")
        self._scanned = metrics.certificates.labels("scanned")

    async def __call__(self, batch: Batch) -> Found:
        with self._at_adapter():
            probes = await self._models.adapt(batch.lane.source, batch.lane.target, batch.templates)
        usable = np.asarray(probes.any(axis=1))
        floors = batch.floors if usable.all() else np.where(usable[:, None], batch.floors, np.float32(np.inf))
        request = SearchRequest(
            batch.lane.gallery_ids, probes, floors, batch.rank_max, self._time.now_ms(), batch.min_sequence
        )
        with self._at_shards():
            result = await self._shard.search(request)
        self._certified.inc(result.certified)
        self._scanned.inc(result.scanned)
        with self._at_calibrator():
            rates = await self._models.false_match_rates(batch.lane.target, result.scores)
        return Found(result, rates, usable)


class _Judgement(NamedTuple):
    """What may be searched for, of which probes, and the lawful time by which that was judged."""

    plan: policy.SearchPlan
    judged: policy.JudgedRows
    now_ms: int


@dataclass(eq=False, slots=True)
class AdmittedMessage:
    """A message that was judged when the log was applied up to `judged_at`. `held`: its permit, and its trace."""

    _identify: Identify
    message: ProbeMessage
    judgement: _Judgement
    judged_at: int
    permit: Permit
    held: ExitStack

    def answer(self) -> Awaitable[IdentifyReply]:
        return self._identify.answer(self)

    def release(self) -> None:
        """Give back what it holds, if it was not answered."""
        self.held.close()


class Identify:
    def __init__(
        self,
        catalogue: Catalogue,
        admission: Admission,
        batcher: Batcher,
        replay: Following,
        log: GalleryLog,
        feed: AlertFeed,
        live_scores: LiveScores,
        time: LawfulTime,
        clock: Clock,
        metrics: Metrics,
        conduct: Conduct,
        tallies: Tallies,
        traces: Traces,
    ) -> None:
        self._catalogue = catalogue
        self._conduct = conduct
        self._tallies = tallies
        self._admission = admission
        self._batcher = batcher
        self._replay = replay
        self._log = log
        self._feed = feed
        self._live_scores = live_scores
        self._time = time
        self._clock = clock
        self._metrics = metrics
        self._traces = traces
        self._outcomes = {outcome: metrics.decisions.labels(outcome.value) for outcome in Outcome}
        self._at_policy, self._at_admission, self._at_batching, self._at_audit = (
            Station(name, metrics, clock, traces) for name in ("policy", "admission", "batching_and_search", "audit")
        )
        self._recorded: OrderedDict[str, None] = OrderedDict()

    def admit(self, message: ProbeMessage) -> AdmittedMessage:
        """Judge the message as a whole, without a wait, so that a refusal is immediate: policy, conduct, a permit.

        Raises MatcherError if it is refused. What is admitted is to be answered, or released, in the same context.
        """
        with ExitStack() as held:
            held.enter_context(
                self._traces.message("identify", message.traceparent, message.received_at, len(message.probe_ids))
            )
            logs.deployment(message.deployment_id)
            judged_at = self._replay.applied
            judgement = self._judged(message)
            if not message.case_reference:
                self._conduct.admit(message)
            permit = held.enter_context(self._permit(message))
            return AdmittedMessage(self, message, judgement, judged_at, permit, held.pop_all())

    async def answer(self, admitted: AdmittedMessage) -> IdentifyReply:
        """Answer every probe once; raises MatcherError if the message as a whole is refused after all."""
        with admitted.held:
            return await self._answered(admitted)

    async def _answered(self, admitted: AdmittedMessage) -> IdentifyReply:
        message = admitted.message
        plan, judged, now_ms = admitted.judgement
        with admitted.permit as permit:
            if self._replay.applied != admitted.judged_at:
                # What was changed while the message waited for its place holds for it.
                plan, judged, now_ms = self._judged(message)
            if message.case_reference:
                await self._conduct.admit_case(message, plan.kinds, plan.custody_first)
                self._conduct.admit(message)
            watched = self._live_scores.choose(message)
            await self._replay.reached(message.min_sequence, message.deadline)
            if await self._replay.renewed(message.deadline):
                plan, judged, now_ms = self._judged(message)
            missing = self._replay.missing()
            sequence = self._replay.applied
            templates, probe_ids, refusals = message.templates, message.probe_ids, judged.refusals
            rows: Sequence[int] = range(len(probe_ids))
            if refusals:
                rows = judged.usable.nonzero()[0].tolist()
                templates, probe_ids = templates[judged.usable], [probe_ids[row] for row in rows]
            decisions = Decisions(probe_ids, NOBODY, {})
            if judged.count:
                with self._at_batching():
                    found = await self._batcher.submit(
                        permit,
                        Lane(plan.source, plan.target, plan.gallery_ids),
                        templates,
                        policy.floors(plan, judged.count),
                        plan.rank_max,
                        message.deadline,
                        message.min_sequence,
                    )
                sequence = found.result.sequence
                missing = tuple(sorted({*missing, *found.result.missing}))
                decisions = decision.decide(probe_ids, found, plan.gallery_ids, bool(missing), self._new_alert_id)
                if not found.usable.all():
                    without = [rows[at] for at in (~found.usable).nonzero()[0].tolist()]
                    refusals = refusals | {row: policy.zero_template(row) for row in without}
            if refusals:
                decisions = decision.among_refused(message.probe_ids, refusals, decisions, rows)
            if message.stream_nonce:
                decisions = decision.with_repeatable_ids(message, decisions)
            thresholds = dict(zip(plan.gallery_ids, plan.thresholds, strict=True))
            alerts = decision.alert_records(
                message, decisions, thresholds, sequence, policy.POLICY_VERSION, not missing, now_ms
            )
            if alerts or message.case_reference:
                decisions = await self._audited(message, plan, decisions, alerts)
            if not missing:
                await self._conduct.completed(message, plan.kinds)
            if watched is not None and decisions[watched].outcome is Outcome.NO_CANDIDATE:
                lane = Lane(plan.source, plan.target, plan.gallery_ids)
                table = self._catalogue.spaces[plan.target].score_table
                await self._live_scores.look(
                    permit, lane, message.templates[watched : watched + 1], table, message.deadline
                )
        self._count(decisions)
        self._tallies.add(message, decisions)
        # Whoever was not alerted on is not to be found through an exemplar either (law 6).
        disclosed = bool(alerts) and any(one.candidates for one in decisions.others.values())
        exemplar = self._traces.exemplar() if disclosed else None
        self._metrics.identify_seconds.observe(self._clock.monotonic() - message.received_at, exemplar)
        return IdentifyReply(
            decisions=decisions,
            sequence=sequence,
            space=plan.target,
            policy_version=policy.POLICY_VERSION,
            thresholds=thresholds,
            missing=missing,
            message_id=message.message_id,
        )

    def _judged(self, message: ProbeMessage) -> _Judgement:
        now_ms = self._time.now_ms()
        with self._at_policy():
            plan = policy.plan(message, self._catalogue, now_ms)
            judged = policy.judge_probes(message, plan, now_ms)
        return _Judgement(plan, judged, now_ms)

    def _permit(self, message: ProbeMessage) -> Permit:
        try:
            with self._at_admission():
                return self._admission.admit(message.actor, len(message.probe_ids), message.deadline)
        except MatcherError:
            self._metrics.refusal_seconds.observe(self._clock.monotonic() - message.received_at)
            raise

    async def _audited(
        self, message: ProbeMessage, plan: policy.SearchPlan, decisions: Decisions, alerts: Sequence[Alert]
    ) -> Decisions:
        """Write what must be in the audit before anything is disclosed; withhold everything if it cannot be."""
        events = []
        disclosed = list(decisions.others.values())
        climb = self._conduct.disclosed(message.actor, disclosed)
        if climb is not None:
            events.append(climb)
        alerts = [one for one in alerts if one.alert_id not in self._recorded]
        if message.case_reference:
            events.append(
                AuditEvent(
                    actor=message.actor.name,
                    action="case_search",
                    subject=message.case_reference,
                    detail={
                        "galleries": list(plan.gallery_ids),
                        "probes": len(message.probe_ids),
                        "candidates": sum(len(one.candidates) for one in disclosed),
                    },
                )
            )
        try:
            with self._at_audit():
                await self._log.record(events, alerts)
        except AuditUnavailable as error:
            _log.error("audit_unavailable", detail=str(error))
            return decision.withheld(decisions, Cause.AUDIT_UNAVAILABLE)
        if message.stream_nonce:
            self._remember(alerts)
        self._feed.publish(alerts)
        return decisions

    def _remember(self, alerts: Sequence[Alert]) -> None:
        """So that a probe that is sent again after a broken connection is not told as a second alert."""
        self._recorded.update((one.alert_id, None) for one in alerts)
        while len(self._recorded) > RECORDED_ALERTS_MAX:
            self._recorded.popitem(last=False)

    def _new_alert_id(self) -> str:
        # Time first, so that ids sort as alerts were raised.
        return f"{self._time.now_ms():012x}-{secrets.token_hex(8)}"

    def _count(self, decisions: Decisions) -> None:
        for outcome, count in decisions.outcomes().items():
            self._outcomes[outcome].inc(count)
        for one in decisions.others.values():
            if one.outcome is Outcome.REJECTED:
                self._metrics.rejections.labels(one.cause).inc()
