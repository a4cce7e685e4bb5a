"""What an overlay comes to, and what its network policies allow."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.ops.tools import ROOT, said, tool, yaml

SINGLE = ROOT / "k8s/overlays/single-node"
NATIONAL = ROOT / "k8s/overlays/national"
POD_OWNERS = ("StatefulSet", "Deployment", "Job")
NAMESPACE = "matcher"


@cache
def built(overlay: Path) -> list[dict[str, Any]]:
    text = said(tool("kubectl", "the extra ops"), "kustomize", overlay)
    return [held for held in yaml.safe_load_all(text) if held]


def all_of(kind: str, overlay: Path) -> dict[str, dict[str, Any]]:
    """Everything of a kind by its name."""
    return {held["metadata"]["name"]: held for held in built(overlay) if held["kind"] == kind}


def one(kind: str, overlay: Path, name: str = "") -> dict[str, Any]:
    found = all_of(kind, overlay)
    return found[name] if name else next(iter(found.values())) if len(found) == 1 else _several(kind, found)


def _several(kind: str, found: dict[str, Any]) -> Any:
    raise AssertionError(f"name one {kind} of {sorted(found)}")


def owners(overlay: Path) -> dict[str, dict[str, Any]]:
    """What makes pods, by its name."""
    return {name: held for kind in POD_OWNERS for name, held in all_of(kind, overlay).items()}


def pod(owner: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = owner["spec"]["template"]["spec"]
    return spec


def container(owner: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(owner)["containers"]
    assert isinstance(only, dict)
    return only


def labels(owner: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = owner["spec"]["template"]["metadata"]["labels"]
    return found


def chosen(selector: dict[str, Any], of: dict[str, str]) -> bool:
    """Whether a label selector chooses something with these labels."""
    if selector.keys() - {"matchLabels", "matchExpressions"}:
        raise AssertionError(f"not understood: {selector}")
    fits = all(of.get(name) == value for name, value in selector.get("matchLabels", {}).items())
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In", rule
        fits = fits and of.get(rule["key"]) in rule["values"]
    return fits


class Pod:
    """Somebody who may send or receive: labels, the namespace's labels, and named ports."""

    def __init__(self, pod_labels: dict[str, str], namespace: str = NAMESPACE, ports: dict[str, int] | None = None):
        self.labels, self.ports = pod_labels, ports or {}
        self.namespace = {"kubernetes.io/metadata.name": namespace}


def pod_of(owner: dict[str, Any]) -> Pod:
    return Pod(labels(owner), ports={one["name"]: one["containerPort"] for one in container(owner).get("ports", ())})


def allowed(overlay: Path, sender: Pod, receiver: Pod, port: int) -> bool:
    """Whether the policies let the sender reach this TCP port of the receiver. As Kubernetes has it: a pod that some
    policy chooses for a direction may do in it only what one of them names."""
    out = _permitted(overlay, "egress", sender, receiver, port, receiver.ports)
    return out and _permitted(overlay, "ingress", receiver, sender, port, receiver.ports)


def _permitted(overlay: Path, way: str, chosen_pod: Pod, peer: Pod, port: int, named: dict[str, int]) -> bool:
    if chosen_pod.namespace["kubernetes.io/metadata.name"] != NAMESPACE:
        return True
    policies = [
        held["spec"]
        for held in all_of("NetworkPolicy", overlay).values()
        if way.capitalize() in held["spec"]["policyTypes"] and chosen(held["spec"]["podSelector"], chosen_pod.labels)
    ]
    return not policies or any(
        any(named.get(ports["port"], ports["port"]) == port and ports["protocol"] == "TCP" for ports in rule["ports"])
        and any(_is(other, peer) for other in rule["from" if way == "ingress" else "to"])
        for policy in policies
        for rule in policy.get(way) or ()
    )


def _is(who: dict[str, Any], peer: Pod) -> bool:
    if "ipBlock" in who:
        return False
    namespace = who.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}})
    return chosen(namespace, peer.namespace) and chosen(who.get("podSelector", {}), peer.labels)


def variables(owner: dict[str, Any]) -> dict[str, str]:
    """The container's variables that are given as such."""
    return {one["name"]: one["value"] for one in container(owner).get("env", ()) if "value" in one}


def secrets(held: Any) -> Iterator[str]:
    """The names of all secrets that something refers to."""
    if isinstance(held, dict):
        for key, value in held.items():
            if key == "secretKeyRef":
                yield value["name"]
            elif key == "secretName":
                yield value
            else:
                yield from secrets(value)
    elif isinstance(held, list):
        for value in held:
            yield from secrets(value)
