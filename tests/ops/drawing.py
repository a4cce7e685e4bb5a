"""Dashboards as pictures, drawn from what a Prometheus holds: Grafana is not needed to see what they would show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.ops.prometheus_server import Prometheus
from tests.ops.tools import DASHBOARDS

COLUMNS = 3
STEP_S = 5.0


class Drawn(NamedTuple):
    """One query of a panel, and the series that it yielded."""

    panel: str
    query: str
    series: list[Any]


async def draw(prometheus: Prometheus, since_s: float, folder: Path) -> list[Drawn]:
    """Every panel of every dashboard over the last `since_s` seconds, a picture for each dashboard in `folder`."""
    drawn: list[Drawn] = []
    for path in DASHBOARDS:
        panels = []
        for panel in json.loads(path.read_text())["panels"]:
            lines = []
            for target in panel["targets"]:
                query = target["expr"].replace("$__rate_interval", "1m")
                series = await prometheus.query_range(query, since_s, STEP_S)
                drawn.append(Drawn(f"{path.stem}: {panel['title']}", target["expr"], series))
                lines += [(one, target.get("legendFormat", "")) for one in series]
            panels.append((panel, lines))
        _picture(panels, folder / f"{path.stem}.png")
    return drawn


def _picture(panels: list[tuple[dict[str, Any], list[tuple[Any, str]]]], file: Path) -> None:
    from matplotlib.figure import Figure

    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(6 * COLUMNS, 2.8 * rows), layout="constrained")
    places = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for place in places[len(panels) :]:
        place.axis("off")
    for place, (panel, lines) in zip(places, panels, strict=False):
        unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
        place.set_title(f"{panel['title']} [{unit}]" if unit else panel["title"], fontsize=9)
        for one, legend in lines:
            first = float(one["values"][0][0])
            place.plot(
                [float(at) - first for at, _ in one["values"]],
                [float(value) for _, value in one["values"]],
                label=_named(legend, one["metric"]),
            )
        if not lines:
            place.text(0.5, 0.5, "no data", ha="center", va="center", transform=place.transAxes)
        elif len(lines) <= 8 and any(place.get_legend_handles_labels()[1]):
            place.legend(fontsize=6)
        place.tick_params(labelsize=6)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=70)


def _named(legend: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        legend = legend.replace("{{" + name + "}}", value)
    return legend or ", ".join(f"{name}={value}" for name, value in labels.items() if name not in ("job", "instance"))
