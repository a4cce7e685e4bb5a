"""The order of candidates and the joining of partial results."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.merge import best_candidates, kth_best_scores, merge, offsets_of, order_of
from matcher_service.terms import SearchResult

GALLERIES = ("b", "a", "ä")

hits = st.lists(
    st.tuples(
        st.sampled_from((0.0, 0.25, 0.5, 1.0)),  # score
        st.integers(0, 2),  # gallery
        st.sampled_from(("r", "s", "é", "z")),  # reference
        st.sampled_from(("one", "two", "three")),  # subject
    ),
    max_size=8,
)
Hit = tuple[float, int, str, str]


def naive(found: list[Hit], rank_max: int) -> list[Hit]:
    """One subject of a gallery after another, best first."""
    ordered = sorted(found, key=lambda hit: (-hit[0], GALLERIES[hit[1]].encode(), hit[2].encode()))
    kept: list[Hit] = []
    for hit in ordered:
        if all((one[1], one[3]) != (hit[1], hit[3]) for one in kept):
            kept.append(hit)
    return kept[:rank_max]


def result_of(per_probe: list[list[Hit]], sequence: int, missing: tuple[str, ...]) -> SearchResult:
    ordered = [naive(found, 100) for found in per_probe]
    flat = [hit for found in ordered for hit in found]
    return SearchResult(
        np.cumsum([0, *map(len, ordered)]),
        np.array([hit[1] for hit in flat], np.int64),
        np.array([hit[0] for hit in flat], np.float32),
        [hit[2] for hit in flat],
        [hit[3] for hit in flat],
        sequence,
        missing,
        1,
        2,
    )


@given(
    st.lists(st.tuples(hits, hits), min_size=0, max_size=4),
    st.lists(st.integers(1, 4), min_size=2, max_size=2),
    st.permutations(range(4)),
)
def test_merging_is_sorting_everything_and_keeping_each_subject_once(
    shards: list[tuple[list[Hit], list[Hit]]], rank_max: list[int], order: list[int]
) -> None:
    """Whatever the order of the shards; ties by UTF-8 bytes."""
    # References that tie in everything would be in no order: no gallery holds one twice.
    seen: set[tuple[int, int, str]] = set()
    unique = [
        [
            [hit for hit in found if (probe, hit[1], hit[2]) not in seen and not seen.add((probe, hit[1], hit[2]))]
            for probe, found in enumerate(pair)
        ]
        for pair in shards
    ]
    results = [result_of(pair, 10 + number, (f"part {number % 2}",)) for number, pair in enumerate(unique)]
    permuted = [results[number] for number in order if number < len(results)]
    merged = merge(permuted, GALLERIES, np.array(rank_max))
    for probe in range(2):
        here = slice(*merged.offsets[probe : probe + 2].tolist())
        assert [
            (float(score), int(gallery), reference, subject)
            for score, gallery, reference, subject in zip(
                merged.scores[here],
                merged.gallery[here],
                merged.reference_ids[here],
                merged.subject_ids[here],
                strict=True,
            )
        ] == naive([hit for pair in unique for hit in pair[probe]], rank_max[probe])
    assert merged.sequence == min((one.sequence for one in results), default=0)
    assert set(merged.missing) == {part for one in results for part in one.missing}
    assert (merged.certified, merged.scanned) == (len(results), 2 * len(results))


def test_what_two_shards_hold_is_as_the_newer_one_says() -> None:
    """While a partition changes hands a reference is found twice, perhaps by a shard that has not yet seen its
    replacement: neither its old score nor its old subject counts, whatever the order of the answers."""
    old = result_of([[(1.0, 0, "r", "one"), (0.25, 1, "r", "one")]], 6, ())
    new = result_of([[(0.5, 0, "r", "two"), (0.25, 0, "s", "two"), (0.25, 1, "r", "one")]], 7, ())
    for answers in ([old, new], [new, old]):
        merged = merge(answers, GALLERIES, np.array([5]))
        assert list(zip(merged.reference_ids, merged.subject_ids, merged.scores.tolist(), strict=True)) == [
            ("r", "two", 0.5),
            ("r", "one", 0.25),
        ]
        assert merged.sequence == 6


@given(hits, st.integers(1, 4))
def test_subjects_whose_hashes_collide_stay_two(found: list[Hit], rank_max: int) -> None:
    """Here all of them do. The floor drawn from hashes is then only lower than it might be."""
    names: set[tuple[int, str]] = set()
    found = [hit for hit in found if (hit[1], hit[2]) not in names and not names.add((hit[1], hit[2]))]
    count = len(found)
    probes, scores = np.zeros(count, np.int64), np.array([hit[0] for hit in found], np.float32)
    gallery, hashes = np.array([hit[1] for hit in found], np.int64), np.zeros(count, np.uint32)
    kept = best_candidates(
        probes,
        gallery,
        scores,
        hashes,
        reference_of=lambda hit: found[hit][2].encode(),
        subject_of=lambda hit: found[hit][3].encode(),
        gallery_order=order_of(GALLERIES),
        rank_max=np.array([rank_max]),
    )
    expected = naive(found, rank_max)
    assert [found[hit] for hit in kept] == expected
    kth = kth_best_scores(probes, gallery, scores, hashes, np.array([rank_max]))
    assert kth[0] <= (expected[-1][0] if len(expected) == rank_max else -np.inf)


@given(hits, st.integers(1, 4))
def test_the_kth_best_score_is_that_of_the_last_candidate(found: list[Hit], rank_max: int) -> None:
    """-inf where there are fewer subjects than wanted."""
    subjects = ("one", "two", "three")
    kth = kth_best_scores(
        np.zeros(len(found), np.int64),
        np.array([hit[1] for hit in found], np.int64),
        np.array([hit[0] for hit in found], np.float32),
        np.array([subjects.index(hit[3]) for hit in found], np.uint32),
        np.array([rank_max]),
    )
    expected = naive(found, rank_max)
    assert kth[0] == (expected[-1][0] if len(expected) == rank_max else -np.inf)


def test_offsets_count_every_probe() -> None:
    """Those without hits too."""
    assert offsets_of(np.array([1, 1, 3]), 5).tolist() == [0, 0, 2, 2, 3, 3]
