"""Write what is made from other files: docs/METRICS.md and k8s/base/prometheus-rule.yaml (make ops-files)."""

from __future__ import annotations

from pathlib import Path

from matcher_service import metrics

ROOT = Path(__file__).parents[1]

_METRICS_HEAD = """\
# Metrics

Made from `matcher_service/metrics.py` by `make ops-files`; a test holds the two together. No label names a person, a
probe, a reference or a camera. On loopback `/metrics` stands on the HTTP port; beyond loopback only on
`server.metrics_port`. With these come the `process_*` metrics of the Prometheus client (memory, CPU, descriptors).

"""

_RULE_HEAD = """\
# Made from ops/prometheus/rules.yaml by `make ops-files`. Change that file, not this one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: matcher
  labels: {app.kubernetes.io/name: matcher}
spec:
"""


def metrics_page() -> str:
    return _METRICS_HEAD + metrics.table()


def prometheus_rule() -> str:
    """The rule file as it is, indented into the custom resource."""
    groups = (ROOT / "ops/prometheus/rules.yaml").read_text().split("\ngroups:", 1)[1]
    return _RULE_HEAD + "\n".join(f"  {line}".rstrip() for line in f"groups:{groups}".splitlines()) + "\n"


def generated() -> dict[Path, str]:
    return {ROOT / "docs/METRICS.md": metrics_page(), ROOT / "k8s/base/prometheus-rule.yaml": prometheus_rule()}


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text)
