"""The gauges that alerts stand on say what is so."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography import x509

from matcher_service import bootstrap
from matcher_service.metrics import Metrics
from tests.running_service import settings_for, whole_service


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, name
    return found


async def test_replay_has_no_lag_once_it_stands_at_the_head_however_long_ago_the_last_write_was(tmp_path: Path) -> None:
    async with whole_service(tmp_path) as service:
        space = await service.space(8)
        await service.gallery("g", space)
        metrics = service.running.service.metrics
        assert value(metrics, "matcher_applied_sequence") == value(metrics, "matcher_log_sequence") == 2
        assert value(metrics, "matcher_replay_lag_seconds") == 0


async def test_a_started_service_publishes_what_it_is_and_stands_on(tmp_path: Path) -> None:
    began = time.time()
    async with whole_service(
        tmp_path, storage={"erase_within_h": 2.0}, index={"memory_bytes_max": 10_000_000}
    ) as whole:
        metrics = whole.running.service.metrics
        assert value(metrics, "matcher_ready") == 1
        assert value(metrics, "matcher_erase_within_seconds") == 7200
        assert value(metrics, "matcher_index_budget_bytes") == 10_000_000
        assert 0 < value(metrics, "matcher_data_free_bytes") <= value(metrics, "matcher_data_size_bytes")
        assert value(metrics, "matcher_certificate_expiry_timestamp_seconds") == 0
        assert value(metrics, "process_resident_memory_bytes") > 0
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"http://127.0.0.1:{whole.running.http_port}/metrics")).text
        assert "matcher_build_info{" in text
    # The first look at what is due may still be on its way while the service runs; the stop waits for nothing of it.
    assert value(metrics, "matcher_erasure_complete_timestamp_seconds") in (0, pytest.approx(began, abs=300))
    assert value(metrics, "matcher_ready") == 0


async def test_the_expiry_shown_is_that_of_the_certificate_served(tmp_path: Path) -> None:
    expires = datetime(2100, 1, 2, 3, 4, 5, tzinfo=UTC)
    issued = trustme.CA().issue_cert("127.0.0.1", not_after=expires)
    issued.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    issued.private_key_pem.write_to_path(tmp_path / "tls.key")
    held = x509.load_pem_x509_certificate((tmp_path / "tls.crt").read_bytes()).not_valid_after_utc
    server = {"tls_certificate_file": tmp_path / "tls.crt", "tls_key_file": tmp_path / "tls.key"}
    async with bootstrap.running(settings_for(tmp_path / "data", server=server)) as service:
        shown = value(service.service.metrics, "matcher_certificate_expiry_timestamp_seconds")
    assert shown == held.timestamp() == expires.timestamp()
