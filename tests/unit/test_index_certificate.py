"""Law 2, the filter: what is not taken is below the floor, but for a chance of at most 1e-9 per pair."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, kstest

from matcher_service.index import certificate
from matcher_service.index.codes import Codes, CodesBuilder, blocks_for, empty_index, encode, one_list, pack
from matcher_service.index.products import Products
from matcher_service.index.refined import Refined
from matcher_service.index.rotation import Rotation, codebook, draw_rotation
from matcher_service.index.score import norms
from matcher_service.terms import Float32, Float64


def unit(source: np.random.Generator, count: int, dimension: int) -> Float32:
    vectors = source.standard_normal((count, dimension))
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def at_cosine(source: np.random.Generator, rows: Float32, cosine: float) -> Float32:
    """One unit vector for each row, at that cosine to it."""
    wide = rows.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    away = source.standard_normal(rows.shape)
    away -= np.einsum("ij,ij->i", away, wide)[:, None] * wide
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    return np.ascontiguousarray(cosine * wide + np.sqrt(1 - cosine**2) * away, np.float32)


def codes_over(rows: np.ndarray, rotation: Float32, block: int) -> tuple[Codes, CodesBuilder, Float32]:
    """The codes of float16 rows, the builder with their factors, and the decoded rows."""
    builder = CodesBuilder(rows.shape[1], block)
    rotated = rows.astype(np.float32) @ rotation.T
    builder.add(rotated, norms(rows))
    codes = Codes.from_state(rows.shape[1], block, builder.finish(np.empty(0, np.int64)))
    index = codes.indexes[0]
    decoded = index.pq.decode(encode(np.ascontiguousarray(rotated[:, : codes.coded]), rows.shape[1], block).plain)
    return codes, builder, decoded


@pytest.mark.parametrize("dimension", [4, 16, 128, 512, 2048])
def test_the_tail_is_the_exact_beta_tail_in_one_dimension_fewer(dimension: int) -> None:
    half = (dimension - 2) / 2
    for failure in (certificate.FAILURE, 1e-3):
        reach = certificate.tail(dimension, failure)
        share = beta.cdf((1 - reach) / 2, half, half)
        assert share <= failure * (1 + 1e-6)
        assert share >= failure * 0.99 or reach == 1.0


def test_the_allowed_failure_leaves_half_for_undecided_codes() -> None:
    assert 2 * certificate.FAILURE <= 1e-9


@pytest.mark.parametrize(("dimension", "block"), [(64, 1), (64, 2), (64, 4), (64, 5)])
def test_law_2_over_many_rotations_the_estimate_of_a_mate_follows_the_beta_law(dimension: int, block: int) -> None:
    """Row and probe stand still, the rotation is drawn anew each time: the law's t must be Beta distributed."""
    seed = 71 + block
    print(f"seed {seed}")
    source = np.random.default_rng(seed)
    row = unit(source, 1, dimension).astype(np.float16)
    probe = at_cosine(source, row.astype(np.float32), 0.45)
    cosine = float((row.astype(np.float64) @ probe[0].astype(np.float64)).item())
    cosine /= float(norms(row)[0] * norms(probe)[0])
    index = empty_index(one_list(dimension // block * block), codebook(dimension, block))
    rotations = [draw_rotation(dimension, int(source.integers(2**62))) for _ in range(3000)]
    rotated = np.concatenate([row.astype(np.float32) @ rotation.T for rotation in rotations])
    probes = np.concatenate([Rotation(rotation)(probe) for rotation in rotations])
    coded = np.ascontiguousarray(rotated[:, : index.d])
    encoded = encode(coded, dimension, block)
    decoded = index.pq.decode(encoded.plain).astype(np.float64)
    along = np.einsum("ij,ij->i", decoded, coded) / norms(row)[0]
    across = np.sqrt(np.einsum("ij,ij->i", decoded, decoded) - along**2)
    estimates = np.einsum("ij,ij->i", decoded, probes[:, : index.d]) / norms(probe)[0]
    coordinate = (estimates - cosine * along) / (np.sqrt(1 - cosine**2) * across)
    half = (dimension - 2) / 2
    assert kstest((1 + coordinate) / 2, beta(half, half).cdf).pvalue > 1e-4
    # A tail that can be counted: the cut-off at a failure of 2% is missed by about 2% of the rotations.
    lengths = np.repeat(norms(row), len(rotations))
    low, high, _ = certificate.factors(encoded.along, encoded.squared, lengths, dimension)
    reach = certificate.tail(dimension, 0.02)
    missed = np.count_nonzero(estimates < cosine * low - np.sqrt(1 - cosine**2) * high * reach)
    assert 20 <= missed <= 95  # 60 expected, standard deviation 8


def test_a_rotation_is_orthogonal_and_its_signs_are_fair() -> None:
    """Without the sign correction of the QR decomposition, diagonal elements lean to one side."""
    seed = 5
    print(f"seed {seed}")
    source = np.random.default_rng(seed)
    rotation = draw_rotation(96, 1)
    assert np.abs(rotation @ rotation.T - np.eye(96)).max() < 1e-5
    corners = [draw_rotation(8, int(source.integers(2**62)))[0, 0] for _ in range(2000)]
    assert kstest((1 + np.array(corners)) / 2, beta(3.5, 3.5).cdf).pvalue > 1e-4
    determinants = [np.sign(np.linalg.det(draw_rotation(8, int(source.integers(2**62))))) for _ in range(400)]
    assert 140 < determinants.count(1.0) < 260


def test_rotations_come_from_the_operating_system_and_differ() -> None:
    assert not np.array_equal(draw_rotation(16), draw_rotation(16))


def test_rotating_in_float32_stays_within_its_bound() -> None:
    seed = 9
    print(f"seed {seed}")
    source = np.random.default_rng(seed)
    rotation = draw_rotation(512, 3)
    vectors = unit(source, 200, 512)
    true = vectors.astype(np.float64) @ rotation.astype(np.float64).T
    error = np.linalg.norm(Rotation(rotation)(vectors) - true, axis=1).max()
    assert error <= certificate.rotation_error(512)
    assert np.linalg.norm(vectors @ rotation.T - true, axis=1).max() <= certificate.rotation_error(512)


@given(st.integers(0, 2**32), st.floats(0.0, 1.0), st.integers(1, 40))
def test_a_part_s_cut_off_is_never_above_that_of_one_of_its_rows(seed: int, cosine: float, rows: int) -> None:
    source = np.random.default_rng(seed)
    along, across = source.uniform(0.2, 1, rows), source.uniform(0.05, 0.6, rows)
    tail = certificate.tail(512)
    own = cosine * along - np.sqrt(1 - cosine**2) * across * tail
    found = certificate.cut_offs(certificate.support(along, across, tail)[None], np.array([cosine]))[0, 0]
    assert found <= own.min()
    # Nor needlessly low: by less than the rows differ, times half the angle between two directions.
    assert found >= own.min() - 0.8 * np.pi / 4 / (certificate.ANGLES - 1)


def test_cut_offs_rise_with_the_floor() -> None:
    source = np.random.default_rng(2)
    support = certificate.support(source.uniform(0.6, 0.7, 50), source.uniform(0.4, 0.5, 50), certificate.tail(512))
    found = certificate.cut_offs(support[None], np.linspace(0, 1, 300))[0]
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize(("dimension", "block"), [(512, 5), (512, 4), (512, 2), (128, 1)])
def test_law_2_the_range_search_takes_every_row_at_its_cut_off_table_rounding_included(
    dimension: int, block: int
) -> None:
    """Every row whose true estimate is at or above the cut-off is taken, for cut-offs at the very estimates."""
    seed = 31
    print(f"seed {seed}")
    source = np.random.default_rng(seed)
    rows = unit(source, 3000, dimension).astype(np.float16)
    rotation = draw_rotation(dimension, 4)
    codes, _, decoded = codes_over(rows, rotation, block)
    probes = np.concatenate([unit(source, 20, dimension), at_cosine(source, rows[:20].astype(np.float32), 0.5)])
    rotated = Rotation(rotation)(probes)
    estimates = rotated[:, : codes.coded].astype(np.float64) @ decoded.astype(np.float64).T
    span, _, magnitude = certificate.tables(rotated, codes.centroids)
    error = certificate.table_error(span, magnitude, codes.tables)
    taken, wanted = 0, 0
    for cut_off in np.quantile(estimates, [0.9, 0.99, 0.999], axis=1):
        scaled = rotated[:, : codes.coded] / (cut_off - error)[:, None]
        offsets, found = codes.near(0, np.ascontiguousarray(scaled, np.float32))
        for probe in range(len(probes)):
            needed = np.flatnonzero(estimates[probe] >= cut_off[probe])
            assert np.isin(needed, found[offsets[probe] : offsets[probe + 1]]).all()
            wanted += needed.size
            taken += int(offsets[probe + 1] - offsets[probe])
    assert wanted < taken < 5 * wanted


@pytest.mark.parametrize(("dimension", "block"), [(512, 2), (512, 5), (128, 1)])
def test_law_2_the_refined_search_takes_what_the_codes_take_and_the_product_keeps(dimension: int, block: int) -> None:
    """One call with a pair of vectors for each probe finds just the rows that both of its halves ask for."""
    seed = 35
    print(f"seed {seed}")
    source = np.random.default_rng(seed)
    rows = unit(source, 3000, dimension).astype(np.float16)
    rotation = draw_rotation(dimension, 5)
    codes, _, _ = codes_over(rows, rotation, block)
    probes = np.concatenate([unit(source, 8, dimension), at_cosine(source, rows[:8].astype(np.float32), 0.5)])
    products = probes.astype(np.float64) @ rows.astype(np.float64).T
    rotated = Rotation(rotation)(probes)
    cut_off, least = np.float32(0.05), 0.09
    pairs = np.concatenate([probes / np.float32(least), rotated / cut_off], axis=1)
    offsets, found = Refined(codes, Products(rows)).near(0, pairs)
    taken_offsets, taken = codes.near(0, np.ascontiguousarray((rotated / cut_off)[:, : codes.coded]))
    assert 50 < found.size < 0.6 * taken.size
    for probe in range(len(probes)):
        mine = found[offsets[probe] : offsets[probe + 1]]
        by_codes = taken[taken_offsets[probe] : taken_offsets[probe + 1]]
        kept = by_codes[products[probe, by_codes] >= least]
        assert (np.abs(products[probe, np.setxor1d(mine, kept)] - least) < 1e-6).all()


@pytest.mark.parametrize(("dimension", "block"), [(512, 2), (512, 4), (512, 5), (128, 1)])
def test_the_rounding_of_the_tables_is_measured_within_its_bound_and_of_its_size(dimension: int, block: int) -> None:
    seed = 33
    print(f"seed {seed}")
    source = np.random.default_rng(seed)
    rows = unit(source, 2000, dimension).astype(np.float16)
    rotation = draw_rotation(dimension, 8)
    codes, _, decoded = codes_over(rows, rotation, block)
    probes = Rotation(rotation)(unit(source, 30, dimension))
    coded = np.ascontiguousarray(probes[:, : codes.coded])
    estimates, found = codes.indexes[0].search(coded, 500)
    true = np.take_along_axis(coded.astype(np.float64) @ decoded.astype(np.float64).T, found, axis=1)
    span, _, magnitude = certificate.tables(probes, codes.centroids)
    error = certificate.table_error(span, magnitude, codes.tables)
    off = np.abs(estimates - true)
    assert (off <= error[:, None]).all()
    assert off.max() > 0.02 * error.max()
    assert error.max() < 0.08


@pytest.mark.parametrize("block", [256, 8, 5, 4, 2])
def test_packed_codes_are_those_that_faiss_would_write(block: int) -> None:
    source = np.random.default_rng(1)
    quantizer = one_list(512 // block * block)
    index = empty_index(quantizer, codebook(512, block))
    rows = np.ascontiguousarray(unit(source, 150, 512)[:, : index.d])
    index.add(rows)
    mine = pack(index.pq.compute_codes(rows))
    assert np.array_equal(mine, faiss.rev_swig_ptr(index.invlists.get_codes(0), mine.size))


@pytest.mark.parametrize(("dimension", "block"), [(64, 1), (64, 2), (64, 4), (65, 5), (128, 8), (515, 5)])
def test_a_code_depends_on_its_rotated_row_alone_and_is_the_nearest_centroid_or_hardly_farther(
    dimension: int, block: int
) -> None:
    rows = unit(np.random.default_rng(6), 300, dimension)
    encoded = encode(rows, dimension, block)
    alone = [encode(rows[at : at + 1], dimension, block) for at in range(len(rows))]
    assert np.array_equal(encoded.plain, np.concatenate([one.plain for one in alone]))
    centroids = codebook(dimension, block)
    index = empty_index(one_list(dimension), centroids)
    decoded = index.pq.decode(encoded.plain).reshape(-1, block)
    away = ((rows.reshape(-1, 1, block) - centroids[None]) ** 2).sum(axis=2)
    mine = ((rows.reshape(-1, block) - decoded) ** 2).sum(axis=1)
    if block > 2:
        assert np.array_equal(decoded, centroids[away.argmin(axis=1)])
    else:
        assert np.isclose(mine, away.min(axis=1), rtol=1e-4, atol=0).mean() > 0.98
        assert mine.sum() < 1.001 * away.min(axis=1).sum()


@pytest.mark.parametrize(("dimension", "block"), [(64, 1), (512, 2), (512, 5), (512, 8)])
@pytest.mark.parametrize("norm", [0.01, 1.0, 30.0])
def test_what_a_row_s_code_is_worth_is_known_within_its_bound(dimension: int, block: int, norm: float) -> None:
    """Law 2: a is never above, b and the reach never below what float64 finds of the decoded rows."""
    source = np.random.default_rng(12)
    rotated = np.ascontiguousarray(norm * unit(source, 400, dimension), np.float32)
    row_norms = norms(rotated)
    coded = np.ascontiguousarray(rotated[:, : dimension // block * block])
    encoded = encode(coded, dimension, block)
    index = empty_index(one_list(coded.shape[1]), codebook(dimension, block))
    wide = index.pq.decode(encoded.plain).astype(np.float64)
    true = np.einsum("ij,ij->i", wide, coded)
    squared = np.einsum("ij,ij->i", wide, wide)
    allowed = (np.sqrt(squared) * row_norms + squared / 2) * certificate.ENCODING_ERROR
    off = np.abs(encoded.along - true)
    assert (off <= allowed).all()
    assert off.max() > 1e-5 * allowed.min()
    low, high, reach = certificate.factors(encoded.along, encoded.squared, row_norms, dimension)
    assert (reach >= np.sqrt(squared)).all()
    assert (low <= true / row_norms).all()
    assert (high >= np.sqrt(squared - (true / row_norms) ** 2)).all()


def test_codebooks_are_the_same_at_every_training() -> None:
    first = codebook(512, 2).copy()
    codebook.cache_clear()
    assert np.array_equal(codebook(512, 2), first)


def test_no_rate_could_overflow_the_kernel_s_accumulator() -> None:
    for dimension in range(1, 1200):
        for block in blocks_for(dimension):
            assert dimension // block * 255 < 65536


@given(st.integers(0, 2**32))
def test_probes_that_the_law_cannot_serve_are_told(seed: int) -> None:
    floors = np.array([0.4, 0.0, -0.1, -np.inf, np.inf, np.nan, 0.4, 0.4], np.float32)
    probe_norms: Float64 = np.array([1, 1, 1, 1, 1, 1, np.nan, 0.0])
    assert certificate.usable(floors, probe_norms).tolist() == [True] + [False] * 7
