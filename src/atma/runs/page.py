"""One page of runs beside each other: their table, what differs in their recipes, and their curves."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from atma.report.figures import COLOURS, CURVE_POINTS, MARKERS, Figure, Table
from atma.report.parts import figure_html, made_with, paragraph, table_html
from atma.report.shell import shell, write_text
from atma.runs.reading import Point, Run
from atma.runs.table import HEAD, labels, rows, short

AXES: dict[str, tuple[str, Callable[[Point], float]]] = {
    "tokens": ("training tokens", lambda point: point.tokens),
    "steps": ("steps", lambda point: point.step),
    "time": ("minutes of training", lambda point: point.seconds / 60),
}
SPANS = 8
"""Rows of a curve in the table below its figure."""


def page(path: Path, runs: Sequence[Run], command: str, facts: Mapping[str, str]) -> Path:
    """Write the page, one HTML file that asks the network for nothing. OSError if it cannot be written."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    drawn = "".join(figure_html(one, f"f{i}") for i, one in enumerate(figures(runs)))
    differs = differences(runs)
    parts = [f"<section>{table_html(Table(HEAD, rows(runs)))}{_broken(runs)}</section>"]
    if differs.rows:
        parts.append(f"<section><h2>What differs in their recipes</h2>{table_html(differs)}</section>")
    parts.append(f'<section><h2>Curves</h2><div class="figures">{drawn}</div></section>' if drawn else "")
    made = made_with(command, Table(["made with", ""], [[name, value] for name, value in facts.items()]))
    return write_text(path, shell(title, "\n".join([*filter(None, parts), made])))


def figures(runs: Sequence[Run]) -> list[Figure]:
    """Training and validation losses by tokens, by steps and by time, of the runs that have any."""
    made = []
    for axis in AXES:
        for kind in ("training", "validation"):
            figure = _figure(runs, kind, axis)
            made += [figure] if figure.data else []
    return made


def differences(runs: Sequence[Run]) -> Table:
    """The settings in which the recipes are not all alike, a column a run."""
    flat = [_flat(run.recipe) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key != "name"]
    told = [[key, *(one.get(key, "–") for one in flat)] for key in keys if len({one.get(key) for one in flat}) > 1]
    return Table(["setting", *labels(runs)], told)


def thin(points: Sequence[Point], most: int = CURVE_POINTS) -> list[Point]:
    """At most so many points, each the mean of an equal span of the given ones."""
    if len(points) <= most:
        return list(points)
    cuts = [len(points) * i // most for i in range(most + 1)]
    spans = [points[start:end] for start, end in pairwise(cuts)]
    return [Point(*(sum(values) / len(span) for values in zip(*span, strict=True))) for span in spans]  # pyright: ignore


def _figure(runs: Sequence[Run], kind: str, axis: str) -> Figure:
    title, where = AXES[axis]
    traces, told = [], list[list[str]]()
    for place, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        points = thin(run.train if kind == "training" else run.valid)
        if not points:
            continue
        traces.append(_trace(place, label, [where(point) for point in points], points, kind))
        told += [[label, short(where(point)), f"{point.loss:.4f}"] for point in thin(points, SPANS)]
    layout = {"xaxis": {"title": {"text": title}}, "yaxis": {"title": {"text": "nats per token"}}, "showlegend": True}
    caption = f"Loss of {kind} by {title}. Long records are averaged over equal spans; the table holds {SPANS} a curve."
    return Figure(f"{kind.capitalize()} by {axis}", caption, traces, layout, Table(["run", title, "loss"], told))


def _trace(place: int, label: str, where: list[float], points: list[Point], kind: str) -> dict[str, Any]:
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place // len(COLOURS) % len(MARKERS)]
    return {
        "type": "scatter",
        "mode": "lines" if kind == "training" and len(points) > 1 else "lines+markers",
        "name": label,
        "x": where,
        "y": [point.loss for point in points],
        "line": {"color": colour, "width": 2, "dash": ("solid", "dash", "dot")[place // len(COLOURS) % 3]},
        "marker": {"symbol": marker, "size": 7},
        "hovertemplate": f"{escape(label)}: %{{y:.4f}} nats<extra></extra>",
    }


def _broken(runs: Sequence[Run]) -> str:
    return "".join(paragraph(f"{run.folder}: {run.why}") for run in runs if run.why)


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{where}{key}.")
        else:
            found[f"{where}{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found
