"""Receipts in columns say what receipts row by row say."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.client import ReceiptOutcome, Receipts, References
from matcher_service.client.dialogues import EnrolDialogue
from matcher_service.errors import Conflict, Gone, LogUnavailable, MatcherError
from matcher_service.gateway import encode
from matcher_service.receipts import EnrolReceipts
from matcher_service.terms import Receipt, SpaceId, WriteOutcome

OUTCOMES = [WriteOutcome.ENROLLED, WriteOutcome.REPLACED, WriteOutcome.REPEATED]
ACCEPTED = st.builds(Receipt, st.sampled_from(OUTCOMES), st.integers(1, 2**40), st.just(()))
REFUSED = st.sampled_from(
    [Conflict("it is live", field="reference_ids", hint="set replace"), Gone("too late", field="expires_at_ms[1]")]
)
ANSWERS = st.lists(ACCEPTED | REFUSED, min_size=1, max_size=12)


def question(rows: int) -> tuple[References, str]:
    names = [f"r{row}" for row in range(rows)]
    templates = np.ones((rows, 2), np.float16)
    return References(
        gallery_id="g", space=SpaceId("s", 1, 2), reference_ids=names, subject_ids=names, templates=templates,
        message_id="m",
    ), "key"  # fmt: skip


@given(ANSWERS)
def test_columns_hold_the_answers_of_the_rows(answers: list[Receipt | MatcherError]) -> None:
    columns = EnrolReceipts.of(answers)
    assert list(columns) == answers
    assert columns[-1] == answers[-1]
    assert list(columns[:2]) == answers[:2]
    assert columns.written == sum(
        isinstance(one, Receipt) and one.outcome is not WriteOutcome.REPEATED for one in answers
    )


@given(ANSWERS)
def test_a_client_reads_the_same_from_columns_as_from_rows(answers: list[Receipt | MatcherError]) -> None:
    dialogue, asked = EnrolDialogue((), 60.0), question(len(answers))
    ids = asked[0].reference_ids
    by_row = encode.enrol_reply(ids, answers, "1")
    in_columns = encode.enrol_reply(ids, EnrolReceipts.of(answers), "1", in_columns=True)
    assert in_columns.sequence == by_row.sequence
    assert len(in_columns.receipts) == sum(isinstance(one, MatcherError) for one in answers)
    told = [row.answer for row in dialogue.decode(asked, by_row, 0.5)]
    assert [row.answer for row in dialogue.decode(asked, in_columns, 0.5)] == told
    whole = dialogue.whole(asked, in_columns, 0.5)
    assert isinstance(whole, Receipts)
    assert list(whole) == told
    assert [one is ReceiptOutcome.REFUSED for one in whole.outcomes] == [
        isinstance(one, MatcherError) for one in answers
    ]
    assert dialogue.whole(asked, by_row, 0.5) is None


def test_a_row_that_may_be_tried_again_is_never_part_of_a_final_whole() -> None:
    dialogue, asked = EnrolDialogue((), 60.0), question(2)
    answers: list[Receipt | MatcherError] = [Receipt(WriteOutcome.ENROLLED, 3), LogUnavailable("later")]
    reply = encode.enrol_reply(asked[0].reference_ids, answers, "1", in_columns=True)
    assert dialogue.whole(asked, reply, 0.5) is None
    assert [row.retry_after_ms for row in dialogue.decode(asked, reply, 0.5)] == [None, 0]
