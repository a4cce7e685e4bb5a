"""The write flow: policy > admission > template_adapter > gallery log (commit) > replay > shards.

An enrolment is answered when it is durable; a withdrawal, and a change of the catalogue, when this process's
searches obey it as well (law 5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import ParamSpec, TypeVar

import numpy as np

from matcher_service import change_policy, evidence, grounds, policy, reference_rows, resemblance
from matcher_service.access.rates import Rates
from matcher_service.admission import Admission
from matcher_service.catalogue import Catalogue
from matcher_service.clock import LawfulTime
from matcher_service.errors import (
    Forbidden,
    MatcherError,
    NotFound,
    Overloaded,
    ReplayBehind,
    TooLarge,
)
from matcher_service.metrics import Metrics
from matcher_service.receipts import EnrolReceipts
from matcher_service.replay import Following
from matcher_service.seams import Clock, GalleryLog, Models, Shard
from matcher_service.settings import LimitSettings
from matcher_service.stations import Station
from matcher_service.terms import (
    Actor,
    CloseProposal,
    DeleteGallery,
    EnrolMessage,
    ProposalAction,
    Receipt,
    Withdraw,
    WithdrawSubject,
    Write,
    WriteOutcome,
)

P = ParamSpec("P")
T = TypeVar("T")


_VALUES_IN_LOOP_MAX = 1 << 18

# While somebody searches, references come in no faster than the index makes codes of them: a search goes through what
# has none in full, and what it takes for that is missing where codes are made. Single enrolments do not wait.
UNCODED_ROWS_MAX = 65_536
PACED_REFERENCES_MIN = 100
# Well below what clients allow for an answer.
PACED_S_MAX = 5.0
_PACE_S = 0.02

# A withdrawal is acknowledged only when it is obeyed; the caller would rather wait than be told less.
OBEYED_WITHIN_S = 30.0

BULK_WITHIN_S = 3600.0


class Writing:
    def __init__(
        self,
        catalogue: Catalogue,
        admission: Admission,
        models: Models,
        log: GalleryLog,
        replay: Following,
        time: LawfulTime,
        clock: Clock,
        limits: LimitSettings,
        metrics: Metrics,
        shard: Shard,
    ) -> None:
        self._catalogue = catalogue
        self._shard = shard
        self._admission = admission
        self._models = models
        self._log = log
        self._replay = replay
        self._time = time
        self._clock = clock
        self._limits = limits
        self._metrics = metrics
        self._at_log = Station("gallery_log", metrics, clock)
        self._preparing = asyncio.Semaphore(1)
        self._withdrawn_by = Rates(clock, BULK_WITHIN_S, "the withdrawals of one person in an hour")

    async def enrol(self, message: EnrolMessage) -> EnrolReceipts:
        """One receipt or refusal per reference, in order, after what was accepted is durable.

        Raises MatcherError if the message as a whole is refused.
        """
        gallery = policy.gallery_of(message.actor, message.gallery_id, self._catalogue)
        policy.require_comparable(message.space, gallery.space, self._catalogue)
        if len(message.reference_ids) >= PACED_REFERENCES_MIN:
            await self._paced(message.deadline)
        with self._admission.admit(message.actor, len(message.reference_ids), message.deadline):
            stuck = self._replay.refusal
            if stuck is not None:
                raise stuck
            size, id_bytes_max = message.templates.size, self._limits.id_bytes_max
            now_ms = self._time.now_ms()
            # One large message at a time: with a thread for each, those of the searches would hardly ever run.
            async with self._preparing if size > _VALUES_IN_LOOP_MAX else nullcontext():
                rows, refusals = await _computed(size, reference_rows.judged, message, id_bytes_max)
                standing = await _computed(size, grounds.judged, message, gallery, now_ms)
                rows = reference_rows.without(rows, standing.refusals)
                refusals = standing.refusals | refusals
                adapted = np.zeros((0, gallery.space.dimension), np.float32)
                if len(rows):
                    templates = reference_rows.templates_of(message, rows)
                    adapted = await self._models.adapt(message.space, gallery.space, templates)
                stored, directed = await _computed(size, reference_rows.as_stored, adapted)
            receipts = EnrolReceipts.of([])
            if len(rows):
                if not directed.all():
                    refusals |= {row: policy.zero_template(row) for row in rows[~directed].tolist()}
                    rows, stored, adapted = rows[directed], stored[directed], adapted[directed]
                if gallery.resembles_max:
                    subjects = [message.subject_ids[row] for row in rows.tolist()]
                    alike = await resemblance.refusals(self._shard, gallery, subjects, adapted, now_ms)
                    refusals |= {int(rows[at]): refusal for at, refusal in alike.items()}
                    rows, stored = np.delete(rows, list(alike)), np.delete(stored, list(alike), axis=0)
                with self._at_log():
                    receipts = await self._log.enrol(
                        reference_rows.wish(message, rows, stored, standing), message.actor
                    )
        self._metrics.enrolled.inc(receipts.written)
        return reference_rows.in_message(receipts, rows, refusals, len(message.reference_ids))

    async def _paced(self, deadline: float) -> None:
        """Until the index has room for more rows without codes, but not long: this refuses nothing."""
        now = self._clock.monotonic()
        until = now + min(PACED_S_MAX, (deadline - now) / 2)
        while self._shard.uncoded_rows > UNCODED_ROWS_MAX:
            if self._clock.monotonic() >= until:
                return
            await asyncio.sleep(_PACE_S)

    async def withdraw(self, gallery_id: str, reference_ids: Sequence[str], reason: str, actor: Actor) -> Receipt:
        """End the searchability of these references now. Raises NotFound if none of them is live; those that
        are not are otherwise passed over. Many at once take two persons (`approve`)."""
        policy.gallery_of(actor, gallery_id, self._catalogue)
        if actor.person:
            self._require_few(actor, len(reference_ids))
        return await self._withdraw(gallery_id, reference_ids, reason, actor)

    async def _withdraw(self, gallery_id: str, reference_ids: Sequence[str], reason: str, actor: Actor) -> Receipt:
        answers = await self._append([Withdraw(gallery_id, one, reason) for one in reference_ids], actor)
        receipts = [answer for answer in answers if isinstance(answer, Receipt)]
        if not receipts:
            raise next(answer for answer in answers if isinstance(answer, MatcherError))
        ended = tuple(pair for receipt in receipts for pair in receipt.reference_ids)
        return await self._obeyed(Receipt(WriteOutcome.DONE, receipts[-1].sequence, ended))

    async def withdraw_subject(self, gallery_id: str, subject_id: str, reason: str, actor: Actor) -> Receipt:
        """The same for every live reference of a subject, in one gallery or (gallery_id "") in all that the actor
        has rights over."""
        if gallery_id:
            policy.gallery_of(actor, gallery_id, self._catalogue)
        places = [gallery_id]
        if not gallery_id and actor.galleries is not None:
            places = sorted(actor.galleries & self._catalogue.galleries.keys())
        answers = await self._append([WithdrawSubject(one, subject_id, reason) for one in places], actor)
        receipts = [_receipt(one) for one in answers]
        receipt = Receipt(
            WriteOutcome.DONE,
            max((one.sequence for one in receipts), default=0),
            tuple(pair for one in receipts for pair in one.reference_ids),
        )
        if not receipt.reference_ids:
            raise NotFound(
                f"no live reference of subject {subject_id!r}",
                field="subject_id",
                hint="it may have been withdrawn already",
            )
        return await self._obeyed(receipt)

    async def change(self, write: Write, actor: Actor) -> Receipt:
        """A change of the catalogue: judged, committed, and obeyed when this returns. With a threshold goes into the
        log what is known of it."""
        write = evidence.settled(write, self._catalogue)
        change_policy.judge_change(
            write, actor, self._catalogue, self._limits.id_bytes_max, self._limits.dimension_max, self._time.now_ms()
        )
        return await self._obeyed(_receipt((await self._append([write], actor))[0]), catalogue=True)

    async def approve(self, proposal_id: str, reason: str, actor: Actor) -> Receipt:
        """Do what one authenticated person proposed, on the word of another; the receipt of the change.

        The change comes first and closes the proposal after it. A crash between the two leaves the proposal open,
        and approving it again says that there is nothing left to change.
        """
        proposal = change_policy.approvable(proposal_id, actor, self._catalogue, self._time.now_ms())
        match proposal.action:
            case ProposalAction.THRESHOLD:
                change = change_policy.proposed_threshold(proposal, actor.person)
                change_policy.judge_threshold_change(change, self._catalogue, self._limits.id_bytes_max)
                settled = evidence.settled(change, self._catalogue)
                receipt = _receipt((await self._append([settled], actor))[0])
            case ProposalAction.GALLERY_DELETION:
                deletion = DeleteGallery(proposal.gallery_id, proposal.reason, proposal.proposed_by, actor.person)
                receipt = _receipt((await self._append([deletion], actor))[0])
            case ProposalAction.WITHDRAWAL:
                receipt = await self._withdraw(proposal.gallery_id, proposal.reference_ids, proposal.reason, actor)
        closed = await self._append([CloseProposal(proposal_id, "approved", actor.person, reason)], actor)
        await self._obeyed(_receipt(closed[0]), catalogue=True)
        return receipt

    def _require_few(self, actor: Actor, references: int) -> None:
        limit = policy.BULK_WITHDRAWAL_REFERENCES
        try:
            self._withdrawn_by.take(actor.name, references, limit / BULK_WITHIN_S)
        except (Overloaded, TooLarge) as many:
            raise Forbidden(
                f"more than {limit} references of one person in an hour are a bulk withdrawal, which takes two persons",
                field="reference_ids",
                hint="propose it at /v1/proposals; an authorising officer other than you approves it",
            ) from many

    async def _append(self, writes: Sequence[Write], actor: Actor) -> list[Receipt | MatcherError]:
        if not writes:
            return []
        with self._at_log():
            return await self._log.append(writes, actor)

    async def _obeyed(self, receipt: Receipt, *, catalogue: bool = False) -> Receipt:
        """The receipt, once every search that starts from now on sees it."""
        until = self._clock.monotonic() + OBEYED_WITHIN_S
        try:
            await self._replay.obeyed(receipt.sequence, until, catalogue=catalogue)
        except ReplayBehind as behind:
            raise ReplayBehind(
                f"durable at sequence {receipt.sequence}, but this process's searches do not obey it yet",
                hint="repeat the request, or stop searching here: look at matcher_replay_lag_seconds",
                retry_after_ms=1000,
            ) from behind
        self._metrics.withdrawn.inc(len(receipt.reference_ids))
        return receipt


def _receipt(answer: Receipt | MatcherError) -> Receipt:
    if isinstance(answer, MatcherError):
        raise answer
    return answer


async def _computed(size: int, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """Arithmetic over `size` values; in a thread if the event loop would stand still for more than a millisecond."""
    if size <= _VALUES_IN_LOOP_MAX:
        return work(*args, **named)
    return await asyncio.to_thread(work, *args, **named)
