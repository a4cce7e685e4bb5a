"""The real server as a process of its own, on free ports, and the administrative calls that the demo makes to it."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from matcher_service import records
from matcher_service.errors import MatcherError, StartRefused
from matcher_service.terms import Deployment, Gallery, TemplateSpace

SERVE = (sys.executable, "-m", "matcher_service", "serve")
START_S_MAX = 60.0
STOP_S_MAX = 30.0
_LINES_KEPT = 50


@dataclass(frozen=True, slots=True)
class Server:
    """Where a started server answers. `exited` is done when its process has ended, for whatever reason."""

    http_url: str
    grpc_address: str
    token: str
    token_file: Path
    log_file: Path
    exited: asyncio.Task[int]

    @property
    def docs_url(self) -> str:
        return f"{self.http_url}/docs"

    @property
    def metrics_url(self) -> str:
        return f"{self.http_url}/metrics"

    @property
    def commands(self) -> tuple[str, ...]:
        """What to try next at a shell while it is up."""
        where = f"--http {self.http_url} --token-file {shlex.quote(str(self.token_file))}"
        return tuple(f"matcher {verb} {where}" for verb in ("galleries list", "alerts list --limit 5", "audit verify"))


@asynccontextmanager
async def started(data_dir: Path, log_file: Path, *, http_port: int = 0, grpc_port: int = 0) -> AsyncIterator[Server]:
    """`matcher serve` over `data_dir`, from ready to stopped in order; port 0 takes a free one.

    Its standard error goes to `log_file`. Nothing is left running afterwards, whatever happened in between. Raises
    StartRefused with the server's own words if it does not become ready.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MATCHER_")}
    environment |= {
        "MATCHER_STORAGE__DATA_DIR": str(data_dir),
        "MATCHER_SERVER__HOST": "127.0.0.1",
        "MATCHER_SERVER__HTTP_PORT": str(http_port),
        "MATCHER_SERVER__GRPC_PORT": str(grpc_port),
        "PYTHONUNBUFFERED": "1",
    }
    with log_file.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *SERVE,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            # An interrupt at the terminal is for the demo alone, which then stops the server in order.
            start_new_session=True,
        )
    exited = asyncio.create_task(process.wait(), name="demo-server-exit")
    lines: deque[str] = deque(maxlen=_LINES_KEPT)
    announced: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
    reading = asyncio.create_task(_read(process, lines, announced), name="demo-server-output")
    try:
        waits: set[asyncio.Future[Any]] = {exited, announced}
        await asyncio.wait(waits, timeout=START_S_MAX, return_when=asyncio.FIRST_COMPLETED)
        if not announced.done():
            raise StartRefused(
                f"the server did not start: {_last_words(lines, log_file)}",
                hint=f"{log_file} has all of it; name a data directory to keep that file",
            )
        places = announced.result()
        token_file = Path(places["token"])
        server = Server(
            http_url=places["HTTP"],
            grpc_address=places["gRPC"],
            token=_text(token_file).strip(),
            token_file=token_file,
            log_file=log_file,
            exited=exited,
        )
        await _ready(server)
        yield server
    finally:
        await _stop(process, exited)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _read(
    process: asyncio.subprocess.Process, lines: deque[str], announced: asyncio.Future[dict[str, str]]
) -> None:
    """Takes every line of the server's output, so that it never blocks on a full pipe. The announcement is
    `matcher: HTTP URL ...`, `matcher: gRPC ADDRESS`, `matcher: token FILE`."""
    places: dict[str, str] = {}
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode(errors="replace").rstrip():
        lines.append(line)
        words = line.split(maxsplit=2)
        if len(words) == 3 and words[0] == "matcher:" and words[1] in ("HTTP", "gRPC", "token"):
            places[words[1]] = words[2] if words[1] == "token" else words[2].split()[0]
        if len(places) == 3 and not announced.done():
            announced.set_result(places)


async def _ready(server: Server) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + START_S_MAX
    async with httpx.AsyncClient(timeout=5.0, trust_env=False) as http:
        while loop.time() < until and not server.exited.done():
            try:
                if (await http.get(f"{server.http_url}/readyz")).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)
    raise StartRefused("the server did not become ready", hint=f"see {server.log_file}")


async def _stop(process: asyncio.subprocess.Process, exited: asyncio.Task[int]) -> None:
    try:
        if not exited.done():
            process.send_signal(signal.SIGTERM)
            await asyncio.wait({exited}, timeout=STOP_S_MAX)
    finally:
        # Too slow, or the demo was interrupted once more while it waited.
        if not exited.done():
            process.kill()
    await exited


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _last_words(lines: deque[str], log_file: Path) -> str:
    logged = _text(log_file).splitlines()[-5:]
    return " / ".join([*logged, *lines]) or "it said nothing"


class Administration:
    """The few calls that set up an operation, over HTTP. Each raises MatcherError in the service's words."""

    def __init__(self, server: Server) -> None:
        self._http = httpx.AsyncClient(
            base_url=server.http_url,
            headers={"Authorization": f"Bearer {server.token}"},
            timeout=30.0,
            trust_env=False,
        )

    async def __aenter__(self) -> Administration:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def register(self, space: TemplateSpace) -> None:
        await self._post("/v1/spaces", records.space_dict(space))

    async def create_gallery(self, gallery: Gallery) -> None:
        body = records.gallery_dict(gallery)
        for settled_by_the_service in ("created_at_ms", "evidence"):
            del body[settled_by_the_service]
        await self._post("/v1/galleries", body)

    async def create_deployment(self, deployment: Deployment) -> None:
        body = records.deployment_dict(deployment)
        del body["ended_at_ms"]
        await self._post("/v1/deployments", body)

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        answer = await self._http.post(path, json=body)
        if answer.is_success:
            return
        try:
            problem = answer.json()
        except ValueError:
            problem = {}
        raise MatcherError(
            f"{path} answered {answer.status_code}: {problem.get('detail', answer.text[:200])}",
            field=str(problem.get("field", "")),
            hint=str(problem.get("hint", "")),
        )
