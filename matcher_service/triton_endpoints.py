"""The way to Triton servers: one gRPC client per endpoint for the life of the process, used by all that ask them.

Calls go round the endpoints. One that is unreachable or out of time is passed over for the next, within the call's
deadline; what a model refuses is not asked again. Triton is given no queue policy and no timeout of its own: bounds
and deadlines are on this side.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import tritonclient.grpc.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.grpc import InferInput
from tritonclient.utils import InferenceServerException

from matcher_service.clock import SystemClock
from matcher_service.errors import ModelsUnavailable, StartRefused
from matcher_service.seams import Clock
from matcher_service.settings import TritonSettings

# Channel options replace the client library's own as a whole, so all that matter are named.
CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_receive_message_length", 64 << 20),
    # A peer that vanished without a word is noticed during a call. Not more often: servers hang up on eager pings.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 2),
    # A headless service name resolves to every replica.
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Trying elsewhere is decided here, where the deadline is known.
    ("grpc.enable_retries", 0),
)

_UNREACHED = frozenset(("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED"))
_DATATYPES = {"f": {4: "FP32", 8: "FP64"}, "i": {8: "INT64"}, "b": {1: "BOOL"}, "O": {8: "BYTES"}}

Answer = TypeVar("Answer")
Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TritonAddress:
    """Where Triton answers, and how long a call may take in all.

    `endpoints` are host:port or any gRPC name, for example dns:///triton-headless:8001. `call_s_max` bounds a call
    over all endpoints that it tries, `attempt_s_max` the wait for one of them.
    """

    endpoints: tuple[str, ...]
    call_s_max: float = 1.0
    attempt_s_max: float = 0.6


class ModelRefused(Exception):
    """The model answered with an error; `message` is its text."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Unreached(Exception):
    """An endpoint gave no answer in time; another may."""


@dataclass(frozen=True)
class Asking:
    """One endpoint during one call: `await asking(model, inputs, outputs)` gives the outputs in their order.

    Raises Unreached or ModelRefused.
    """

    endpoint: str
    client: Any
    until: float
    attempt_s_max: float
    clock: Clock

    async def __call__(self, model: str, inputs: Tensors, outputs: Sequence[str]) -> list[NDArray[Any]]:
        left = min(self.until - self.clock.monotonic(), self.attempt_s_max)
        if left <= 0:
            raise Unreached("the deadline passed")
        tensors = [_input(name, values) for name, values in inputs.items()]
        try:
            result = await self.client.infer(model, tensors, client_timeout=left)
            answers = [result.as_numpy(name) for name in outputs]
        except InferenceServerException as error:
            if error.status() in _UNREACHED:
                raise Unreached(str(error.status())) from error
            raise ModelRefused(str(error.message())) from error
        except ValueError as error:
            # An answer whose bytes do not fill its shape.
            raise ModelRefused(f"the answer cannot be read: {error}") from error
        if any(one is None for one in answers):
            raise ModelRefused(f"the answer lacks one of {', '.join(outputs)}")
        return answers


def credentials_of(settings: TritonSettings) -> grpc.ChannelCredentials | None:
    """What the settings say of TLS to the servers; None: none of it. The files are read now, once. Raises StartRefused
    if one cannot be."""
    if settings.ca_file is None:
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=_content(settings.ca_file, "ca_file"),
        private_key=_content(settings.key_file, "key_file"),
        certificate_chain=_content(settings.certificate_file, "certificate_file"),
    )


def _content(file: Path | None, name: str) -> bytes | None:
    try:
        return None if file is None else file.read_bytes()
    except OSError as error:
        raise StartRefused(
            f"cannot read {file}: {error.strerror}",
            field=f"triton.{name}",
            hint="name a PEM file that can be read",
        ) from error


class TritonClients:
    """One client per endpoint for the life of the process, whatever asks there: one for each call would leak. Made on
    the event loop that uses it; `close` it there. `credentials`: those of TLS (`credentials_of`); None speaks without.
    """

    def __init__(self, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._credentials = credentials
        self._clients: dict[str, Any] = {}

    def client(self, endpoint: str) -> Any:
        if endpoint not in self._clients:
            self._clients[endpoint] = triton_aio.InferenceServerClient(
                endpoint, creds=self._credentials, channel_args=list(CHANNEL_OPTIONS)
            )
        return self._clients[endpoint]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()


class TritonEndpoints:
    """Made on the event loop that uses it; `close` it there. `clients`: those of the process, which stay open; without
    them it has its own."""

    def __init__(
        self, address: TritonAddress, clock: Clock | None = None, clients: TritonClients | None = None
    ) -> None:
        if not address.endpoints:
            raise StartRefused("no Triton endpoint is named", field="endpoints", hint="for example 127.0.0.1:8001")
        self.address = address
        self._clock = clock or SystemClock()
        held = clients or TritonClients()
        self._own = None if clients else held
        self._clients = [held.client(endpoint) for endpoint in address.endpoints]
        self._turn = itertools.cycle(range(len(self._clients)))

    async def close(self) -> None:
        if self._own is not None:
            await self._own.close()

    def deadline(self, call_s_max: float | None = None) -> float:
        """Monotonic seconds at which a call that starts now has taken its time."""
        return self._clock.monotonic() + (call_s_max or self.address.call_s_max)

    def each(self, until: float, attempt_s_max: float | None = None) -> list[Asking]:
        """Every endpoint once, in the order of the address."""
        wait = attempt_s_max or self.address.attempt_s_max
        pairs = zip(self.address.endpoints, self._clients, strict=True)
        return [Asking(endpoint, client, until, wait, self._clock) for endpoint, client in pairs]

    async def ask(
        self,
        what: str,
        call: Callable[[Asking], Awaitable[Answer]],
        until: float,
        attempt_s_max: float | None = None,
    ) -> Answer:
        """The answer of the first endpoint, from whose turn it is, that gives one.

        Raises ModelsUnavailable, naming `what` was asked, if none answers before `until` or a model fails.
        """
        around = self.each(until, attempt_s_max)
        first = next(self._turn)
        unreached: Unreached | None = None
        for asking in (*around[first:], *around[:first]):
            try:
                return await call(asking)
            except Unreached as error:
                unreached = error
            except ModelRefused as error:
                raise ModelsUnavailable(
                    f"{what} failed: {error.message}", hint="look into the log of the Triton server"
                ) from error
            if self._clock.monotonic() >= until:
                break
        raise ModelsUnavailable(
            f"{what}: no endpoint answered in time ({unreached})",
            hint="check that the Triton servers run and are reachable",
            retry_after_ms=500,
        ) from unreached


def _input(name: str, values: NDArray[Any]) -> InferInput:
    tensor = InferInput(name, list(values.shape), _DATATYPES[values.dtype.kind][values.dtype.itemsize])
    tensor.set_data_from_numpy(np.ascontiguousarray(values))
    return tensor


def bytes_column(values: Sequence[bytes]) -> NDArray[np.object_]:
    """A BYTES tensor [n, 1]."""
    column = np.empty((len(values), 1), dtype=np.object_)
    column[:, 0] = values
    return column
