"""What a force publishes of a deployment: how many faces, alerts and false alerts, of whom, under which terms. Pure.

False alerts are told per alert and per face seen: either alone misleads, the one because alerts are few, the other
because faces are many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import orjson

from matcher_service import records
from matcher_service.evidence_in_words import in_words
from matcher_service.terms import Deployment, EntryKind, LogEntry

KINDS = (
    EntryKind.GALLERY_CREATED,
    EntryKind.THRESHOLD_CHANGED,
    EntryKind.WATCHLIST_APPROVED,
    EntryKind.GALLERY_DELETED,
)
"""The entries of the log that a report is made from."""

_MEANING = (
    "Faces that passed the cameras were compared with those whom the galleries below hold. An alert says that a face "
    "resembled one of them at least as much as the threshold asks; it names nobody for certain, and people judge it."
)

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.4rem 0 1rem}td,th{border-bottom:1px solid #ddd;padding:.2rem .8rem;"
    "text-align:left;vertical-align:top}"
)


def build(
    deployment: Deployment,
    entries: Iterable[LogEntry],
    counts: Mapping[str, int],
    now_ms: int,
    listed: Mapping[str, int],
) -> dict[str, Any]:
    """`entries` are those of KINDS, in order; `counts` the deployment's counters; `listed` how many are on its
    watchlists now, by category."""
    faces, alerts = counts.get("faces_searched", 0), counts.get("alerts", 0)
    rejected = counts.get("alerts_rejected", 0)
    prefix = "category_"
    by_category = Counter({name.removeprefix(prefix): by for name, by in counts.items() if name.startswith(prefix)})
    by_category.update(listed)
    lasted_until_ms = min(now_ms, deployment.ended_at_ms or deployment.closes_at_ms)
    return {
        "deployment": records.deployment_dict(deployment),
        "made_at_ms": now_ms,
        "lasted_ms": max(0, lasted_until_ms - deployment.opens_at_ms),
        "faces": {
            "searched": faces,
            "refused": counts.get("faces_refused", 0),
            "incomplete": counts.get("faces_incomplete", 0),
        },
        "alerts": {
            "raised": alerts,
            **{name: counts.get(f"alerts_{name}", 0) for name in ("open", "confirmed", "rejected", "inconclusive")},
            "live_ms": deployment.alert_retention_ms,
            "erased": counts.get("alerts_erased", 0),
        },
        "false_alerts": {
            "per_alert": rejected / alerts if alerts else None,
            "per_face_searched": rejected / faces if faces else None,
        },
        "galleries": _galleries(deployment.gallery_ids, entries),
        "watchlist": {
            "entries": sum(by_category.values()),
            "destroyed": counts.get("watchlist_entries", 0),
            "by_category": dict(sorted(by_category.items())),
        },
        "templates_kept_of_faces_without_an_alert": 0,
    }


def _galleries(gallery_ids: Sequence[str], entries: Iterable[LogEntry]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.gallery_id not in gallery_ids:
            continue
        match entry.kind:
            case EntryKind.GALLERY_CREATED:
                gallery = records.decode_gallery(entry.record)
                found[gallery.gallery_id] = {
                    **records.gallery_dict(gallery),
                    "thresholds": [
                        {
                            "from_ms": entry.at_ms,
                            "threshold": gallery.threshold,
                            "evidence": records.evidence_dict(gallery.evidence),
                        }
                    ],
                    "approved_by": "",
                    "deleted_at_ms": None,
                }
            case EntryKind.THRESHOLD_CHANGED:
                _, threshold, known = records.decode_threshold_change(entry.record)
                change = orjson.loads(entry.record)
                found[entry.gallery_id]["thresholds"].append(
                    {
                        "from_ms": entry.at_ms,
                        "threshold": threshold,
                        "evidence": records.evidence_dict(known),
                        "reason": change.get("reason", ""),
                    }
                )
            case EntryKind.WATCHLIST_APPROVED:
                found[entry.gallery_id]["approved_by"] = records.decode_approval(entry.record)[1]
            case EntryKind.GALLERY_DELETED:
                found[entry.gallery_id]["deleted_at_ms"] = entry.at_ms
            case _:
                pass
    return [found[name] for name in sorted(found)]


def page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page that needs nothing else."""
    deployment, alerts, faces = report["deployment"], report["alerts"], report["faces"]
    title = f"Deployment {deployment['deployment_id']}"
    rows = [
        ("Place", deployment["place"] or "not stated"),
        ("From", _time(deployment["opens_at_ms"])),
        ("To", _time(deployment["ended_at_ms"] or deployment["closes_at_ms"])),
        ("Lasted", _length(report["lasted_ms"])),
        ("Authorised by", deployment["authorised_by"]),
        ("Reason", deployment["reason"]),
        ("Legal authority", deployment.get("legal_authority") or "not stated"),
        ("Necessity", deployment.get("necessity") or "not stated"),
        ("Cameras", ", ".join(deployment["cameras"]) or "not limited to named ones"),
    ]
    seen = [
        ("Faces searched for", f"{faces['searched']:,}"),
        ("Faces refused, as too old or unusable", f"{faces['refused']:,}"),
        ("Templates kept of faces without an alert", "0"),
        ("Alerts", f"{alerts['raised']:,}"),
        ("of these confirmed by people", f"{alerts['confirmed']:,}"),
        ("of these rejected by people (false alerts)", f"{alerts['rejected']:,}"),
        ("of these inconclusive", f"{alerts['inconclusive']:,}"),
        ("of these not yet judged", f"{alerts['open']:,}"),
        ("False alerts among alerts", _share(alerts["rejected"], alerts["raised"])),
        ("False alerts among faces searched for", _share(alerts["rejected"], faces["searched"])),
    ]
    listed = report["watchlist"]
    people = [
        ("People listed", f"{listed['entries']:,}"),
        *(
            (f"of these {name.replace('_', ' ') or 'without a category'}", f"{count:,}")
            for name, count in listed["by_category"].items()
        ),
    ]
    erased = [
        ("Alerts are erased after", _length(alerts["live_ms"]) if alerts["live_ms"] else "the service's usual time"),
        ("Alerts erased so far", f"{alerts['erased']:,}"),
        ("Entries of watchlists destroyed", f"{listed['destroyed']:,}"),
    ]
    galleries = "".join(
        f"<h2>Searched: {escape(one['gallery_id'])} ({escape(one['kind'])})</h2>{_table(_terms(one))}"
        for one in report["galleries"]
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1><p>{_MEANING}</p>{_table(rows)}"
        f"<h2>Faces and alerts</h2>{_table(seen)}<h2>Watchlists of this deployment</h2>{_table(people)}"
        f"<h2>Erasure</h2>{_table(erased)}{galleries}"
        f"<p>Made {_time(report['made_at_ms'])}.</p></html>\n"
    )


def _terms(gallery: Mapping[str, Any]) -> list[tuple[str, str]]:
    watchlist = gallery["watchlist"]
    listed = watchlist and [
        ("Categories", ", ".join(one.replace("_", " ") for one in watchlist["categories"])),
        ("Approved by", gallery["approved_by"] or "nobody"),
        ("Calibrated for", f"{gallery['size_max']:,} people"),
    ]
    return [
        ("Controller", gallery["controller"]),
        ("Lawful basis", gallery["lawful_basis"]),
        ("Purpose", gallery["purpose"]),
        *(listed or ()),
        *(
            (
                f"Threshold from {_time(one['from_ms'])}",
                " ".join([f"{one['threshold']:g}.", *in_words(one.get("evidence"))]),
            )
            for one in gallery["thresholds"]
        ),
        ("Destroyed", _time(gallery["deleted_at_ms"]) if gallery["deleted_at_ms"] else "no"),
    ]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return f"<table>{''.join(f'<tr><th>{escape(one)}<td>{escape(other)}' for one, other in rows)}</table>"


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _length(ms: int) -> str:
    """A duration in its two largest units."""
    units = [(86_400_000, "day"), (3_600_000, "hour"), (60_000, "minute"), (1000, "second")]
    told: list[str] = []
    for size, name in units:
        count, ms = divmod(ms, size)
        if count:
            told.append(f"{count} {name}{'' if count == 1 else 's'}")
    return " ".join(told[:2]) or "less than a second"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole:.4g}%)" if whole else "none to count"
