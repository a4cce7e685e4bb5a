"""Law 6: nothing of a probe without a candidate outlives its response, and no template of one that alerted."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import orjson
import pytest
import structlog
from numpy.typing import NDArray

from matcher_service import logs
from matcher_service.terms import Outcome
from tests.running_service import whole_service

DIMENSION = 64
PROBES = 400


def forms(template: NDArray[np.float32]) -> dict[str, bytes]:
    """Byte strings by which a template would be found; the textual ones by their distinctive middle."""
    single, half = template.astype("<f4").tobytes(), template.astype("<f2").tobytes()
    numbers = orjson.dumps(template.tolist())
    return {
        "float32": single[16:48],
        "float16": half[16:48],
        # base64 depends on the offset modulo 3: any of the three alignments
        **{f"base64 float32 +{at}": base64.b64encode(single[at:])[4:44] for at in range(3)},
        **{f"base64 float16 +{at}": base64.b64encode(half[at:])[4:44] for at in range(3)},
        "JSON numbers": numbers[20:80],
    }


def traces(folder: Path, wanted: list[dict[str, bytes]]) -> set[str]:
    """Names of the forms found in any file below the folder."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found |= {name for one in wanted for name, form in one.items() if form in content}
    return found


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def everything_logged() -> Iterator[None]:
    logs.configure("debug")
    yield
    # The next test's standard error is another file.
    structlog.reset_defaults()


@pytest.mark.usefixtures("everything_logged")
async def test_law_6_no_form_of_any_probe_is_in_any_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(6)
    centre = rng.normal(size=DIMENSION).astype(np.float32) * 0.1
    probes = rng.normal(size=(PROBES, DIMENSION)).astype(np.float32)
    enrolled = rng.normal(size=(50, DIMENSION)).astype(np.float32)
    # Five probes that alert: their templates are not kept either.
    probes[-5:] = enrolled[:5] + 0.01 * rng.normal(size=(5, DIMENSION))
    adapted = unit((probes - centre).astype(np.float64))
    wanted = [forms(row) for row in (*probes, *adapted)]
    data_dir = tmp_path / "data"

    # The search proves itself: one of each form, planted in the middle of a file, is found.
    planted = tmp_path / "planted"
    planted.mkdir()
    for row in (probes[3], adapted[5]):
        for name, form in forms(row).items():
            (planted / "file").write_bytes(b"x" * 1001 + form + b"y" * 77)
            assert name in traces(planted, wanted)

    async with whole_service(data_dir) as service:
        space = await service.space(DIMENSION, centre)
        await service.gallery("g", space, threshold=0.95)
        await service.enrol("g", space, enrolled, [f"r{at}" for at in range(50)])
        await service.deployment("g")
        await service.case("g")
        streamed = await service.ask(space, probes)
        cased = await service.ask(space, probes[:50], case_reference="case-1")
        outcomes = [streamed[f"p{at}"].decision.outcome for at in range(PROBES)]
        assert outcomes == [Outcome.NO_CANDIDATE] * (PROBES - 5) + [Outcome.ALERT] * 5
        assert {one.decision.outcome for one in cased.values()} == {Outcome.NO_CANDIDATE}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.running.http_port}") as http:
            for at, probe in enumerate(probes[:20]):
                template = probe.tolist() if at % 2 else base64.b64encode(probe.astype("<f4").tobytes()).decode()
                answer = await http.post(
                    "/v1/identify",
                    headers={"Authorization": f"Bearer {service.running.token}"},
                    json={
                        "space": {"name": space.name, "version": space.version, "dimension": space.dimension},
                        "dtype": "float32",
                        "probes": [{"probe_id": f"h{at}", "template": template, "captured_at_ms": 0}],
                        "case_reference": "case-1",
                    },
                )
                assert answer.status_code == 200, answer.text
            metrics = (await http.get("/metrics")).content
        # the index too is on disk before the search for traces
        assert traces(data_dir, wanted) == set()
        assert not any(form in metrics for one in wanted for form in one.values())
    assert traces(data_dir, wanted) == set()
    printed = capfd.readouterr()
    said = (printed.out + printed.err).encode()
    assert not any(form in said for one in wanted for form in one.values())
    # and the audit of the cases is there, without them
    assert any(path.stat().st_size for path in data_dir.rglob("*") if path.is_file())
