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


@pytest.fixture(params=["gpu segment", "gpu tail"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[np.ndarray], Scanner]]:
    scanners = scanners_on([Breakable()])

    def appended(stored: np.ndarray) -> Scanner:
        """Rows that came in three times."""
        tail = scanners.growing(stored.shape[1])
        assert tail is not None
        for some in np.array_split(stored, 3):
            tail.append(some)
        return tail.view(stored, FlatScanner(stored))

    yield scanners.build if request.param == "gpu segment" else appended
    scanners.close()


globals().update(
    {
        name: test
        for name, test in vars(contract).items()
        if name.startswith("test_") and "make" in inspect.signature(test).parameters
    }
)
