"""What is on record of a threshold, and rates, as people say them. Imports nothing: commands say them too. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def in_words(evidence: Mapping[str, Any] | None) -> list[str]:
    """Sentences about a threshold, from the evidence as a document (`records.evidence_dict`)."""
    if evidence is None:
        return ["Nothing is on record of what this threshold does: it was set without looking at a calibration."]
    said = []
    fpir, fnir, needed = evidence["fpir"], evidence["fnir"], evidence["needed"]
    size = f"{evidence['references']:,} references" if evidence["references"] else "no stated number of references"
    if evidence["one_false_alert_in"]:
        said.append(f"Asked for: at most one false alert in {evidence['one_false_alert_in']:,}, with {size}.")
    else:
        said.append(f"The threshold was given, without a target, for {size}.")
    if needed is not None:
        limits = f", between {needed['low']:.4f} and {needed['high']:.4f}" if needed["low"] > -1.0 else ""
        said.append(
            f"The threshold that this takes is {needed['estimate']:.4f} by the best estimate{limits}; "
            f"{needed['high']:.4f} is on the safe side."
        )
    if fpir is not None:
        said.append(
            f"Of people who are not in it: {one_in(fpir['estimate'])} is wrongly alerted on "
            f"({one_in(fpir['low'])} to {one_in(fpir['high'])})."
        )
    if fnir is not None:
        said.append(f"Of people who are in it: {fnir['estimate']:.2%} are missed ({_percents(fnir)}).")
    elif evidence["calibration_sequence"]:
        said.append("How many people who are in it are missed is not known: the calibration does not say.")
    if evidence["calibration_sequence"]:
        sure = f"; limits at {evidence['confidence']:.0%} confidence" if evidence["confidence"] else ""
        said.append(f"By calibration {evidence['calibration_sequence']}{sure}.")
    if evidence["not_supported"]:
        said.append(f"NOT SUPPORTED BY EVIDENCE: {evidence['not_supported']}")
    return said


def one_in(rate: float) -> str:
    """A rate as people say it."""
    if math.isnan(rate):
        return "unknown"
    if rate <= 0.0:
        return "none"
    if rate >= 0.995:
        return "all"
    if rate > 1 / 3:
        return f"{rate:.0%}"
    every = 1.0 / rate
    digits = 10 ** max(0, math.floor(math.log10(every)) - 1)
    return f"1 in {round(every / digits) * digits:,.0f}"


def _percents(limits: Mapping[str, float]) -> str:
    return f"{limits['low']:.2%} to {limits['high']:.2%}"
