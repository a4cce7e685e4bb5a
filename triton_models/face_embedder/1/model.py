"""Triton's face of `matcher_service.models.embedder`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from matcher_service.models import hosted, hosted_pictures, hosted_tensors
from matcher_service.models.embedder.embed import open_embedder


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        hosted.check_exchange(pb_utils.Tensor)
        chosen = json.loads(args["model_config"])["parameters"]
        files_dir = chosen["files_dir"]["string_value"]
        self._embedder = open_embedder(
            chosen["card"]["string_value"],
            Path(files_dir) if files_dir else None,
            f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu",
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        pictures = pb_utils.get_input_tensor_by_name(request, "PICTURE").as_numpy()[:, 0]
        crops = pb_utils.get_input_tensor_by_name(request, "CROP").as_numpy()[:, 0]
        made = hosted_pictures.tensors(self._embedder, pictures, crops)
        return hosted_tensors.named(pb_utils, made)
