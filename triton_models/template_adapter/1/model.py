"""Triton's face of `matcher_service.models.template_adapter`."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from matcher_service.models import hosted
from matcher_service.models.hosted_tensors import answers, rows


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        hosted.check_exchange(pb_utils.Tensor)
        self._known = hosted.Records(hosted.decode_adaptation)

    def execute(self, requests: list[Any]) -> list[Any]:
        batch = [rows(pb_utils, request, "TEMPLATES") for request in requests]
        return answers(pb_utils, "ADAPTED", hosted.adapt_batch(self._known, batch))
