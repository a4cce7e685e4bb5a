"""The gRPC server: what it listens on, how much it takes in, and how it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from matcher_service.errors import MatcherError, StartRefused
from matcher_service.gateway.grpc import MatcherEdge
from matcher_service.gateway.grpc_call import end_with
from matcher_service.gateway.grpc_health import HEALTH_SERVICE, Health
from matcher_service.gateway.service import Service
from matcher_service.settings import is_loopback

SERVICE_NAME = "matcher.v1.Matcher"

# Unary calls at once, beside the streams; what they ask for is bounded by admission.
UNARY_CALLS_MAX = 128
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
PING_INTERVAL_MS_MIN = 5_000
# What of a stream may lie in the transport unread. gRPC would let it grow to megabytes: seconds of messages under load,
# whose deadlines begin only when they are read, while their sender believes that they are being searched.
STREAM_WINDOW_BYTES = 64 << 10


class _ReflectionGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Beyond loopback, what the service can do is told to who has a credential."""

    def __init__(self, edge: MatcherEdge) -> None:
        self._edge = edge

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith("/grpc.reflection."):
            return handler

        async def guarded(requests: Any, context: Any) -> AsyncIterator[Any]:
            try:
                await self._edge.authenticate("reflection", context)
            except MatcherError as refusal:
                await end_with(refusal, context)
            async for reply in handler.stream_stream(requests, context):
                yield reply

        return grpc.stream_stream_rpc_method_handler(guarded, handler.request_deserializer, handler.response_serializer)


def _handlers(edge: MatcherEdge) -> grpc.GenericRpcHandler:
    """The methods over raw request bytes: no deserialiser, so that we authenticate first and parse ourselves."""

    def encoded(reply: Message) -> bytes:
        return reply.SerializeToString()

    return grpc.method_handlers_generic_handler(
        SERVICE_NAME,
        {
            "Identify": grpc.unary_unary_rpc_method_handler(edge.identify, response_serializer=encoded),
            "IdentifyStream": grpc.stream_stream_rpc_method_handler(edge.identify_stream, response_serializer=encoded),
            "Enrol": grpc.stream_stream_rpc_method_handler(edge.enrol, response_serializer=encoded),
            "Withdraw": grpc.unary_unary_rpc_method_handler(edge.withdraw, response_serializer=encoded),
            "WatchAlerts": grpc.unary_stream_rpc_method_handler(edge.watch_alerts, response_serializer=encoded),
        },
    )


class GrpcServer:
    """Owns the listening server; `start` once, `stop` once, in one event loop."""

    def __init__(self, service: Service) -> None:
        self._settings = service.settings
        self._edge = MatcherEdge(service)
        self._health = Health(service.ready, SERVICE_NAME)
        self._server: grpc.aio.Server | None = None
        self._overseeing: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """The port bound, on all of which calls are answered. Raises StartRefused if it cannot be bound or the
        TLS files cannot be used."""
        limits, listen = self._settings.limits, self._settings.server
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limits.message_bytes_max),
                ("grpc.max_send_message_length", -1),
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
                # With its own 16 KiB a message of probes comes in frames, each of which costs the receiver.
                ("grpc.http2.max_frame_size", STREAM_WINDOW_BYTES),
                ("grpc.max_concurrent_streams", limits.streams_max + UNARY_CALLS_MAX),
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_INTERVAL_MS_MIN),
                # Unless it is wanted, a second process on the same port must fail rather than share its callers.
                ("grpc.so_reuseport", int(listen.share_ports)),
            ],
            maximum_concurrent_rpcs=limits.streams_max + UNARY_CALLS_MAX,
            interceptors=() if is_loopback(listen.host) else (_ReflectionGuard(self._edge),),
        )
        server.add_generic_rpc_handlers((_handlers(self._edge),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE_NAME, HEALTH_SERVICE, reflection.SERVICE_NAME), server)
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        address = f"{host}:{listen.grpc_port}"
        try:
            if listen.tls_certificate_file and listen.tls_key_file:
                authority = listen.tls_client_ca_file
                credentials = grpc.ssl_server_credentials(
                    [(_bytes_of(listen.tls_key_file), _bytes_of(listen.tls_certificate_file))],
                    root_certificates=None if authority is None else _bytes_of(authority),
                    require_client_auth=authority is not None,
                )
                port = server.add_secure_port(address, credentials)
            else:
                port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise StartRefused(
                f"cannot listen for gRPC on {address}",
                field="server.grpc_port",
                hint="another process may hold the port; choose another, or 0 for a free one",
            ) from error
        await server.start()
        self._server = server
        self._overseeing = asyncio.create_task(self._edge.oversee(), name="oversee-streams")
        return int(port)

    @property
    def taking_in(self) -> bool:
        """False from the moment that streams are no longer read."""
        return self._edge.taking_in

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, answer what was read, end every stream; cut what is left after `grace_s`."""
        self._edge.drain()
        self._health.close()
        if self._server is not None:
            await self._server.stop(grace_s)
        if self._overseeing is not None:
            self._overseeing.cancel()
            await asyncio.gather(self._overseeing, return_exceptions=True)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartRefused(
            f"cannot read {path}: {error.strerror}", field="server", hint="check the TLS files"
        ) from error
