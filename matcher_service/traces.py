"""Traces of messages through the stations, off by default; OpenTelemetry's words and wire (OTLP over HTTP).

A message is one span, each station it passes a child, and a batch a span that links to all the messages in it.
Attributes are counts and causes. Nothing in them names a person, a probe, a reference or a camera, and exceptions are
not recorded, because their texts may (law 6).
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from matcher_service.errors import MatcherError, StartRefused
from matcher_service.seams import Clock
from matcher_service.settings import TraceSettings


class Traces(Protocol):
    def message(self, name: str, traceparent: str, received_at: float, rows: int) -> AbstractContextManager[None]:
        """One message of so many rows, from its receipt (monotonic seconds) on; `traceparent` (W3C) is the caller's
        span, "" if he has none."""
        ...

    def station(self, name: str) -> AbstractContextManager[None]: ...

    def here(self) -> Any:
        """What a batch can link to: the span under way; None if there is none."""
        ...

    def batch(self, members: Sequence[Any], rows: int) -> AbstractContextManager[None]: ...

    def exemplar(self) -> dict[str, str] | None:
        """The trace under way, for a measurement that may name it."""
        ...

    def close(self) -> None:
        """Send what is held; takes a few seconds at most."""
        ...


class NoTraces:
    """Where traces are off."""

    def message(self, name: str, traceparent: str, received_at: float, rows: int) -> AbstractContextManager[None]:
        return _NOTHING

    def station(self, name: str) -> AbstractContextManager[None]:
        return _NOTHING

    def here(self) -> None:
        return None

    def batch(self, members: Sequence[Any], rows: int) -> AbstractContextManager[None]:
        return _NOTHING

    def exemplar(self) -> None:
        return None

    def close(self) -> None:
        return None


_NOTHING: AbstractContextManager[None] = nullcontext()


class OpenTelemetryTraces:
    """`provider` is a `opentelemetry.sdk.trace.TracerProvider`."""

    def __init__(self, provider: Any, clock: Clock) -> None:
        # Only the extra `traces` brings these.
        self._api = importlib.import_module("opentelemetry.trace")
        propagation = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
        self._propagator = propagation.TraceContextTextMapPropagator()
        self._provider = provider
        self._tracer = provider.get_tracer("matcher_service")
        self._clock = clock

    @contextmanager
    def message(self, name: str, traceparent: str, received_at: float, rows: int) -> Iterator[None]:
        caller = self._propagator.extract({"traceparent": traceparent}) if traceparent else None
        now_ns = time.time_ns()
        received_ns = now_ns - max(0, int((self._clock.monotonic() - received_at) * 1e9))
        kind = self._api.SpanKind.SERVER
        span = self._tracer.start_span(name, caller, kind, {"matcher.rows": rows}, start_time=received_ns)
        with self._under(span):
            # Decoded before the caller's span could be known.
            self._tracer.start_span("decode", start_time=received_ns).end(now_ns)
            yield

    @contextmanager
    def station(self, name: str) -> Iterator[None]:
        with self._under(self._tracer.start_span(name)):
            yield

    def here(self) -> Any:
        context = self._api.get_current_span().get_span_context()
        return context if context.trace_flags.sampled else None

    @contextmanager
    def batch(self, members: Sequence[Any], rows: int) -> Iterator[None]:
        traced = [one for one in members if one is not None]
        if not traced:
            yield
            return
        # It has one place in one trace, that of its first member; from the others it is found by its links.
        first = self._api.set_span_in_context(self._api.NonRecordingSpan(traced[0]))
        links = [self._api.Link(one) for one in traced]
        with self._under(self._tracer.start_span("batch", first, links=links, attributes={"matcher.rows": rows})):
            yield

    @contextmanager
    def _under(self, span: Any) -> Iterator[None]:
        with self._api.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield
            except MatcherError as refusal:
                span.set_attribute("matcher.cause", refusal.cause.value)
                raise

    def exemplar(self) -> dict[str, str] | None:
        context = self.here()
        return None if context is None else {"trace_id": f"{context.trace_id:032x}"}

    def close(self) -> None:
        self._provider.shutdown()


def traces_for(settings: TraceSettings, clock: Clock) -> Traces:
    """As set. Raises StartRefused if traces are wanted and their packages are not installed."""
    if not settings.otlp_endpoint:
        return NoTraces()
    try:
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        sampling = importlib.import_module("opentelemetry.sdk.trace.sampling")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as absent:
        raise StartRefused(
            f"traces need {absent.name}", field="traces.otlp_endpoint", hint="install the extra `traces`"
        ) from absent
    provider = sdk.TracerProvider(
        sampler=sampling.ParentBased(sampling.TraceIdRatioBased(settings.share)),
        resource=resources.Resource.create({"service.name": "matcher"}),
    )
    exporter = otlp.OTLPSpanExporter(endpoint=settings.otlp_endpoint)
    # Its queue is bounded, and drops spans rather than wait: a collector that is away costs no probe anything.
    provider.add_span_processor(export.BatchSpanProcessor(exporter))
    return OpenTelemetryTraces(provider, clock)


def name_trace(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: a line that is written while a message is traced carries the ids of its trace."""
    try:
        api = importlib.import_module("opentelemetry.trace")
    except ImportError:
        return event
    context = api.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
        event["span_id"] = f"{context.span_id:016x}"
    return event
