"""What every Scanner owes, owed by the GPU scanner too: the tests of tests/contract/test_scanners.py, run on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from matcher_service.index.flat import FlatScanner
from matcher_service.index.scanner import Scanner
from tests.contract import test_scanners as contract
from tests.gpu.chips import Breakable, scanners_on

# What tells a tail from a segment is how its codes came to be; these tests look at enough of them.
ON_TAILS = {
    "test_law_2_rows_that_are_not_unit_vectors_are_served_too",
    "test_law_2_any_gallery_any_probe_any_floor",
    "test_law_2_floors_of_every_kind_stand_in_one_batch",
    "test_a_guess_gives_true_scores_of_as_many_different_rows_as_wanted",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make" in metafunc.fixturenames:
        kinds = ["segment", "tail"] if metafunc.function.__name__ in ON_TAILS else ["segment"]
        metafunc.parametrize("make", kinds, indirect=True)


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[np.ndarray], Scanner]]:
    scanners = scanners_on([Breakable()])

    def appended(stored: np.ndarray) -> Scanner:
        """Rows that came in three times."""
        tail = scanners.growing(stored.shape[1])
        assert tail is not None
        for some in np.array_split(stored, 3):
            tail.append(some)
        return tail.view(stored, FlatScanner(stored))

    yield scanners.build if request.param == "segment" else appended
    scanners.close()


globals().update(
    {
        name: test
        for name, test in vars(contract).items()
        if name.startswith("test_") and "make" in inspect.signature(test).parameters
    }
)
