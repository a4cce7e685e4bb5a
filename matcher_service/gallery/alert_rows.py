"""Alerts as their table holds them: the alert sealed, and sealed beside it what people made of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from matcher_service import records
from matcher_service.gallery import seal
from matcher_service.terms import Adjudication, Alert, AlertState, Verdict


def read_alert(cipher: AESGCM, alert_id: str, sealed: bytes, attributes: bytes | None) -> Alert:
    """Raises DataDamaged if one of them fails its authentication."""
    alert = records.decode_alert(seal.unseal_record(cipher, sealed, "alert", alert_id))
    if attributes is None:
        return alert
    beside: dict[str, Any] = orjson.loads(seal.unseal_record(cipher, attributes, "adjudication", alert_id))
    state = AlertState(beside["state"])
    said = (Adjudication(**{**one, "verdict": Verdict(one["verdict"])}) for one in beside["adjudications"])
    return dataclasses.replace(alert, state=state, adjudications=tuple(said))


def encode_adjudications(state: AlertState, adjudications: tuple[Adjudication, ...]) -> bytes:
    return orjson.dumps({"state": state, "adjudications": [one._asdict() for one in adjudications]})
