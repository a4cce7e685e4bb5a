"""Triton's face of `matcher_service.shards.hosted`."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

import triton_python_backend_utils as pb_utils

from matcher_service.errors import MatcherError
from matcher_service.models import hosted, hosted_tensors
from matcher_service.shard_bootstrap import open_shard
from matcher_service.shards import exchange, self_check
from matcher_service.shards.guard import Guard


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        hosted.check_exchange(pb_utils.Tensor)
        self_check.check_engine(pb_utils.Tensor)
        chosen = json.loads(args["model_config"])["parameters"]
        self._guard = Guard(os.getppid())
        try:
            self._shard = open_shard(
                args["model_name"],
                {name: one["string_value"] for name, one in chosen.items()},
                f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "",
            )
        except BaseException:
            self._guard.release()
            raise

    def execute(self, requests: list[Any]) -> None:
        # Answered by its sender when it is done: meanwhile the next one comes in.
        for request in requests:
            self._shard.submit(partial(self._send, request, request.get_response_sender()))

    def _send(self, request: Any, sender: Any) -> None:
        try:
            response = self._answer(request)
        except Exception as fault:
            sender.send(hosted_tensors.failure(pb_utils, fault), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            raise
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Any) -> Any:
        given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in (*exchange.INPUTS, exchange.ASSIGN)}
        try:
            made = self._shard.answer({name: one.as_numpy() for name, one in given.items() if one is not None})
        except MatcherError as error:
            return hosted_tensors.refusal(pb_utils, error)
        return hosted_tensors.named(pb_utils, made)

    def finalize(self) -> None:
        self._guard.release()
        self._shard.close()
