"""What a report holds, as plain data: sections of runs, each run with its recipe, its log and its evaluation rows.

Nothing here measures anything: rows come from a run's `metrics.jsonl` and from `atma.eval`, and are shown as they are.
"""

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atma.config import Recipe

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One model: how it was made and what was measured on it."""

    name: str
    recipe: Recipe
    metrics: list[Row] = field(default_factory=list)
    """Rows of the run's `metrics.jsonl`."""
    evaluation: list[Row] = field(default_factory=list)
    """Rows of `atma.eval`."""
    sample: str = ""
    prompt: str = ""

    @property
    def trained_length(self) -> int:
        """Context tokens of a training row."""
        return self.recipe.train.length

    def rows(self, kind: str) -> list[Row]:
        """Evaluation rows of a kind, by rising length (loss by position: by the position where a row's span ends)."""
        return sorted((row for row in self.evaluation if row.get("kind") == kind), key=place)

    def summary(self, measure: str) -> Row | None:
        """The slope and change over lengths of a loss measure, paired by document; None where it was not measured."""
        rows = [row for row in self.evaluation if row.get("kind") == "summary" and row.get("measure") == measure]
        return rows[0] if rows else None


@dataclass(frozen=True)
class Section:
    """Runs to be compared with each other, in the order in which they are drawn."""

    title: str
    runs: list[Run]
    note: str = ""

    def label(self, run: Run) -> str:
        """The run's name, with its seed where another run has the same name."""
        twins = sum(other.name == run.name for other in self.runs)
        return run.name if twins == 1 else f"{run.name}, seed {run.recipe.train.seed}"


@dataclass(frozen=True)
class Report:
    """A whole page. `command` is what the reader types to make it again."""

    title: str
    command: str
    environment: dict[str, str]
    sections: list[Section]

    @property
    def runs(self) -> list[Run]:
        return [run for section in self.sections for run in section.runs]


def environment() -> dict[str, str]:
    """Interpreter, libraries and machine of this process, in words."""
    import torch

    from atma import __version__

    return {
        "atma": __version__,
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "byte order": sys.byteorder,
    }


def size_text(length: float) -> str:
    """A token count for people: 256, 4K, 1.5K, 2M (K is 1,024 and M its square)."""
    for unit, suffix in ((1024**2, "M"), (1024, "K")):
        if length >= unit:
            return f"{length / unit:.3g}{suffix}"
    return f"{length:.4g}"


def place(row: Row) -> int:
    """Where a row stands on the axis of lengths."""
    return row["end"] if row["kind"] == "position" else row["length"]


def first_value(rows: Iterable[Row], key: str) -> Any:
    """The first value of `key` in the rows that have it; None if none has."""
    return next((row[key] for row in rows if row.get(key) is not None), None)


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    if description.exists():
        names = [line.split(":", 1)[1].strip() for line in description.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
