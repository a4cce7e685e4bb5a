"""What an impact assessment (Data Protection Act 2018, section 64) needs to know of the service as it is set up. Pure.

The assessment itself is a person's work; these are its inputs, with no person in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matcher_service import lawful_galleries, policy, processing, records
from matcher_service.access.verbs import HTTP_VERBS
from matcher_service.catalogue import Catalogue
from matcher_service.settings import StorageSettings


def inputs(catalogue: Catalogue, storage: StorageSettings, live: Mapping[str, int], now_ms: int) -> dict[str, Any]:
    """`live` counts the references of each gallery."""
    return {
        "made_at_ms": now_ms,
        "policy_version": policy.POLICY_VERSION,
        "galleries": [
            {
                **records.gallery_dict(one),
                "references": live.get(one.gallery_id, 0),
                "calibrated": _calibration(catalogue, one.gallery_id),
            }
            for one in sorted(catalogue.galleries.values(), key=lambda gallery: gallery.gallery_id)
        ],
        "deployments": [records.deployment_dict(one) for one in catalogue.deployments.values()],
        "clocks": {
            "templates_erased_within_h": storage.erase_within_h,
            "alerts_kept_d": storage.alert_retention_d,
            "audit_detail_kept_d": storage.audit_detail_retention_d,
            "idempotency_keys_kept_h": storage.idempotency_window_h,
            "probes_without_an_alert_kept": 0,
        },
        "ceilings_ms": {
            "retention": policy.RETENTION_MS_MAX,
            "review_interval": lawful_galleries.REVIEW_INTERVAL_MS_MAX,
            "watchlist": lawful_galleries.WATCHLIST_MS_MAX,
            "deployment": policy.DEPLOYMENT_MS_MAX,
            "case": policy.CASE_MS_MAX,
            "age_of_a_live_probe": policy.PROBE_AGE_MS_MAX,
            "alert": policy.ALERT_RETENTION_MS_MAX,
        },
        "processing": {action: operation.value for action, operation in processing.OPERATIONS.items()},
        "who_may": {verb: sorted(one.value for one in scopes) for verb, scopes in sorted(HTTP_VERBS.items())},
    }


def _calibration(catalogue: Catalogue, gallery_id: str) -> dict[str, Any] | None:
    """The false-match rate that the gallery's threshold was measured to have at most; None if nobody measured it."""
    gallery = catalogue.galleries[gallery_id]
    space = catalogue.spaces.get(gallery.space)
    table = None if space is None else space.score_table
    if table is None:
        return None
    reached = [rate for score, rate in zip(table.scores, table.rates, strict=True) if score <= gallery.threshold]
    return {"false_match_rate_max": reached[-1] if reached else 1.0, "method": table.method}
