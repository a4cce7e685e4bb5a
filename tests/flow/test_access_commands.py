"""`matcher credentials`, `matcher proposals`, and an edge node with its own credential, on the command line."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path

import numpy as np
import pytest

from matcher_service.__main__ import run
from tests.identity_provider import IdentityProvider
from tests.running_service import WholeService, whole_service


async def test_a_credential_is_issued_used_rotated_and_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with whole_service(tmp_path / "data") as service:
        space = await service.space(8)
        await service.gallery("custody", space)
        await service.enrol("custody", space, np.eye(8, dtype=np.float32)[:1], ["r"])
        await service.deployment("custody")
        secret = tmp_path / "van.secret"
        assert await command(service, "credentials", "issue", "op", "--secret-file", str(secret), "--json") == 0
        issued = json.loads(capsys.readouterr().out)
        assert "secret" not in issued
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600

        np.savez(tmp_path / "probes.npz", templates=np.eye(8, dtype=np.float32)[:2])
        stream = ["edge", str(tmp_path / "probes.npz"), "--deployment", "op", "--space", "test/1/8", "--json"]
        assert await command(service, *stream, token_file=secret) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])["summary"]
        assert (summary["alerts"], summary["no_candidate"]) == (1, 1)

        assert await command(service, "credentials", "rotate", issued["credential_id"], "--overlap", "1h") == 0
        assert "Secret, told this once: edge." in capsys.readouterr().out
        assert await command(service, "credentials", "revoke", issued["credential_id"], "--reason", "stolen") == 0
        capsys.readouterr()
        assert await command(service, *stream, token_file=secret) == 1
        assert "revoked" in capsys.readouterr().err
        assert await command(service, "credentials", "list", "--json") == 0
        listed = json.loads(capsys.readouterr().out)["credentials"]
        assert [one["revoked_at_ms"] is None for one in sorted(listed, key=lambda one: one["issued_at_ms"])] == [
            False,
            True,
        ]


async def test_a_proposal_is_made_by_one_person_and_approved_by_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = IdentityProvider(tmp_path)
    async with whole_service(tmp_path / "data", access=provider.settings()) as service:
        space = await service.space(8)
        await service.gallery("custody", space)
        references = np.random.default_rng(3).normal(size=(120, 8)).astype(np.float32)
        names = [f"r{row}" for row in range(120)]
        await service.enrol("custody", space, references, names)
        listed = tmp_path / "withdraw.txt"
        listed.write_text("\n".join(names[:110]))

        async def as_person(person: str, role: str, *arguments: str) -> int:
            token = tmp_path / f"{person}.token"
            token.write_text(provider.token(person, role))
            return await command(service, *arguments, token_file=token)

        propose = ["proposals", "withdrawal", "custody", str(listed), "--reason", "a court's order", "--json"]
        assert await as_person("p-low", "gallery_manager", *propose) == 0
        proposal_id = json.loads(capsys.readouterr().out)["proposal_id"]
        approve = ["proposals", "approve", proposal_id, "--reason", "seen"]
        assert await as_person("p-low", "authorising_officer", *approve) == 1
        assert await _live(service) == 120
        assert await as_person("p-high", "authorising_officer", *approve) == 0
        assert await _live(service) == 10
        capsys.readouterr()
        assert await as_person("p-u", "auditor", "proposals", "list", "--json") == 0
        (told,) = json.loads(capsys.readouterr().out)["proposals"]
        assert (told["proposed_by"], told["closed_as"], told["closed_by"]) == ("p-low", "approved", "p-high")
        assert (
            await as_person("p-low", "gallery_manager", "proposals", "deletion", "custody", "--reason", "x", "--json")
            == 0
        )
        proposal_id = json.loads(capsys.readouterr().out)["proposal_id"]
        assert (
            await as_person("p-high", "authorising_officer", "proposals", "reject", proposal_id, "--reason", "no") == 0
        )
        assert "custody" in service.running.service.catalogue.galleries


async def command(service: WholeService, *arguments: str, token_file: Path | None = None) -> int:
    """A command line against the service, in a thread of its own as it runs an event loop of its own."""
    running = service.running
    places = ["--http", f"http://127.0.0.1:{running.http_port}", "--token-file", str(token_file or running.token_file)]
    if arguments[0] == "edge":
        places += ["--server", f"127.0.0.1:{running.grpc_port}"]
    return await asyncio.to_thread(run, [*arguments, *places])


async def _live(service: WholeService) -> int:
    return len(await service.running.service.log.references("custody", "", 1000))
