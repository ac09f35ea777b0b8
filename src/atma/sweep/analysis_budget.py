"""Runs compared at an equal budget of tokens or of training time, from their training records.

A record tells the speed of every step; the time of a run is the sum of its steps', so that pauses, resumptions,
validation and checkpoints cost nothing. Nothing is extrapolated: a run that did not reach a budget has no value there.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from atma.sweep.table import Cell, Table

Budget = Literal["tokens", "seconds"]


class Curve(NamedTuple):
    """Loss in nats against tokens and training seconds, each (points,) float64 and rising in the budget."""

    tokens: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray


def read_curves(cell: Cell) -> dict[str, Curve]:
    """The cell's curves by kind, "train" and "validation"; none without a record. ValueError names a bad line."""
    record = record_of(cell)
    if record is None:
        return {}
    from atma.train.record import read_record

    points: dict[str, list[tuple[float, float, float]]] = {"train": [], "validation": []}
    tokens = seconds = 0.0
    for row in read_record(record.parent):
        if row["kind"] == "train" and row.get("tokens_per_second"):
            seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
            tokens = row["tokens"]
        if row["kind"] in points and row.get("loss") is not None:
            points[row["kind"]].append((row["tokens"], seconds, row["loss"]))
    return {kind: Curve(*np.array(rows, dtype=np.float64).T) for kind, rows in points.items() if rows}


def record_of(cell: Cell) -> Path | None:
    """The cell's `metrics.jsonl`, in its folder or its run's; None if it has none."""
    found = cell.folder.rglob("metrics.jsonl") if cell.folder else ()
    return min(found, key=lambda path: (len(path.parts), path), default=None)


def at_budget(table: Table, by: Budget, budget: float | None = None) -> tuple[Table, str]:
    """The table with one more metric, the validation loss at an equal budget, and that metric's name.

    Without a `budget`, the largest that every recorded run reached. Losses are interpolated between validations.
    ValueError where no cell has validations, or none reached the budget.
    """
    curves = {cell.name: curve for cell in table.cells if (curve := read_curves(cell).get("validation"))}
    if not curves:
        raise ValueError(f"{table.name}: no cell has a training record with validations, so none at equal {by}")
    spent = min(float(getattr(curve, by)[-1]) for curve in curves.values()) if budget is None else float(budget)
    name = f"validation_loss_at_{round(spent, 1):.12g}_{by}"
    losses = {key: _loss_at(getattr(curve, by), curve.loss, spent) for key, curve in curves.items()}
    cells = tuple(_with_metric(cell, name, losses.get(cell.name)) for cell in table.cells)
    if not any(name in cell.metrics for cell in cells):
        raise ValueError(f"{table.name}: no run was validated up to {round(spent, 1):.12g} {by}; choose another budget")
    return replace(table, cells=cells, metrics=(*table.metrics, name)), name


def _loss_at(spent: np.ndarray, loss: np.ndarray, budget: float) -> float | None:
    return float(np.interp(budget, spent, loss)) if spent[0] <= budget <= spent[-1] else None


def _with_metric(cell: Cell, name: str, value: float | None) -> Cell:
    return cell if value is None else replace(cell, metrics={**cell.metrics, name: value})
