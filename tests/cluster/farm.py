"""A whole cluster as real processes: PostgreSQL, Triton servers with gallery shards, and gateways over them."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matcher_service.clock import SystemClock
from matcher_service.gallery.postgres import open_postgres_log
from matcher_service.models.repository import assemble
from matcher_service.partitions import Partitions, ranges
from matcher_service.settings import StorageSettings
from tests.cluster.fixtures import MODELS
from tests.cluster.served_postgres import ServedPostgres, served_postgres
from tests.cluster.served_triton import ServedTriton
from tests.cluster.server_environment import ServerEnvironment

DATABASE = "matcher"

# A server's models by name, each with the partitions that it holds.
Shards = Mapping[str, Partitions]


@dataclass
class Farm:
    """PostgreSQL and Triton servers that follow it. `folder` holds the keys and the volumes of the shards."""

    folder: Path
    postgres: ServedPostgres
    servers: list[ServedTriton] = field(default_factory=list)

    @property
    def log_url(self) -> str:
        return self.postgres.url(DATABASE)

    @property
    def keys_dir(self) -> Path:
        return self.folder / "keys"

    def replica(self, server: int, model: str) -> str:
        """The address of a shard's replica, as the settings name it."""
        return f"{self.servers[server].grpc_endpoint}/{model}"

    def sections(self, shards: Sequence[Sequence[str]], **cluster: Any) -> dict[str, dict[str, Any]]:
        """The sections of a gateway's settings over these shards, each a list of addresses of replicas."""
        return {
            "storage": {"keys_dir": self.keys_dir},
            "cluster": {"log_url": self.log_url, "shards": shards, **cluster},
        }

    def environment(self, shards: Sequence[Sequence[str]], **cluster: Any) -> dict[str, str]:
        """The same for a gateway in a process of its own."""
        told = {"log_url": self.log_url, "shards": json.dumps(shards), **{k: str(v) for k, v in cluster.items()}}
        return {
            "MATCHER_STORAGE__KEYS_DIR": str(self.keys_dir),
            **{f"MATCHER_CLUSTER__{name.upper()}": value for name, value in told.items()},
        }

    def volume(self, server: int, model: str) -> Path:
        """The folder in which a shard keeps its files."""
        return self.folder / f"server-{server}" / "volumes" / model


@contextmanager
def farm(environment: ServerEnvironment, servers: Sequence[Shards], *, threads: int = 0) -> Iterator[Farm]:
    """PostgreSQL with an empty gallery log, and one Triton server for each set of shards, all of them ready. Each
    shard searches with so many threads; 0: as many as there are cores.

    Nothing of it is left afterwards.
    """
    folder = Path(tempfile.mkdtemp(prefix="matcher-cluster-"))
    with ExitStack() as closing:
        closing.callback(shutil.rmtree, folder, ignore_errors=True)
        made = Farm(folder, closing.enter_context(served_postgres()))
        made.postgres.create(DATABASE)
        asyncio.run(_make_log(made))
        for number, shards in enumerate(servers):
            server = ServedTriton(
                environment, _repository(made, number, shards, threads), folder / f"server-{number}.log"
            )
            closing.callback(server.kill)
            made.servers.append(server)
        with ThreadPoolExecutor() as at_once:
            list(at_once.map(ServedTriton.start, made.servers))
        yield made


def _repository(made: Farm, server: int, shards: Shards, threads: int) -> Path:
    told = {
        name: {
            "partitions": ranges(partitions),
            "data_dir": str(made.volume(server, name)),
            "keys_dir": str(made.keys_dir),
            "log_url": made.log_url,
            "threads": str(threads),
        }
        for name, partitions in shards.items()
    }
    return assemble(MODELS, made.folder / f"server-{server}" / "models", models=(), shards=told)


async def _make_log(made: Farm) -> None:
    log = await open_postgres_log(made.log_url, made.keys_dir, StorageSettings(), SystemClock())
    await log.close()
