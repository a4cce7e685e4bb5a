"""Moving partitions from one shard to another, as an operator asks for it, so that no answer lacks anything meanwhile.

The new owner is given them first. Only when every replica of it answers for them, freshly, does the old one lose them.
Broken off at any point it leaves partitions that two shards hold, which does no harm, and repeating it completes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from matcher_service.errors import InvalidInput, ShardUnavailable
from matcher_service.partitions import NO_PARTITIONS, Partitions, named
from matcher_service.seams import Clock
from matcher_service.shards.exchange import ShardState
from matcher_service.shards.scattered import unfit

LOOK_EVERY_S = 0.2
# A shard that applies a block of entries answers when it is through with it.
ANSWER_S_MAX = 10.0


class Assignable(Protocol):
    """One replica of a shard. `until` is in monotonic seconds; calls raise ShardUnavailable for no answer by then."""

    @property
    def name(self) -> str: ...

    async def state(self, until: float) -> ShardState: ...

    async def assign(self, partitions: Partitions, until: float) -> ShardState:
        """Own these from now on; the state at that time."""
        ...


async def move(
    partitions: Partitions, giver: Sequence[Assignable], taker: Sequence[Assignable], clock: Clock, within_s: float
) -> None:
    """Have the replicas of `taker` own these partitions, and then those of `giver` no more.

    Raises InvalidInput if neither side has them, ShardUnavailable if a replica does not answer, or if those of the
    taker do not hold them within `within_s` seconds. The giver has lost nothing then, unless the message says so.
    """
    until = clock.monotonic() + within_s
    giving = [await one.state(_soon(clock)) for one in giver]
    taking = [await one.state(_soon(clock)) for one in taker]
    known = NO_PARTITIONS.union(*(one.assigned for one in (*giving, *taking)))
    if not partitions or partitions - known:
        raise InvalidInput(
            f"neither shard is to own {named(partitions - known) or 'no partitions'}",
            field="partitions",
            hint="`matcher shards list` shows which shard owns what",
        )
    for one, state in zip(taker, taking, strict=True):
        if not partitions <= state.assigned:
            await one.assign(state.assigned | partitions, _soon(clock))
    head = max(one.sequence for one in (*giving, *taking))
    for one in taker:
        await _held(one, partitions, head, clock, until)
    for one in giver:
        state = await one.state(_soon(clock))
        if partitions & state.assigned:
            await one.assign(state.assigned - partitions, _soon(clock))


async def _held(one: Assignable, partitions: Partitions, sequence: int, clock: Clock, until: float) -> None:
    """Return once the replica answers for these, within the lease and with what was known of the log."""
    while True:
        try:
            state = await one.state(min(until, _soon(clock)))
            lacking = _lacking(state, partitions, sequence)
        except ShardUnavailable as error:
            lacking = str(error)
        if not lacking:
            return
        if clock.monotonic() + LOOK_EVERY_S >= until:
            raise ShardUnavailable(
                f"{one.name} does not hold {named(partitions)} yet: {lacking}",
                hint="nothing was taken from anybody; move again, with more time",
            )
        await asyncio.sleep(LOOK_EVERY_S)


def _lacking(state: ShardState, partitions: Partitions, sequence: int) -> str:
    if state.refusal:
        return state.refusal
    if partitions - state.partitions or state.missing:
        return f"it replays {', '.join(filter(None, (named(partitions - state.partitions), *state.missing)))}"
    return unfit(state, sequence)


def _soon(clock: Clock) -> float:
    return clock.monotonic() + ANSWER_S_MAX
