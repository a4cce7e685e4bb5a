"""What a force publishes of a deployment: how many faces, alerts and false alerts, of whom, under which terms. Pure.

False alerts are told per alert and per face seen: either alone misleads, the one because alerts are few, the other
because faces are many.
"""

from __future__ import annotations

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

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.4rem 0 1rem}td,th{border-bottom:1px solid #ddd;padding:.2rem .8rem;"
    "text-align:left;vertical-align:top}"
)


def build(
    deployment: Deployment, entries: Iterable[LogEntry], counts: Mapping[str, int], now_ms: int
) -> dict[str, Any]:
    """`entries` are those of KINDS, in order; `counts` the deployment's counters."""
    faces, alerts = counts.get("faces_searched", 0), counts.get("alerts", 0)
    rejected = counts.get("alerts_rejected", 0)
    prefix = "category_"
    return {
        "deployment": records.deployment_dict(deployment),
        "made_at_ms": now_ms,
        "faces": {
            "searched": faces,
            "refused": counts.get("faces_refused", 0),
            "incomplete": counts.get("faces_incomplete", 0),
        },
        "alerts": {
            "raised": alerts,
            **{name: counts.get(f"alerts_{name}", 0) for name in ("open", "confirmed", "rejected", "inconclusive")},
        },
        "false_alerts": {
            "per_alert": rejected / alerts if alerts else None,
            "per_face_searched": rejected / faces if faces else None,
        },
        "galleries": _galleries(deployment.gallery_ids, entries),
        "watchlist": {
            "entries": counts.get("watchlist_entries", 0),
            "by_category": {
                name.removeprefix(prefix): count for name, count in sorted(counts.items()) if name.startswith(prefix)
            },
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
        ("Authorised by", deployment["authorised_by"]),
        ("Reason", deployment["reason"]),
        ("Legal authority", deployment.get("legal_authority") or "not stated"),
        ("Necessity", deployment.get("necessity") or "not stated"),
        ("Faces searched for", f"{faces['searched']:,}"),
        ("Faces refused, as too old or unusable", f"{faces['refused']:,}"),
        ("Alerts", f"{alerts['raised']:,}"),
        ("of which confirmed by people", f"{alerts['confirmed']:,}"),
        ("of which rejected (false alerts)", f"{alerts['rejected']:,}"),
        ("of which inconclusive", f"{alerts['inconclusive']:,}"),
        ("of which not yet judged", f"{alerts['open']:,}"),
        ("False alerts per alert", _share(report["false_alerts"]["per_alert"])),
        ("False alerts per face searched for", _share(report["false_alerts"]["per_face_searched"])),
        ("People on watchlists that were destroyed", f"{report['watchlist']['entries']:,}"),
        *(
            (f"of which {name.replace('_', ' ')}", f"{count:,}")
            for name, count in report["watchlist"]["by_category"].items()
        ),
        ("Templates kept of faces without an alert", "0"),
    ]
    galleries = "".join(
        f"<h2>{escape(one['gallery_id'])} ({escape(one['kind'])})</h2>{_table(_terms(one))}"
        for one in report["galleries"]
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{_table(rows)}{galleries}"
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


def _share(value: float | None) -> str:
    return "none to count" if value is None else f"{100 * value:.4g}%"
