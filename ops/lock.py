"""Write ops/image/requirements-*.txt: what the images install, each file by its SHA-256 (make lock).

pip resolves, with constraints.txt, what pyproject.toml and triton_models/requirements.txt ask for, and says which
wheels it would take; nothing is installed. The wheels are those of Linux on x86_64, of the Python that the image has; a
requirement may have one for each of several Pythons. What is locked already stays as it is while it fits, so a second
run writes the same text; to let newer versions in, delete the file.

    python -m ops.lock [cpu gpu triton triton-gpu build]      all of them without a name
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / "ops/image"
# What wheels may be tagged with, up to the C library of the base images (2.36; NVIDIA's has a newer one).
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)), "manylinux2014_x86_64", "any")
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Locked:
    """`extras` are those of pyproject.toml beside what the service needs; `files` are requirement files. `free` are
    packages for which constraints.txt does not hold; `pythons` those of the base images that may be used."""

    extras: tuple[str, ...] = ()
    core: bool = False
    files: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ("3.11",)


_SERVICE = ("cpu", "postgres", "triton", "traces")
TARGETS = {
    "cpu": Locked(core=True, extras=_SERVICE),
    # faiss-cpu and not faiss-gpu, which would be the same module: the kernel for GPUs is the project's own.
    "gpu": Locked(core=True, extras=(*_SERVICE, "gpu"), also=(TORCH,)),
    # The tests' Triton server runs on Python 3.11; NVIDIA's image, from release 24.11 on, has 3.12.
    "triton": Locked(files=("triton_models/requirements.txt",), free=("numpy",), pythons=("3.11", "3.12")),
    "triton-gpu": Locked(
        files=("triton_models/requirements.txt",),
        extras=("gpu",),
        also=(TORCH,),
        free=("numpy",),
        pythons=("3.11", "3.12"),
    ),
    "build": Locked(also=("setuptools>=77",)),
}


def path_of(target: str) -> Path:
    return IMAGE / f"requirements-{target}.txt"


def asked(locked: Locked) -> list[str]:
    """The requirements as they are written in the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = list(project["dependencies"]) if locked.core else []
    for extra in locked.extras:
        found += project["optional-dependencies"][extra]
    for name in locked.files:
        found += [line for line in (ROOT / name).read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return [*found, *locked.also]


def constraints(target: str) -> str:
    """constraints.txt, and of what it does not name, the versions that are locked now."""
    tested = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line]
    named = {_canonical(line.partition("==")[0]) for line in tested}
    kept = [line for line in tested if _canonical(line.partition("==")[0]) not in TARGETS[target].free]
    before = path_of(target).read_text("utf-8") if path_of(target).exists() else ""
    pins = re.findall(r"^([a-z0-9-]+)==([^ ;]+)", before, re.MULTILINE)
    held = [f"{name}=={version}" for name, version in pins if name not in named or name in TARGETS[target].free]
    return "\n".join([*kept, *held])


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def resolved(target: str, python: str) -> dict[tuple[str, str], str]:
    """(name, version) to the SHA-256 of the wheel that pip takes for this Python. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        held, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        held.write_text(constraints(target), "utf-8")
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"),
            *("--ignore-installed", "--report", str(report), "--target", str(Path(folder, "nothing"))),
            *("--python-version", python, "--implementation", "cp", "--only-binary", ":all:", "-c", str(held)),
            *(word for platform in PLATFORMS for word in ("--platform", platform)),
            *asked(TARGETS[target]),
        ]
        # Wheels of this machine's own folders may have hashes that nobody else finds: the index alone, which
        # PIP_INDEX_URL may name.
        alone = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": folder}
        subprocess.run(command, check=True, env={**os.environ, **alone})
        return {_named(one): _hash(one) for one in json.loads(report.read_text("utf-8"))["install"]}


def _named(one: dict[str, Any]) -> tuple[str, str]:
    return _canonical(one["metadata"]["name"]), one["metadata"]["version"]


def _hash(one: dict[str, Any]) -> str:
    if not one["download_info"]["url"].startswith("https://"):
        raise ValueError(f"{one['metadata']['name']} is not from a package index: {one['download_info']['url']}")
    found: str = one["download_info"]["archive_info"]["hashes"]["sha256"]
    return found


def written(target: str, per_python: Sequence[dict[tuple[str, str], str]]) -> str:
    """The text of the lock file."""
    lines = [
        f"# Made by `python -m ops.lock {target}`; do not edit. Wheels of Linux on x86_64 for Python "
        f"{' and '.join(TARGETS[target].pythons)}."
    ]
    for name, version in sorted({one for found in per_python for one in found}):
        hashes = dict.fromkeys(found[name, version] for found in per_python if (name, version) in found)
        marker = ""
        if not all((name, version) in found for found in per_python):
            only = [
                python
                for python, found in zip(TARGETS[target].pythons, per_python, strict=True)
                if (name, version) in found
            ]
            marker = " ; " + " or ".join(f'python_version == "{python}"' for python in only)
        lines.append(" \\\n    ".join([f"{name}=={version}{marker}", *(f"--hash=sha256:{one}" for one in hashes)]))
    return "\n".join(lines) + "\n"


def main(targets: Sequence[str]) -> int:
    for target in targets or TARGETS:
        if target not in TARGETS:
            sys.stderr.write(f"no lock file {target}: there are {', '.join(TARGETS)}\n")
            return 2
        found = [resolved(target, python) for python in TARGETS[target].pythons]
        path_of(target).write_text(written(target, found), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
