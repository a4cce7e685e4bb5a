"""The images as far as they can be judged without a container engine."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from matcher_service import bootstrap
from ops import lock, rehearse, sbom
from tests.ops.tools import ROOT, said, tool
from tests.running_service import settings_for

DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = rehearse.stages_of(DOCKERFILE)
HEALTHCHECK = ROOT / "ops/image/healthcheck.py"
TARGETS = ("cpu", "gpu", "triton", "triton-gpu")
PIN = re.compile(r"^([a-z0-9-]+)==(\S+?)(?: ; .+?)?((?: --hash=sha256:[0-9a-f]{64})+)$")


def pins(target: str) -> dict[str, str]:
    """Name to version of what a lock file holds; fails at a line without a hash."""
    joined = lock.path_of(target).read_text().replace(" \\\n   ", "")
    found = [PIN.match(line) for line in joined.splitlines() if not line.startswith("#")]
    assert all(found), target
    return {one[1]: one[2] for one in found if one}


def steps(target: str) -> list[rehearse.Step]:
    """Of a stage and of those that it stands on."""
    base, own = STAGES[target]
    return [*(steps(base) if base in STAGES else ()), *own]


def last(target: str, name: str) -> str:
    return [step.text for step in steps(target) if step.name == name][-1]


def test_hadolint_finds_nothing() -> None:
    said(tool("hadolint", "the extra ops"), ROOT / "Dockerfile")


def test_the_default_is_the_service_on_cpu() -> None:
    assert list(STAGES)[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_as_nobody_special_with_its_folders_as_volumes_and_a_check_of_its_health(target: str) -> None:
    assert last(target, "USER") == "10001:10001"
    assert steps(target)[-1].name == "USER"
    volumes = json.loads(last(target, "VOLUME"))
    variables = " ".join(step.text for step in steps(target) if step.name == "ENV")
    for variable in ("DATA_DIR", "KEYS_DIR"):
        (folder,) = re.findall(rf"_{variable}=(\S+)", variables)
        assert any(Path(folder).is_relative_to(volume) for volume in volumes)
    assert json.loads(last(target, "ENTRYPOINT"))[0] == ("matcher" if target in ("cpu", "gpu") else "tritonserver")
    _, script = json.loads(last(target, "HEALTHCHECK").partition(" CMD ")[2])
    assert f"COPY ops/image/{Path(script).name} {Path(script).parent}/" in DOCKERFILE


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_installed_in_an_image_but_wheels_by_their_hash_and_the_package_itself(target: str) -> None:
    packages = [step.text for step in STAGES[f"packages-{target}"][1] if step.name == "RUN"]
    assert len(packages) == 2
    assert f"--require-hashes --no-deps -r /build/requirements-{target}.txt" in packages[0]
    assert packages[1].endswith("install --disable-pip-version-check --no-index --no-deps /wheel/*.whl")
    assert "pip" not in " ".join(step.text for step in steps(target) if step.name == "RUN")
    assert f"--from=packages-{target} /opt/matcher /opt/matcher" in [
        s.text for s in STAGES[target][1] if s.name == "COPY"
    ]


@pytest.mark.parametrize("target", lock.TARGETS)
def test_the_locked_versions_are_those_that_were_tested_and_all_that_is_asked_for_is_locked(target: str) -> None:
    tested = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    names = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in tested.items()}
    held = pins(target)
    for name, version in held.items():
        if name not in lock.TARGETS[target].free:
            assert names.get(name, version) == version, f"{name}: run `make lock`"
    for asked in lock.asked(lock.TARGETS[target]):
        name = re.split(r"[<>=\[;]", asked)[0].strip()
        assert re.sub(r"[-_.]+", "-", name).lower() in held, f"{asked}: run `make lock`"


def test_triton_models_get_the_numpy_that_their_backend_exchanges_tensors_with_and_no_image_two_faiss() -> None:
    for target in TARGETS:
        held = pins(target)
        assert [name for name in held if name.startswith("faiss")] == ["faiss-cpu"]
        assert held["numpy"].startswith("1." if target.startswith("triton") else "2.")
        assert ("torch" in held) is target.endswith("gpu")


def test_a_resolution_is_written_with_a_hash_for_each_python_and_a_marker_where_only_one_needs_it() -> None:
    both = {("numpy", "1.26.4"): "a" * 64}, {("numpy", "1.26.4"): "b" * 64, ("six", "1.0"): "c" * 64}
    text = lock.written("triton", both)
    assert text.splitlines()[1:] == [
        "numpy==1.26.4 \\",
        f"    --hash=sha256:{'a' * 64} \\",
        f"    --hash=sha256:{'b' * 64}",
        'six==1.0 ; python_version == "3.12" \\',
        f"    --hash=sha256:{'c' * 64}",
    ]


def test_every_file_that_an_image_copies_is_let_through_to_the_build() -> None:
    for step in [step for _, own in STAGES.values() for step in own]:
        if step.name == "COPY" and not step.text.startswith("--from"):
            *sources, _ = step.text.split()
            assert all(rehearse.let_through(source) for source in sources), step
    assert not rehearse.let_through("tests")


def test_the_list_of_what_an_image_holds_names_every_wheel_with_its_hash(tmp_path: Path) -> None:
    if importlib.util.find_spec("cyclonedx_py") is None:
        assert os.environ.get("CI") != "true", "cyclonedx-bom is not installed"
        pytest.skip("cyclonedx-bom is not installed: make test-ops installs it")
    told = json.loads(sbom.write("cpu", tmp_path).read_text())
    assert told["bomFormat"] == "CycloneDX"
    assert {one["name"]: one["version"] for one in told["components"]} == pins("cpu")
    for one in told["components"]:
        assert one["purl"].startswith(f"pkg:pypi/{one['name']}@")
        assert [held["alg"] for way in one["externalReferences"] for held in way["hashes"]] == ["SHA-256"]


def test_the_steps_of_the_dockerfile_make_a_service_that_runs_as_its_image_says() -> None:
    """Its steps as they are written, by chroot over this machine's root; with the packages of the tests instead of the
    locked ones, which `python -m ops.rehearse` installs."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        assert os.environ.get("CI") != "true", "mounts need root"
        pytest.skip("mounts need root")
    command = [sys.executable, "-m", "ops.rehearse", "--short", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "cpu: built, healthy, stopped in order" in done.stdout


async def test_the_health_check_is_well_while_the_service_is_with_and_without_tls_and_ill_after(tmp_path: Path) -> None:
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
