"""A labelled test through the running service: the same path that an edge node takes, under a case."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

from matcher_service.client import MatcherClient, Probes, References
from matcher_service.errors import ServiceFault
from matcher_service.evaluation.labelled import LabelledSet
from matcher_service.terms import Decision, SpaceId

MESSAGE_ROWS = 64
ENROL_ROWS = 1000
# A test must not turn a busy service into missed people.
DEADLINE_S = 60.0


async def enrol_all(
    client: MatcherClient,
    gallery_id: str,
    space: SpaceId,
    references: LabelledSet,
    reference_ids: Sequence[str],
    advance: Callable[[int], None],
) -> int:
    """Enrol everything; returns the sequence from which searches see it. Raises ServiceFault for a refusal."""

    async def messages() -> AsyncIterator[References]:
        for start in range(0, len(references), ENROL_ROWS):
            rows = slice(start, start + ENROL_ROWS)
            yield References(
                gallery_id=gallery_id,
                space=space,
                reference_ids=reference_ids[rows],
                subject_ids=references.subjects[rows].tolist(),
                templates=references.templates[rows],
            )

    sequence = 0
    async with aclosing(client.enrol_stream(messages())) as receipts:
        async for receipt in receipts:
            if receipt.cause:
                raise ServiceFault(
                    f"reference {receipt.reference_id} was refused: {receipt.cause} {receipt.detail}",
                    field=receipt.field,
                    hint="enrol into a new gallery, in the space of the templates",
                )
            sequence = max(sequence, receipt.sequence)
            advance(1)
    return sequence


async def search_all(
    client: MatcherClient,
    case_reference: str,
    gallery_id: str,
    space: SpaceId,
    probes: LabelledSet,
    probe_ids: Sequence[str],
    *,
    rank_max: int,
    min_sequence: int,
    advance: Callable[[int], None],
) -> dict[str, Decision]:
    """The decision of every probe, by probe_id; refusals are decisions too."""

    async def messages() -> AsyncIterator[Probes]:
        for start in range(0, len(probes), MESSAGE_ROWS):
            rows = slice(start, min(start + MESSAGE_ROWS, len(probes)))
            yield Probes(
                space=space,
                probe_ids=probe_ids[rows],
                templates=probes.templates[rows],
                captured_at_ms=[time.time_ns() // 1_000_000] * (rows.stop - rows.start),
                case_reference=case_reference,
                gallery_ids=[gallery_id],
                rank_max=rank_max,
                min_sequence=min_sequence,
                deadline_s=DEADLINE_S,
            )

    decisions = {}
    async with aclosing(client.identify_stream(messages())) as answers:
        async for answer in answers:
            decisions[answer.decision.probe_id] = answer.decision
            advance(1)
    return decisions
