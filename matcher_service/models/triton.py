"""The models as Triton hosts them: the cluster's implementation of the Models seam.

One gRPC client per endpoint for the life of the process. Calls go round the endpoints; one that is unreachable or
out of time is passed over for the next, within the call's deadline. What the arguments of a call deserve is judged
here, before anything is sent, with the same code as in process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.grpc import InferInput
from tritonclient.utils import InferenceServerException

from matcher_service.clock import SystemClock
from matcher_service.errors import InvalidInput, ModelsUnavailable, StartRefused
from matcher_service.models import hosted
from matcher_service.models.spaces import Spaces
from matcher_service.models.template_adapter import check_templates
from matcher_service.seams import Clock
from matcher_service.terms import Float32, Float64, Int64, SpaceId, TemplateSpace

# max_batch_size of the models in triton_models/.
TEMPLATES_MAX = 1024
SCORES_MAX = 8192

# Channel options replace the client library's own as a whole, so all that matter are named.
CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_receive_message_length", 64 << 20),
    # A peer that vanished without a word is noticed during a call, not by the next one.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 2),
    # A headless service name resolves to every replica.
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
)

_UNREACHED = frozenset(("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED"))


@dataclass(frozen=True)
class TritonAddress:
    """Where Triton answers, and how long a call may take in all.

    `endpoints` are host:port or any gRPC name, for example dns:///triton-headless:8001. `call_s_max` bounds a call
    over all endpoints that it tries, `attempt_s_max` the wait for one of them.
    """

    endpoints: tuple[str, ...]
    call_s_max: float = 1.0
    attempt_s_max: float = 0.6


class TritonModels:
    """Made by `open`; `close` it on the loop that opened it."""

    def __init__(self, address: TritonAddress, clock: Clock | None = None) -> None:
        if not address.endpoints:
            raise StartRefused("no Triton endpoint is named", field="endpoints", hint="for example 127.0.0.1:8001")
        self._address = address
        self._clock = clock or SystemClock()
        self._spaces = Spaces()
        self._clients = [
            triton_aio.InferenceServerClient(endpoint, channel_args=list(CHANNEL_OPTIONS))
            for endpoint in address.endpoints
        ]
        self._adaptations: dict[tuple[SpaceId, SpaceId], bytes] = {}
        self._turn = itertools.cycle(range(len(self._clients)))

    @classmethod
    async def open(cls, address: TritonAddress, clock: Clock | None = None) -> TritonModels:
        """Connect, and prove with known values that every endpoint computes and hands over what it should.

        Raises ModelsUnavailable if an endpoint does not answer, StartRefused if it answers wrongly.
        """
        models = cls(address, clock)
        try:
            for place, endpoint in enumerate(address.endpoints):
                await models._prove(place, endpoint)
        except BaseException:
            await models.close()
            raise
        return models

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def register(self, space: TemplateSpace) -> None:
        """As `Spaces.register`. Servers are sent what they need of it when they first need it."""
        self._spaces.register(space)
        self._adaptations.clear()

    async def adapt(self, source: SpaceId, target: SpaceId, templates: Float32) -> Float32:
        """As the Models seam says; ModelsUnavailable if no endpoint answers in time."""
        from_space, to_space = self._spaces.get(source), self._spaces.get(target)
        record = self._adaptations.get((source, target))
        if record is None:
            record = self._adaptations[source, target] = hosted.adaptation_record(from_space, to_space)
        check_templates(templates, from_space)
        adapted = np.empty((len(templates), target.dimension), dtype=np.float32)
        await self._in_parts("template_adapter", "TEMPLATES", "ADAPTED", templates, record, TEMPLATES_MAX, adapted)
        return adapted

    async def false_match_rates(self, space: SpaceId, scores: Float32) -> Float64:
        """As the Models seam says; ModelsUnavailable if no endpoint answers in time."""
        table = self._spaces.get(space).score_table
        if table is None:
            return np.full(len(scores), np.nan)
        column = np.asarray(scores, dtype=np.float32)[:, None]
        rates = np.empty((len(scores), 1))
        record = hosted.table_record(table)
        await self._in_parts("score_calibrator", "SCORE", "RATE", column, record, SCORES_MAX, rates)
        return rates[:, 0]

    async def _in_parts(
        self,
        model: str,
        tensor: str,
        output: str,
        values: Float32,
        record: bytes,
        rows_max: int,
        into: NDArray[Any],
    ) -> None:
        """Fill `into` with the model's answer to `values`, row by row, in requests of at most `rows_max` rows."""
        until = self._clock.monotonic() + self._address.call_s_max
        key = hosted.key_of(record)
        for first in range(0, len(values), rows_max):
            part = values[first : first + rows_max]
            answer = await self._asked(model, tensor, output, part, key, record, until)
            if answer.shape != into[first : first + rows_max].shape or answer.dtype != into.dtype:
                raise ModelsUnavailable(
                    f"{model} answered {answer.dtype} {answer.shape} to {len(part)} rows",
                    hint="the server runs another release of the models",
                )
            into[first : first + rows_max] = answer

    async def _asked(
        self, model: str, tensor: str, output: str, values: Float32, key: int, record: bytes, until: float
    ) -> NDArray[Any]:
        keys = np.full((len(values), 1), key, dtype=np.int64)
        inputs = [_input(tensor, "FP32", values), _input("KEY", "INT64", keys)]

        def with_record() -> list[InferInput]:
            records = np.full((len(values), 1), b"", dtype=np.object_)
            records[0] = record
            return [*inputs, _input("RECORD", "BYTES", records)]

        refused: InferenceServerException | None = None
        for _ in self._clients:
            place = next(self._turn)
            try:
                return await self._asked_once(place, model, output, inputs, with_record, until)
            except InferenceServerException as error:
                if error.status() not in _UNREACHED:
                    raise _failed(model, error) from error
                refused = error
            if self._clock.monotonic() >= until:
                break
        raise ModelsUnavailable(
            f"{model}: no endpoint answered in time ({refused.status() if refused else 'none was tried'})",
            hint="check that the Triton servers run and are reachable",
            retry_after_ms=500,
        ) from refused

    async def _asked_once(
        self,
        place: int,
        model: str,
        output: str,
        inputs: Sequence[InferInput],
        with_record: Callable[[], list[InferInput]],
        until: float,
    ) -> NDArray[Any]:
        try:
            return await self._infer(place, model, output, inputs, until)
        except InferenceServerException as error:
            if hosted.UNKNOWN_KEY not in str(error.message()):
                raise
        return await self._infer(place, model, output, with_record(), until)

    async def _infer(
        self, place: int, model: str, output: str, inputs: Sequence[InferInput], until: float
    ) -> NDArray[Any]:
        left = min(until - self._clock.monotonic(), self._address.attempt_s_max)
        if left <= 0:
            raise InferenceServerException("the deadline passed", "StatusCode.DEADLINE_EXCEEDED")
        result = await self._clients[place].infer(model, list(inputs), client_timeout=left)
        answer = result.as_numpy(output)
        if answer is None:
            raise InferenceServerException(f"the answer has no {output}", "StatusCode.INTERNAL")
        return np.asarray(answer)

    async def _prove(self, place: int, endpoint: str) -> None:
        """The values of each model, end to end. A server whose Python backend and numpy do not fit answers wrongly,
        and to everybody, without knowing it."""
        row = hosted.check_row()[None]
        for model, tensor, output, sent, expected in (
            ("template_adapter", "TEMPLATES", "ADAPTED", row, hosted.check_adapted()),
            ("score_calibrator", "SCORE", "RATE", row.T, hosted.check_rates()[:, None]),
        ):
            keys = np.full((len(sent), 1), hosted.CHECK_KEY, dtype=np.int64)
            inputs = [_input(tensor, "FP32", sent), _input("KEY", "INT64", keys)]
            until = self._clock.monotonic() + self._address.call_s_max
            try:
                answer = await self._infer(place, model, output, inputs, until)
            except InferenceServerException as error:
                raise ModelsUnavailable(
                    f"{model} at {endpoint} does not answer: {error.status()}",
                    hint="start the Triton server, or wait until it is ready",
                    retry_after_ms=1000,
                ) from error
            except ValueError as error:
                raise _harmed(model, endpoint) from error
            if answer.shape != expected.shape or not np.allclose(answer, expected, rtol=1e-12, atol=0):
                raise _harmed(model, endpoint)


def _input(name: str, datatype: str, values: Float32 | Int64 | NDArray[np.object_]) -> InferInput:
    tensor = InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(np.ascontiguousarray(values))
    return tensor


def _failed(model: str, error: InferenceServerException) -> ModelsUnavailable | InvalidInput:
    return ModelsUnavailable(
        f"{model} failed: {error.message()}",
        hint="look into the log of the Triton server",
    )


def _harmed(model: str, endpoint: str) -> StartRefused:
    return StartRefused(
        f"{model} at {endpoint} answers wrong values",
        hint="its Python backend and its numpy do not fit together: install numpy below 2 there",
    )
