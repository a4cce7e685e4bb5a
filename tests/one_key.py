"""A key for every gallery that is never rotated."""

from __future__ import annotations

from matcher_service.index.snapshots import Key
from matcher_service.terms import DataKey


def one_key(key: bytes) -> Key:
    return lambda gallery_id, generation=0: DataKey(1, key)
