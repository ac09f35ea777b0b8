"""Runs compared at an equal budget of tokens or of training time, from their training records.

A record tells the speed of every step; the time of a run is the sum of its steps', so that pauses, resumptions,
validation and checkpoints cost nothing. Nothing is extrapolated: a run that did not reach a budget has no value there.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from atma.sweep.table import Cell, Table

Budget = Literal["tokens", "seconds"]
Loss = Literal["train", "validation"]


class Curve(NamedTuple):
    """Loss in nats against tokens and training seconds, each (points,) float64 and rising in the budget."""

    tokens: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray


def read_curves(cell: Cell) -> dict[str, Curve]:
    """The cell's curves by kind, "train" and "validation"; none without a record. ValueError names a bad line."""
    if cell.record is None:
        return {}
    from atma.train.record import read_record

    points: dict[str, list[tuple[float, float, float]]] = {"train": [], "validation": []}
    tokens = seconds = 0.0
    for row in read_record(cell.record.parent):
        if row["kind"] == "train" and row.get("tokens_per_second"):
            seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
            tokens = row["tokens"]
        if row["kind"] in points and row.get("loss") is not None:
            points[row["kind"]].append((row["tokens"], seconds, row["loss"]))
    return {kind: Curve(*np.array(rows, dtype=np.float64).T) for kind, rows in points.items() if rows}


def at_budget(table: Table, by: Budget, budget: float | None = None, loss: Loss = "validation") -> tuple[Table, str]:
    """The table with one more metric, a loss at an equal budget, and that metric's name.

    Without a `budget`, the largest that every recorded run reached. The validation loss is interpolated between
    validations; the training loss is the mean of the last tenth of the budget. ValueError where no cell has a record,
    or too few have the loss there.
    """
    curves = {cell.name: curve for cell in table.cells if (curve := read_curves(cell).get(loss))}
    if not curves:
        raise ValueError(f"{table.name}: no cell has a training record with a {loss} loss, so none at equal {by}")
    spent = min(float(getattr(curve, by)[-1]) for curve in curves.values()) if budget is None else float(budget)
    name = f"{loss}_loss_at_{round(spent, 1):.12g}_{by}"
    losses = {key: _loss_at(getattr(curve, by), curve.loss, spent, loss) for key, curve in curves.items()}
    measured = sum(value is not None for value in losses.values())
    if not measured or (budget is None and measured < len(losses)):
        mend = "judge by the training loss instead (train_loss)" if loss == "validation" else "choose another budget"
        raise ValueError(f"{table.name}: {measured} of {len(losses)} runs have the {name}; {mend}")
    cells = tuple(_with_metric(cell, name, losses.get(cell.name)) for cell in table.cells)
    return replace(table, cells=cells, metrics=(*table.metrics, name)), name


def _loss_at(spent: np.ndarray, values: np.ndarray, budget: float, loss: Loss) -> float | None:
    if not spent[0] <= budget <= spent[-1] * (1 + 1e-12):
        return None
    if loss == "validation":
        return float(np.interp(budget, spent, values))
    last = (spent <= budget) & (spent >= 0.9 * budget)
    return float(values[last].mean()) if last.any() else float(np.interp(budget, spent, values))


def _with_metric(cell: Cell, name: str, value: float | None) -> Cell:
    return cell if value is None else replace(cell, metrics={**cell.metrics, name: value})
