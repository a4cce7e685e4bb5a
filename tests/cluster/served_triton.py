"""A real tritonserver as a child process: started on free loopback ports, waited for, stopped, cleaned up after."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.server_environment import ServerEnvironment

START_S_MAX = 90.0
STOP_S_MAX = 20.0
END_S_MAX = 60.0


class ServerDied(Exception):
    """The server ended, or did not become ready; the message holds the end of its log."""


@dataclass
class ServedTriton:
    """One server over one model repository. `environment_variables` are added to those of the environment, `options` to
    those of the command."""

    environment: ServerEnvironment
    repository: Path
    log_file: Path
    environment_variables: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.http_port, self.grpc_port, self.metrics_port = _free_ports(3)
        # Its own prefix, so that what a killed server leaves in shared memory can be told from that of others.
        self._shared_memory_prefix = f"matcher_{uuid.uuid4().hex[:12]}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def grpc_endpoint(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, ready_s_max: float = START_S_MAX) -> None:
        """Start, and return once every model is ready. Raises ServerDied."""
        options = {
            "model-repository": self.repository,
            "backend-directory": self.environment.backends,
            "http-address": "127.0.0.1",
            "http-port": self.http_port,
            "grpc-address": "127.0.0.1",
            "grpc-port": self.grpc_port,
            "metrics-address": "127.0.0.1",
            "metrics-port": self.metrics_port,
            "allow-gpu-metrics": "false",
            "model-control-mode": "none",
            "pinned-memory-pool-byte-size": 0,
            "exit-timeout-secs": 10,
            "backend-config": f"python,shm-region-prefix-name={self._shared_memory_prefix}",
            **self.options,
        }
        command = [
            str(self.environment.tritonserver),
            "--disable-auto-complete-config",
            *(f"--{name}={value}" for name, value in options.items()),
        ]
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment.variables | self.environment_variables,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(time.monotonic() + ready_s_max)
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self, until: float) -> None:
        assert self._process is not None
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise ServerDied(f"the server ended with {self._process.returncode}:\n{self.log_tail()}")
            if self.is_ready():
                return
            time.sleep(0.05)
        raise ServerDied(f"the server was not ready in time:\n{self.log_tail()}")

    @property
    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def is_ready(self) -> bool:
        """Whether it says that all its models are ready."""
        with contextlib.suppress(urllib.error.URLError, OSError):
            url = f"http://127.0.0.1:{self.http_port}/v2/health/ready"
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(answer.status == 200)
        return False

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])

    def send(self, which: signal.Signals) -> None:
        """To the server and its stubs alike, as losing a machine would."""
        os.killpg(self.pid, which)

    def kill(self) -> None:
        """At once, as a power cut; repeatable."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._clean()

    def stop(self) -> None:
        """In order: SIGTERM, and SIGKILL only if that is not obeyed in time; repeatable."""
        if self._process is None or self._process.poll() is not None:
            return self.kill()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S_MAX)
        self.kill()

    def await_end(self) -> None:
        """Return when it has ended by itself. Raises subprocess.TimeoutExpired."""
        assert self._process is not None
        self._process.wait(END_S_MAX)
        self.kill()

    def _clean(self) -> None:
        for left in Path("/dev/shm").glob(f"{self._shared_memory_prefix}*"):
            left.unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    """Ports that are free now; held together while choosing, so that they differ."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()
