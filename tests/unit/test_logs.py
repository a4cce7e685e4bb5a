"""Law 6 in the log: no call can print a template, in whatever form it is handed one; and what a line always says."""

from __future__ import annotations

import array
import ast
import asyncio
import base64
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import structlog

from matcher_service import logs
from matcher_service.client import Probes
from matcher_service.errors import MatcherError
from matcher_service.terms import SpaceId
from tests.flow.test_no_trace import forms
from tests.running_service import whole_service

PACKAGE = Path(logs.__file__).parent
DIMENSION = 128
ROW = np.random.default_rng(12).normal(size=DIMENSION).astype(np.float32)
BYTES = ROW.tobytes()


@dataclass
class Holder:
    """Prints what it holds."""

    template: Any


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What was logged since, as parsed lines."""
    written = io.StringIO()
    logs.configure("debug", written)
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    structlog.reset_defaults()


PLANTED: dict[str, Any] = {
    "float32 array": ROW,
    "float16 array": ROW.astype(np.float16),
    "float64 array": ROW.astype(np.float64),
    "rows": ROW.reshape(2, -1),
    "column": ROW.reshape(-1, 1),
    "a few values": ROW[:8],
    "bytes": BYTES,
    "bytearray": bytearray(BYTES),
    "memoryview": memoryview(BYTES),
    "array.array": array.array("f", BYTES),
    "list": ROW.tolist(),
    "tuple": tuple(ROW.tolist()),
    "list of array scalars": list(ROW),
    "short list": ROW[:16].tolist(),
    "nested list": ROW.reshape(8, 16).tolist(),
    "list of texts": [str(one) for one in ROW[:40]],
    "list of bytes": list(BYTES),
    "short list of bytes": list(BYTES[:40]),
    "set": set(ROW.tolist()),
    "by place": {str(at): float(one) for at, one in enumerate(ROW)},
    "within": {"probe": {"template": ROW.tolist()}},
    "within, short": {"probe": {"template": ROW[:20].tolist()}},
    "one number": int.from_bytes(BYTES, "little"),
    "generator": (float(one) for one in ROW),
    "map": map(float, ROW),
    "an object that prints it": Holder(ROW),
    "repr of the array": repr(ROW),
    "str of the array": str(ROW),
    "repr of the list": repr(ROW.tolist()),
    "JSON": json.dumps(ROW.tolist()),
    "JSON, indented": json.dumps(ROW.tolist(), indent=1),
    "spaced": " ".join(map(str, ROW)),
    "semicolons": ";".join(f"{one:.5e}" for one in ROW),
    "bytes in figures": " ".join(map(str, BYTES)),
    "base64": base64.b64encode(BYTES).decode(),
    "base64 of float16": base64.b64encode(ROW.astype(np.float16)).decode(),
    "base64 for addresses": base64.urlsafe_b64encode(BYTES).decode(),
    "base64 in lines": base64.encodebytes(BYTES).decode(),
    "base85": base64.b85encode(BYTES).decode(),
    "hexadecimal": BYTES.hex(),
    "hexadecimal, spaced": BYTES.hex(" "),
    "repr of bytes": repr(BYTES),
    "bytes as text": BYTES.decode("latin-1"),
    "repr of the object": repr(Holder(ROW.tolist())),
}


def assert_nothing_of_it(line: str) -> None:
    assert not any(form in line.encode() for form in forms(ROW).values())
    assert BYTES.hex()[40:72] not in line
    assert BYTES.hex(" ")[40:72] not in line
    assert base64.b85encode(BYTES)[40:60].decode() not in line
    assert re.search(rf"(?:{logs._NUMBER}[^\w.+-]+){{8}}", line) is None
    # No line of a template's size, whatever it was made of.
    assert len(line) < 700


@pytest.mark.parametrize("form", PLANTED)
def test_law_6_no_field_prints_a_template(form: str, lines: Callable[[], list[dict[str, Any]]]) -> None:
    structlog.get_logger().error("planted", detail=PLANTED[form], gallery="g")
    (line,) = lines()
    assert (line["event"], line["gallery"]) == ("planted", "g")
    assert "withheld" in json.dumps(line["detail"])
    assert_nothing_of_it(json.dumps(line, ensure_ascii=False))


@pytest.mark.parametrize("form", [name for name, value in PLANTED.items() if isinstance(value, str)])
def test_law_6_no_event_and_no_name_of_a_field_prints_a_template(
    form: str, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    structlog.get_logger().error(f"probe {PLANTED[form]} failed")
    logging.getLogger("a.library").error("probe %s failed", PLANTED[form])
    structlog.get_logger().error("planted", fields={PLANTED[form]: 1})
    for line in lines():
        assert_nothing_of_it(json.dumps(line, ensure_ascii=False))


def test_law_6_no_exception_prints_a_template(lines: Callable[[], list[dict[str, Any]]]) -> None:
    def fails() -> None:
        raise ValueError(f"cannot reshape {ROW.tolist()}")

    try:
        fails()
    except ValueError as error:
        structlog.get_logger().exception("failed")
        structlog.get_logger().error("failed", exc_info=error)
        structlog.get_logger().error("failed", exc_info=(type(error), error, error.__traceback__))
        logging.getLogger("a.library").exception("failed")
    assert len(lines()) == 4
    for line in lines():
        assert line["kind"] == "ValueError"
        assert line["at"][-1].endswith(" fails")
        assert_nothing_of_it(json.dumps(line))


@pytest.mark.parametrize(
    "text",
    [
        "index.memory_bytes_max: the index would need 1,411,380 bytes, of which 1,233,780 for new references",
        "cannot write /var/lib/matcher/index/segments/custody-suite-of-the-northern-area/0000000000000001.seg",
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "partitions 0-63, 70-79, 128-191 are held by nobody",
        "2026-01-02T03:04:05.678901Z: connection to server at 127.0.0.1, port 5432 failed",
    ],
)
def test_what_helps_to_find_a_fault_stays(text: str, lines: Callable[[], list[dict[str, Any]]]) -> None:
    structlog.get_logger().error("fault", detail=text, rows=12, share=0.5, at=["a.py:1 f", "b.py:2 g"], more=None)
    (line,) = lines()
    assert (line["detail"], line["rows"], line["share"], line["more"]) == (text, 12, 0.5, None)
    assert line["at"] == ["a.py:1 f", "b.py:2 g"]
    assert line["level"] == "error"
    assert line["timestamp"].endswith("Z")


# --- what the code itself logs -------------------------------------------------------------------------

NAMES = {
    "after_s", "applied", "at", "detail", "device", "exc_info", "gallery", "hint", "index_sequence", "kind", "log_head",
    "lost", "partitions", "reason", "replica", "rows", "sequence", "sequence_max", "sequence_min", "shard",
    "task", "withdrawn_again",
}  # fmt: skip
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
OF_A_TEMPLATE = re.compile(r"template|probe|vector|embedding|adapted|score|stored|floors|codes|pixels|image|body|data$")


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("_log", "log", "logger", "structlog", "logging")
            ):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def test_every_call_that_logs_names_an_event_and_hands_over_nothing_of_a_template() -> None:
    calls = list(log_calls())
    assert len(calls) > 30
    for place, call in calls:
        assert len(call.args) == 1, place
        event = call.args[0]
        assert isinstance(event, ast.Constant), place
        assert re.fullmatch(r"[a-z_]+", event.value), place
        for keyword in call.keywords:
            assert keyword.arg in NAMES, (place, keyword.arg)
            # The number of something is not the thing.
            counted = [
                node.args[0]
                for node in ast.walk(keyword.value)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len"
            ]
            inside = {id(node) for one in counted for node in ast.walk(one)}
            for node in ast.walk(keyword.value):
                name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
                assert id(node) in inside or not OF_A_TEMPLATE.search(name), (place, name)


def test_nothing_logs_past_the_one_place_that_judges_lines() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if path.name == "logs.py":
            continue
        assert "structlog.configure" not in text, path
        assert not re.search(r"^import logging|^from logging", text, re.MULTILINE), path


# --- ids -------------------------------------------------------------------------------------------------


async def test_lines_name_the_request_and_the_deployment_and_the_caller_is_told_the_request(
    tmp_path: Path, lines: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with whole_service(tmp_path) as service:
        space = await service.space(8)
        await service.gallery("g", space)
        await service.deployment("g", deployment_id="op-1")

        async def fails(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"a defect, with {ROW.tolist()}")

        monkeypatch.setattr(service.running.service.admit.__self__._batcher, "submit", fails)
        url = f"http://127.0.0.1:{service.running.http_port}"
        headers = {"Authorization": f"Bearer {service.running.token}"}
        async with httpx.AsyncClient(base_url=url, headers=headers) as http:
            probe = {"probe_id": "p", "template": [1.0] * 8, "captured_at_ms": 2**42}
            body = {
                "space": {"name": "test", "version": 1, "dimension": 8},
                "dtype": "float32",
                "probes": [probe],
                "deployment_id": "op-1",
            }
            probe["captured_at_ms"] = service.running.service.clock.wall_ms()
            answers = await asyncio.gather(*(http.post("/v1/identify", json=body) for _ in range(2)))
        with pytest.raises(MatcherError):
            await ask_once(service, space)
    told = [answer.headers["x-request-id"] for answer in answers]
    assert [answer.status_code for answer in answers] == [500, 500]
    unexpected = [line for line in lines() if line["event"] == "unexpected"]
    assert {line["request_id"] for line in unexpected[:2]} == set(told)
    assert len({line["request_id"] for line in unexpected}) == 3
    assert {line["deployment_id"] for line in unexpected} == {"op-1"}
    assert {line["kind"] for line in unexpected} == {"RuntimeError"}
    assert all("a defect" not in json.dumps(line) for line in lines())


async def ask_once(service: Any, space: SpaceId) -> None:
    await service.client.identify(
        Probes(
            space=space,
            probe_ids=["p"],
            templates=np.ones((1, 8), np.float32),
            captured_at_ms=[service.running.service.clock.wall_ms()],
            deployment_id="op-1",
        )
    )
