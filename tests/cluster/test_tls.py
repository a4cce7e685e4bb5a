"""Encrypted and mutually known: gateway and Triton over gRPC, gateway and shard and PostgreSQL; real servers."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from matcher_service.errors import LogUnavailable, StartRefused
from matcher_service.partitions import ALL_PARTITIONS
from matcher_service.settings import TritonSettings
from matcher_service.triton_endpoints import credentials_of
from tests.cluster.hosted_shard import open_log, served_shards
from tests.cluster.served_postgres import ServedPostgres, served_postgres
from tests.cluster.served_triton import ServedTriton
from tests.cluster.server_environment import ROOT, ServerEnvironment
from tests.cluster.test_cluster import PATIENCE_S, asked, complete, enrolled, found, missing, named, prepared, someone
from tests.running_service import WholeService, whole_service

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Encrypted:
    """A PostgreSQL server and a Triton server that know nobody without a certificate of `ca_file`."""

    folder: Path
    postgres: ServedPostgres
    triton: ServedTriton
    log_url: str
    ca_file: Path
    certificate_file: Path
    key_file: Path
    stranger_ca_file: Path

    @property
    def triton_settings(self) -> dict[str, Path]:
        return {"ca_file": self.ca_file, "certificate_file": self.certificate_file, "key_file": self.key_file}

    @asynccontextmanager
    async def gateway(self, name: str, triton: dict[str, Path]) -> AsyncIterator[WholeService]:
        sections: dict[str, Any] = {
            "storage": {"keys_dir": self.folder / "keys"},
            "cluster": {"log_url": self.log_url, "shards": [[f"{self.triton.grpc_endpoint}/a"]]},
            "triton": triton,
        }
        async with whole_service(self.folder / name, **sections) as one:
            yield one


def issued(ca: trustme.CA, folder: Path, name: str) -> tuple[Path, Path]:
    """Files with a certificate and its key."""
    made = ca.issue_cert(name)
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(b"".join(one.bytes() for one in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    key.chmod(0o600)
    return certificate, key


@pytest.fixture(scope="module")
def encrypted(
    server_environment: ServerEnvironment,
    postgres_server: ServedPostgres,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Encrypted]:
    """The session's PostgreSQL is asked for only so that a machine without one skips or fails with its reason."""
    folder = tmp_path_factory.mktemp("encrypted")
    authority, stranger = trustme.CA(), trustme.CA()
    ca_file, stranger_ca_file = folder / "ca.pem", folder / "stranger.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    stranger.cert_pem.write_to_path(str(stranger_ca_file))
    server_certificate, server_key = issued(authority, folder, "127.0.0.1")
    certificate_file, key_file = issued(authority, folder, "gateway.force.example")
    with served_postgres() as postgres:
        postgres.stop()
        theirs = [postgres.folder / "server.pem", postgres.folder / "server.key"]
        for source, target in zip((server_certificate, server_key), theirs, strict=True):
            shutil.copy(source, target)
            target.chmod(0o600)
            shutil.chown(target, postgres.folder.owner())
        postgres.start("ssl=on", f"ssl_cert_file={theirs[0]}", f"ssl_key_file={theirs[1]}")
        log_url = f"{postgres.create('log')}?sslmode=verify-full&sslrootcert={ca_file}"
        asyncio.run(made_log(log_url, folder / "keys"))
        with served_shards(
            server_environment,
            folder,
            log_url,
            folder / "keys",
            {"a": ALL_PARTITIONS},
            grpc_use_ssl_mutual="1",
            grpc_server_cert=str(server_certificate),
            grpc_server_key=str(server_key),
            grpc_root_cert=str(ca_file),
            http_restricted_api="inference,model-repository,shared-memory,logging,trace:nobody=knows",
        ) as triton:
            yield Encrypted(folder, postgres, triton, log_url, ca_file, certificate_file, key_file, stranger_ca_file)


async def made_log(log_url: str, keys_dir: Path) -> None:
    await (await open_log(log_url, keys_dir)).close()


async def test_gateway_and_triton_know_each_other_by_their_certificates(encrypted: Encrypted) -> None:
    """Law 4: a gateway that the server does not know, or which does not know the server, has no answer from it, and
    says what is missing."""
    rows, ids = someone(1, 20), named("tls", 20)
    async with encrypted.gateway("known", encrypted.triton_settings) as one:
        await prepared(one, "tls")
        head = await enrolled(one.client, "tls", ids, rows)
        assert [found(answer) for answer in await complete(one.client, "tls", rows, min_sequence=head)] == ids
        strangers = {
            "plain": {},
            "without-certificate": {"ca_file": encrypted.ca_file},
            "other-authority": encrypted.triton_settings | {"ca_file": encrypted.stranger_ca_file},
        }
        for name, settings in strangers.items():
            async with encrypted.gateway(name, settings) as other:
                for answer in await asked(other.client, "tls", rows[:4]):
                    assert (found(answer), missing(answer)) == ("INCOMPLETE", ALL_PARTITIONS), name


async def test_nothing_of_a_shard_is_to_be_had_beside_its_encrypted_port(encrypted: Encrypted) -> None:
    """Triton's HTTP port has no encryption of its own: restricted, it tells how the server is and answers no search."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{encrypted.triton.http_port}") as http:
        assert (await http.get("/v2/health/ready")).status_code == 200
        for path in ("/v2/models/a/infer", "/v2/repository/index", "/v2/repository/models/a/unload"):
            refused = await http.post(path, json={})
            assert refused.status_code == 403, (path, refused.status_code, refused.text)


async def test_the_readiness_probe_asks_a_restricted_server_with_the_word_and_not_without(encrypted: Encrypted) -> None:
    def probe(**more: str) -> subprocess.CompletedProcess[str]:
        told = {"MATCHER_SHARD_HTTP_PORT": str(encrypted.triton.http_port), "MATCHER_SHARD_MODEL": "a", **more}
        command = [sys.executable, ROOT / "ops/image/shard_ready.py"]
        return subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, timeout=60)

    refused = await asyncio.to_thread(probe)
    assert refused.returncode == 1
    assert "status 403" in refused.stderr
    async with asyncio.timeout(PATIENCE_S):
        while (await asyncio.to_thread(probe, MATCHER_SHARD_PROBE_HEADER="nobody=knows")).returncode:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def test_the_log_is_read_and_written_encrypted_and_from_the_server_that_is_meant(encrypted: Encrypted) -> None:
    """By the address alone: every connection of gateway and shard is encrypted, and a server whose certificate is of
    another authority is not spoken to."""
    async with encrypted.gateway("log", encrypted.triton_settings) as one:
        assert not await asyncio.to_thread(
            encrypted.postgres.ask,
            "SELECT pid FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
            "WHERE datname = 'log' AND backend_type = 'client backend' AND NOT ssl",
        )
        (count,) = (
            await asyncio.to_thread(
                encrypted.postgres.ask,
                "SELECT count(DISTINCT client_port) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
                "WHERE datname = 'log' AND ssl",
            )
        )[0]
        assert count >= 3, "the gateway's and the shard's"
        assert await one.running.service.log.head() >= 0
    meant_another = encrypted.log_url.replace(str(encrypted.ca_file), str(encrypted.stranger_ca_file))
    with pytest.raises((StartRefused, LogUnavailable), match="certificate verify failed"):
        await open_log(meant_another, encrypted.folder / "keys")


def test_a_certificate_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match="cannot read") as refused:
        credentials_of(TritonSettings(ca_file=tmp_path / "nothing.pem"))  # type: ignore[call-arg]
    assert refused.value.field == "triton.ca_file"
