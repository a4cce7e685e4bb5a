"""A replica of a shard as a Triton server hosts it (triton_models/gallery_shard)."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from matcher_service.errors import CallerFault, ShardUnavailable
from matcher_service.partitions import Partitions
from matcher_service.seams import Clock
from matcher_service.shards import exchange
from matcher_service.shards.exchange import ShardAnswer, ShardState
from matcher_service.terms import SearchRequest
from matcher_service.triton_endpoints import Asking, ModelRefused, TritonClients, Unreached


class TritonReplica:
    """`address` is host:port or host:port/model. Implements `scattered.Replica` and `moving.Assignable`; the clients
    stay the caller's."""

    def __init__(self, address: str, clients: TritonClients, clock: Clock) -> None:
        self._address = address
        self._endpoint, _, model = address.partition("/")
        self._model = model or exchange.MODEL
        self._client = clients.client(self._endpoint)
        self._clock = clock

    @property
    def name(self) -> str:
        return self._address

    async def search(self, request: SearchRequest, until: float) -> ShardAnswer:
        found = await self._call(exchange.request_tensors(request), until)
        return exchange.answer_of(found, len(request.probes), len(request.gallery_ids))

    async def state(self, until: float) -> ShardState:
        found = await self._call(exchange.status_tensors(), until)
        return exchange.answer_of(found, 0, 0).state

    async def assign(self, partitions: Partitions, until: float) -> ShardState:
        """As `moving.Assignable` says."""
        found = await self._call(exchange.status_tensors(partitions), until)
        return exchange.answer_of(found, 0, 0).state

    async def _call(self, tensors: exchange.Tensors, until: float) -> list[NDArray[Any]]:
        asking = Asking(self._endpoint, self._client, until, until - self._clock.monotonic(), self._clock)
        try:
            return await asking(self._model, tensors, exchange.OUTPUTS)
        except Unreached as error:
            raise ShardUnavailable(f"{self._address} does not answer: {error}") from error
        except ModelRefused as refused:
            meant = exchange.refusal_of(refused.message)
            if isinstance(meant, CallerFault):
                raise meant from refused
            raise ShardUnavailable(f"{self._address}: {meant.detail}", hint=meant.hint) from refused
