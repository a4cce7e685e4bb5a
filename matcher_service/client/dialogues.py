"""The two dialogues that a windowed stream holds: what is asked for a message, and what its replies answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from matcher_service.client.from_wire import decision_value, receipt_value, receipts_in_columns, space_value
from matcher_service.client.refusals import error_of
from matcher_service.client.values import ProbeAnswer, Probes, ReceiptOutcome, Receipts, ReferenceReceipt, References
from matcher_service.errors import MatcherError
from matcher_service.terms import Cause, Decision, Grounds, Outcome, SpaceId
from matcher_service.windowed_stream import RowAnswer
from matcher_service.wire import matcher_pb2 as pb
from matcher_service.wire import matcher_pb2_grpc as pb_grpc

RETRYABLE_PROBE_CAUSES = frozenset({Cause.OVERLOADED, Cause.SHUTTING_DOWN})
# Sending a reference again is safe whatever became of the first try: its key makes it the same wish.
RETRYABLE_REFERENCE_CAUSES = frozenset({Cause.OVERLOADED, Cause.SHUTTING_DOWN, Cause.LOG_UNAVAILABLE})
# The most that a service accepts by default; a longer deadline of the client's is tried again after it.
DEADLINE_MS_MAX = 60_000


def stub_on(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.MatcherStub(channel)  # type: ignore[no-untyped-call]


def _wire_space(space: SpaceId) -> pb.TemplateSpace:
    return pb.TemplateSpace(name=space.name, version=space.version, dimension=space.dimension)


def _wire_templates(templates: NDArray[Any], rows: Sequence[int] | None) -> tuple[pb.Dtype.ValueType, bytes]:
    half = templates.dtype == np.float16
    wanted = templates if rows is None or len(rows) == len(templates) else templates[list(rows)]
    values = np.ascontiguousarray(wanted, dtype="<f2" if half else "<f4")
    return (pb.FLOAT16 if half else pb.FLOAT32), values.tobytes()


@dataclass(frozen=True, slots=True)
class IdentifyDialogue:
    """IdentifyStream; asks again only for the rows that still need an answer."""

    metadata: tuple[tuple[str, str], ...]
    default_deadline_s: float
    nonce: bytes
    sendings: Iterator[int]

    def open(self, channel: grpc.aio.Channel) -> Any:
        return stub_on(channel).IdentifyStream(metadata=self.metadata)

    def rows(self, question: Probes) -> int:
        return len(question.probe_ids)

    def deadline_s(self, question: Probes) -> float:
        return self.default_deadline_s if question.deadline_s is None else question.deadline_s

    def encode(self, question: Probes, rows: Sequence[int], wire_id: str, remaining_s: float) -> pb.IdentifyRequest:
        dtype, templates = _wire_templates(question.templates, rows)
        request = pb.IdentifyRequest(
            space=_wire_space(question.space),
            dtype=dtype,
            templates=templates,
            probe_ids=[question.probe_ids[row] for row in rows],
            captured_at_ms=[int(question.captured_at_ms[row]) for row in rows],
            gallery_ids=question.gallery_ids,
            threshold=question.threshold,
            rank_max=question.rank_max,
            min_sequence=question.min_sequence,
            deadline_ms=min(DEADLINE_MS_MAX, max(1, round(remaining_s * 1000))),
            message_id=wire_id,
            traceparent=question.traceparent,
            camera_id=question.camera_id,
            stream_nonce=self.nonce,
            stream_sequence=next(self.sendings),
        )
        if question.deployment_id:
            request.deployment_id = question.deployment_id
        else:
            request.case_reference = question.case_reference
        return request

    def wire_id(self, reply: pb.IdentifyReply) -> str:
        return reply.message_id

    def decode(self, question: Probes, reply: pb.IdentifyReply, elapsed_s: float) -> Iterable[RowAnswer]:
        row_of = {probe_id: row for row, probe_id in enumerate(question.probe_ids)}
        common = (
            question.message_id,
            reply.sequence,
            space_value(reply.space),
            reply.policy_version,
            {one.gallery_id: one.threshold for one in reply.thresholds},
            tuple(reply.missing),
            elapsed_s,
        )
        for wire in reply.decisions:
            decision = decision_value(wire)
            again = decision.outcome is Outcome.REJECTED and decision.cause in RETRYABLE_PROBE_CAUSES
            retry_after_ms = decision.retry_after_ms if again else None
            if not decision.probe_id:
                # The refusal of a message as a whole, whose probes the service did not tell apart.
                for probe_id, row in row_of.items():
                    yield RowAnswer(row, ProbeAnswer(decision._replace(probe_id=probe_id), *common), retry_after_ms)
            else:
                row = row_of.get(decision.probe_id, -1)
                yield RowAnswer(row, ProbeAnswer(decision, *common), retry_after_ms)

    def whole(self, question: Probes, reply: pb.IdentifyReply, elapsed_s: float) -> None:
        return None

    def refusal(self, question: Probes, row: int, error: MatcherError, elapsed_s: float) -> ProbeAnswer:
        decision = Decision(
            question.probe_ids[row],
            Outcome.REJECTED,
            cause=error.cause.value,
            detail=error.detail,
            field=error.field,
            retry_after_ms=error.retry_after_ms or 0,
        )
        return ProbeAnswer(decision, question.message_id, 0, None, "", {}, (), elapsed_s, answered=False)

    def error_of(self, broken: grpc.aio.AioRpcError) -> MatcherError:
        return error_of(broken)


@dataclass(frozen=True, slots=True)
class EnrolDialogue:
    """Enrol; always asks for the whole message again, since its key stands for the whole of it."""

    metadata: tuple[tuple[str, str], ...]
    default_deadline_s: float

    def open(self, channel: grpc.aio.Channel) -> Any:
        return stub_on(channel).Enrol(metadata=self.metadata)

    def rows(self, question: tuple[References, str]) -> int:
        return len(question[0].reference_ids)

    def deadline_s(self, question: tuple[References, str]) -> float:
        given = question[0].deadline_s
        return self.default_deadline_s if given is None else given

    def encode(
        self, question: tuple[References, str], rows: Sequence[int], wire_id: str, remaining_s: float
    ) -> pb.EnrolRequest:
        references, key = question
        dtype, templates = _wire_templates(references.templates, None)
        return pb.EnrolRequest(
            gallery_id=references.gallery_id,
            space=_wire_space(references.space),
            dtype=dtype,
            templates=templates,
            reference_ids=references.reference_ids,
            subject_ids=references.subject_ids,
            expires_at_ms=[int(at_ms) for at_ms in references.expires_at_ms],
            idempotency_key=key,
            replace=references.replace,
            message_id=wire_id,
            receipts_in_columns=True,
            grounds=None if references.grounds == Grounds() else pb.Grounds(**dataclasses.asdict(references.grounds)),
        )

    def wire_id(self, reply: pb.EnrolReply) -> str:
        return reply.message_id

    def decode(self, question: tuple[References, str], reply: pb.EnrolReply, elapsed_s: float) -> Iterable[RowAnswer]:
        references, key = question
        if reply.cause:
            retry = reply.retry_after_ms if reply.cause in RETRYABLE_REFERENCE_CAUSES else None
            refused = (ReceiptOutcome.REFUSED, 0, reply.cause, reply.detail, reply.field)
            for row, reference_id in enumerate(references.reference_ids):
                yield RowAnswer(
                    row, ReferenceReceipt(reference_id, *refused, row, references.message_id, key, elapsed_s), retry
                )
            return
        if reply.outcomes:
            rows: Sequence[ReferenceReceipt] = receipts_in_columns(references, key, reply, elapsed_s)
        else:
            # Receipts are parallel to the request. A reference_id that stands twice in a message has two.
            rows = [receipt_value(references, key, row, wire, elapsed_s) for row, wire in enumerate(reply.receipts)]
        for row, receipt in enumerate(rows):
            yield RowAnswer(row, receipt, 0 if receipt.cause in RETRYABLE_REFERENCE_CAUSES else None)

    def whole(self, question: tuple[References, str], reply: pb.EnrolReply, elapsed_s: float) -> Receipts | None:
        if not reply.outcomes or any(wire.cause in RETRYABLE_REFERENCE_CAUSES for wire in reply.receipts):
            return None
        return receipts_in_columns(*question, reply, elapsed_s)

    def refusal(
        self, question: tuple[References, str], row: int, error: MatcherError, elapsed_s: float
    ) -> ReferenceReceipt:
        references, key = question
        return ReferenceReceipt(
            references.reference_ids[row],
            ReceiptOutcome.REFUSED,
            0,
            error.cause.value,
            error.detail,
            error.field,
            row,
            references.message_id,
            key,
            elapsed_s,
        )

    def error_of(self, broken: grpc.aio.AioRpcError) -> MatcherError:
        return error_of(broken)
