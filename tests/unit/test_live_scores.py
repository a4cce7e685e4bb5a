"""Live best scores: a sample chosen blindly, a count and nothing more, and an honest judgement of drift."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from matcher_service.live_scores import LiveScores, chance_of_no_higher
from matcher_service.metrics import Metrics
from matcher_service.models.score_calibrator import measure_table
from matcher_service.terms import Actor, ProbeMessage, ScoreTable, SpaceId
from tests.running_service import WholeService, whole_service

SEED = 11
DIMENSION = 64
REFERENCES = 500


TABLE = ScoreTable((0.0, 0.5), (0.5, 1e-3), "drawn")


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def people(count: int, source: np.random.Generator) -> NDArray[np.float32]:
    return unit(source.standard_normal((count, DIMENSION)))


def table_of(source: np.random.Generator) -> ScoreTable:
    scores = (people(1500, source) @ people(1500, source).T).ravel()
    table = measure_table(scores, source="drawn")
    # What a calibration adds to the limits.
    reached = np.array([(scores >= one).mean() for one in table.scores]).clip(1e-9)
    return ScoreTable(table.scores, table.rates, table.method, tuple(reached), tuple(reached), 0.95)


def watching(every: int = 1) -> tuple[LiveScores, CollectorRegistry]:
    registry = CollectorRegistry()
    return LiveScores(every, None, None, None, Metrics(registry)), registry  # type: ignore[arg-type]


def suspected(registry: CollectorRegistry) -> bool:
    return registry.get_sample_value("matcher_score_drift_suspected") == 1


def test_strangers_like_those_of_the_calibration_are_no_drift_and_others_are() -> None:
    print("seed", SEED)
    source = np.random.default_rng(SEED)
    table, gallery = table_of(source), people(REFERENCES, source)
    live, registry = watching()
    for score in (people(1200, source) @ gallery.T).max(axis=1):
        live.count(float(score), table, REFERENCES)
    assert registry.get_sample_value("matcher_best_score_count") == 1200
    assert not suspected(registry)
    # As through a scratched lens: every face has something of the same pattern.
    pattern = people(1, source)
    blurred, smeared = unit(people(1200, source) + 0.5 * pattern), unit(gallery + 0.5 * pattern)
    for score in (blurred @ smeared.T).max(axis=1):
        live.count(float(score), table, REFERENCES)
    assert suspected(registry)
    # And when the lens is clean again, that is forgotten.
    for score in (people(1200, source) @ gallery.T).max(axis=1):
        live.count(float(score), table, REFERENCES)
    assert not suspected(registry)


def test_a_few_scores_or_none_calibrated_prove_nothing() -> None:
    source = np.random.default_rng(SEED)
    live, registry = watching()
    for _ in range(150):
        live.count(0.9, TABLE, REFERENCES)
    assert not suspected(registry)
    for score in source.uniform(0.5, 1.0, 1000):
        live.count(float(score), None, REFERENCES)
    assert not suspected(registry)
    assert registry.get_sample_value("matcher_best_score_count") == 1150


def test_the_chance_of_no_higher_score_is_that_of_all_references_staying_below() -> None:
    assert chance_of_no_higher(0.5, TABLE, 1000) == pytest.approx((1 - 1e-3) ** 1000)
    assert chance_of_no_higher(-0.5, TABLE, 1) == 0.0
    assert chance_of_no_higher(0.5, TABLE, 0) == 1.0


def message(rows: int, **more: Any) -> ProbeMessage:
    given: dict[str, Any] = {
        "deployment_id": "op",
        "case_reference": "",
        "probe_ids": [f"p{row}" for row in range(rows)],
    }
    given |= more
    return ProbeMessage(
        actor=Actor("van"),
        space=SpaceId("s", 1, 2),
        templates=np.ones((rows, 2), np.float32),
        captured_at_ms=np.zeros(rows, np.int64),
        gallery_ids=(),
        threshold=None,
        rank_max=1,
        min_sequence=0,
        received_at=0.0,
        deadline=1.0,
        **given,
    )


def test_each_live_probe_has_the_same_chance_and_cases_and_canaries_have_none() -> None:
    live, _ = watching(every=10)
    chosen = [live.choose(message(4)) for _ in range(4000)]
    counts = [chosen.count(row) for row in range(4)]
    # Each row is expected 400 times; six standard deviations are 114.
    assert all(abs(count - 400) < 120 for count in counts)
    assert all(live.choose(message(4, deployment_id="", case_reference="c")) is None for _ in range(200))
    assert all(live.choose(message(1, probe_ids=["canary-000001"])) is None for _ in range(200))
    none, _ = watching(every=0)
    assert all(none.choose(message(4)) is None for _ in range(50))


@asynccontextmanager
async def asked(
    data_dir: Path, every: int
) -> AsyncIterator[tuple[WholeService, SpaceId, NDArray[np.float32], np.random.Generator]]:
    source = np.random.default_rng(SEED)
    async with whole_service(data_dir, watch={"score_sample_every": every}) as service:
        space, stored = await service.space(DIMENSION), people(50, source)
        await service.gallery("g", space, threshold=0.9)
        await service.deployment("g")
        await service.case("g")
        await service.enrol("g", space, stored, [f"r{row}" for row in range(50)])
        yield service, space, stored, source


async def test_law_6_of_a_probe_without_a_candidate_only_the_bucket_of_its_best_score_remains(tmp_path: Path) -> None:
    async with asked(tmp_path, every=1) as (service, space, stored, source):
        strangers = people(30, source)
        registry = service.running.service.metrics.registry

        def counted() -> float:
            return registry.get_sample_value("matcher_best_score_count") or 0.0

        answers = await service.ask(space, strangers, size=1)
        assert all(not one.decision.candidates for one in answers.values())
        assert counted() == 30
        expected = (strangers @ stored.T.astype(np.float16).astype(np.float32)).max(axis=1)
        for bound in (0.2, 0.25, 0.3, 0.35):
            below = registry.get_sample_value("matcher_best_score_bucket", {"le": str(bound)})
            assert below == (expected <= bound).sum()
        # Whoever alerts is not a stranger, and a case is not the street.
        await service.ask(space, stored, size=1)
        await service.ask(space, strangers, size=1, case_reference="case-1")
        assert counted() == 30
