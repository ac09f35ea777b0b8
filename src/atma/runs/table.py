"""A table of runs, for the terminal and for a page: cells as text, sorted by any column."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Literal

from atma.bars import clock
from atma.runs.reading import Run

Column = Literal["started", "name", "state", "steps", "tokens", "loss", "validation", "rate", "time", "size"]
HEAD = ["run", "state", "steps", "tokens", "loss", "validation", "tokens/s", "time", "size", "started"]
ORDER = ("running", "begun", "stopped", "broken", "finished")
"""States, those first that may need somebody."""
NOTHING = "–"


def labels(runs: Sequence[Run]) -> list[str]:
    """What each run is called: its name, or where that is not one run's alone, its folder."""
    names = Counter(run.name for run in runs)
    return [run.name if names[run.name] == 1 else str(run.folder) for run in runs]


def ordered(runs: Sequence[Run], column: Column, reverse: bool = False) -> list[Run]:
    """The runs by a column: newest, fastest, largest and lowest loss first; what is not known comes last."""
    keys: dict[str, Callable[[Run], Any]] = {
        "started": lambda run: -run.started,
        "name": lambda run: run.name,
        "state": lambda run: ORDER.index(run.state),
        "steps": lambda run: -run.steps,
        "tokens": lambda run: -run.tokens,
        "loss": lambda run: _or_last(run.loss),
        "validation": lambda run: _or_last(run.validation),
        "rate": lambda run: -run.rate,
        "time": lambda run: -run.seconds,
        "size": lambda run: -(run.parameters or 0),
    }
    return sorted(runs, key=keys[column], reverse=reverse)


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """A row of cells for each run."""
    return [_row(run, label) for run, label in zip(runs, labels(runs), strict=True)]


def short(count: float) -> str:
    """A count for people: 950, 12.3K, 4.5M, 1.2B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def _row(run: Run, label: str) -> list[str]:
    steps = f"{run.steps:,}" if run.of is None or run.of == run.steps else f"{run.steps:,}/{run.of:,}"
    when = datetime.fromtimestamp(run.started).strftime("%Y-%m-%d %H:%M") if run.started else NOTHING
    known = run.steps > 0
    return [
        label,
        run.state,
        steps,
        short(run.tokens) if known else NOTHING,
        NOTHING if run.loss is None else f"{run.loss:.4f}",
        NOTHING if run.validation is None else f"{run.validation:.4f}",
        short(run.rate) if run.rate else NOTHING,
        clock(run.seconds) if known else NOTHING,
        NOTHING if run.parameters is None else short(run.parameters),
        when,
    ]


def _or_last(value: float | None) -> float:
    return math.inf if value is None else value
