"""The settings of a cluster are judged together, and the refusal says what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from matcher_service.errors import StartRefused
from matcher_service.settings import load

GOOD: dict[str, Any] = {
    "log_url": "postgresql://matcher:secret@db/gallery",
    "shards": [["a:8001", "b:8001/gallery_shard_1"], ["a:8001/gallery_shard_1"]],
}
KEYS = {"keys_dir": "/keys"}


def test_a_cluster_is_read_from_a_file_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password of the log is shown nowhere."""
    file = tmp_path / "matcher.toml"
    file.write_text('[cluster]\nshards = [["a:8001"], ["b:8001"]]\n[storage]\nkeys_dir = "/keys"\n')
    monkeypatch.setenv("MATCHER_CLUSTER__LOG_URL", GOOD["log_url"])
    settings = load(file)
    assert settings.cluster.on
    assert settings.cluster.shards == (("a:8001",), ("b:8001",))
    assert settings.cluster.log_url.get_secret_value() == GOOD["log_url"]
    assert "secret" not in repr(settings)
    monkeypatch.setenv("MATCHER_CLUSTER__SHARDS", '[["c:1", "d:1"]]')
    assert load(file).cluster.shards == (("c:1", "d:1"),)


def test_without_a_log_in_postgresql_there_is_no_cluster() -> None:
    assert not load().cluster.on


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cluster": GOOD | {"log_url": ""}}, "cluster.log_url is not set"),
        ({"cluster": GOOD | {"log_url": "sqlite:///x"}}, "not a postgresql:// address"),
        ({"cluster": GOOD | {"shards": []}}, "at least one replica"),
        ({"cluster": GOOD | {"shards": [["a:1"], []]}}, "at least one replica"),
        ({"cluster": GOOD | {"shards": [["a:1", "b:1"], ["a:1"]]}}, "a:1 is named twice"),
        ({"cluster": GOOD | {"shards": [["dns:///shards:8001"]]}}, "neither host:port nor host:port/model"),
        ({"cluster": GOOD | {"hedge_after_ms": 1000}}, "no other replica would be asked"),
        ({"cluster": GOOD | {"answer_within_ms": 2000}}, "refused for their deadline"),
        ({"storage": {}}, "storage.keys_dir is not set"),
        ({"triton": {"ca_file": "ca", "key_file": "key"}}, "certificate_file and key_file must be set together"),
        ({"triton": {"certificate_file": "c", "key_file": "k"}}, "certificate_file needs ca_file"),
        ({"server": {"share_ports": True, "http_port": 0}}, "name http_port and grpc_port"),
        ({"server": {"share_ports": True}}, "a metrics_port of its own"),
        ({"cluster": {}, "server": {"share_ports": True}}, "server.share_ports is for the gateways of a cluster"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(StartRefused, match=told):
        load(**({"cluster": GOOD, "storage": KEYS} | changes))
