"""The image as far as it can be judged without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from matcher_service import bootstrap
from tests.ops.tools import ROOT, said
from tests.running_service import settings_for

DOCKERFILE = (ROOT / "Dockerfile").read_text()
HEALTHCHECK = ROOT / "ops/image/healthcheck.py"


def test_hadolint_finds_nothing() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        assert os.environ.get("CI") != "true", "hadolint is not installed"
        pytest.skip("hadolint is not installed: make test-ops installs it")
    said(linter, ROOT / "Dockerfile")


def test_it_runs_as_nobody_special_and_its_two_folders_are_volumes() -> None:
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)
    assert DOCKERFILE.rindex("USER ") > DOCKERFILE.rindex("RUN ")
    assert 'VOLUME ["/var/lib/matcher", "/var/lib/matcher-keys"]' in DOCKERFILE
    assert 'ENTRYPOINT ["matcher", "serve"]' in DOCKERFILE


def test_the_rehearsal_installs_as_the_image_does() -> None:
    install = "-c constraints.txt '.[cpu]'"
    assert install in DOCKERFILE
    assert install in (ROOT / "ops/image/run_steps.sh").read_text()


def test_every_file_that_the_image_copies_is_let_through_to_the_build() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in copied.split():
            assert (ROOT / source).exists()
            assert any(Path(source).is_relative_to(one) for one in allowed), source


async def test_the_health_check_is_well_while_the_service_is_with_and_without_tls_and_ill_after(tmp_path: Path) -> None:
    import asyncio

    async def health(port: int, **more: str) -> int:
        environment = os.environ | {"MATCHER_SERVER__HTTP_PORT": str(port)} | more
        asked = [sys.executable, str(HEALTHCHECK)]
        done = await asyncio.to_thread(subprocess.run, asked, env=environment, capture_output=True, timeout=30)
        return done.returncode

    async with bootstrap.running(settings_for(tmp_path / "plain")) as plain:
        assert await health(plain.http_port) == 0
    assert await health(plain.http_port) == 1

    issued = trustme.CA().issue_cert("matcher.example")
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    server = {"tls_certificate_file": certificate, "tls_key_file": key}
    async with bootstrap.running(settings_for(tmp_path / "tls", server=server)) as secured:
        assert await health(secured.http_port, MATCHER_SERVER__TLS_CERTIFICATE_FILE=str(certificate)) == 0
