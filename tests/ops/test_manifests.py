"""The manifests build, are valid, and agree with the settings, the image and the rules."""

from __future__ import annotations

import json
import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import trustme

from matcher_service import bootstrap
from matcher_service.errors import StartRefused
from matcher_service.settings import load
from tests.ops.tools import OVERLAYS, ROOT, said, tool, yaml

KUBERNETES = "1.34"
SCHEMAS = Path(__file__).with_name("schemas")
PRE_STOP_S = 5


@cache
def built(overlay: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(said(tool("kubectl", "kubernetes-client"), "kustomize", overlay)) if one]


def one(kind: str, overlay: Path = OVERLAYS[0]) -> dict[str, Any]:
    (found,) = [held for held in built(overlay) if held["kind"] == kind]
    return found


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = one("StatefulSet")["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    assert isinstance(only, dict)
    return only


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: overlay.name)
def test_everything_built_is_valid_and_nothing_in_it_is_unknown(overlay: Path) -> None:
    kinds = set()
    for held in built(overlay):
        kinds.add(held["kind"])
        schema = SCHEMAS / f"{held['kind'].lower()}_v1.json"
        if schema.exists():
            jsonschema.Draft202012Validator(json.loads(schema.read_text())).validate(held)
        else:
            kubernetes_validate.validate(held, KUBERNETES, strict=True)
        assert held["kind"] == "Namespace" or held["metadata"]["namespace"] == "matcher"
    assert {"StatefulSet", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "PrometheusRule"} <= kinds
    assert "Secret" not in kinds


def test_the_validators_refuse_what_is_wrong() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one("StatefulSet") | {"surprise": 1}, KUBERNETES, strict=True)
    monitor = json.loads((SCHEMAS / "podmonitor_v1.json").read_text())
    wrong = one("PodMonitor") | {"spec": {"selector": {}, "podMetricsEndpoints": [{"prot": "metrics"}]}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(monitor).validate(wrong)


def test_one_process_stands_on_one_data_directory_with_the_keys_on_a_volume_of_their_own() -> None:
    assert one("StatefulSet")["spec"]["replicas"] == 1
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    settings = load(ROOT / "k8s/base/matcher.toml").storage
    assert settings.keys_dir is not None
    assert settings.data_dir.is_relative_to(mounts["data"])
    assert settings.keys_dir.is_relative_to(mounts["keys"])
    assert not settings.keys_dir.is_relative_to(mounts["data"])
    assert {claim["metadata"]["name"] for claim in one("StatefulSet")["spec"]["volumeClaimTemplates"]} == {
        "data",
        "keys",
    }


def test_the_pod_has_no_right_that_it_does_not_need() -> None:
    assert pod()["automountServiceAccountToken"] is one("ServiceAccount")["automountServiceAccountToken"] is False
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert f"USER {pod()['securityContext']['runAsUser']}:" in (ROOT / "Dockerfile").read_text()
    # With Always the modes of the token and the master key would be widened, and the service would refuse to start.
    assert pod()["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    limits = container()["securityContext"]
    assert limits["readOnlyRootFilesystem"] is True
    assert limits["allowPrivilegeEscalation"] is False
    assert limits["capabilities"] == {"drop": ["ALL"]}


def test_ports_and_probes_are_those_of_the_settings() -> None:
    server = load(ROOT / "k8s/base/matcher.toml").server
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"https": server.http_port, "grpc": server.grpc_port, "metrics": server.metrics_port}
    paths = {name: container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in paths.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert all(probe["scheme"] == "HTTPS" and probe["port"] == "https" for probe in paths.values())


def test_an_orderly_stop_ends_before_the_pod_is_killed() -> None:
    drain_s = load(ROOT / "k8s/base/matcher.toml").server.drain_s_max
    assert container()["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(PRE_STOP_S)]
    # Admitted work, then open HTTP connections, each up to drain_s_max; then a second for the streams.
    assert pod()["terminationGracePeriodSeconds"] > PRE_STOP_S + 2 * drain_s + 1


def test_the_network_policy_lets_clients_reach_the_edges_prometheus_the_metrics_and_the_service_nobody() -> None:
    spec = one("NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert not spec.get("egress")
    clients, prometheus = spec["ingress"]
    assert {port["port"] for port in clients["ports"]} == {"https", "grpc"}
    assert [port["port"] for port in prometheus["ports"]] == ["metrics"]
    assert all(source for source in clients["from"] + prometheus["from"])


def test_the_rules_in_kubernetes_are_those_of_the_rule_file() -> None:
    held = yaml.safe_load((ROOT / "ops/prometheus/rules.yaml").read_text())
    assert one("PrometheusRule")["spec"] == held


async def test_with_these_settings_health_is_open_over_tls_and_metrics_only_on_their_own_port(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("matcher.example")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    issued.private_key_pem.write_to_path(tmp_path / "tls.key")
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    server = {
        # Spelt like this it counts as beyond loopback, and the test still stays on it.
        "host": "LOCALHOST",
        "http_port": 0,
        "grpc_port": 0,
        "metrics_host": "127.0.0.1",
        "metrics_port": metrics_port,
        "tls_certificate_file": tmp_path / "tls.crt",
        "tls_key_file": tmp_path / "tls.key",
    }
    storage = {"data_dir": tmp_path / "volume/data", "keys_dir": tmp_path / "keys-volume/keys"}
    settings = load(ROOT / "k8s/base/matcher.toml", server=server, storage=storage)
    async with bootstrap.running(settings) as service, httpx.AsyncClient(verify=False) as http:
        edge = f"https://127.0.0.1:{service.http_port}"
        for probe in ("startup", "readiness", "liveness"):
            path = container()[f"{probe}Probe"]["httpGet"]["path"]
            assert (await http.get(edge + path)).status_code == 200
        (endpoint,) = one("PodMonitor")["spec"]["podMetricsEndpoints"]
        assert (await http.get(edge + endpoint["path"])).status_code == 401
        answered = await http.get(f"{endpoint['scheme']}://127.0.0.1:{metrics_port}{endpoint['path']}")
        assert "matcher_ready 1.0" in answered.text
        with pytest.raises(StartRefused, match="metrics_port"):
            async with bootstrap.running(load(server=server, storage={"data_dir": tmp_path / "second"})):
                pass
    assert (storage["data_dir"] / "gallery.db").exists()
    assert (storage["keys_dir"] / "master.key").exists()


def test_the_settings_hold_no_secret_and_no_environment_is_needed() -> None:
    assert not [name for name in os.environ if name.startswith("MATCHER_")]
    assert "env" not in container()
