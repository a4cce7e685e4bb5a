"""What a change of threshold does, read from two evaluation reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rate_changes(before: Path, threshold_before: float, after: Path, threshold_after: float) -> list[dict[str, Any]]:
    """Upper limits of FPIR and FNIR at both thresholds, over all people and for each group in both reports. Raises
    InvalidInput if a report is not one, or is of another threshold."""
    first, second = _limits(before, threshold_before, "before"), _limits(after, threshold_after, "after")
    return [
        {"measure": measure, "group": group, "before": limit, "after": second[measure, group]}
        for (measure, group), limit in first.items()
        if (measure, group) in second
    ]


def _limits(path: Path, threshold: float, field: str) -> dict[tuple[str, str], float]:
    from matcher_service.errors import InvalidInput

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        judged = float(report["plan"]["threshold"])
        limits = {(measure, ""): float(report["at_threshold"][measure]["high"]) for measure in ("FPIR", "FNIR")}
        for measure in report["groups"]:
            for group in measure["groups"]:
                limits[measure["measure"], group["group"]] = float(group["rate"]["high"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"{path} is no evaluation report: {error!r}", field=field, hint="give a report.json of `matcher evaluate`"
        ) from error
    # Reports hold six digits.
    if abs(judged - threshold) > 1e-5:
        raise InvalidInput(
            f"{path} judges threshold {judged:g}, not {threshold:g}",
            field=field,
            hint=f"run `matcher evaluate --threshold {threshold:g}`",
        )
    return limits
