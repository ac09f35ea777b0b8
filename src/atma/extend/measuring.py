"""What an extension brought and cost: the model before, stretched at run time, and after, at every length.

The measurements are those of `atma eval lengths`. Rows are kept as they come, so that it goes on after any stop.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from atma.config import EvaluationConfig, Recipe
from atma.data.dataset import TokenSet
from atma.eval.lengths import evaluate
from atma.eval.rope import Stretch, stretchable
from atma.eval.suite import Progress
from atma.extend.settings import ExtendConfig
from atma.loading import Loaded, load
from atma.report import Report, Run, Section, environment, page
from atma.train.record import read_record

Row = dict[str, Any]
ROWS, PAGE = "extended.jsonl", "report.html"


class Entrant(NamedTuple):
    """A model as it is measured: what it is called, and how its positions are stretched, if they are."""

    name: str
    loaded: Loaded
    stretch: Stretch | None


class Cell(NamedTuple):
    """What one model does at one length."""

    length: int
    loss: float | None
    """Nats a token on the fixed targets."""
    needles: float | None
    """Share of needles with all digits right."""
    trials: int


def entrants(before: Loaded, out: Path, trained: int) -> Iterator[Entrant]:
    """The model before, the same with positions interpolated and with YaRN where it has any, and the model after."""
    yield Entrant("before", before, None)
    if stretchable(before.model):
        yield Entrant("interpolated", before, Stretch("linear", trained))
        yield Entrant("YaRN", before, Stretch("yarn", trained))
    yield Entrant("after", load(out), None)


def measure(
    before: Loaded,
    out: Path,
    recipe: Recipe,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
) -> dict[str, list[Row]]:
    """The rows of every entrant, by name. Those in `out`/extended.jsonl of the same measurement are taken from it."""
    texts, rows = TokenSet.open(recipe.data.path, "validation"), {}
    for one in entrants(before, out, recipe.train.length):
        rows[one.name] = evaluate(one.loaded, texts, evaluation, progress, out / ROWS, stretch=one.stretch)
    return rows


def cells(rows: list[Row]) -> list[Cell]:
    """Loss and needles by length."""
    fixed = {row["length"]: row["loss"] for row in rows if row["kind"] == "fixed"}
    needles = {row["length"]: row for row in rows if row["kind"] == "needle"}
    return [
        Cell(
            length,
            fixed.get(length),
            needles[length]["exact_accuracy"] if length in needles else None,
            needles[length]["trials"] if length in needles else 0,
        )
        for length in sorted({*fixed, *needles})
    ]


def table(rows: dict[str, list[Row]]) -> list[list[str]]:
    """A line for each entrant and length: loss, needles, of how many."""
    return [
        [
            name,
            f"{cell.length:,}",
            "–" if cell.loss is None else f"{cell.loss:.3f}",
            "–" if cell.needles is None else f"{round(cell.needles * cell.trials)} of {cell.trials}",
        ]
        for name, own in rows.items()
        for cell in cells(own)
    ]


def cost(out: Path, recipe: Recipe) -> Row:
    """Tokens and seconds of a run's steps, and the numbers that it trained and has, by its record."""
    record = read_record(out)
    speeds = [row["tokens_per_second"] for row in record if row["kind"] == "train"]
    told = next(row for row in record if row.get("trained") is not None)
    tokens = len(speeds) * recipe.train.batch_tokens
    seconds = sum(recipe.train.batch_tokens / speed for speed in speeds)
    return {"tokens": tokens, "seconds": round(seconds), "trained": told["trained"], "parameters": told["parameters"]}


def write_page(out: Path, recipe: Recipe, settings: ExtendConfig, rows: dict[str, list[Row]], command: str) -> Path:
    """The report of an extension, `out`/report.html."""
    paid = cost(out, recipe)
    note = (
        f"{settings.way}: {paid['trained']:,} of {paid['parameters']:,} parameters were trained on {paid['tokens']:,} "
        f"tokens in rows of {recipe.train.length:,}, in {paid['seconds']:,} seconds."
    )
    record = read_record(out)
    runs = [Run(name, recipe, record if name == "after" else [], own) for name, own in rows.items()]
    opening = [
        "One model was given length: its attention was replaced by one that goes on beyond what it was trained on. "
        "Here it is beside the model that it was, with its positions as they are and stretched at run time."
    ]
    section = Section("Before and after", runs, note)
    report = Report(f"{recipe.name}: given length", command, environment(), [section], opening)
    return page(report, out / PAGE)
