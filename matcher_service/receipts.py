"""What became of the rows of one message of references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from matcher_service.errors import MatcherError
from matcher_service.terms import Int64, Receipt, WriteOutcome


@dataclass(frozen=True, slots=True, eq=False)
class EnrolReceipts(Sequence[Receipt | MatcherError]):
    """One receipt or refusal per row, kept in columns, because nearly all rows are ENROLLED.

    `sequences` int64 [n], 0 where the row was refused; `refusals` by row; `others` are the outcomes of the rows that
    were neither refused nor ENROLLED.
    """

    sequences: Int64
    refusals: Mapping[int, MatcherError] = field(default_factory=dict)
    others: Mapping[int, WriteOutcome] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: Sequence[Receipt | MatcherError]) -> EnrolReceipts:
        """The same answers in columns."""
        if isinstance(answers, EnrolReceipts):
            return answers
        sequences = np.zeros(len(answers), np.int64)
        refusals: dict[int, MatcherError] = {}
        others: dict[int, WriteOutcome] = {}
        for row, answer in enumerate(answers):
            if isinstance(answer, MatcherError):
                refusals[row] = answer
                continue
            sequences[row] = answer.sequence
            if answer.outcome is not WriteOutcome.ENROLLED:
                others[row] = answer.outcome
        return cls(sequences, refusals, others)

    def __len__(self) -> int:
        return len(self.sequences)

    @overload
    def __getitem__(self, row: int) -> Receipt | MatcherError: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Receipt | MatcherError]: ...
    def __getitem__(self, row: int | slice) -> Receipt | MatcherError | Sequence[Receipt | MatcherError]:
        if isinstance(row, slice):
            return [self[one] for one in range(len(self))[row]]
        place = range(len(self))[row]
        refusal = self.refusals.get(place)
        if refusal is not None:
            return refusal
        return Receipt(self.others.get(place, WriteOutcome.ENROLLED), int(self.sequences[place]))

    @property
    def written(self) -> int:
        """How many rows are new in the log."""
        repeated = sum(outcome is WriteOutcome.REPEATED for outcome in self.others.values())
        return len(self) - len(self.refusals) - repeated
