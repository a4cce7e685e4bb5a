"""The only place that chooses implementations, and the order in which things start and stop.

Start: lock, token, keys and log, shard, replay up to the head, background tasks, gRPC, HTTP, ready.
Stop:  not ready, refuse new work, finish what was admitted, close the edges, end the tasks, close the stores.
"""

from __future__ import annotations

import asyncio
import platform
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import prometheus_client
import structlog
import uvicorn
import uvloop
from cryptography import x509

from matcher_service import forms, interpreter, logs, policy, process_lock, upkeep
from matcher_service.access.authentication import Authentication
from matcher_service.access.conduct import Conduct
from matcher_service.access.edge_tokens import EdgeTokens, load_or_create_key
from matcher_service.access.people import people_of
from matcher_service.admission import Admission, ServiceTime
from matcher_service.batching import Batcher
from matcher_service.catalogue import Catalogue
from matcher_service.clock import LawfulTime, SystemClock
from matcher_service.enrol import Writing
from matcher_service.errors import LogUnavailable, MatcherError, StartRefused
from matcher_service.forms import Form
from matcher_service.gallery.alert_records import SqlAlertRecords
from matcher_service.gallery.case_use import SqlCaseUse
from matcher_service.gallery.erasure_receipts import SqlErasureReceipts
from matcher_service.gallery.holds import SqlLegalHolds
from matcher_service.gallery.proofs import SqlAuditProofs
from matcher_service.gallery.resealing import SqlKeyRotations
from matcher_service.gallery.signing import SigningKeys
from matcher_service.gateway import credentials
from matcher_service.gateway.grpc_server import GrpcServer
from matcher_service.gateway.http import build_http_app
from matcher_service.gateway.service import Service
from matcher_service.identify import Identify, Searching
from matcher_service.live_scores import LiveScores
from matcher_service.metrics import Metrics
from matcher_service.models.embedder.card import read_card
from matcher_service.models.embedder.outcome import TemplateMaker
from matcher_service.readiness import Readiness
from matcher_service.seams import Clock
from matcher_service.settings import EmbedderSettings, Settings, TritonSettings, is_loopback
from matcher_service.tallies import Tallies
from matcher_service.traces import traces_for

# Time for answers already computed to leave through open streams.
FAREWELL_S = 1.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Running:
    """A running service: where it answers, and `failed`, which is set if one of its tasks died."""

    service: Service
    http_port: int
    grpc_port: int
    token: str
    token_file: Path
    failed: asyncio.Event


class _Tasks:
    """Owns the background tasks: sees each death, and ends them all."""

    def __init__(self) -> None:
        self.failed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)
        return task

    def let_end(self, task: asyncio.Task[None]) -> None:
        """From now on the end of this task is no failure."""
        task.remove_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        _log.critical("task_died", task=task.get_name(), exc_info=task.exception())
        self.failed.set()

    async def end(self) -> None:
        for task in reversed(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process has one place that decides when to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def running(
    settings: Settings, clock: Clock | None = None, metrics: Metrics | None = None
) -> AsyncIterator[Running]:
    """The whole service in this event loop, from start to ordered stop. Raises StartRefused."""
    clock = clock or SystemClock()
    metrics = metrics or Metrics(prometheus_client.CollectorRegistry())
    data_dir = settings.storage.data_dir
    with process_lock.held(data_dir):
        token, token_file = credentials.load_or_create(data_dir)
        async with (
            forms.opened(settings, clock, metrics) as form,
            _template_maker(settings.embedder, settings.triton) as templates,
            _serving(settings, clock, metrics, form, token, token_file, templates) as service,
        ):
            yield service


@asynccontextmanager
async def _template_maker(settings: EmbedderSettings, triton: TritonSettings) -> AsyncIterator[TemplateMaker | None]:
    """The embedder, if one is configured: on Triton servers, else in a process of its own."""
    if not settings.card:
        yield None
    elif settings.triton_endpoints:
        # Imported here, because only the extra `triton` brings the client.
        from matcher_service.models.triton import TritonEmbedder
        from matcher_service.triton_endpoints import TritonAddress, TritonClients, TritonEndpoints, credentials_of

        clients = TritonClients(credentials_of(triton))
        try:
            endpoints = TritonEndpoints(TritonAddress(settings.triton_endpoints), clients=clients)
            yield await TritonEmbedder.open(endpoints, read_card(settings.card))
        finally:
            await clients.close()
    else:
        # Imported here, because only the extra `embedder` brings what reads pictures.
        from matcher_service.models.embedder.worker import WorkerEmbedder

        worker = await WorkerEmbedder.open(settings.card, settings.files_dir)
        try:
            yield worker
        finally:
            await worker.close()


@asynccontextmanager
async def _serving(
    settings: Settings,
    clock: Clock,
    metrics: Metrics,
    form: Form,
    token: str,
    token_file: Path,
    templates: TemplateMaker | None,
) -> AsyncIterator[Running]:
    admissions = settings.admission
    log, shard, models = form.log, form.shard, form.models
    time, catalogue, feed = LawfulTime(clock), Catalogue(), form.feed
    replay = form.follow(catalogue, time)
    await replay.catch_up()
    traces = traces_for(settings.traces, clock)

    batching = settings.batching
    service_time = ServiceTime(batching.batch_probes_max, batching.batches_in_flight_max)
    probes = Admission(
        admissions.probes_in_flight_max,
        admissions.probes_in_flight_per_credential_max,
        service_time,
        clock,
        metrics.permits_in_use.labels("identify"),
    )
    references = Admission(
        admissions.references_in_flight_max,
        admissions.references_in_flight_max,
        ServiceTime(admissions.references_in_flight_max, 1),
        clock,
        metrics.permits_in_use.labels("enrol"),
    )
    batcher = Batcher(
        Searching(models, shard, time, clock, metrics, traces),
        service_time,
        clock,
        metrics,
        probes_max=batching.batch_probes_max,
        searchers=batching.batches_in_flight_max,
        traces=traces,
    )
    conduct = Conduct(settings.access, clock, metrics, SqlCaseUse(log))
    live_scores = LiveScores(settings.watch.score_sample_every, batcher, shard, clock, metrics)
    alert_records = SqlAlertRecords(log)
    tallies = Tallies(alert_records)
    identify = Identify(
        catalogue, probes, batcher, replay, log, feed, live_scores, time, clock, metrics, conduct, tallies, traces
    )
    writing = Writing(catalogue, references, models, log, replay, time, clock, settings.limits, metrics, shard)

    receipts, rotations = SqlErasureReceipts(log), SqlKeyRotations(log)
    proofs = SqlAuditProofs(log, SigningKeys(settings.keys_dir / "audit", log.keyring))

    tokens = EdgeTokens(load_or_create_key(settings.keys_dir))

    readiness = Readiness(lambda: replay.unready, clock)
    service = Service(
        admit=identify.admit,
        enrol=writing.enrol,
        withdraw=writing.withdraw,
        withdraw_subject=writing.withdraw_subject,
        change=writing.change,
        catalogue=catalogue,
        log=log,
        alert_feed=feed,
        ready=readiness,
        started=lambda: readiness.started,
        settings=settings,
        metrics=metrics,
        clock=clock,
        credentials=Authentication(
            catalogue, time, credentials.BearerToken(token), tokens, people_of(settings.access, clock)
        ),
        templates=templates,
        proofs=proofs,
        alert_records=alert_records,
        legal_holds=SqlLegalHolds(log),
        erasures=receipts,
        rotations=rotations,
        approve=writing.approve,
        tokens=tokens,
    )
    metrics.ready.set_function(lambda: float(readiness()[0]))
    metrics.log_available.set_function(lambda: float(log.available))
    metrics.log_sequence.set_function(lambda: log.newest)
    tasks = _Tasks()
    tasks.start("replay", replay.run())
    tasks.start("batcher", batcher.run())
    tasks.start("tallies", tallies.run())
    tasks.start("sweep", interpreter.sweep())
    for name, work in form.beside.items():
        tasks.start(name, work())
    every_s = settings.storage.audit_checkpoint_every_s
    tasks.start("checkpoint", upkeep.checkpoint_when_due(proofs, clock, metrics, every_s))
    tasks.start("keys", upkeep.rotate_keys(rotations, shard, time, clock))
    tasks.start("receipts", upkeep.complete_receipts(receipts, shard, metrics))
    erase_within_s = settings.storage.erase_within_h * 3600
    tasks.start("erase", upkeep.erase_when_due(log, time, clock, metrics, erase_within_s))
    try:
        async with _edges(service, tasks) as (http_port, grpc_port):
            _publish_setup(settings, metrics)
            readiness.serve()
            try:
                yield Running(service, http_port, grpc_port, token, token_file, tasks.failed)
            finally:
                readiness.stop()
                probes.close()
                references.close()
                try:
                    async with asyncio.timeout(settings.server.drain_s_max):
                        await probes.idle()
                        await references.idle()
                except TimeoutError:
                    _log.warning("drain_cut_short", after_s=settings.server.drain_s_max)
                feed.close()
                try:
                    await tallies.store()
                except LogUnavailable as error:
                    _log.error("tallies_lost", detail=str(error))
    finally:
        await tasks.end()
        await asyncio.to_thread(traces.close)


def _publish_setup(settings: Settings, metrics: Metrics) -> None:
    """What the process was started with, and the disk under it, which is looked at when it is asked for."""
    data_dir, certificate = settings.storage.data_dir, settings.server.tls_certificate_file
    versions = {
        "version": metadata.version("matcher-service"),
        "policy": policy.POLICY_VERSION,
        "python": platform.python_version(),
        "form": "cluster" if settings.cluster.on else "embedded",
    }
    metrics.build.info(versions)
    metrics.permits_max.labels("identify").set(settings.admission.probes_in_flight_max)
    metrics.permits_max.labels("enrol").set(settings.admission.references_in_flight_max)
    metrics.streams_max.set(settings.limits.streams_max)
    metrics.audit_checkpoint_every_seconds.set(settings.storage.audit_checkpoint_every_s)
    metrics.erase_within_seconds.set(settings.storage.erase_within_h * 3600)
    metrics.data_free_bytes.set_function(lambda: shutil.disk_usage(data_dir).free)
    metrics.data_size_bytes.set_function(lambda: shutil.disk_usage(data_dir).total)
    if certificate is not None:
        # The edges have read it and would have refused a bad one.
        served = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
        metrics.certificate_expiry.set(served.not_valid_after_utc.timestamp())
    prometheus_client.ProcessCollector(registry=metrics.registry)


@asynccontextmanager
async def _edges(service: Service, tasks: _Tasks) -> AsyncIterator[tuple[int, int]]:
    """Both listeners, from bound ports to closed ones."""
    server = service.settings.server
    grpc_server = GrpcServer(service)
    grpc_port = await grpc_server.start()
    try:
        listener = _bound(server.host, server.http_port, "http_port", shared=server.share_ports)
        http = _HttpServer(
            uvicorn.Config(
                build_http_app(service),
                loop="none",
                access_log=False,  # its lines would name subjects
                log_config=None,
                lifespan="off",
                ssl_certfile=server.tls_certificate_file,
                ssl_keyfile=server.tls_key_file,
                timeout_graceful_shutdown=max(1, int(server.drain_s_max)),
                server_header=False,
            )
        )
        serving = tasks.start("http", http.serve(sockets=[listener]))
        try:
            async with _metrics_edge(service):
                yield listener.getsockname()[1], grpc_port
        finally:
            tasks.let_end(serving)
            http.should_exit = True
            await serving
    finally:
        await grpc_server.stop(FAREWELL_S)


@asynccontextmanager
async def _metrics_edge(service: Service) -> AsyncIterator[None]:
    """The metrics on a port of their own, where one is set and the other ports are open to more than loopback, or to
    other processes too."""
    server = service.settings.server
    if not server.metrics_port or (is_loopback(server.host) and not server.share_ports):
        yield
        return
    try:
        listening, thread = prometheus_client.start_http_server(
            server.metrics_port, server.metrics_host, service.metrics.registry
        )
    except OSError as error:
        raise StartRefused(
            f"cannot listen on {server.metrics_host}:{server.metrics_port}: {error.strerror}",
            field="server.metrics_port",
            hint="choose another port",
        ) from error
    try:
        yield
    finally:
        await asyncio.to_thread(listening.shutdown)
        listening.server_close()
        thread.join()


def _bound(host: str, port: int, field: str, *, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named so that asyncio turns delayed sending off on every connection.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartRefused(
            f"cannot listen on {host}:{port}: {error.strerror}", field=f"server.{field}", hint="choose another port"
        ) from error
    # Callers may connect as soon as the port is known; they are answered when the server is up.
    listener.listen(2048)
    return listener


def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code (0: stopped in order, 1: refused or a task died)."""
    logs.configure(settings.log_level)
    try:
        return uvloop.run(_serve(settings))
    except StartRefused as refusal:
        print(f"matcher: {refusal}", file=sys.stderr)  # noqa: T201
        return 1
    except MatcherError as error:
        _log.critical("stopped", detail=str(error))
        return 1


async def _serve(settings: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, stop.set)
    async with running(settings) as service:
        scheme = "https" if settings.server.tls_certificate_file else "http"
        host = settings.server.host
        for line in (
            f"matcher: HTTP  {scheme}://{host}:{service.http_port} (docs at /docs, metrics at /metrics)",
            f"matcher: gRPC  {host}:{service.grpc_port}",
            f"matcher: token {service.token_file}",
        ):
            print(line, flush=True)  # noqa: T201
        interpreter.tune()
        waits = [asyncio.create_task(stop.wait()), asyncio.create_task(service.failed.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        failed = service.failed.is_set()
        print("matcher: stopping" if not failed else "matcher: stopping, a task died", flush=True)  # noqa: T201
    return 1 if failed else 0
