"""One real tritonserver for the session, over the repository's own models as they are assembled for a CPU; and one real
PostgreSQL server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from matcher_service.models.repository import assemble
from tests.cluster import served_postgres
from tests.cluster.served_triton import ServedTriton
from tests.cluster.server_environment import ROOT, CannotServe, ServerEnvironment, prepare

if TYPE_CHECKING:
    from tests.cluster.hosted_shard import ServedShard

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


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[served_postgres.ServedPostgres]:
    """One real PostgreSQL server for the session; a test makes itself a database on it (`create`) and drops it. Tests
    that stop or kill the server have their own (`served_postgres.served_postgres`)."""
    try:
        if find_spec("psycopg") is None:
            raise served_postgres.CannotServe("psycopg is not installed; make test-cluster installs what is needed")
        served_postgres.programs()
    except served_postgres.CannotServe as reason:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no PostgreSQL: {reason}")
        pytest.skip(f"no PostgreSQL: {reason}")
    with served_postgres.served_postgres() as served:
        yield served


@pytest.fixture
def postgres_url(postgres_server: served_postgres.ServedPostgres) -> Iterator[str]:
    """The address of an empty database of the test's own."""
    name = f"test_{uuid.uuid4().hex}"
    yield postgres_server.create(name)
    postgres_server.drop(name)


@pytest.fixture(scope="session")
def served_shard(
    server_environment: ServerEnvironment,
    postgres_server: served_postgres.ServedPostgres,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServedShard]:
    """A gallery_shard that owns every partition, and the log that it follows, which tests may empty and fill."""
    # Imported only where there is a server: the default tests run without the client.
    from tests.cluster.hosted_shard import served_shard as serve

    name = f"shard_{uuid.uuid4().hex}"
    folder = tmp_path_factory.mktemp("shard")
    with serve(server_environment, folder, postgres_server.create(name)) as served:
        yield served
    postgres_server.drop(name)


def weights_folder() -> Path:
    """Where the tests' own environment has the embedder's weights; the server's reads them there."""
    spec = find_spec("face_recognition_models")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / "models"


def repository_for_cpu(into: Path) -> Path:
    """The models as `matcher triton-repository` assembles them for a machine without a GPU."""
    return assemble(MODELS, into, parameters={"files_dir": str(weights_folder())})
