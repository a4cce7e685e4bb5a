"""Moving partitions: the giver loses nothing before every replica of the taker answers for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from matcher_service.clock import SystemClock
from matcher_service.errors import InvalidInput, ShardUnavailable
from matcher_service.partitions import Partitions, share
from matcher_service.shards.exchange import ShardState
from matcher_service.shards.moving import move

LEFT, RIGHT = share(0, 2), share(1, 2)
QUARTER = share(1, 4)


class Replica:
    """Holds what it is assigned after so many more looks; what was done to all replicas of a test is in `acts`."""

    def __init__(self, name: str, owned: Partitions, acts: list[str], *, replays: int = 0, refusal: str = "") -> None:
        self.name = name
        self.state_now = ShardState(name, 7, 20.0, owned, assigned=owned)
        self.down = False
        self._acts = acts
        self._replays = replays
        self._refusal = refusal

    async def state(self, until: float) -> ShardState:
        if self.down:
            raise ShardUnavailable(f"{self.name} does not answer", hint="wait")
        if self.state_now.assigned != self.state_now.partitions and not self._refusal:
            self._replays -= 1
            if self._replays < 0:
                self.state_now = replace(self.state_now, partitions=self.state_now.assigned)
                self._acts.append(f"{self.name} holds")
        return replace(self.state_now, refusal=self._refusal)

    async def assign(self, partitions: Partitions, until: float) -> ShardState:
        self._acts.append(f"{self.name} is assigned {len(partitions)}")
        held = self.state_now.partitions & partitions
        self.state_now = replace(self.state_now, assigned=partitions, partitions=held)
        return self.state_now


async def moved(giver: Sequence[Replica], taker: Sequence[Replica], within_s: float = 5.0) -> None:
    await move(QUARTER, giver, taker, SystemClock(), within_s)


async def test_the_taker_holds_all_on_every_replica_before_the_giver_loses_any() -> None:
    acts: list[str] = []
    giver = [Replica("a", LEFT, acts), Replica("b", LEFT, acts)]
    taker = [Replica("c", RIGHT, acts, replays=1), Replica("d", RIGHT, acts, replays=2)]
    await moved(giver, taker)
    assert acts[:2] == ["c is assigned 192", "d is assigned 192"]
    assert set(acts[2:4]) == {"c holds", "d holds"}
    assert acts[4:] == ["a is assigned 64", "b is assigned 64"]
    assert {one.state_now.assigned for one in giver} == {LEFT - QUARTER}
    del acts[:]
    await moved(giver, taker)
    assert acts == [], "repeated, it changes nothing"


@pytest.mark.parametrize("why", ["it replays", "the log is down", "it does not answer"])
async def test_nothing_is_taken_while_a_replica_of_the_taker_lacks_them(why: str) -> None:
    acts: list[str] = []
    giver = Replica("a", LEFT, acts)
    late = Replica("c", RIGHT, acts, replays=10**6, refusal="the log is down" if why == "the log is down" else "")
    if why == "it does not answer":
        await late.assign(RIGHT | QUARTER, 0.0)
        late.down = True
    with pytest.raises(ShardUnavailable):
        await moved([giver], [Replica("d", RIGHT, acts), late], within_s=0.5)
    assert giver.state_now.partitions == LEFT


async def test_partitions_that_neither_owns_are_refused_before_anything_is_done() -> None:
    acts: list[str] = []
    with pytest.raises(InvalidInput, match="partitions 64-127"):
        await moved([Replica("a", share(0, 4), acts)], [Replica("c", RIGHT, acts)])
    assert acts == []
