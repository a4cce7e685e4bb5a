"""Do strangers still score as they did at calibration? One probe in many tells, and leaves only a count.

The search drops whatever is below the threshold, so the best score of a person who is not alerted on is not known. One
probe in `every`, chosen before anything of its scores is known, is therefore searched once more for its best score
alone. Of that score a bucket is counted, and nothing else is kept (law 6).

Galleries differ in size, and so do their best scores. What is compared is the chance, under the calibration, that the
best of so many references scores no higher: (1 - FMR(score))^references. If the calibration still holds, that chance
is uniform between 0 and 1, whatever the gallery (the probability integral transform).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from matcher_service.admission import Permit
from matcher_service.batching import Batcher, Lane
from matcher_service.drift import drift
from matcher_service.errors import MatcherError
from matcher_service.metrics import Metrics
from matcher_service.models.score_calibrator import false_match_rates
from matcher_service.seams import Clock, Shard
from matcher_service.terms import CANARY_PREFIX, Float32, ProbeMessage, ScoreTable

BINS = 20
# The window: what came since the last whole block, and that block. A fault of today must not drown in last month.
BLOCK_SCORES = 500
# Wider than between two calibrations: references of one person, and neighbours in a queue, are not independent, and
# people who do alert are left out.
DISTANCE_OF_CONCERN = 0.15
# A second search may take this part of the time that is left.
TIME_SHARE = 0.25


class LiveScores:
    """`every`: one probe in so many; 0: none."""

    def __init__(self, every: int, batcher: Batcher, shard: Shard, clock: Clock, metrics: Metrics) -> None:
        self._every = every
        self._batcher = batcher
        self._shard = shard
        self._clock = clock
        self._metrics = metrics
        self._block = np.zeros(BINS)
        self._block_before = np.zeros(BINS)

    def choose(self, message: ProbeMessage) -> int | None:
        """The row of the message that is to be looked at, if any: each live probe has the same chance."""
        rows = len(message.probe_ids)
        if not self._every or not message.deployment_id or not 0 <= (row := secrets.randbelow(self._every)) < rows:
            return None
        return None if message.probe_ids[row].startswith(CANARY_PREFIX) else row

    async def look(
        self, permit: Permit, lane: Lane, template: Float32, table: ScoreTable | None, deadline: float
    ) -> None:
        """Count the best score of a probe that raised no alert; `template` float32 [1, d]. What fails is left out: the
        answer of the probe does not depend on it."""
        now = self._clock.monotonic()
        try:
            found = await self._batcher.submit(
                permit,
                lane._replace(best_only=True),
                template,
                np.full((1, len(lane.gallery_ids)), -np.inf, np.float32),
                1,
                now + TIME_SHARE * (deadline - now),
            )
            sizes = (await self._shard.status()).live
        except MatcherError:
            return
        if not found.result.missing and found.result.scores.size:
            references = sum(sizes.get(gallery_id, 0) for gallery_id in lane.gallery_ids)
            self.count(float(found.result.scores[0]), table, references)

    def count(self, score: float, table: ScoreTable | None, references: int) -> None:
        """Put a best score into its bucket, and judge the drift anew if the space has a calibration."""
        self._metrics.best_score.observe(score)
        if table is None:
            return
        chance = chance_of_no_higher(score, table, references)
        self._block[min(BINS - 1, int(chance * BINS))] += 1
        found = drift(np.full(BINS, 1e9), self._block + self._block_before, distance_of_concern=DISTANCE_OF_CONCERN)
        if self._block.sum() >= BLOCK_SCORES:
            self._block_before, self._block = self._block, np.zeros(BINS)
        self._metrics.score_drift.set(found.distance)
        self._metrics.score_drift_suspected.set(found.is_drift)


def chance_of_no_higher(score: float, table: ScoreTable, references: int) -> float:
    """The chance, by the table's best estimates, that none of so many unmated references scores higher."""
    rates: Sequence[float] = table.estimates or table.rates
    estimated = ScoreTable(table.scores, tuple(rates), table.method)
    rate = float(false_match_rates(estimated, np.asarray([score]))[0])
    return float(np.exp(references * np.log1p(-rate))) if rate < 1.0 else 0.0
