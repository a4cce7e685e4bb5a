"""Between Triton's requests and the arrays of `hosted`. `backend` is the module triton_python_backend_utils."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from matcher_service.errors import MatcherError
from matcher_service.models.hosted import Rows


def rows(backend: Any, request: Any, name: str) -> Rows[Any]:
    """The rows of a request: its tensor `name`, its KEY, and its RECORD if it carries one."""
    record = backend.get_input_tensor_by_name(request, "RECORD")
    return Rows(
        np.ascontiguousarray(backend.get_input_tensor_by_name(request, name).as_numpy()),
        backend.get_input_tensor_by_name(request, "KEY").as_numpy()[:, 0],
        () if record is None else tuple(one for one in record.as_numpy()[:, 0] if one),
    )


def answers(backend: Any, name: str, results: Sequence[Any]) -> list[Any]:
    """One response per result: its array as the tensor `name`, or its refusal."""
    return [
        refusal(backend, one)
        if isinstance(one, MatcherError)
        else backend.InferenceResponse([backend.Tensor(name, np.ascontiguousarray(one))])
        for one in results
    ]


def refusal(backend: Any, error: MatcherError) -> Any:
    """A refusal of one request. The text names causes and shapes, never a value of a template (law 6)."""
    return backend.InferenceResponse(error=backend.TritonError(f"[{error.cause}] {error}"))


def failure(backend: Any, fault: Exception) -> Any:
    """What a request is told that failed for no fault of its own; the log says more."""
    return backend.InferenceResponse(error=backend.TritonError(f"failed unexpectedly: {type(fault).__name__}"))


def named(backend: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    """The response with these tensors."""
    return backend.InferenceResponse([backend.Tensor(name, values) for name, values in tensors.items()])
