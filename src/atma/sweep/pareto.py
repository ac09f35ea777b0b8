"""Which cells no other beats at once in every metric that counts: the front of quality against time and size."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from atma.sweep.table import Cell, Table, label
from atma.sweep.table_metrics import rises


def front(values: np.ndarray, rising: Sequence[bool]) -> np.ndarray:
    """Which rows of values (cells, metrics) no other row dominates, as bool (cells,).

    A row dominates another if it is nowhere worse and somewhere better; equal rows are both on the front. `rising`
    tells of which metrics more is better. A row with a NaN is never on it.
    """
    cost = np.where(np.asarray(rising), -values, values)
    on = np.zeros(len(cost), dtype=bool)
    whole = np.flatnonzero(np.isfinite(cost).all(axis=1))
    for i in whole:
        no_worse, better = (cost[whole] <= cost[i]).all(axis=1), (cost[whole] < cost[i]).any(axis=1)
        on[i] = not (no_worse & better).any()
    return on


def pareto(table: Table, metrics: Sequence[str]) -> list[Cell]:
    """Cells on the front of these metrics, best in the first of them first. ValueError names an unknown metric."""
    names = [table.metric(name) for name in metrics]
    values = np.stack([table.values(name) for name in names], 1)
    on = front(values, [rises(name) for name in names])
    return ranked([cell for cell, kept in zip(table.cells, on, strict=True) if kept], names[0])


def ranked(cells: Sequence[Cell], metric: str) -> list[Cell]:
    """Cells that have the metric, best first; equal ones by validation loss, then as they came."""
    sign = -1 if rises(metric) else 1
    measured = [cell for cell in cells if metric in cell.metrics]
    return sorted(measured, key=lambda c: (sign * c.metrics[metric], c.metrics.get("final_val_loss_nats", 0.0)))


def over_seeds(table: Table) -> Table:
    """One cell a setting, named by its levels: every metric that all its seeds have, averaged over them."""
    settings: dict[str, list[Cell]] = {}
    for cell in table.cells:
        settings.setdefault(repr(sorted(cell.factors.items())), []).append(cell)
    return replace(table, cells=tuple(_averaged(table, seeds) for seeds in settings.values()))


def _averaged(table: Table, seeds: list[Cell]) -> Cell:
    name = label(seeds[0].factors, table.levels)
    if len(seeds) == 1:
        return replace(seeds[0], name=name)
    whole = [name for name in table.metrics if all(name in cell.metrics for cell in seeds)]
    metrics = {name: float(np.mean([cell.metrics[name] for cell in seeds])) for name in whole}
    return replace(seeds[0], name=f"{name}, {len(seeds)} seeds", metrics=metrics, folder=None, record=None)
