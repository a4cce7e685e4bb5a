"""Laws of the hosted models, without a server: keys, company, and the proof of unharmed values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matcher_service.errors import InvalidInput, MatcherError, StartRefused
from matcher_service.models import hosted, repository
from matcher_service.models.template_adapter import adapt
from matcher_service.terms import Cause, Float32, ScoreTable, SpaceId, SpaceMap, TemplateSpace

MODELS = Path(__file__).resolve().parents[2] / "triton_models"
RNG_SEED = 5


def space(name: str, dimension: int, *maps: SpaceMap) -> TemplateSpace:
    centre = np.random.default_rng(dimension).standard_normal(dimension).astype(np.float32)
    return TemplateSpace(SpaceId(name, 1, dimension), centre, maps)


EDGE = space("edge", 6)
MATRIX = np.random.default_rng(RNG_SEED).standard_normal((8, 6)).astype(np.float32)
CORE = space("core", 8, SpaceMap(EDGE.id, MATRIX), SpaceMap(SpaceId("third", 1, 2), np.ones((8, 2), np.float32)))


def templates(rows: int, dimension: int) -> Float32:
    return np.random.default_rng(rows).standard_normal((rows, dimension)).astype(np.float32)


def request(values: Float32, key: int, *records: bytes) -> hosted.Rows[Float32]:
    return hosted.Rows(values, np.full(len(values), key, dtype=np.int64), records)


def adapter() -> hosted.Records[tuple[TemplateSpace, TemplateSpace]]:
    return hosted.Records(hosted.decode_adaptation)


def test_an_unknown_key_is_asked_for_and_then_remembered() -> None:
    """A model that does not hold a record says UNKNOWN_KEY; sent along once, it serves every later request."""
    known, record = adapter(), hosted.adaptation_record(EDGE, CORE)
    rows, key = templates(5, 6), hosted.key_of(record)
    (refused,) = hosted.adapt_batch(known, [request(rows, key)])
    assert hosted.UNKNOWN_KEY in str(refused)
    expected = adapt(rows, EDGE, CORE).tobytes()
    assert hosted.adapt_batch(known, [request(rows, key, record)])[0].tobytes() == expected
    assert hosted.adapt_batch(known, [request(rows, key)])[0].tobytes() == expected


def test_a_refusal_stays_with_the_request_that_earned_it() -> None:
    """Requests that Triton batched together are answered each for itself, and with the same bits as alone."""
    known = adapter()
    through_map, own = hosted.adaptation_record(EDGE, CORE), hosted.adaptation_record(CORE, CORE)
    mixed = hosted.Rows(templates(2, 6), np.array([1, 2], dtype=np.int64))
    batch = [
        request(templates(3, 6), hosted.key_of(through_map), through_map),
        request(templates(4, 6), 12345),
        request(templates(2, 8), hosted.key_of(own), own),
        mixed,
        request(templates(1, 6), 77, b"no record"),
        request(templates(7, 6), hosted.key_of(through_map)),
    ]
    answers: list[Any] = hosted.adapt_batch(known, batch)
    assert answers[0].tobytes() == adapt(templates(3, 6), EDGE, CORE).tobytes()
    assert answers[2].tobytes() == adapt(templates(2, 8), CORE, CORE).tobytes()
    assert answers[5].tobytes() == adapt(templates(7, 6), EDGE, CORE).tobytes()
    assert [isinstance(one, MatcherError) for one in answers] == [False, True, False, True, True, False]


def test_a_key_is_made_of_what_the_computation_needs_and_nothing_else() -> None:
    """Another centre or matrix is another key; maps from other spaces change nothing."""
    alone = space("core", 8, SpaceMap(EDGE.id, MATRIX))
    moved = TemplateSpace(EDGE.id, EDGE.centre + 1)
    turned = space("core", 8, SpaceMap(EDGE.id, MATRIX * 2))
    keys = [hosted.key_of(hosted.adaptation_record(*pair)) for pair in ((EDGE, CORE), (EDGE, alone), (moved, alone))]
    assert keys[0] == keys[1] != keys[2]
    assert hosted.key_of(hosted.adaptation_record(EDGE, turned)) != keys[0]
    assert hosted.CHECK_KEY not in keys
    with pytest.raises(InvalidInput) as no_map:
        hosted.adaptation_record(CORE, EDGE)
    assert no_map.value.cause is Cause.WRONG_SPACE


def test_what_a_model_remembers_is_bounded() -> None:
    """Law 3: the least recently used record is forgotten, and asked for again when it is needed."""
    known: hosted.Records[ScoreTable] = hosted.Records(hosted.decode_table)
    records = [hosted.table_record(ScoreTable((0.0, 0.5), (1.0, 1e-3 / n), "")) for n in range(1, 300)]
    for one in records:
        known.learn(one)
        assert known[hosted.key_of(records[0])].rates[0] == 1.0
    assert known[hosted.key_of(records[-1])].rates[1] == 1e-3 / 299
    with pytest.raises(hosted.UnknownKey):
        known[hosted.key_of(records[150])]
    assert sum(_held(known, one) for one in records) == hosted.RECORDS_MAX


def _held(known: hosted.Records[ScoreTable], record: bytes) -> bool:
    try:
        known[hosted.key_of(record)]
    except hosted.UnknownKey:
        return False
    return True


def test_a_record_that_makes_no_sense_is_not_learnt() -> None:
    """Neither a damaged space nor a rising score table gets in."""
    for wrong in (b"", b"{}", hosted.adaptation_record(EDGE, CORE)[:-9]):
        with pytest.raises(MatcherError):
            adapter().learn(wrong)
    tables: hosted.Records[ScoreTable] = hosted.Records(hosted.decode_table)
    for wrong in (b"[]", b'{"scores": [0.1, 0.2], "rates": [0.1, 0.2]}'):
        with pytest.raises(MatcherError):
            tables.learn(wrong)


class HarmingTensor:
    """A backend's tensor as a numpy of another major version is handed it: filled with its first element."""

    harmed = True

    def __init__(self, name: str, values: Float32) -> None:
        self._values = values

    def to_dlpack(self) -> Float32:
        return self._values

    @classmethod
    def from_dlpack(cls, name: str, values: Float32) -> HarmingTensor:
        return cls(name, np.full_like(values, values.flat[0]) if cls.harmed else values)

    def as_numpy(self) -> Float32:
        return self._values


class FaithfulTensor(HarmingTensor):
    harmed = False


def test_a_model_does_not_load_where_tensors_are_harmed() -> None:
    """The check at load tells a backend that fills tensors with their first element from one that does not."""
    hosted.check_exchange(FaithfulTensor)
    with pytest.raises(hosted.ValuesHarmed, match="numpy"):
        hosted.check_exchange(HarmingTensor)


def test_known_values_that_arrive_harmed_stop_the_whole_batch() -> None:
    """Nobody is answered beside a known row that did not arrive as it was sent."""
    row = hosted.check_row()[None]
    assert hosted.adapt_batch(adapter(), [request(row, hosted.CHECK_KEY)])[0].tobytes() == (
        hosted.check_adapted().tobytes()
    )
    with pytest.raises(hosted.ValuesHarmed):
        hosted.adapt_batch(adapter(), [request(np.full_like(row, row[0, 0]), hosted.CHECK_KEY)])
    tables: hosted.Records[ScoreTable] = hosted.Records(hosted.decode_table)
    with pytest.raises(hosted.ValuesHarmed):
        hosted.rates_batch(tables, [request(np.zeros((1, 1), np.float32), hosted.CHECK_KEY)])


def test_law_8_no_model_waits_for_company_or_keeps_a_result() -> None:
    """Law 8: plain dynamic batching, no queue policy or delay, no response cache; each is warm before it is ready."""
    for name in repository.MODELS:
        config = (MODELS / name / "config.pbtxt").read_text()
        assert "\ndynamic_batching { }\n" in config, name
        for forbidden in ("max_queue_delay", "queue_policy", "preferred_batch_size", "priority", "timeout"):
            assert forbidden not in config, (name, forbidden)
        assert "response_cache { enable: false }" in config
        assert "model_warmup" in config
        assert f'name: "{name}"' in config
    assert (MODELS / "template_adapter/warmup/known_row").read_bytes() == hosted.check_row().astype("<f4").tobytes()


def test_a_repository_for_a_cpu_has_no_gpu_instance_and_the_parameters_asked_for(tmp_path: Path) -> None:
    """Every instance group is rewritten, the embedder's card and folder too, and nothing else changes."""
    made = repository.assemble(
        MODELS, tmp_path / "cpu", instances=3, parameters={"card": 'a "card".toml', "files_dir": "/weights"}
    )
    for name in repository.MODELS:
        config, before = (one / name / "config.pbtxt" for one in (made, MODELS))
        assert "instance_group [ { count: 3 kind: KIND_CPU } ]" in config.read_text()
        changed = set(config.read_text().splitlines()) ^ set(before.read_text().splitlines())
        assert all(one.startswith(("instance_group", "parameters")) for one in changed)
    embedder = (made / "face_embedder/config.pbtxt").read_text()
    assert 'value: { string_value: "a \\"card\\".toml" }' in embedder
    assert 'value: { string_value: "/weights" }' in embedder
    on_gpu = repository.assemble(MODELS, tmp_path / "gpu", on_gpu=True)
    assert "KIND_GPU" in (on_gpu / "face_embedder/config.pbtxt").read_text()
    assert "KIND_CPU" in (on_gpu / "template_adapter/config.pbtxt").read_text()
    with pytest.raises(StartRefused, match="not empty"):
        repository.assemble(MODELS, made)
    with pytest.raises(StartRefused, match="no model"):
        repository.assemble(tmp_path, tmp_path / "other")
