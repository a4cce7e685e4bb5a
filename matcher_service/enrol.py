"""The write flow: policy > admission > template_adapter > gallery log (commit) > replay > shards.

An enrolment is answered when it is durable; a withdrawal, and a change of the catalogue, when this process's
searches obey it as well (law 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import structlog

from matcher_service import policy
from matcher_service.admission import Admission
from matcher_service.catalogue import Catalogue
from matcher_service.clock import LawfulTime
from matcher_service.errors import MatcherError, NotFound, ReplayBehind
from matcher_service.metrics import Metrics
from matcher_service.replay import Following
from matcher_service.seams import Clock, GalleryLog, Models
from matcher_service.settings import LimitSettings
from matcher_service.terms import (
    Actor,
    Enrol,
    EnrolMessage,
    Receipt,
    Withdraw,
    WithdrawSubject,
    Write,
    WriteOutcome,
)

_log = structlog.get_logger(__name__)

# A withdrawal is acknowledged only when it is obeyed; the caller would rather wait than be told less.
OBEYED_WITHIN_S = 30.0


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
    ) -> None:
        self._catalogue = catalogue
        self._admission = admission
        self._models = models
        self._log = log
        self._replay = replay
        self._time = time
        self._clock = clock
        self._limits = limits
        self._metrics = metrics
        self._log_seconds = metrics.station_seconds.labels("gallery_log")

    async def enrol(self, message: EnrolMessage) -> list[Receipt | MatcherError]:
        """One receipt or refusal per reference, in order, after what was accepted is durable.

        Raises MatcherError if the message as a whole is refused.
        """
        gallery = policy.gallery_named(message.gallery_id, self._catalogue)
        policy.require_comparable(message.space, gallery.space, self._catalogue)
        with self._admission.admit(message.actor, len(message.reference_ids), message.deadline):
            stuck = self._replay.refusal
            if stuck is not None:
                raise stuck
            refusals = policy.judge_templates(message.templates).refusals
            for field in ("reference_ids", "subject_ids"):
                refusals |= policy.require_ids(getattr(message, field), field, self._limits.id_bytes_max)
            rows = [row for row in range(len(message.reference_ids)) if row not in refusals]
            adapted = await self._models.adapt(message.space, gallery.space, message.templates[rows])
            stored = adapted.astype("<f2")
            directed = np.asarray(stored.any(axis=1))
            width = stored.shape[1] * stored.itemsize
            templates = stored.tobytes()
            writes: list[Write] = []
            written: list[int] = []
            for at, row in enumerate(rows):
                if not directed[at]:
                    refusals[row] = policy.zero_template(row)
                    continue
                reference_id = message.reference_ids[row]
                key = f"{message.idempotency_key}\n{reference_id}" if message.idempotency_key else ""
                writes.append(
                    Enrol(
                        gallery_id=message.gallery_id,
                        reference_id=reference_id,
                        subject_id=message.subject_ids[row],
                        template=templates[at * width : (at + 1) * width],
                        expires_at_ms=int(message.expires_at_ms[row]),
                        replace=message.replace,
                        idempotency_key=key,
                    )
                )
                written.append(row)
            answers: list[Receipt | MatcherError | None] = [
                refusals.get(row) for row in range(len(message.reference_ids))
            ]
            for row, answer in zip(written, await self._append(writes, message.actor), strict=True):
                answers[row] = _at_row(answer, row)
        done = [answer for answer in answers if answer is not None]
        self._metrics.enrolled.inc(
            sum(
                isinstance(answer, Receipt) and answer.outcome in (WriteOutcome.ENROLLED, WriteOutcome.REPLACED)
                for answer in done
            )
        )
        return done

    async def withdraw(self, gallery_id: str, reference_ids: Sequence[str], reason: str, actor: Actor) -> Receipt:
        """End the searchability of these references now. Raises NotFound if none of them is live; those that
        are not are otherwise passed over."""
        policy.gallery_named(gallery_id, self._catalogue)
        answers = await self._append([Withdraw(gallery_id, one, reason) for one in reference_ids], actor)
        receipts = [answer for answer in answers if isinstance(answer, Receipt)]
        if not receipts:
            raise next(answer for answer in answers if isinstance(answer, MatcherError))
        ended = tuple(pair for receipt in receipts for pair in receipt.reference_ids)
        return await self._obeyed(Receipt(WriteOutcome.DONE, receipts[-1].sequence, ended))

    async def withdraw_subject(self, gallery_id: str, subject_id: str, reason: str, actor: Actor) -> Receipt:
        """The same for every live reference of a subject, in one gallery or (gallery_id "") in all."""
        if gallery_id:
            policy.gallery_named(gallery_id, self._catalogue)
        receipt = _receipt((await self._append([WithdrawSubject(gallery_id, subject_id, reason)], actor))[0])
        if not receipt.reference_ids:
            raise NotFound(
                f"no live reference of subject {subject_id!r}",
                field="subject_id",
                hint="it may have been withdrawn already",
            )
        return await self._obeyed(receipt)

    async def change(self, write: Write, actor: Actor) -> Receipt:
        """A change of the catalogue: judged, committed, and obeyed when this returns."""
        policy.judge_change(
            write, self._catalogue, self._limits.id_bytes_max, self._limits.dimension_max, self._time.now_ms()
        )
        return await self._obeyed(_receipt((await self._append([write], actor))[0]), catalogue=True)

    async def _append(self, writes: Sequence[Write], actor: Actor) -> list[Receipt | MatcherError]:
        if not writes:
            return []
        began = self._clock.monotonic()
        answers = await self._log.append(writes, actor)
        self._log_seconds.observe(self._clock.monotonic() - began)
        return answers

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


def _at_row(answer: Receipt | MatcherError, row: int) -> Receipt | MatcherError:
    """The log judges one reference; the caller sent a column."""
    if isinstance(answer, MatcherError) and answer.field in ("expires_at_ms", "templates"):
        answer.field = f"{answer.field}[{row}]"
    return answer
