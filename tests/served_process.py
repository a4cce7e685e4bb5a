"""The service as a process of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Served:
    process: subprocess.Popen[str]
    http_port: int
    grpc_port: int
    token: str

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def served(data_dir: Path, log: Path, *prefix: str, **environment: str) -> Iterator[Served]:
    """`matcher serve` on free loopback ports, its standard error appended to `log`; killed at the end if it is
    still there. `prefix` is put before the command, for example a tracer."""
    environment = {
        **os.environ,
        "MATCHER_STORAGE__DATA_DIR": str(data_dir),
        "MATCHER_SERVER__HTTP_PORT": "0",
        "MATCHER_SERVER__GRPC_PORT": "0",
        "PYTHONUNBUFFERED": "1",
        **environment,
    }
    with log.open("a") as errors:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "matcher_service", "serve"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        ports: dict[str, int] = {}
        token = ""
        for line in process.stdout:
            words = line.split()
            if len(words) > 2 and words[1] in ("HTTP", "gRPC"):
                ports[words[1]] = int(words[2].rsplit(":", 1)[1])
            if "token" in words:
                token = Path(words[-1]).read_text().strip()
                break
        assert token, f"the service did not start: {log.read_text()[-3000:]}"
        yield Served(process, ports["HTTP"], ports["gRPC"], token)
    finally:
        # The whole group: a tracer that is killed leaves what it traces running.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
