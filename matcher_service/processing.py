"""Which operation of section 62 of the Data Protection Act 2018 an audit record stands for. Pure.

The section asks for a log of collection, alteration, consultation, disclosure, combination and erasure: who, when and,
for consultation and disclosure, why. Every record says who and when; its detail says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Operation(StrEnum):
    COLLECTION = "collection"
    ALTERATION = "alteration"
    CONSULTATION = "consultation"
    DISCLOSURE = "disclosure"
    COMBINATION = "combination"
    ERASURE = "erasure"


OPERATIONS: Mapping[str, Operation] = {
    "reference.enrolled": Operation.COLLECTION,
    "reference.replaced": Operation.ALTERATION,
    "reference.reviewed": Operation.ALTERATION,
    "reference.withdrawn": Operation.ALTERATION,
    "reference.expired": Operation.ALTERATION,
    "subject.withdrawn": Operation.ALTERATION,
    "ground.ended": Operation.ALTERATION,
    "threshold.changed": Operation.ALTERATION,
    "hold.placed": Operation.ALTERATION,
    "hold.released": Operation.ALTERATION,
    "alert.adjudicated": Operation.ALTERATION,
    "references.consulted": Operation.CONSULTATION,
    "subject.consulted": Operation.CONSULTATION,
    "alerts.consulted": Operation.CONSULTATION,
    "erasures.consulted": Operation.CONSULTATION,
    "alert.raised": Operation.DISCLOSURE,
    "subject.exported": Operation.DISCLOSURE,
    # A search compares what several controllers hold with one face.
    "case_search": Operation.COMBINATION,
    "template.erased": Operation.ERASURE,
    "erased_from_index": Operation.ERASURE,
    "erasure.complete": Operation.ERASURE,
    "gallery.deleted": Operation.ERASURE,
    "alert.erased": Operation.ERASURE,
}


def covers(record: Mapping[str, Any], sequences: frozenset[int]) -> bool:
    """Whether an audit record is about one of these log entries."""
    ranges = record.get("facts", {}).get("sequences", ())
    return any(first <= one <= last for first, last in ranges for one in sequences)
