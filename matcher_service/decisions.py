"""What was decided of the probes of one message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from matcher_service.terms import Decision, Outcome

NOBODY = Decision("", Outcome.NO_CANDIDATE)
"""What is decided of a probe without a candidate, but for its probe_id."""


@dataclass(frozen=True, slots=True)
class Decisions(Sequence[Decision]):
    """One decision per probe of a message, in order. Nearly all probes find nobody: those have `usual` in common, a
    decision without a probe_id; `others` has the rest, by row in rising order."""

    probe_ids: Sequence[str]
    usual: Decision
    others: Mapping[int, Decision]

    def __len__(self) -> int:
        return len(self.probe_ids)

    @overload
    def __getitem__(self, row: int) -> Decision: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Decision]: ...
    def __getitem__(self, row: int | slice) -> Decision | Sequence[Decision]:
        if isinstance(row, slice):
            return [self[one] for one in range(len(self))[row]]
        place = range(len(self))[row]
        return self.others.get(place) or Decision(self.probe_ids[place], *self.usual[1:])

    def __iter__(self) -> Iterator[Decision]:
        others, alike = self.others, self.usual[1:]
        return (others.get(row) or Decision(probe_id, *alike) for row, probe_id in enumerate(self.probe_ids))

    @classmethod
    def of(cls, decisions: Sequence[Decision]) -> Decisions:
        """The same decisions so kept."""
        if isinstance(decisions, Decisions):
            return decisions
        others = {row: one for row, one in enumerate(decisions) if one[1:] != NOBODY[1:]}
        return cls([one.probe_id for one in decisions], NOBODY, others)

    def outcomes(self) -> Counter[Outcome]:
        """How many of each."""
        counts = Counter(one.outcome for one in self.others.values())
        if len(self) > len(self.others):
            counts[self.usual.outcome] += len(self) - len(self.others)
        return counts
