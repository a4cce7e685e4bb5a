"""A key service as Vault's transit engine is spoken to: `python -m tests.key_service PORT STATE_FILE`.

A process of its own with real encryption. Its keys outlive it in the state file, one line for each version. Asked
without its token it answers 403, and for what it did not make, 400.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

TOKEN = "s.token-of-the-matcher"


class Transit(BaseHTTPRequestHandler):
    state: Path

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.headers.get("X-Vault-Token") != TOKEN:
            return self._answer(403, {"errors": ["permission denied"]})
        engine, verb, key = self.path.rsplit("/", 2)
        versions = [bytes.fromhex(line) for line in self.state.read_text().split()]
        names = base64.b64decode(body["associated_data"])
        if (engine, key) != ("/v1/transit", "matcher"):
            return self._answer(400, {"errors": [f"no key {key}"]})
        if verb == "encrypt":
            nonce = os.urandom(12)
            made = nonce + AESGCM(versions[-1]).encrypt(nonce, base64.b64decode(body["plaintext"]), names)
            return self._answer(
                200, {"data": {"ciphertext": f"vault:v{len(versions)}:{base64.b64encode(made).decode()}"}}
            )
        try:
            _, version, made = body["ciphertext"].split(":")
            wrapped = base64.b64decode(made)
            plain = AESGCM(versions[int(version[1:]) - 1]).decrypt(wrapped[:12], wrapped[12:], names)
        except (ValueError, IndexError, InvalidTag):
            return self._answer(400, {"errors": ["invalid ciphertext"]})
        return self._answer(200, {"data": {"plaintext": base64.b64encode(plain).decode()}})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


class ServedKeys:
    """The service as a test has it: started, stopped, its key rotated."""

    def __init__(self, folder: Path) -> None:
        self._state = folder / "transit.keys"
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.token_file = folder / "transit.token"
        self.token_file.write_text(TOKEN + "\n")
        self.rotate()

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "wrapped_by": "service",
            "service_url": f"http://127.0.0.1:{self.port}/v1/transit",
            "service_token_file": self.token_file,
        }

    def rotate(self) -> None:
        with self._state.open("a") as file:
            file.write(os.urandom(32).hex() + "\n")

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.key_service", str(self.port), str(self._state)]
        self._process = subprocess.Popen(command)
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < until, "the key service does not listen"
                time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def served_keys(folder: Path) -> Iterator[ServedKeys]:
    served = ServedKeys(folder)
    served.start()
    try:
        yield served
    finally:
        served.stop()


if __name__ == "__main__":
    Transit.state = Path(sys.argv[2])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Transit).serve_forever()
