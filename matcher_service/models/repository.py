"""A Triton model repository for one kind of machine, from the one in triton_models/.

The repository as it stands is for GPUs. A machine without one, or with another embedder, needs other instance groups
and parameters, and Triton reads both from config.pbtxt alone; so the repository is copied and those lines written
anew.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from matcher_service.errors import StartRefused

MODELS = ("template_adapter", "score_calibrator", "face_embedder")
SHARD = "gallery_shard"
_INSTANCE_GROUP = re.compile(r"^instance_group \[ \{ count: (\d+) kind: (KIND_[A-Z]+) \} \]$", re.MULTILINE)
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc")


def assemble(
    source: Path,
    into: Path,
    *,
    models: Sequence[str] = MODELS,
    on_gpu: bool = False,
    instances: int = 1,
    parameters: Mapping[str, str] | None = None,
    shards: Mapping[str, Mapping[str, str]] | None = None,
) -> Path:
    """Copy `models` from the repository `source` to the new folder `into`, with `instances` of each, and with the
    `parameters` of face_embedder that are named. Without `on_gpu` every instance is on the CPU. Of gallery_shard there
    is one copy for each of `shards`, under that name and with those of its parameters; one instance each.

    Returns `into`. Raises StartRefused if `into` has contents, or a model or parameter does not exist.
    """
    if into.exists() and any(into.iterdir()):
        raise StartRefused(f"{into} is not empty", field="into", hint="name a new folder")
    shards = shards or {}
    for name in (*models, *((SHARD,) if shards else ())):
        if not (source / name / "config.pbtxt").is_file():
            raise StartRefused(f"{source} has no model {name}", field="source", hint="name the folder triton_models")
    for name in models:
        shutil.copytree(source / name, into / name, ignore=_NOT_COPIED)
        config = into / name / "config.pbtxt"
        text = with_instances(config.read_text("utf-8"), on_gpu=on_gpu, instances=instances)
        if name == "face_embedder":
            for key, value in (parameters or {}).items():
                text = with_parameter(text, key, value)
        config.write_text(text, "utf-8")
    for name, chosen in shards.items():
        shutil.copytree(source / SHARD, into / name, ignore=_NOT_COPIED)
        config = into / name / "config.pbtxt"
        text = config.read_text("utf-8").replace(f'name: "{SHARD}"', f'name: "{name}"', 1)
        if on_gpu:
            text = text.replace("kind: KIND_CPU", "kind: KIND_GPU", 1)
        for key, value in chosen.items():
            text = with_parameter(text, key, value)
        config.write_text(text, "utf-8")
    return into


def with_instances(config: str, *, on_gpu: bool, instances: int) -> str:
    """The config with so many instances; a model that is on the CPU everywhere stays there."""

    def written(found: re.Match[str]) -> str:
        kind = found[2] if on_gpu else "KIND_CPU"
        return f"instance_group [ {{ count: {instances} kind: {kind} }} ]"

    text, count = _INSTANCE_GROUP.subn(written, config)
    if count != 1:
        raise StartRefused(f"the config has {count} instance groups, one is expected", field="instance_group")
    return text


def with_parameter(config: str, key: str, value: str) -> str:
    """The config with another value of a parameter that it has."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    line = f'parameters {{ key: "{key}" value: {{ string_value: "{escaped}" }} }}'
    pattern = re.compile(rf'^parameters \{{ key: "{re.escape(key)}" .*\}}$', re.MULTILINE)
    text, count = pattern.subn(lambda _: line, config)
    if count != 1:
        raise StartRefused(f"the model has no parameter {key}", field="parameters")
    return text
