"""A real server whose Python backend and numpy do not fit together, and ones that fail: none answers wrongly."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from matcher_service.errors import ModelsUnavailable, StartRefused
from matcher_service.models.repository import assemble
from matcher_service.models.template_adapter import adapt
from matcher_service.models.triton import TritonModels
from matcher_service.terms import ScoreTable, SpaceId, TemplateSpace
from matcher_service.triton_endpoints import TritonAddress, TritonEndpoints
from tests.cluster.fixtures import MODELS
from tests.cluster.served_triton import ServedTriton, ServerDied
from tests.cluster.server_environment import ServerEnvironment

pytestmark = pytest.mark.cluster

PLAIN = ("template_adapter", "score_calibrator")
SPACE = TemplateSpace(SpaceId("main", 1, 32), np.linspace(-1, 1, 32, dtype=np.float32))
TEMPLATES = np.random.default_rng(3).standard_normal((40, 32)).astype(np.float32)

# As a model without any of our checks would be written.
UNCHECKED = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            rows = pb_utils.get_input_tensor_by_name(request, "TEMPLATES").as_numpy()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("ADAPTED", rows * 2)]))
        return answers
"""


@asynccontextmanager
async def models_at(
    *endpoints: str, call_s_max: float = 5.0, attempt_s_max: float = 2.0
) -> AsyncIterator[TritonModels]:
    way = TritonEndpoints(TritonAddress(endpoints, call_s_max, attempt_s_max))
    try:
        models = TritonModels(way)
        await models.register(SPACE)
        yield models
    finally:
        await way.close()


def numpy_2_before(folder: Path, model: Path) -> None:
    """Let this model of a copied repository import the tests' own numpy, which is a 2, instead of the server's."""
    spec = importlib.util.find_spec("numpy")
    assert spec is not None
    assert spec.origin is not None
    packages = Path(spec.origin).parents[1]
    folder.mkdir()
    for name in ("numpy", "numpy.libs"):
        (folder / name).symlink_to(packages / name)
    text = model.read_text().replace("from __future__ import annotations\n", "")
    model.write_text(f"import sys\nsys.path.insert(0, {str(folder)!r})\n{text}")


def test_a_model_refuses_to_be_ready_with_a_numpy_that_harms_its_tensors(
    server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    """With numpy 2 this server fills every input with its first element: the model says so and does not load."""
    assert np.__version__.startswith("2."), "this test needs numpy 2 on its own side"
    made = assemble(MODELS, tmp_path / "models", models=PLAIN)
    numpy_2_before(tmp_path / "numpy2", made / "template_adapter/1/model.py")
    served = ServedTriton(server_environment, made, tmp_path / "server.log")
    with pytest.raises(ServerDied):
        served.start()
    log = served.log_file.read_text(errors="replace")
    assert "tensors do not arrive as they were sent" in log
    assert "needs another numpy than 2." in log


async def test_a_server_that_answers_wrong_values_is_found_out_before_it_is_used(
    server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    """Models without our checks do become ready on numpy 2; the client's known values tell on them."""
    made = assemble(MODELS, tmp_path / "models", models=PLAIN)
    shutil.rmtree(made / "template_adapter/warmup")
    config = made / "template_adapter/config.pbtxt"
    config.write_text(config.read_text().partition("model_warmup")[0])
    model = made / "template_adapter/1/model.py"
    model.write_text(UNCHECKED)
    numpy_2_before(tmp_path / "numpy2", model)
    served = ServedTriton(server_environment, made, tmp_path / "server.log")
    served.start()
    try:
        way = TritonEndpoints(TritonAddress((served.grpc_endpoint,), 10.0, 10.0))
        with pytest.raises(StartRefused) as refused:
            await TritonModels.open(way)
        await way.close()
        assert "numpy" in refused.value.hint
    finally:
        served.stop()


async def test_a_server_that_was_killed_serves_again_when_it_is_back(
    server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    """SIGKILL: calls fail as ModelsUnavailable within their deadline. Started again on its ports, the server has
    forgotten every record, asks for it, and answers the same bits through the same client."""
    made = assemble(MODELS, tmp_path / "models", models=PLAIN)
    served = ServedTriton(server_environment, made, tmp_path / "server.log")
    served.start()
    expected = adapt(TEMPLATES, SPACE, SPACE).tobytes()
    try:
        async with models_at(served.grpc_endpoint, call_s_max=20.0, attempt_s_max=20.0) as models:
            assert (await models.adapt(SPACE.id, SPACE.id, TEMPLATES)).tobytes() == expected
            served.kill()
            with pytest.raises(ModelsUnavailable) as refused:
                await models.adapt(SPACE.id, SPACE.id, TEMPLATES)
            assert refused.value.retryable
            await asyncio.to_thread(served.start)
            until = time.monotonic() + 30
            while True:
                try:
                    again = await models.adapt(SPACE.id, SPACE.id, TEMPLATES)
                    break
                except ModelsUnavailable:
                    # The channel waits up to a second before it dials again.
                    assert time.monotonic() < until
                    await asyncio.sleep(0.1)
            assert again.tobytes() == expected
    finally:
        served.stop()


async def test_with_two_endpoints_the_loss_of_one_costs_no_answer(
    served_models: ServedTriton, server_environment: ServerEnvironment, tmp_path: Path
) -> None:
    """A server that stands still (SIGSTOP), then is gone (SIGKILL), is passed over within the call's deadline."""
    made = assemble(MODELS, tmp_path / "models", models=PLAIN)
    second = ServedTriton(server_environment, made, tmp_path / "server.log")
    second.start()
    expected = adapt(TEMPLATES, SPACE, SPACE).tobytes()
    endpoints = (served_models.grpc_endpoint, second.grpc_endpoint)
    try:
        async with models_at(*endpoints, call_s_max=20.0, attempt_s_max=0.5) as models:
            for loss in (None, signal.SIGSTOP, signal.SIGKILL):
                if loss is not None:
                    second.send(loss)
                for _ in range(4):
                    assert (await models.adapt(SPACE.id, SPACE.id, TEMPLATES)).tobytes() == expected
    finally:
        second.kill()


async def test_an_endpoint_that_accepts_and_never_answers_costs_no_more_than_the_deadline() -> None:
    """A listener that says nothing is given up on when the call's time is over, and the refusal says what to check."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with models_at(f"127.0.0.1:{silent.getsockname()[1]}", call_s_max=0.3, attempt_s_max=0.2) as models:
            async with asyncio.timeout(20):
                with pytest.raises(ModelsUnavailable) as refused:
                    await models.adapt(SPACE.id, SPACE.id, TEMPLATES)
    assert refused.value.hint
    assert refused.value.retry_after_ms


async def test_many_callers_of_many_spaces_each_get_their_own_answer(served_models: ServedTriton) -> None:
    """Requests that Triton batches together do not mix, whatever spaces and sizes they are of."""
    seed = 11
    print("seed", seed)
    rng = np.random.default_rng(seed)
    spaces = [
        TemplateSpace(
            SpaceId(f"space{number}", 1, 16 + 8 * (number % 2)),
            rng.standard_normal(16 + 8 * (number % 2)).astype(np.float32),
            score_table=ScoreTable((0.0, 0.5), (1.0, 10.0 ** -(number + 2)), "made up"),
        )
        for number in range(6)
    ]
    async with models_at(served_models.grpc_endpoint, call_s_max=30.0, attempt_s_max=30.0) as models:
        for one in spaces:
            await models.register(one)

        async def caller(number: int) -> None:
            space = spaces[number % len(spaces)]
            rows = rng.standard_normal((1 + number % 7, space.id.dimension)).astype(np.float32)
            adapted = await models.adapt(space.id, space.id, rows)
            assert adapted.tobytes() == adapt(rows, space, space).tobytes()
            rates = await models.false_match_rates(space.id, np.full(number + 1, 0.9, np.float32))
            np.testing.assert_allclose(rates, np.full(number + 1, 10.0 ** -(number % len(spaces) + 2)), rtol=1e-12)

        async with asyncio.TaskGroup() as callers:
            for number in range(60):
                callers.create_task(caller(number))
