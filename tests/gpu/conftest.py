"""Tests of the GPU scanner: on a GPU where there is one, else in the Triton language's interpreter at small sizes.

They need torch and triton, which the service's own environment does not have: `make test-gpu-interpreted` makes one
that does.
"""

from __future__ import annotations

import importlib.util
import os

from hypothesis import settings

collect_ignore_glob: list[str] = []

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    if not torch.cuda.is_available():
        if os.environ.get("MATCHER_TEST_GPU"):
            raise RuntimeError("torch sees no GPU here: see nvidia-smi, or run make test-gpu-interpreted")
        # Before the kernel is imported: it decides then whether it is compiled or interpreted.
        os.environ["TRITON_INTERPRET"] = "1"

# The interpreter is slow; what it takes says nothing.
settings.register_profile("gpu", deadline=None)
settings.load_profile("gpu")
