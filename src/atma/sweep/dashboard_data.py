"""What a dashboard knows of a sweep, as plain data small enough for one page.

Levels are numbers into their factor's list and metrics stand in one list a cell. Training curves are thinned and logs
cut to their ends, the shorter the more cells there are, so that a page of hundreds of cells stays light.
"""

from typing import Any

import numpy as np

from atma.report.content import size_text
from atma.sweep.analysis_budget import Curve, read_curves
from atma.sweep.dashboard_effects import depth, fronts, judged, level_numbers, strongest
from atma.sweep.pareto import over_seeds
from atma.sweep.table import Cell, Levels, Table, is_on, is_switch, label, level_text
from atma.sweep.table_metrics import digits_of, family_of, length_of, number_text, rises

CURVE_POINTS = 24_000
"""Points of training curves in a page, shared between the cells: from 20 to 200 each."""
LOG_CHARACTERS = 300_000
"""Characters of logs in a page, shared between the cells: from 500 to 8,000 each."""


def payload(table: Table, metric: str | None = None) -> dict[str, Any]:
    """The table as plain JSON data, judged at first by `metric` (see `Table.metric`)."""
    headline = table.metric(metric)
    points = min(200, max(20, CURVE_POINTS // len(table.cells)))
    most = depth(table)
    places = level_numbers(table)
    cells = [_cell(table, cell, points) for cell in table.cells]
    for i, cell in enumerate(cells):
        cell["levels"] = [int(numbers[i]) for numbers in places.values()]
    return {
        "factors": [{"name": name, "levels": level_texts(levels)} for name, levels in table.levels.items()],
        "metrics": [_metric(name) for name in table.metrics],
        "headline": table.metrics.index(headline),
        "trained": _trained(table),
        "trainedSize": size_text(_trained(table) or 0),
        "depth": most,
        "cells": cells,
        "settings": _settings(table, cells),
        "judged": judged(table, most),
        "fronts": fronts(table, most),
        "strongest": strongest(table, headline),
    }


def log_characters(table: Table) -> int:
    """How much of the end of each log a page of this table shows."""
    return min(8000, max(500, LOG_CHARACTERS // len(table.cells)))


def columns(table: Table, headline: str) -> list[str]:
    """The metrics a reader sees first: the headline, losses at the ends of the lengths, what a run cost."""
    found = [headline, "final_val_loss_nats"]
    for family in ("clean_nll", "junk_nll"):
        lengths = list(table.family(family).values())
        found += lengths[:1] + lengths[-1:] if family == "clean_nll" else lengths[-1:]
    found += ["train_seconds", "params"]
    return [name for name in dict.fromkeys(found) if name in table.metrics]


def level_texts(levels: Levels) -> list[str]:
    """The levels of one factor in words."""
    return [level_text(is_on(level)) if is_switch(levels) else level_text(level) for level in levels]


def metric_text(name: str) -> str:
    """A metric in words: clean nll 64K."""
    length = length_of(name)
    return f"{family_of(name)} {size_text(length)}".replace("_", " ") if length else name.replace("_", " ")


def cell_text(table: Table, cell: Cell) -> str:
    """A cell in words, its seed with it where there are several."""
    words = label(cell.factors, table.levels)
    return f"{words}, seed {cell.seed}" if len({other.seed for other in table.cells}) > 1 else words


def _metric(name: str) -> dict[str, Any]:
    length = length_of(name)
    return {
        "name": metric_text(name),
        "rises": rises(name),
        "length": length,
        "size": size_text(length),
        "family": family_of(name).replace("_", " ") if length else None,
    }


def _trained(table: Table) -> int | None:
    """The length to mark in curves: what every recipe says; None where none says it or they differ."""
    told = {cell.config.get("train", {}).get("length") for cell in table.cells}
    return told.pop() if len(told) == 1 else None


def _cell(table: Table, cell: Cell, points: int) -> dict[str, Any]:
    curves = {kind: _thinned(curve, points) for kind, curve in read_curves(cell).items()}
    values = [cell.metrics.get(name) for name in table.metrics]
    return {"name": cell_text(table, cell), "metrics": values, "curves": curves}


def _settings(table: Table, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells that differ in the seed alone as one, averaged; `cells` are their numbers."""
    found = []
    settings = over_seeds(table)
    numbers = level_numbers(settings)
    for i, setting in enumerate(settings.cells):
        levels = [int(places[i]) for places in numbers.values()]
        texts = [number_text(setting.metrics.get(name), digits_of(name)) for name in table.metrics]
        values = [setting.metrics.get(name) for name in table.metrics]
        alike = [i for i, cell in enumerate(cells) if cell["levels"] == levels]
        found.append({"name": setting.name, "levels": levels, "metrics": values, "texts": texts, "cells": alike})
    return found


def log_text(cell: Cell, characters: int) -> str:
    """The ends of the cell's logs and of its training record, each under its name."""
    paths = sorted(cell.folder.glob("*.log")) if cell.folder else []
    parts = []
    for path in [*paths, *([cell.record] if cell.record else [])]:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        cut = len(text) > characters
        end = f"… the last {characters:,} of {len(text):,} characters\n{text[-characters:]}" if cut else text
        parts.append(f"{path.name}\n{end}")
    return "\n\n".join(parts)


def _thinned(curve: Curve, points: int) -> dict[str, list[float]]:
    """At most `points` points, each the mean over an equal span; five significant digits."""
    spans = np.array_split(np.arange(curve.loss.size), min(points, curve.loss.size))
    thin = {name: [float(values[span].mean()) for span in spans] for name, values in curve._asdict().items()}
    return {name: [float(f"{value:.5g}") for value in values] for name, values in thin.items()}
