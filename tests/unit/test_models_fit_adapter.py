"""Laws of learning a map between two template spaces."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from matcher_service import __main__ as program
from matcher_service.errors import InvalidInput
from matcher_service.models.fit_adapter import FOLDS, Pairs, fit, mapped_space, read_pairs
from matcher_service.models.template_adapter import adapt
from matcher_service.terms import Float32, SpaceId, TemplateSpace

SEED = 41
SOURCE = SpaceId("edge", 2, 24)


def turned(noise: float, *, source: int = 24, target: int = 24, count: int = 600) -> Pairs:
    """Templates and the same ones turned into another space; `noise` is relative to their length."""
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    hidden = rng.standard_normal((count // 6, target)).repeat(6, axis=0) + 0.4 * rng.standard_normal((count, target))
    turn = np.linalg.qr(rng.standard_normal((max(source, target),) * 2))[0][:source, :target]
    seen = hidden @ turn.T + noise * rng.standard_normal((count, source))
    zero_source, zero_target = np.zeros(source, np.float32), np.zeros(target, np.float32)
    subjects = np.arange(count, dtype=np.int64) // 6
    return Pairs(seen.astype(np.float32), hidden.astype(np.float32), zero_source, zero_target, subjects)


def applied(pairs: Pairs, matrix: Float32) -> Float32:
    """The source templates as `template_adapter` brings them into the target space."""
    source = TemplateSpace(SpaceId("edge", 2, pairs.source.shape[1]), pairs.source_centre)
    target = TemplateSpace(SpaceId("core", 1, pairs.target.shape[1]), pairs.target_centre)
    return adapt(pairs.source, source, mapped_space(target, source.id, matrix))


@pytest.mark.parametrize("method", ["procrustes", "ridge", "best"])
def test_a_turn_is_learnt_and_acts_through_the_template_adapter(method: str) -> None:
    """Where one space is the other turned, the map undoes the turn, and the adapter's result is the own template."""
    pairs = turned(0.0)
    found = fit(pairs, method)  # type: ignore[arg-type]
    own = pairs.target / np.linalg.norm(pairs.target, axis=1, keepdims=True)
    np.testing.assert_allclose(applied(pairs, found.matrix), own, atol=2e-3)
    assert found.cosine_low_1pct > 0.9999
    assert found.rank_1_loss == 0
    assert found.own_pair_rank_1 == 1


def test_procrustes_gives_an_orthogonal_map_whatever_the_noise() -> None:
    """A turn keeps lengths and angles: its rows are orthonormal, or its columns where the target is larger."""
    for source, target in ((24, 24), (24, 16), (16, 24)):
        matrix = fit(turned(0.5, source=source, target=target), "procrustes").matrix.astype(np.float64)
        small = matrix @ matrix.T if target <= source else matrix.T @ matrix
        np.testing.assert_allclose(small, np.eye(min(source, target)), atol=1e-5)


def test_near_stays_with_the_identity_when_the_spaces_already_agree() -> None:
    """For two versions of one model and few pairs, the penalised identity beats a map fitted afresh."""
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    target = rng.standard_normal((60, 48))
    source = target + 0.4 * rng.standard_normal(target.shape)
    centre = np.zeros(48, np.float32)
    pairs = Pairs(source.astype(np.float32), target.astype(np.float32), centre, centre)
    near, afresh = fit(pairs, "near"), fit(pairs, "ridge")
    assert near.cosine_median > afresh.cosine_median + 0.05
    assert fit(pairs, "best").choice.method == "near"


def test_what_is_reported_was_measured_on_subjects_that_the_map_never_saw() -> None:
    """Between spaces that have nothing in common, the fitted pairs look alike and the held-out ones do not."""
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    subjects = np.arange(60, dtype=np.int64).repeat(2)
    centre = np.zeros(100, np.float32)
    # Both pictures of a subject are the same, so a fold that split a subject would give itself away.
    source = rng.standard_normal((60, 100)).repeat(2, axis=0).astype(np.float32)
    target = rng.standard_normal((60, 100)).repeat(2, axis=0).astype(np.float32)
    found = fit(Pairs(source, target, centre, centre, subjects), "ridge")
    own = target / np.linalg.norm(target, axis=1, keepdims=True)
    on_fitted = np.einsum("ij,ij->i", applied(Pairs(source, target, centre, centre), found.matrix), own)
    assert np.median(on_fitted) > 0.5
    assert abs(found.cosine_median) < 0.15
    assert found.rank_1_native == 1
    assert found.rank_1_mapped < 0.1


def test_real_templates_keep_their_rank_1_through_a_space_turned_squashed_and_noisy() -> None:
    """ORL templates of dlib's model, seen from a space made of them: fewer dimensions, a turn, a saturation and noise.
    The map costs no rank-1 on held-out people, and says how far the scores fall."""
    print("seed", SEED)
    with (files("matcher_service.demo") / "orl_templates_dlib128.npz").open("rb") as file, np.load(file) as orl:
        target, subjects = orl["templates"], orl["subject"].astype(np.int64)
    rng = np.random.default_rng(SEED)
    seen = np.tanh(3 * (target - target.mean(axis=0)) @ rng.standard_normal((128, 96)) / np.sqrt(128))
    source = (seen + 0.05 * rng.standard_normal(seen.shape)).astype(np.float32)
    found = fit(Pairs(source, target, source.mean(axis=0), target.mean(axis=0), subjects))
    assert found.matrix.shape == (128, 96)
    assert found.rank_1_native == 1
    assert found.rank_1_loss <= 0.01
    assert 0.7 < found.cosine_median < 0.95


def test_without_subjects_each_pair_is_its_own() -> None:
    """Native rank-1 has no meaning then, and is not given as a number."""
    pairs = turned(0.1)
    found = fit(Pairs(pairs.source, pairs.target, pairs.source_centre, pairs.target_centre), "procrustes")
    assert np.isnan(found.rank_1_native)
    assert np.isnan(found.rank_1_mapped)
    assert not found.held_out_by_subject
    assert found.own_pair_rank_1 > 0.9


def test_a_map_takes_the_place_of_the_one_from_the_same_space() -> None:
    """A space has one map from each other space; the others, the centre and the score table stay."""
    target = TemplateSpace(SpaceId("core", 1, 3), np.ones(3, np.float32))
    other = SpaceId("other", 1, 2)
    once = mapped_space(mapped_space(target, SOURCE, np.ones((3, 24), np.float32)), other, np.ones((3, 2), np.float32))
    twice = mapped_space(once, SOURCE, np.zeros((3, 24), np.float32))
    assert {one.source for one in twice.maps} == {SOURCE, other}
    assert [one.matrix.any() for one in twice.maps if one.source == SOURCE] == [False]
    with pytest.raises(InvalidInput):
        mapped_space(target, SOURCE, np.ones((3, 23), np.float32))


def test_too_few_subjects_and_near_between_dimensions_are_refused() -> None:
    """Nothing could be held out, or no identity exists to be near to."""
    few = turned(0.0, count=6 * (2 * FOLDS - 1))
    with pytest.raises(InvalidInput, match="too few"):
        fit(few)
    with pytest.raises(InvalidInput, match="one dimension"):
        fit(turned(0.0, target=16), "near")


def test_pairs_that_make_no_sense_are_refused_by_name(tmp_path: Path) -> None:
    """The array that is missing, not finite, or of another length is named."""
    good = np.ones((20, 4), np.float32)
    for field, arrays in (
        ("source", {"target": good}),
        ("target", {"source": good, "target": np.full((20, 4), np.nan)}),
        ("pairs", {"source": good, "target": good[:10]}),
        ("pairs", {"source": good, "target": good, "subject": np.arange(3)}),
    ):
        np.savez(tmp_path / "pairs.npz", **arrays)
        with pytest.raises(InvalidInput) as refused:
            read_pairs(tmp_path / "pairs.npz")
        assert refused.value.field == field
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(InvalidInput, match="cannot read"):
        read_pairs(tmp_path / "text.npz")


def test_the_command_writes_the_map_and_says_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`matcher fit-adapter PAIRS OUT --json`: the map as `matcher spaces register --map-from` takes it."""
    pairs = turned(0.2)
    np.savez(tmp_path / "pairs.npz", source=pairs.source, target=pairs.target, subject=pairs.subjects)
    np.save(tmp_path / "centre.npy", pairs.source_centre)
    out = tmp_path / "map.npy"
    centres = ["--source-centre", str(tmp_path / "centre.npy"), "--target-centre", str(tmp_path / "centre.npy")]
    assert program.run(["fit-adapter", str(tmp_path / "pairs.npz"), str(out), *centres, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["held_out_by"] == "subject"
    assert report["rank_1_loss"] == pytest.approx(report["rank_1_native"] - report["rank_1_mapped"])
    np.testing.assert_array_equal(np.load(out), fit(pairs).matrix)
    assert program.run(["fit-adapter", str(tmp_path / "pairs.npz"), str(out), "--method", "magic"]) == 1
    assert "magic is no method" in capsys.readouterr().err
