"""What was measured, as Python holds it: rows, and the table, curves and heat maps that they make."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from atma.config import Recipe, TrainConfig
from atma.display import MOST_LINES, table_html, table_text
from atma.eval.results import read_rows, write_rows
from atma.report.chart import Chart
from atma.report.content import Run, Section
from atma.report.figures import Figure, loss_by_length, needles_found
from atma.statistics import proportion, share_text

Row = dict[str, Any]
Curve = Literal["fixed", "nested", "position", "needles"]
UNKNOWN = 1
"""Trained length of a run whose length nobody knows; no mark is drawn for it."""


class Part(NamedTuple):
    """The rows of one model."""

    name: str
    rows: list[Row]
    trained_length: int | None = None


class Rows(list[Row]):
    """Rows of plain JSON data that show themselves as a table, and the first of many alone."""

    def __repr__(self) -> str:
        header, lines = self._table()
        left = len(self) - len(lines)
        return "\n".join(
            [f"{len(self):,} rows", table_text(header, lines), *([f"… {left:,} more"] if left > 0 else [])]
        )

    def _repr_html_(self) -> str:
        header, lines = self._table()
        left = len(self) - len(lines)
        return table_html(header, lines, caption=f"… {left:,} more" if left > 0 else "")

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """What each of the first rows is of, and its figure."""
        keys = ("kind", "task", "haystack", "depth", "length", "loss", "exact_accuracy", "trials")
        shown = self[:MOST_LINES]
        used = [key for key in keys if any(key in row for row in shown)]
        return used, [[_cell(row.get(key)) for key in used] for row in shown]


class Results:
    """Measurements of one model, or of several added up: `measure("nano") + measure("nano-rope")`.

    Printed, or as the last line of a notebook's cell, it is its table.
    """

    def __init__(self, parts: list[Part]) -> None:
        """Of parts with the same name the later ones are numbered."""
        before = [[other.name for other in parts[:i]].count(part.name) for i, part in enumerate(parts)]
        names = [f"{part.name} ({n + 1})" if n else part.name for part, n in zip(parts, before, strict=True)]
        self.parts = [part._replace(name=name) for part, name in zip(parts, names, strict=True)]

    @classmethod
    def read(cls, path: str | Path) -> "Results":
        """The rows of a .jsonl file that `save` or a command of `atma eval` wrote. ValueError: it is none."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file of rows")
        found: dict[tuple[str, str], list[Row]] = {}
        for row in read_rows(path):
            stamp = row.get("provenance", {})
            found.setdefault((str(stamp.get("model")), str(stamp.get("weights_sha256"))), []).append(row)
        return cls([Part(name, rows) for (name, _), rows in found.items()])

    @property
    def rows(self) -> Rows:
        """Every row as plain JSON data, as the commands write them: figures, intervals, and where they came from."""
        return Rows(row for part in self.parts for row in part.rows)

    def __add__(self, other: "Results") -> "Results":
        return Results([*self.parts, *other.parts])

    def table(self) -> str:
        """Loss and needles by length, as text."""
        return table_text(*self._table())

    def curve(self, measure: Curve = "fixed") -> Chart:
        """A curve a model over length: "fixed" (loss of the same targets after ever more text), "nested" (of ever
        longer beginnings), "position" (by place in the text) or "needles" (found, over all depths).

        ValueError: it was not measured.
        """
        section = Section("", [_run(part, part.rows) for part in self.parts])
        figure = self._needles() if measure == "needles" else loss_by_length(section, measure)
        if figure is None:
            known = ("fixed", "nested", "position", "needles")
            raise ValueError(f"no curve {measure!r}: it was not measured; known are {', '.join(known)}")
        title = "Loss by length" if measure != "needles" else "Needles by length"
        tokenizers = {row.get("provenance", {}).get("tokenizer_sha256") for row in self.rows}
        if measure != "needles" and len(tokenizers) > 1:
            title += ", nats a token of different tokenizers: compare the shapes, not the heights"
        return self._chart(title, [self._marked(figure)])

    def heat_map(self) -> Chart:
        """Needles found, by depth and length: a map for each model and task. ValueError: they were not measured."""
        from atma.eval.retrieval.heat_map import figures

        found: list[Figure] = []
        for part in self.parts:
            rows = [row | {"provenance": row.get("provenance", {}) | {"model": part.name}} for row in part.rows]
            found += [dataclasses.replace(one, title=f"{part.name}: {one.title}") for one in figures(rows)]
        if not found:
            raise ValueError("no heat map: it takes needles by depth, of measure or `atma eval retrieval`")
        return self._chart("Needles by depth and length", found)

    def save(self, path: str | Path) -> Path:
        """Write the rows (.jsonl), or a page of all curves and heat maps (.html). ValueError for another ending."""
        path = Path(path)
        if path.suffix == ".jsonl":
            write_rows(path, self.rows)
            return path
        if path.suffix != ".html":
            raise ValueError(f"{path}: end the name in .jsonl for the rows or .html for a page")
        kinds = {row["kind"] for row in self.rows}
        charts = [self.curve(kind) for kind in ("fixed", "nested", "position") if kind in kinds]
        charts += [self.curve("needles")] if kinds & {"needle", "retrieval"} else []
        charts += [self.heat_map()] if "retrieval" in kinds else []
        return self._chart("Does it hold at length?", [one for chart in charts for one in chart.figures]).save(path)

    def __repr__(self) -> str:
        names = ", ".join(part.name for part in self.parts)
        return f"Results of {names}: {len(self.rows):,} rows\n{self.table()}"

    def _repr_html_(self) -> str:
        return table_html(*self._table(), caption=CAPTION)

    def _chart(self, title: str, figures: list[Figure]) -> Chart:
        stamp = self.rows[0].get("provenance", {}) if self.rows else {}
        facts = {name: str(stamp[name]) for name in ("dtype", "device", "backend", "threads", "seed") if name in stamp}
        return Chart(title, figures, facts)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Header and lines: a line for each length, two or three columns for each model."""
        columns: dict[str, dict[int, str]] = {}
        for part in self.parts:
            for kind, words, cell in COLUMNS:
                found = {row["length"]: cell(row) for row in _of(part, kind)}
                if found:
                    columns[f"{part.name}: {words}"] = found
        lengths = sorted(set().union(*columns.values())) if columns else []
        lines = [[f"{n:,}", *(found.get(n, "–") for found in columns.values())] for n in lengths]
        return ["length", *columns], lines

    def _needles(self) -> Figure | None:
        """The curve of needles, all tasks and depths together."""
        return needles_found(Section("", [_run(part, _of(part, "needle")) for part in self.parts]))

    def _marked(self, figure: Figure) -> Figure:
        """A figure without marks of trained lengths that nobody knows."""
        kept = [i for i, shape in enumerate(figure.layout["shapes"]) if shape["x0"] != UNKNOWN]
        marks = {key: [figure.layout[key][i] for i in kept] for key in ("shapes", "annotations")}
        return dataclasses.replace(figure, layout=figure.layout | marks)


CAPTION = (
    "loss: nats a token (bits a byte, the unit to compare models of different tokenizers by) of the same last tokens "
    "of each text after ever more of it; prefixes: of ever longer beginnings; needles: all of the answer right, over "
    "all depths and tasks, 95% interval, of how many needles"
)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _loss(row: Row) -> str:
    bits = row.get("bits_per_byte")
    return f"{row['loss']:.3f}" + (f" ({bits:.3f})" if bits is not None else "")


def _found(row: Row) -> str:
    return share_text(row, "exact_accuracy", "exact_", row["trials"])


COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("fixed", "loss", _loss),
    ("nested", "prefixes", _loss),
    ("needle", "needles", _found),
)


def _run(part: Part, rows: list[Row]) -> Run:
    """A model as the report's figures know it."""
    return Run(part.name, Recipe(train=TrainConfig(length=part.trained_length or UNKNOWN)), evaluation=rows)


def _of(part: Part, kind: str) -> list[Row]:
    """Its rows of a kind; "needle" are those of retrieval over all tasks and depths, or else those of lengths."""
    if kind != "needle" or not any(row["kind"] == "retrieval" for row in part.rows):
        return [row for row in part.rows if row["kind"] == kind]
    lengths = sorted({row["length"] for row in part.rows if row["kind"] == "retrieval"})
    return [_pooled(part.rows, length) for length in lengths]


def _pooled(rows: list[Row], length: int) -> Row:
    """All needles at a length as one row. Every cell asks for the same needles, so that its interval is of so many."""
    found = [row for row in rows if row["kind"] == "retrieval" and row["length"] == length]
    share = sum(row["exact_accuracy"] * row["trials"] for row in found) / sum(row["trials"] for row in found)
    trials = max(row["trials"] for row in found)
    row: Row = {"kind": "needle", "length": length, "trials": trials}
    return row | proportion("exact_accuracy", "exact_", min(share, 1.0) * trials, trials)
