"""A threshold follows from the share of unmated probes that may alert, over all references together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.demo.thresholds import Part, fpir_limit, threshold_for_fpir
from matcher_service.errors import InvalidInput
from matcher_service.models.score_calibrator import false_match_rates, threshold_for_rate
from matcher_service.terms import ScoreTable

NARROW = ScoreTable((-0.2, 0.3, 0.5), (1.0, 1e-3, 1e-6), "made up")
WIDE = ScoreTable((-0.2, 0.4, 0.7), (1.0, 1e-3, 1e-7), "made up")


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(-1, 1, width=32))
def test_the_limit_is_that_of_no_false_candidate_among_any_of_the_references(
    narrow: int, wide: int, threshold: float
) -> None:
    """1 - (1 - a)^m (1 - b)^n, as Python's own arithmetic has it."""
    a, b = (float(false_match_rates(table, [threshold])[0]) for table in (NARROW, WIDE))
    expected = 1 - (1 - a) ** narrow * (1 - b) ** wide
    assert fpir_limit([Part(NARROW, narrow), Part(WIDE, wide)], threshold) == pytest.approx(expected, abs=1e-9)


@given(st.integers(1, 5000), st.integers(0, 100_000), st.floats(0.02, 0.9))
def test_the_threshold_is_the_least_one_that_keeps_the_promise(narrow: int, wide: int, wanted: float) -> None:
    """At the threshold the limit is within what was wanted; one float32 step below it is not."""
    parts = [Part(NARROW, narrow), Part(WIDE, wide)]
    threshold = threshold_for_fpir(parts, wanted)
    assert np.float32(threshold) == threshold
    assert fpir_limit(parts, threshold) <= wanted
    assert fpir_limit(parts, float(np.nextafter(np.float32(threshold), np.float32(-2)))) > wanted


def test_more_references_need_a_higher_threshold() -> None:
    """The same promise over a hundred times as many references."""
    thresholds = [threshold_for_fpir([Part(WIDE, count)], 0.05) for count in (10, 1000, 100_000)]
    assert thresholds == sorted(set(thresholds))


def test_over_a_single_reference_the_promise_is_the_false_match_rate() -> None:
    """The two ways to a threshold agree where they must."""
    assert threshold_for_fpir([Part(WIDE, 1)], 1e-3) == pytest.approx(threshold_for_rate(WIDE, 1e-3), abs=1e-7)


def test_a_promise_that_the_data_cannot_support_is_refused_with_what_they_can() -> None:
    """No threshold is invented beyond the last measured rate."""
    with pytest.raises(InvalidInput) as refused:
        threshold_for_fpir([Part(NARROW, 1_000_000)], 0.05)
    assert refused.value.field == "fpir"
    assert "0.632" in refused.value.detail
