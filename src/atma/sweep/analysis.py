"""Everything that `atma sweep analyse` tells of a sweep, as data: leaders, effects, contrasts asked for, the front."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atma.sweep.contrasts import Effect, interactions, main_effects, where_text
from atma.sweep.contrasts_words import read_contrasts, read_where
from atma.sweep.pareto import over_seeds, pareto, ranked
from atma.sweep.table import Cell, Table

COSTS = ("train_seconds", "params")


@dataclass(frozen=True)
class Analysis:
    """A table (or its subset `where`, in words) judged by one metric."""

    table: Table
    metric: str
    where: str
    leaders: list[Cell]
    """Settings, averaged over seeds, best first."""
    contrasts: list[Effect]
    """Those that were asked for."""
    effects: list[Effect]
    interactions: list[Effect]
    front: list[Cell]
    """Settings that no other beats at once in the metric and in the costs."""
    costs: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        effects = ("contrasts", "effects", "interactions")
        return {
            "table": self.table.name,
            "cells": len(self.table.cells),
            "unfinished": list(self.table.unfinished),
            "metric": self.metric,
            "where": self.where,
            "costs": list(self.costs),
            "leaders": [cell_dict(cell) for cell in self.leaders],
            "front": [cell_dict(cell) for cell in self.front],
        } | {name: [effect.as_dict() for effect in getattr(self, name)] for name in effects}


def analyse(table: Table, metric: str | None = None, where: str = "", contrasts: Sequence[str] = ()) -> Analysis:
    """Judge a table by a metric (see `Table.metric`) within a subset, with further contrasts in words.

    ValueError names an unknown metric, factor or level, or a subset without cells.
    """
    name = table.metric(metric)
    subset = read_where(table, where)
    words = where_text(subset, table)
    kept = table.where(subset)
    if not any(name in cell.metrics for cell in kept.cells):
        raise ValueError(f"{table.name}: no cell{f' where {words}' if words else ''} has the metric {name}")
    asked = [effect for text in contrasts for effect in read_contrasts(kept, name, text)]
    settings = over_seeds(kept)
    costs = tuple(cost for cost in COSTS if cost in kept.metrics)
    on_front = pareto(settings, [name, *costs]) if costs else []
    leaders = ranked(settings.cells, name)
    return Analysis(
        kept, name, words, leaders, asked, main_effects(kept, name), interactions(kept, name), on_front, costs
    )


def cell_dict(cell: Cell) -> dict[str, Any]:
    """A cell as plain JSON data, without its recipe."""
    return {"cell": cell.name, "factors": cell.factors, "seed": cell.seed, "metrics": cell.metrics}
