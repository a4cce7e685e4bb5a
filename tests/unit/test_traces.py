"""Traces as a collector receives them: one span a station, batches linked, and nothing that names anybody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from matcher_service.client import Probes
from matcher_service.clock import SystemClock
from matcher_service.errors import MatcherError
from matcher_service.settings import TraceSettings
from matcher_service.terms import SpaceId
from matcher_service.traces import NoTraces, name_trace, traces_for
from tests.running_service import WholeService, whole_service

DIMENSION = 32
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATIONS = {"decode", "policy", "admission", "batching_and_search", "audit"}
OF_A_BATCH = {"template_adapter", "shards", "score_calibrator"}


class Collector:
    """Takes traces in over OTLP, as a real one does."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                outer.received.append(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for body in self.received
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    yield one
    one.close()


async def asked(service: WholeService, space: SpaceId, rows: np.ndarray, **more: Any) -> None:
    now = SystemClock().wall_ms()
    names = [f"sighting-{row}" for row in range(len(rows))]
    given: dict[str, Any] = {"deployment_id": "op-harbour"} | more
    await service.client.identify(
        Probes(space=space, probe_ids=names, templates=rows, captured_at_ms=[now] * len(rows), **given)
    )


async def test_a_message_is_traced_through_every_station_and_law_6_names_nobody(
    tmp_path: Path, collector: Collector
) -> None:
    people = np.random.default_rng(3).standard_normal((8, DIMENSION)).astype(np.float32)
    async with whole_service(tmp_path, traces={"otlp_endpoint": collector.endpoint, "share": 0.0}) as service:
        space = await service.space(DIMENSION)
        await service.gallery("wanted-people", space, threshold=0.9)
        await service.deployment("wanted-people", deployment_id="op-harbour")
        await service.enrol("wanted-people", space, people, [f"custody-{row}" for row in range(8)])
        # Nobody asked for a trace of this one, and the share is 0.
        await asked(service, space, people)
        await asked(service, space, people, traceparent=CALLER)
        with pytest.raises(MatcherError):
            await asked(service, space, people, traceparent=CALLER, gallery_ids=["elsewhere"])
        accept = {"Accept": "application/openmetrics-text"}
        http_port = service.running.http_port
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", headers=accept) as http:
            exposed = (await http.get("/metrics")).text
            before_strangers = exposed.count("# {trace_id=")
            await asked(service, space, -people, traceparent=CALLER)
            assert (await http.get("/metrics")).text.count("# {trace_id=") == before_strangers == 1
    spans = collector.spans
    messages = [span for span in spans if span.name == "identify"]
    assert len(messages) == 3
    assert all(span.trace_id.hex() == CALLER.split("-")[1] for span in messages)
    assert all(span.parent_span_id.hex() == CALLER.split("-")[2] for span in messages)
    causes = [
        attribute.value.string_value
        for span in messages
        for attribute in span.attributes
        if attribute.key == "matcher.cause"
    ]
    assert causes == ["UNKNOWN_GALLERY"]
    alerted = next(span for span in messages if any(one.name == "audit" for one in children(spans, span)))
    assert {span.name for span in children(spans, alerted)} == STATIONS
    batches = [span for span in spans if span.name == "batch"]
    linked = {link.span_id for batch in batches for link in batch.links}
    assert {span.span_id for span in spans if span.name == "batching_and_search"} == linked
    assert all({span.name for span in children(spans, batch)} == OF_A_BATCH for batch in batches)
    sent = b"".join(collector.received)
    assert b"identify" in sent
    for name in (b"sighting-", b"custody-", b"wanted-people", b"op-harbour", b"elsewhere"):
        assert name not in sent
    assert {attribute.key for span in spans for attribute in span.attributes} == {"matcher.rows", "matcher.cause"}


def children(spans: list[Span], parent: Span) -> list[Span]:
    return [span for span in spans if span.parent_span_id == parent.span_id]


def test_without_an_endpoint_nothing_is_traced_and_no_line_of_the_log_has_a_trace() -> None:
    traces = traces_for(TraceSettings(), SystemClock())
    assert isinstance(traces, NoTraces)
    with traces.message("identify", CALLER, 0.0, 1), traces.station("policy"):
        assert traces.here() is None
        assert traces.exemplar() is None
        assert name_trace(None, "info", {"event": "x"}) == {"event": "x"}


def test_a_line_of_the_log_carries_the_trace_under_way(collector: Collector) -> None:
    traces = traces_for(TraceSettings(otlp_endpoint=collector.endpoint, share=1.0), SystemClock())
    with traces.message("identify", CALLER, SystemClock().monotonic(), 1):
        line = name_trace(None, "info", {"event": "x"})
    traces.close()
    assert line["trace_id"] == CALLER.split("-")[1]
    assert line["span_id"] == next(span.span_id.hex() for span in collector.spans if span.name == "identify")
