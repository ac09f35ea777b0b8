"""The figures of a report, each as plain plotly data with the table of the same numbers.

A figure is data and layout in the words of plotly.js, drawn by the page's own copy of it. Colours stay with a run over
all figures of a section; they are chosen to be read on light and on dark ground, and every run has its own marker too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from atma.report.content import Row, Run, Section, place, size_text

COLOURS = ("#2f7fe0", "#dd6b10", "#16976c", "#a45ee0", "#cf4065", "#7d8a1f")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star")
CURVE_POINTS = 300
"""Most points of one training curve: longer logs are averaged over equal spans of rows."""
Trace = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Numbers as text: a header and rows of equal length."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """One chart with its caption and the table of its numbers."""

    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]
    table: Table


def figures(section: Section) -> list[Figure]:
    """All figures for which a section's runs have rows."""
    made = [
        loss_by_length(section, "fixed"),
        loss_by_length(section, "nested"),
        needles(section),
        training(section),
        loss_by_length(section, "position"),
        loss_by_length(section, "junk"),
    ]
    return [figure for figure in made if figure is not None]


LOSS_WORDS = {
    "fixed": (
        "Loss on fixed targets",
        "The same target tokens with ever more context before them, so that only the context changes. Lower is better.",
    ),
    "nested": ("Loss on nested prefixes", "Mean loss over ever longer prefixes of the same documents."),
    "position": ("Loss by position", "Mean loss of the tokens from one mark to the next, over whole documents."),
    "junk": (
        "Loss on unrelated text",
        "Mean loss over strung-together documents that have little to do with each other.",
    ),
}


def loss_by_length(section: Section, kind: str) -> Figure | None:
    """Loss against length on a logarithmic axis, the trained length marked; None without rows of that kind."""
    if not any(run.rows(kind) for run in section.runs):
        return None
    title, caption = LOSS_WORDS[kind]
    traces = [
        _line(section, run, run.rows(kind), "loss", ("loss_low", "loss_high"), "%{y:.3f} nats") for run in section.runs
    ]
    axis = "position" if kind == "position" else "context, tokens"
    table = _length_table(section, kind, lambda row: _number(row, "loss", "loss_low", "loss_high", "{:.3f}"))
    return Figure(title, caption + _documents(section, kind), traces, _length_layout(section, kind, axis), table)


def needles(section: Section) -> Figure | None:
    """Needle token accuracy with Wilson intervals, exact accuracy, and the baseline without the needle."""
    if not any(run.rows("needle") for run in section.runs):
        return None
    traces = []
    for run in section.runs:
        rows = run.rows("needle")
        traces.append(_line(section, run, rows, "token_accuracy", ("token_low", "token_high"), "%{y:.1%} of tokens"))
        exact = _line(section, run, rows, "exact_accuracy", ("exact_low", "exact_high"), "%{y:.1%} exact")
        traces.append(_variant(exact, "all five", "dash") | {"showlegend": False})
        if rows and all(row.get("absent_token_accuracy") is not None for row in rows):
            absent = _line(section, run, rows, "absent_token_accuracy", None, "%{y:.1%} without the needle")
            traces.append(_variant(absent, "needle absent", "dot") | {"showlegend": False})
    layout = _length_layout(section, "needle", "length of the sequence, tokens")
    layout["yaxis"] = {"title": {"text": "accuracy"}, "range": [-0.03, 1.03], "tickformat": ".0%"}
    caption = (
        "A record of five digits is told once, and asked for at the end of a sequence of so many tokens of text. "
        "Share of digits right (solid) and of records with all five right (dashed), with 95% Wilson intervals; "
        "dotted: the same question where the record was never told."
    )
    return Figure("Needle recall", caption, traces, layout, _length_table(section, "needle", _needle_cell))


def needles_found(section: Section) -> Figure | None:
    """Share of needles with the whole answer right by length, of rows of kind "needle", with Wilson intervals."""
    if not any(run.rows("needle") for run in section.runs):
        return None
    interval = ("exact_low", "exact_high")
    traces = [
        _line(section, run, run.rows("needle"), "exact_accuracy", interval, "%{y:.1%} found") for run in section.runs
    ]
    layout = _length_layout(section, "needle", "length of the text, tokens")
    layout["yaxis"] = {"title": {"text": "needles found"}, "range": [-0.03, 1.03], "tickformat": ".0%"}
    caption = (
        "Share of needles with the whole answer right, over all tasks and depths, with 95% Wilson intervals of as many "
        "trials as there are needles: each depth asks for the same ones."
    )
    table = _length_table(section, "needle", lambda row: _number(row, "exact_accuracy", *interval, "{:.1%}"))
    return Figure("Needles by length", caption, traces, layout, table)


def training(section: Section) -> Figure | None:
    """Training loss and validation loss against tokens seen, from the runs' logs."""
    traces, rows = [], []
    for run in section.runs:
        label = section.label(run)
        for kind, mode in (("train", "lines"), ("validation", "lines+markers")):
            points = thin([row for row in run.metrics if row.get("kind") == kind and _finite(row.get("loss"))])
            if not points:
                continue
            trace = _styled(section, run, [row["tokens"] for row in points], [row["loss"] for row in points])
            trace |= {"mode": mode, "hovertemplate": f"{label}, {kind}: %{{y:.3f}} nats<extra></extra>"}
            traces.append(_variant(trace, kind, "solid" if kind == "train" else "dot"))
            rows += [[f"{label}, {kind}", f"{p['tokens']:,.0f}", f"{p['loss']:.3f}"] for p in thin(points, 8)]
    if not traces:
        return None
    layout = {"xaxis": {"title": {"text": "training tokens"}}, "yaxis": {"title": {"text": "nats per token"}}}
    caption = "Loss while training. Long logs are averaged over equal spans; the table holds eight spans a curve."
    return Figure("Training", caption, traces, layout, Table(["run", "tokens", "loss"], rows))


def thin(rows: list[Row], most: int = CURVE_POINTS) -> list[Row]:
    """At most `most` rows, each the mean of `tokens` and `loss` over an equal span of the given ones."""
    if len(rows) <= most:
        return rows
    cuts = [len(rows) * i // most for i in range(most + 1)]
    spans = [rows[start:end] for start, end in pairwise(cuts)]
    return [{key: sum(row[key] for row in span) / len(span) for key in ("tokens", "loss")} for span in spans]


def _line(section: Section, run: Run, rows: list[Row], key: str, interval: tuple[str, str] | None, hover: str) -> Trace:
    trace = _styled(section, run, [place(row) for row in rows], [row[key] for row in rows])
    trace["hovertemplate"] = f"{section.label(run)}: {hover}<extra></extra>"
    if interval and all(row.get(name) is not None for row in rows for name in interval):
        low, high = interval
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [row[high] - row[key] for row in rows],
            "arrayminus": [row[key] - row[low] for row in rows],
            "thickness": 1.2,
            "width": 3,
        }
    return trace


def _styled(section: Section, run: Run, x: list[float], y: list[float]) -> Trace:
    """A line in the run's colour (by name, so that seeds share it) with the run's own marker."""
    names = list(dict.fromkeys(other.name for other in section.runs))
    place = next(i for i, other in enumerate(section.runs) if other is run)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": section.label(run),
        "x": x,
        "y": y,
        "line": {"color": COLOURS[names.index(run.name) % len(COLOURS)], "width": 2},
        "marker": {"symbol": MARKERS[place % len(MARKERS)], "size": 7},
    }


def _variant(trace: Trace, words: str, dash: str) -> Trace:
    return trace | {"name": f"{trace['name']}, {words}", "line": trace["line"] | {"dash": dash}}


def _length_layout(section: Section, kind: str, title: str) -> dict[str, Any]:
    lengths = sorted({place(row) for run in section.runs for row in run.rows(kind)})
    marks = sorted({run.trained_length for run in section.runs})
    step = math.ceil(len(lengths) / 9)
    return {
        "xaxis": {
            "type": "log",
            "title": {"text": title},
            "tickvals": lengths[::step],
            "ticktext": [size_text(length) for length in lengths[::step]],
        },
        "yaxis": {"title": {"text": "nats per token"}},
        "shapes": [_mark(mark) for mark in marks],
        "annotations": [_mark_words(mark) for mark in marks],
    }


def _mark(length: int) -> dict[str, Any]:
    return {
        "type": "line",
        "x0": length,
        "x1": length,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": "#8a8f98", "width": 1.5, "dash": "dash"},
    }


def _mark_words(length: int) -> dict[str, Any]:
    return {
        "text": f"trained at {size_text(length)}",
        "x": math.log10(length),
        "y": 1,
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 11, "color": "#8a8f98"},
    }


def _length_table(section: Section, kind: str, cell: Callable[[Row], str]) -> Table:
    """A row for each length and a column for each run."""
    runs = [run for run in section.runs if run.rows(kind)]
    by_length = [{place(row): row for row in run.rows(kind)} for run in runs]
    lengths = sorted(set().union(*by_length))
    header = ["up to position" if kind == "position" else "length", *(section.label(run) for run in runs)]
    rows = [
        [f"{length:,}", *(cell(rows[length]) if length in rows else "–" for rows in by_length)] for length in lengths
    ]
    return Table(header, rows)


def _number(row: Row, key: str, low: str, high: str, form: str) -> str:
    text = form.format(row[key])
    if row.get(low) is None or row.get(high) is None:
        return text
    return f"{text} [{form.format(row[low])}, {form.format(row[high])}]"


def _needle_cell(row: Row) -> str:
    tokens = _number(row, "token_accuracy", "token_low", "token_high", "{:.1%}")
    exact = _number(row, "exact_accuracy", "exact_low", "exact_high", "{:.1%}")
    absent = f"; absent {row['absent_token_accuracy']:.1%}" if row.get("absent_token_accuracy") is not None else ""
    return f"{tokens}; exact {exact}{absent}"


def _documents(section: Section, kind: str) -> str:
    """How many documents the losses are of, and how many of these had to be joined from neighbouring files."""
    rows = [row for run in section.runs for row in run.rows(kind) if "documents" in row]
    counts = {(row["documents"], row.get("joined_documents", 0)) for row in rows}
    if len(counts) != 1:
        return ""
    ((count, joined),) = counts
    made_of = f", {joined} of them made of neighbouring files" if joined else ""
    bars = " Bars are 95% intervals over them." if any(row.get("loss_low") is not None for row in rows) else ""
    return f" {count} held-out documents{made_of}.{bars}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
