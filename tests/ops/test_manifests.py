"""The manifests build, are valid, and agree with the settings, the image and the rules."""

from __future__ import annotations

import json
import os
import re
import socket
from itertools import product
from pathlib import Path

import httpx
import jsonschema
import kubernetes_validate
import pytest
import trustme

from matcher_service import bootstrap
from matcher_service.errors import StartRefused
from matcher_service.partitions import ALL_PARTITIONS, parse
from matcher_service.settings import load
from matcher_service.shards import hosted
from matcher_service.sizing import INDEX_SHARE, Load, size
from matcher_service.triton_endpoints import CHANNEL_OPTIONS
from tests.ops.manifests import (
    NATIONAL,
    SINGLE,
    Pod,
    all_of,
    allowed,
    built,
    chosen,
    container,
    labels,
    one,
    owners,
    pod,
    pod_of,
    secrets,
    variables,
)
from tests.ops.tools import OVERLAYS, ROOT, assert_names_only_what_exists, yaml

KUBERNETES = "1.34"
SCHEMAS = Path(__file__).with_name("schemas")
PRE_STOP_S = 5
NO_NAMESPACE = ("Namespace", "PriorityClass")
SERVERS = [pytest.param((SINGLE, "StatefulSet"), id="embedded"), pytest.param((NATIONAL, "Deployment"), id="gateways")]
SHARDS = ("matcher-shard-0", "matcher-shard-1")
SETTINGS = ROOT / "k8s/base/matcher.toml"


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
        assert held["kind"] in NO_NAMESPACE or held["metadata"]["namespace"] == "matcher"
    assert {"StatefulSet", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "PrometheusRule"} <= kinds
    assert "Secret" not in kinds


def test_the_validators_refuse_what_is_wrong() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one("StatefulSet", SINGLE) | {"surprise": 1}, KUBERNETES, strict=True)
    for kind, overlay, name in (("PodMonitor", SINGLE, ""), ("ScaledObject", NATIONAL, ""), ("Cluster", NATIONAL, "")):
        schema = json.loads((SCHEMAS / f"{kind.lower()}_v1.json").read_text())
        held = one(kind, overlay, name)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema).validate(held | {"spec": held["spec"] | {"surprise": 1}})


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: overlay.name)
def test_no_pod_has_a_right_that_it_does_not_need(overlay: Path) -> None:
    account = one("ServiceAccount", overlay)
    assert account["automountServiceAccountToken"] is False
    for name, owner in owners(overlay).items():
        spec, limits = pod(owner), container(owner)["securityContext"]
        assert spec["serviceAccountName"] == account["metadata"]["name"], name
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        # One number everywhere: gateways write the keys that shards read.
        assert spec["securityContext"]["runAsUser"] == 10001
        # With Always the modes of the token and the master key would be widened, and the service would refuse to start.
        assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        assert limits["readOnlyRootFilesystem"] is True
        assert limits["allowPrivilegeEscalation"] is False
        assert limits["capabilities"] == {"drop": ["ALL"]}
        assert container(owner)["resources"]["requests"]["memory"] == container(owner)["resources"]["limits"]["memory"]
        # What is written to is a volume.
        mounts = {mount["mountPath"] for mount in container(owner)["volumeMounts"]}
        assert "/tmp" in mounts
    kinds = {held["kind"] for held in built(overlay)}
    assert not kinds & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: overlay.name)
def test_every_volume_claim_secret_and_map_that_is_named_is_there_or_told(overlay: Path) -> None:
    told = (ROOT / "docs/OPERATIONS.md").read_text()
    for name, owner in owners(overlay).items():
        claims = {claim["metadata"]["name"] for claim in owner["spec"].get("volumeClaimTemplates", ())}
        held = {volume["name"] for volume in pod(owner)["volumes"]} | claims
        assert {mount["name"] for mount in container(owner)["volumeMounts"]} <= held, name
        for volume in pod(owner)["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in all_of("PersistentVolumeClaim", overlay)
            if "configMap" in volume:
                assert volume["configMap"]["name"] in all_of("ConfigMap", overlay)
        assert all(
            one["configMapRef"]["name"] in all_of("ConfigMap", overlay) for one in container(owner).get("envFrom", ())
        )
        assert all(f"`{secret}`" in told for secret in secrets(owner)), name
        if "priorityClassName" in pod(owner):
            assert pod(owner)["priorityClassName"] in all_of("PriorityClass", overlay)


# --- the server of both forms --------------------------------------------------------------------------


@pytest.mark.parametrize("where", SERVERS)
def test_ports_and_probes_are_those_of_the_settings(where: tuple[Path, str]) -> None:
    held, server = container(one(where[1], where[0], "matcher")), load(SETTINGS).server
    ports = {port["name"]: port["containerPort"] for port in held["ports"]}
    assert ports == {"https": server.http_port, "grpc": server.grpc_port, "metrics": server.metrics_port}
    paths = {name: held[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in paths.items()} == {
        "startup": "/startupz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert all(probe["scheme"] == "HTTPS" and probe["port"] == "https" for probe in paths.values())


@pytest.mark.parametrize("where", SERVERS)
def test_an_orderly_stop_ends_before_the_pod_is_killed(where: tuple[Path, str]) -> None:
    owner = one(where[1], where[0], "matcher")
    drain_s = load(SETTINGS).server.drain_s_max
    assert container(owner)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(PRE_STOP_S)]
    # Admitted work, then open HTTP connections, each up to drain_s_max; then a second for the streams.
    assert pod(owner)["terminationGracePeriodSeconds"] > PRE_STOP_S + 2 * drain_s + 1


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: overlay.name)
def test_the_rules_in_kubernetes_are_those_of_the_rule_file(overlay: Path) -> None:
    held = yaml.safe_load((ROOT / "ops/prometheus/rules.yaml").read_text())
    assert one("PrometheusRule", overlay)["spec"] == held


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: overlay.name)
def test_every_pod_monitor_finds_pods_that_have_its_port_and_the_job_of_the_rules_is_the_gateways(
    overlay: Path,
) -> None:
    for name, monitor in all_of("PodMonitor", overlay).items():
        found = [owner for owner in owners(overlay).values() if chosen(monitor["spec"]["selector"], labels(owner))]
        assert found, name
        for owner in found:
            ports = {port["name"] for port in container(owner)["ports"]}
            assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
            # The job is the pod's label of this name.
            assert (labels(owner)[monitor["spec"]["jobLabel"]] == "matcher") == (owner["metadata"]["name"] == "matcher")


# --- the embedded form ---------------------------------------------------------------------------------


def test_one_process_stands_on_one_data_directory_with_the_keys_on_a_volume_of_their_own() -> None:
    assert one("StatefulSet", SINGLE)["spec"]["replicas"] == 1
    mounts = {mount["name"]: mount["mountPath"] for mount in container(one("StatefulSet", SINGLE))["volumeMounts"]}
    settings = load(SETTINGS).storage
    assert settings.keys_dir is not None
    assert settings.data_dir.is_relative_to(mounts["data"])
    assert settings.keys_dir.is_relative_to(mounts["keys"])
    assert not settings.keys_dir.is_relative_to(mounts["data"])
    assert {claim["metadata"]["name"] for claim in one("StatefulSet", SINGLE)["spec"]["volumeClaimTemplates"]} == {
        "data",
        "keys",
    }


CLIENT = Pod({"matcher-client": "true"}, "somewhere")
STRANGER = Pod({"app": "stranger"}, "somewhere")
PROMETHEUS = Pod({"app.kubernetes.io/name": "prometheus"}, "monitoring")


def test_clients_reach_the_edges_prometheus_the_metrics_and_the_embedded_service_nobody() -> None:
    service = pod_of(one("StatefulSet", SINGLE))
    reached = {
        (who, port): allowed(SINGLE, sender, service, service.ports[port])
        for who, sender in {"client": CLIENT, "stranger": STRANGER, "prometheus": PROMETHEUS}.items()
        for port in service.ports
    }
    assert {pair for pair, may in reached.items() if may} == {
        ("client", "https"),
        ("client", "grpc"),
        ("prometheus", "metrics"),
    }
    assert not any(allowed(SINGLE, service, other, 443) for other in (CLIENT, STRANGER, PROMETHEUS, service))


def test_the_settings_hold_no_secret_and_no_environment_is_needed() -> None:
    assert not [name for name in os.environ if name.startswith("MATCHER_")]
    assert "env" not in container(one("StatefulSet", SINGLE))


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
    settings = load(SETTINGS, server=server, storage=storage)
    held = container(one("StatefulSet", SINGLE))
    async with bootstrap.running(settings) as service, httpx.AsyncClient(verify=False) as http:
        edge = f"https://127.0.0.1:{service.http_port}"
        for probe in ("startup", "readiness", "liveness"):
            assert (await http.get(edge + held[f"{probe}Probe"]["httpGet"]["path"])).status_code == 200
        (endpoint,) = one("PodMonitor", SINGLE)["spec"]["podMetricsEndpoints"]
        assert (await http.get(edge + endpoint["path"])).status_code == 401
        answered = await http.get(f"{endpoint['scheme']}://127.0.0.1:{metrics_port}{endpoint['path']}")
        assert "matcher_ready 1.0" in answered.text
        with pytest.raises(StartRefused, match="metrics_port"):
            async with bootstrap.running(load(server=server, storage={"data_dir": tmp_path / "second"})):
                pass
    assert (storage["data_dir"] / "gallery.db").exists()
    assert (storage["keys_dir"] / "master.key").exists()


# --- the cluster form ----------------------------------------------------------------------------------


def gateway_settings() -> dict[str, str]:
    (name,) = [one["configMapRef"]["name"] for one in container(one("Deployment", NATIONAL))["envFrom"]]
    found: dict[str, str] = one("ConfigMap", NATIONAL, name)["data"]
    return found


def test_the_shards_share_out_all_partitions_and_gateways_and_migration_know_every_replica_by_its_name() -> None:
    held = [parse(variables(one("StatefulSet", NATIONAL, name))["MATCHER_SHARD_PARTITIONS"]) for name in SHARDS]
    assert sum(map(len, held)) == len(ALL_PARTITIONS) == len(frozenset().union(*held))
    replicas = []
    for name in SHARDS:
        owner = one("StatefulSet", NATIONAL, name)
        service = one("Service", NATIONAL, owner["spec"]["serviceName"])
        assert service["spec"]["clusterIP"] == "None"
        # Gateways judge by what a shard says of itself: one that is not Ready must still have a name.
        assert service["spec"]["publishNotReadyAddresses"] is True
        assert chosen({"matchLabels": service["spec"]["selector"]}, labels(owner))
        others = [labels(one("StatefulSet", NATIONAL, other)) for other in SHARDS if other != name]
        assert not any(chosen({"matchLabels": service["spec"]["selector"]}, other) for other in others)
        (port,) = [port["port"] for port in service["spec"]["ports"]]
        replicas.append(
            [f"{name}-{at}.{owner['spec']['serviceName']}:{port}" for at in range(owner["spec"]["replicas"])]
        )
    told = json.loads(gateway_settings()["MATCHER_CLUSTER__SHARDS"])
    assert told == replicas
    assert all(len(one) >= 2 for one in told)
    settings = load(SETTINGS, cluster={"log_url": "postgresql://log.example/matcher", "shards": told})
    assert settings.cluster.on
    migration = container(one("Job", NATIONAL))
    assert migration["envFrom"] == container(one("Deployment", NATIONAL))["envFrom"]
    assert migration["command"][:2] == ["matcher", "migrate"]
    assert migration["command"][2:] == container(one("Deployment", NATIONAL))["args"]


def test_gateways_and_shards_have_the_keys_in_common_and_only_gateways_may_write_them() -> None:
    claim = one("PersistentVolumeClaim", NATIONAL)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    settings = load(SETTINGS).storage
    for name, owner in owners(NATIONAL).items():
        (volume,) = [one for one in pod(owner)["volumes"] if one["name"] == "keys"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (mount,) = [one for one in container(owner)["volumeMounts"] if one["name"] == "keys"]
        assert settings.keys_dir is not None
        assert settings.keys_dir.is_relative_to(mount["mountPath"])
        assert mount.get("readOnly", False) is (name in SHARDS)
    for name in SHARDS:
        assert Path(variables(one("StatefulSet", NATIONAL, name))["MATCHER_SHARD_KEYS_DIR"]) == settings.keys_dir


def test_the_log_comes_by_reference_and_must_show_its_certificate() -> None:
    log = one("Cluster", NATIONAL)["metadata"]["name"]
    for name, owner in owners(NATIONAL).items():
        (url,) = [one for one in container(owner)["env"] if one["name"].endswith("LOG_URL")]
        assert url["valueFrom"]["secretKeyRef"] == {"name": f"{log}-app", "key": "uri"}, name
        assert variables(owner)["PGSSLMODE"] == "verify-full"
        (mount,) = [one for one in container(owner)["volumeMounts"] if one["name"] == "log-ca"]
        assert Path(variables(owner)["PGSSLROOTCERT"]).parent == Path(mount["mountPath"])
        assert f"{log}-ca" in set(secrets(owner))


def test_gateways_and_shards_know_each_other_by_certificates_that_come_by_reference() -> None:
    gateway = one("Deployment", NATIONAL)
    named = {name: value for name, value in variables(gateway).items() if name.startswith("MATCHER_TRITON__")}
    fields = {name.removeprefix("MATCHER_TRITON__").lower(): value for name, value in named.items()}
    assert load(SETTINGS, triton=fields).triton.ca_file is not None
    mounts = {mount["mountPath"] for mount in container(gateway)["volumeMounts"]}
    assert {str(Path(value).parent) for value in named.values()} <= mounts
    for name in SHARDS:
        held = container(one("StatefulSet", NATIONAL, name))
        told = dict(one.removeprefix("--").split("=", 1) for one in held["args"])
        assert told["grpc-use-ssl-mutual"] == "1"
        files = [told[f"grpc-{one}"] for one in ("root-cert", "server-cert", "server-key")]
        assert {str(Path(file).parent) for file in files} <= {mount["mountPath"] for mount in held["volumeMounts"]}
        apis, _, word = told["http-restricted-api"].partition(":")
        assert {"inference", "model-repository"} <= set(apis.split(","))
        (reference,) = [one for one in held["env"] if f"$({one['name']})" == word]
        assert "secretKeyRef" in reference["valueFrom"]


def test_the_log_has_connections_for_everybody_at_the_largest_and_loses_nothing_when_it_fails_over() -> None:
    spec, scaled = one("Cluster", NATIONAL)["spec"], one("ScaledObject", NATIONAL)["spec"]
    surge = one("Deployment", NATIONAL)["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    shards = sum(one("StatefulSet", NATIONAL, name)["spec"]["replicas"] for name in SHARDS)
    used = 6 * (scaled["maxReplicaCount"] + surge + shards + 1)
    assert used + 20 <= int(spec["postgresql"]["parameters"]["max_connections"])
    assert spec["instances"] >= 3
    assert spec["postgresql"]["synchronous"]["dataDurability"] == "required"
    assert spec["bootstrap"]["initdb"]["encoding"] == "UTF8"


def test_only_the_flows_of_the_design_are_allowed() -> None:
    """Everybody against everybody, at every port that there is."""
    assert one("Cluster", NATIONAL)["metadata"]["name"] == "matcher-log"
    gateway, migration = pod_of(one("Deployment", NATIONAL)), pod_of(one("Job", NATIONAL))
    shards = {name: pod_of(one("StatefulSet", NATIONAL, name)) for name in SHARDS}
    who = {
        "gateway": gateway,
        "migration": migration,
        **shards,
        "log": Pod(
            {"cnpg.io/cluster": one("Cluster", NATIONAL)["metadata"]["name"]}, ports={"sql": 5432, "status": 8000}
        ),
        "operator": Pod({}, "cnpg-system"),
        "client": CLIENT,
        "prometheus": PROMETHEUS,
        "names": Pod({"k8s-app": "kube-dns"}, "kube-system", ports={"dns": 53}),
        "stranger": STRANGER,
        "neighbour": Pod({"app": "neighbour"}),
    }
    reached = {
        (sender, receiver, name)
        for sender, receiver in product(who, who)
        for name, port in who[receiver].ports.items()
        if allowed(NATIONAL, who[sender], who[receiver], port)
    }
    outside = {"operator", "client", "prometheus", "names", "stranger"}
    assert {flow for flow in reached if not (flow[0] in outside and flow[1] in outside)} == {
        ("client", "gateway", "https"),
        ("client", "gateway", "grpc"),
        ("prometheus", "gateway", "metrics"),
        *(("gateway", shard, "grpc") for shard in SHARDS),
        *(("prometheus", shard, "metrics") for shard in SHARDS),
        *((sender, "log", "sql") for sender in ("gateway", "migration", *SHARDS, "log", "operator")),
        *((sender, "log", "status") for sender in ("log", "operator")),
        *((sender, "names", "dns") for sender in ("gateway", "migration", *SHARDS, "log")),
    }


def test_a_shard_is_restarted_by_tritons_readiness_and_rolled_by_its_own() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name in SHARDS:
        owner = one("StatefulSet", NATIONAL, name)
        held = container(owner)
        for probe in ("startup", "liveness"):
            assert held[f"{probe}Probe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
        # The command of the readiness probe is in the image.
        _, script = held["readinessProbe"]["exec"]["command"]
        assert f"COPY ops/image/{Path(script).name} {Path(script).parent}/" in dockerfile
        assert held["readinessProbe"]["timeoutSeconds"] <= held["readinessProbe"]["periodSeconds"]
        exit_s = int(re.findall(r"--exit-timeout-secs=(\d+)", dockerfile)[0])
        assert pod(owner)["terminationGracePeriodSeconds"] > exit_s + hosted.END_S_MAX
        # A gateway tries a replica again within this, and asks for its address again within 30 s, gRPC's own limit.
        reconnect_s = dict(CHANNEL_OPTIONS)["grpc.max_reconnect_backoff_ms"] / 1000
        assert owner["spec"]["minReadySeconds"] > 30 + 1.2 * reconnect_s
        (shm,) = [one["emptyDir"] for one in pod(owner)["volumes"] if one["name"] == "shm"]
        assert shm["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in held["volumeMounts"]


def test_replicas_and_gateways_are_apart_and_go_one_at_a_time() -> None:
    for name, owner in owners(NATIONAL).items():
        if owner["kind"] == "Job":
            continue
        budgets = [
            one["spec"]["maxUnavailable"]
            for one in all_of("PodDisruptionBudget", NATIONAL).values()
            if chosen(one["spec"]["selector"], labels(owner))
        ]
        assert budgets == [1], name
        spread = {one["topologyKey"]: one for one in pod(owner)["topologySpreadConstraints"]}
        assert spread["kubernetes.io/hostname"]["whenUnsatisfiable"] == "DoNotSchedule"
        assert "topology.kubernetes.io/zone" in spread
        for constraint in spread.values():
            # Of this shard, not of all shards: one node may hold replicas of several.
            selector = constraint["labelSelector"]
            assert [other for other, held in owners(NATIONAL).items() if chosen(selector, labels(held))] == [name]
    rolling = one("Deployment", NATIONAL)["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}


def test_the_number_of_gateways_follows_what_waits() -> None:
    spec, gateways = one("ScaledObject", NATIONAL)["spec"], one("Deployment", NATIONAL)
    assert spec["scaleTargetRef"]["name"] == gateways["metadata"]["name"]
    assert "replicas" not in gateways["spec"]
    (trigger,) = spec["triggers"]
    assert_names_only_what_exists(trigger["metadata"]["query"])
    assert 2 <= spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"]
    # Before permits run out, and not for a queue that is one batch.
    settings = load(SETTINGS)
    assert settings.batching.batch_probes_max < float(trigger["metadata"]["threshold"])
    assert float(trigger["metadata"]["threshold"]) < settings.admission.probes_in_flight_max / 2


def quantity(text: str) -> float:
    units = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3}
    found = re.fullmatch(r"([0-9.]+)(\w*)", text)
    assert found
    return float(found[1]) * (units[found[2]] if found[2] else 1)


def test_the_sizes_are_those_that_matcher_size_reckons_from_what_was_measured() -> None:
    text = (NATIONAL / "sizes.yaml").read_text()
    told = re.search(r"matcher size --references (\d+) --probes-per-s (\d+) --measured-queries-per-s (\d+)", text)
    assert told
    references, probes_per_s, measured = map(int, told.groups())
    assert f"| threshold 0.3 | 64 | {measured}.0 |" in (ROOT / "docs/PERFORMANCE.md").read_text()
    needed = size(Load(references, 512, probes_per_s, measured * 1_000_000 / 2))
    assert needed.shards == len(SHARDS)
    for name in SHARDS:
        owner = one("StatefulSet", NATIONAL, name)
        requests = container(owner)["resources"]["requests"]
        cores = needed.search_cores / needed.shards
        assert cores <= quantity(requests["cpu"]) <= 1.2 * cores
        assert variables(owner)["MATCHER_SHARD_THREADS"] == requests["cpu"]
        of_one = size(Load(references // needed.shards, 512, 0, measured * 1_000_000 / 2))
        (shm,) = [one["emptyDir"]["sizeLimit"] for one in pod(owner)["volumes"] if one["name"] == "shm"]
        memory = quantity(requests["memory"])
        assert of_one.memory_bytes + quantity(shm) <= memory <= 1.2 * (of_one.memory_bytes + quantity(shm))
        # The index's budget is a share of the container's memory.
        assert of_one.index_bytes + of_one.rewrite_bytes <= INDEX_SHARE * memory
        (claim,) = owner["spec"]["volumeClaimTemplates"]
        assert 2 * of_one.segment_file_bytes <= quantity(claim["spec"]["resources"]["requests"]["storage"])
        assert container(owner)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert needed.log_bytes * 2 <= quantity(one("Cluster", NATIONAL)["spec"]["storage"]["size"])
    gateway = container(one("Deployment", NATIONAL))["resources"]["requests"]
    assert needed.gateway_cores <= quantity(gateway["cpu"]) * one("ScaledObject", NATIONAL)["spec"]["minReplicaCount"]


def test_the_pods_that_the_runbook_names_are_those_of_the_overlays() -> None:
    table = (ROOT / "docs/RUNBOOK.md").read_text().split("## ")[0]
    rows = dict(re.findall(r"^\| (single-node|national) \| (.*)$", table, re.MULTILINE))
    assert re.findall(r"`(\w+)/(\w+)`", rows["single-node"]) == [
        ("statefulset", one("StatefulSet", SINGLE)["metadata"]["name"])
    ]
    assert re.findall(r"`(\w+)/(\w+)`", rows["national"]) == [
        ("deployment", one("Deployment", NATIONAL)["metadata"]["name"])
    ]
    pods = [
        f"{name}-{replica}"
        for name in SHARDS
        for replica in range(one("StatefulSet", NATIONAL, name)["spec"]["replicas"])
    ]
    assert re.findall(r"`(matcher-shard-[\d-]+)`", rows["national"]) == pods
    (named,) = re.findall(r"container `(\w+)`", rows["national"])
    assert {container(one("StatefulSet", NATIONAL, name))["name"] for name in SHARDS} == {named}


def test_the_upgrade_that_the_documents_tell_applies_what_each_step_needs_and_the_gateways_last() -> None:
    text = (ROOT / "docs/OPERATIONS.md").read_text().split("## Upgrade")[1].split("\n## ")[0]
    way = re.compile(r"kubectl apply -k OVERLAY(?: -l 'app.kubernetes.io/component in \(([a-z, ]+)\)')?$", re.MULTILINE)
    selections = way.findall(text)
    assert selections[-1] == ""
    order: list[list[str]] = []
    there: set[tuple[str, str]] = set()
    for selection in selections:
        applied = [
            held
            for held in built(NATIONAL)
            if not selection
            or held["metadata"].get("labels", {}).get("app.kubernetes.io/component") in selection.split(", ")
        ]
        there |= {(held["kind"], held["metadata"]["name"]) for held in applied}
        order.append([held["metadata"]["name"] for held in applied if held["metadata"]["name"] in owners(NATIONAL)])
        for name in order[-1]:
            owner = owners(NATIONAL).get(name)
            assert owner is not None
            maps = [volume["configMap"]["name"] for volume in pod(owner)["volumes"] if "configMap" in volume]
            maps += [way["configMapRef"]["name"] for way in container(owner).get("envFrom", ())]
            assert {("ConfigMap", name) for name in maps} <= there, name
    assert order[0] == ["matcher-migrate"]
    assert set(order[1]) == set(SHARDS)
    assert "matcher" in order[2]
    assert f"rollout status statefulset/{SHARDS[0]}" in text
