"""Builds, once, a Python environment that holds a real tritonserver for a machine without a GPU.

The server comes from the nvidia-pytriton wheel: server and Python backend, nothing else of it is used. It has an
environment of its own because its Python backend exchanges tensors correctly with numpy 1 only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path(os.environ.get("MATCHER_TRITON_ENVIRONMENT", ROOT / ".venv-triton"))
SERVER_PACKAGE = "nvidia-pytriton==0.7.0"
# For face_embedder; the weights are found in the environment of the tests and named by their folder.
EMBEDDER_PACKAGES = ("dlib-bin==20.0.1.post1", "pillow>=11")
# So that the laws which need no server can be tried with that environment's numpy as well.
TEST_PACKAGES = ("hypothesis", "prometheus-client", "psutil", "pytest", "pytest-asyncio", "pytest-timeout")
GLIBC_LEAST = (2, 35)


class CannotServe(Exception):
    """Why there can be no tritonserver here, in words for the reason of a skipped test."""


@dataclass(frozen=True)
class ServerEnvironment:
    """Paths of an environment that has been built; `variables` are what its server must be started with."""

    python: Path
    tritonserver: Path
    backends: Path
    variables: dict[str, str]


def prepare() -> ServerEnvironment:
    """The environment, built first if it is not there or was built from other requirements. Raises CannotServe."""
    _judge_machine()
    with _alone():
        if _stamp_file().is_file() and _stamp_file().read_text() == _stamp():
            return _described()
        _build()
        _stamp_file().write_text(_stamp())
        return _described()


def _judge_machine() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise CannotServe(f"the server's wheel is for Linux on x86_64, this is {sys.platform} {platform.machine()}")
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise CannotServe(f"the server's wheel is for Python 3.10 to 3.12, this is {platform.python_version()}")
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < GLIBC_LEAST:
        raise CannotServe(f"the server needs glibc 2.35 or newer, this is {name} {version}")
    _libpython_folder()


def _libpython_folder() -> Path:
    """Where libpython of this interpreter's version is; the backend's stub embeds it. Raises CannotServe."""
    name = f"libpython3.{sys.version_info.minor}.so.1.0"
    folders = (sysconfig.get_config_var("LIBDIR"), f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}", "/usr/lib64")
    for folder in folders:
        if folder and (Path(folder) / name).is_file():
            return Path(folder)
    raise CannotServe(f"{name} is in none of {', '.join(str(one) for one in folders)}: install Python's shared library")


@contextmanager
def _alone() -> Iterator[None]:
    """One builder at a time; the others wait and find it done."""
    ENVIRONMENT.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder: building clears what is in it.
    with ENVIRONMENT.with_name(f"{ENVIRONMENT.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _requirements_file() -> Path:
    return ROOT / "triton_models" / "requirements.txt"


def _stamp_file() -> Path:
    return ENVIRONMENT / ".built-from"


def _stamp() -> str:
    parts = (
        platform.python_version(),
        str(ROOT),
        SERVER_PACKAGE,
        *EMBEDDER_PACKAGES,
        *TEST_PACKAGES,
        _requirements_file().read_text(),
        Path(__file__).read_text(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _build() -> None:
    print(f"building the server's environment in {ENVIRONMENT}", file=sys.stderr, flush=True)
    _stamp_file().unlink(missing_ok=True)
    _run(sys.executable, "-m", "venv", "--clear", "--upgrade-deps", str(ENVIRONMENT))
    pip = (str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    # The constraints of the tests pin numpy 2, so they cannot hold here; the requirements bound the versions.
    _run(*pip, "-r", str(_requirements_file()), *EMBEDDER_PACKAGES, *TEST_PACKAGES)
    # Its own dependencies bring web frameworks and a client that nothing here uses.
    _run(*pip, "--no-deps", SERVER_PACKAGE)
    _run(*pip, "--no-deps", "--editable", str(ROOT))
    server = _server_folder()
    backends = ENVIRONMENT / "backends"
    shutil.rmtree(backends, ignore_errors=True)
    shutil.copytree(server / "backends", backends)
    stub = f"3.{sys.version_info.minor}/triton_python_backend_stub"
    shutil.copy2(server / "python_backend_stubs" / stub, backends / "python" / "triton_python_backend_stub")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise CannotServe(f"{' '.join(command[:6])} ... failed: {' / '.join(last)}")


def _packages_folder() -> Path:
    return ENVIRONMENT / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"


def _server_folder() -> Path:
    return _packages_folder() / "pytriton" / "tritonserver"


def _described() -> ServerEnvironment:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    variables["VIRTUAL_ENV"] = str(ENVIRONMENT)
    # The stub finds its interpreter, and so numpy, through PATH.
    variables["PATH"] = f"{ENVIRONMENT / 'bin'}:{variables.get('PATH', '')}"
    # A stub that was copied has lost the way to its own libraries.
    variables["LD_LIBRARY_PATH"] = f"{_packages_folder() / 'nvidia_pytriton.libs'}:{_libpython_folder()}"
    return ServerEnvironment(
        python=ENVIRONMENT / "bin" / "python",
        tritonserver=_server_folder() / "bin" / "tritonserver",
        backends=ENVIRONMENT / "backends",
        variables=variables,
    )
