"""What a dashboard knows of a sweep, as plain data small enough for one page.

Levels are numbers into their factor's list and metrics stand in one list a cell. Training curves are thinned and logs
cut to their ends, the shorter the more cells there are, so that a page of hundreds of cells stays light.
"""

import json
from typing import Any

import numpy as np

from atma.sweep.analysis_budget import Curve, read_curves
from atma.sweep.contrasts import RESAMPLES, SEED, TIE
from atma.sweep.table import Cell, Table, holds, is_on, is_switch, label, level_text, stands_alone
from atma.sweep.table_metrics import digits_of, family_of, length_of, rises

CURVE_POINTS = 24_000
"""Points of training curves in a page, shared between the cells: from 20 to 200 each."""
LOG_CHARACTERS = 300_000
"""Characters of logs in a page, shared between the cells: from 500 to 8,000 each."""


def payload(table: Table, metric: str | None = None) -> dict[str, Any]:
    """The table as plain JSON data, judged at first by `metric` (see `Table.metric`)."""
    headline = table.metric(metric)
    points = min(200, max(20, CURVE_POINTS // len(table.cells)))
    characters = min(8000, max(500, LOG_CHARACTERS // len(table.cells)))
    return {
        "name": table.name,
        "factors": [_factor(table, name) for name in table.levels],
        "metrics": [_metric(name) for name in table.metrics],
        "headline": table.metrics.index(headline),
        "columns": [table.metrics.index(name) for name in columns(table, headline)],
        "trained": _trained(table),
        "unfinished": list(table.unfinished),
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "tie": TIE},
        "cells": [_cell(table, cell, points, characters) for cell in table.cells],
    }


def columns(table: Table, headline: str) -> list[str]:
    """The metrics a reader sees first: the headline, losses at the ends of the lengths, what a run cost."""
    found = [headline, "final_val_loss_nats"]
    for family in ("clean_nll", "junk_nll"):
        lengths = list(table.family(family).values())
        found += lengths[:1] + lengths[-1:] if family == "clean_nll" else lengths[-1:]
    found += ["train_seconds", "params"]
    return [name for name in dict.fromkeys(found) if name in table.metrics]


def _factor(table: Table, name: str) -> dict[str, Any]:
    levels = table.levels[name]
    switch = is_switch(levels)
    texts = [level_text(is_on(level)) if switch else level_text(level) for level in levels]
    alone = [stands_alone(level, table.levels) for level in levels]
    return {"name": name, "levels": texts, "switch": switch, "alone": alone}


def _metric(name: str) -> dict[str, Any]:
    length = length_of(name)
    return {
        "name": name,
        "rises": rises(name),
        "digits": digits_of(name),
        "length": length,
        "family": family_of(name) if length else None,
    }


def _trained(table: Table) -> int | None:
    """The length to mark in curves: what every recipe says; None where none says it or they differ."""
    told = {cell.config.get("train", {}).get("length") for cell in table.cells}
    return told.pop() if len(told) == 1 else None


def _cell(table: Table, cell: Cell, points: int, characters: int) -> dict[str, Any]:
    levels = [
        next(i for i, known in enumerate(levels) if holds(cell.factors[factor], (known,)))
        for factor, levels in table.levels.items()
    ]
    found: dict[str, Any] = {
        "name": cell.name,
        "label": label(cell.factors, table.levels),
        "levels": levels,
        "seed": cell.seed,
        "metrics": [cell.metrics.get(name) for name in table.metrics],
    }
    if cell.config:
        found["config"] = json.dumps(cell.config, indent=1, ensure_ascii=False, default=str)
    if logs := _logs(cell, characters):
        found["log"] = logs
    if curves := read_curves(cell):
        found["curves"] = {kind: _thinned(curve, points) for kind, curve in curves.items()}
    return found


def _logs(cell: Cell, characters: int) -> str:
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
