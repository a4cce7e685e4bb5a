"""The mathematics and the index with the numpy of a Triton server, which is below 2."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.cluster.server_environment import ROOT, ServerEnvironment

pytestmark = pytest.mark.cluster

# What a Triton server runs of this package, and so what must hold there too.
SUITES = (
    "tests/contract/test_models.py",
    "tests/contract/test_scanners.py",
    "tests/contract/test_shards.py",
    "tests/unit/test_models_card.py",
    "tests/unit/test_models_hosted.py",
    "tests/unit/test_models_score_calibrator.py",
    "tests/unit/test_models_template_adapter.py",
    "tests/unit/test_index_certificate.py",
    "tests/unit/test_index_choose.py",
    "tests/unit/test_index_engine.py",
    "tests/unit/test_index_score.py",
    "tests/unit/test_index_shares.py",
    "tests/unit/test_merge.py",
    "tests/unit/test_partitions.py",
    "tests/unit/test_segment_file.py",
    "tests/unit/test_shards_exchange.py",
    "tests/unit/test_shards_following.py",
)


@pytest.mark.timeout(600)
def test_the_laws_of_models_and_index_hold_with_numpy_1(server_environment: ServerEnvironment) -> None:
    """Index, models and contract suites pass in the server's environment as they do in the service's."""
    python = str(server_environment.python)
    version = subprocess.run([python, "-c", "import numpy; print(numpy.__version__)"], capture_output=True, text=True)
    assert version.stdout.startswith("1.26"), version.stderr
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-m", "not cluster and not slow", "-p", "no:cacheprovider", *SUITES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-1000:]}"
