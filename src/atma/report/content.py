"""What a report holds, as plain data: sections of runs, each run with its recipe, its log and its evaluation rows.

Nothing here measures anything: rows come from a run's `metrics.jsonl` and from `atma.eval`, and are shown as they are.
"""

import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from html import escape
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
    caveat: str = ""
    """What a reader must know before comparing it with the others, a sentence."""

    def __repr__(self) -> str:
        return f"Run({self.name!r}: {len(self.metrics):,} rows of its log, {len(self.evaluation):,} of evaluation)"

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
class Answer:
    """What a model wrote when it was asked for a fact that its text began with. The same `trial` is the same fact."""

    model: str
    length: int
    """Tokens of the whole text, question and answer included."""
    trial: int
    told: str
    gap: int
    """Tokens between the fact and the question."""
    written: str
    right: bool
    seconds: float = 0.0


@dataclass(frozen=True)
class Recall:
    """Questions for facts told at the beginning of a text. Every model was asked the same."""

    haystack: str
    """What the text between fact and question was."""
    haystack_tokens: int
    """Read round and round where a text is longer."""
    trained_length: int
    answers: list[Answer]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(answer.model for answer in self.answers))

    @property
    def lengths(self) -> list[int]:
        return sorted({answer.length for answer in self.answers})

    @property
    def longest(self) -> int:
        return max((answer.length for answer in self.answers), default=0)

    def right(self, model: str, length: int) -> tuple[int, int]:
        """Right answers, and how many there are."""
        found = [answer.right for answer in self.answers if (answer.model, answer.length) == (model, length)]
        return sum(found), len(found)

    def complete(self, models: list[str]) -> "Recall":
        """Only the questions that all of these models have answered."""
        asked = Counter((answer.trial, answer.length) for answer in self.answers)
        kept = [answer for answer in self.answers if asked[answer.trial, answer.length] == len(models)]
        return replace(self, answers=kept)


@dataclass(frozen=True)
class Report:
    """A whole page. `command` is what the reader types to make it again."""

    title: str
    command: str
    environment: dict[str, str]
    sections: list[Section]
    opening: list[str] = field(default_factory=list)
    """What is shown and why it matters, in plain sentences that come before everything else."""
    recall: Recall | None = None
    cuts: list[str] = field(default_factory=list)
    """What was left out to end in time, a sentence each."""

    def __repr__(self) -> str:
        sections = ", ".join(f"{section.title!r} ({len(section.runs)} runs)" for section in self.sections)
        return f"Report({self.title!r}: {sections or 'no sections'})"

    def _repr_html_(self) -> str:
        """The figures of every section, still."""
        from atma.report.figures import figures
        from atma.report.inline import figure_html

        parts = [f"<h3>{escape(self.title)}</h3>"]
        for section in self.sections:
            parts += [f"<h4>{escape(section.title)}</h4>", *map(figure_html, figures(section))]
        return "".join(parts)

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
