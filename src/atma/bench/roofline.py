"""The roofline page: operations a second over operations a byte, one self-contained HTML file."""

import math
from pathlib import Path
from typing import Any

from atma.bench.rows import Result, Row
from atma.bench.table import cells, header, rates_text
from atma.report.figures import COLOURS, MARKERS, Figure, Table
from atma.report.plain import plain_page


def write(result: Result, path: Path) -> Path:
    """Write the page of a measurement. OSError if it cannot be written."""
    table = Table(header(result), [cells(result, row) for row in result.rows])
    drawn = [roofline(result, dtype) for dtype in result.rates.operations]
    facts = {name: str(value) for name, value in result.machine.items()} | {"rates": rates_text(result)}
    notes = " ".join(result.notes)
    return plain_page(path, f"atma bench {result.kind}", drawn, result.command, facts, note=notes, table=table)


def roofline(result: Result, dtype: str) -> Figure:
    """The roof of one dtype and every row below it. The distance from the roof is the ratio to the floor."""
    rows = [row for row in result.rows if row.dtype == dtype]
    rate, slope = result.rates.operations[dtype], result.rates.bytes
    intensities = [row.operations / row.bytes for row in rows] + [rate / slope]
    low, high = min(intensities) / 4, max(intensities) * 4
    marks = [low, rate / slope, high]
    roof: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        "name": "roof",
        "line": {"color": "#8a8f98", "width": 2},
    }
    roof |= {"x": marks, "y": [min(rate, slope * x) for x in marks], "hoverinfo": "skip"}
    names = list(dict.fromkeys(row.name for row in rows))
    traces = [roof, *(_points(rows, name, i) for i, name in enumerate(names))]
    axes = {
        "xaxis": {"type": "log", "title": {"text": "operations a byte"}, "range": [math.log10(low), math.log10(high)]},
        "yaxis": {"type": "log", "title": {"text": "operations a second"}},
        "hovermode": "closest",
    }
    caption = (
        f"{dtype}: the sloped line is the measured copy rate, the flat one the measured rate of matrix products. "
        "Both axes count the least work that the task needs, so a point's distance below the roof is its ratio to "
        "the floor; points above the slope held their data in a cache."
    )
    numbers = [[row.what, _size(row), row.name, f"{row.operations / row.bytes:.3g}", _speed(row)] for row in rows]
    table = Table(["what", "sizes", "by", "operations a byte", "operations a second"], numbers)
    return Figure(f"Roofline, {dtype}", caption, traces, axes, table)


def _points(rows: list[Row], name: str, place: int) -> dict[str, Any]:
    mine = [row for row in rows if row.name == name]
    style = {"symbol": MARKERS[place % len(MARKERS)], "size": 9, "color": COLOURS[place % len(COLOURS)]}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [row.operations / row.bytes for row in mine],
        "y": [row.operations / row.seconds for row in mine],
        "text": [f"{row.what}, {_size(row)}: {row.to_floor:.3g} × floor" for row in mine],
        "hovertemplate": f"{name}: %{{text}}<extra></extra>",
        "marker": style,
    }


def _size(row: Row) -> str:
    return " ".join(f"{name} {value:,}" for name, value in row.sizes.items())


def _speed(row: Row) -> str:
    return f"{row.operations / row.seconds / 1e9:,.3g} G"
