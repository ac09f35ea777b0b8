"""A figure as HTML for a notebook: lines as SVG, squares as a table, with no script.

The page's figures are drawn by plotly.js, of several megabytes, which a notebook would carry in every output. These
draw the same data (`Figure.data`) still, so that an output is small and is seen wherever notebooks are shown.
Text and axes take the page's own colour; curves have colours that are read on light and on dark ground.
"""

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from atma.display import CELL, FIRST, TABLE, table_html
from atma.report.figures import Figure

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 680, 310, 56, 16, 34, 44
DASHES = {"dash": "6 4", "dot": "2 4"}
TICKS = (1, 2, 2.5, 5, 10)


class Axis(NamedTuple):
    """From values to pixels."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.first + (self.last - self.first) * ((at - low) / (high - low) if high > low else 0.5)


def figure_html(figure: Figure) -> str:
    """Title, drawing, caption, and the same numbers as a table that opens."""
    drawn = _squares(figure) if figure.data and figure.data[0]["type"] == "heatmap" else _lines(figure)
    numbers = table_html(figure.table.header, figure.table.rows)
    return (
        f'<figure style="margin:.5em 0 1.2em;max-width:{WIDTH}px"><b>{escape(figure.title)}</b>{drawn}'
        f'<figcaption style="opacity:.75;font-size:85%">{escape(figure.caption)}</figcaption>'
        f"<details><summary>The same numbers as a table</summary>{numbers}</details></figure>"
    )


def _lines(figure: Figure) -> str:
    """Curves with their intervals, and a legend above them."""
    x, y = _axes(figure)
    body = "".join(
        _mark(shape["x0"], x, y) for shape in figure.layout.get("shapes", ()) if x.low <= shape["x0"] <= x.high
    )
    body += "".join(_curve(trace, x, y) for trace in figure.data)
    name = escape(figure.title, quote=True)
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="{name}" fill="currentColor" '
        f'font-family="sans-serif" font-size="12">{_frame(figure, x, y)}{body}{_notes(figure, x)}</svg>'
    )
    return f"{_legend(figure.data)}{svg}"


def _axes(figure: Figure) -> tuple[Axis, Axis]:
    xs = [value for trace in figure.data for value in trace["x"]]
    ys = [value for trace in figure.data for value in (*trace["y"], *_ends(trace))]
    low, high = figure.layout.get("yaxis", {}).get("range") or (min(ys), max(ys))
    spare = 0.04 * (high - low) or 0.1
    if "range" in figure.layout.get("yaxis", {}):
        spare = 0.0
    log = figure.layout.get("xaxis", {}).get("type") == "log"
    x = Axis(min(xs), max(xs), LEFT + 10, WIDTH - RIGHT - 10, log)
    return x, Axis(low - spare, high + spare, HEIGHT - BOTTOM, TOP)


def _ends(trace: dict[str, Any]) -> list[float]:
    """Both ends of a trace's intervals."""
    error = trace.get("error_y")
    if not error:
        return []
    up = [y + more for y, more in zip(trace["y"], error["array"], strict=True)]
    return up + [y - less for y, less in zip(trace["y"], error["arrayminus"], strict=True)]


def _frame(figure: Figure, x: Axis, y: Axis) -> str:
    """Axes, their ticks and titles."""
    across, down = figure.layout.get("xaxis", {}), figure.layout.get("yaxis", {})
    at = list(across.get("tickvals") or _ticks(x.low, x.high))
    words = list(
        across.get("ticktext") or (f"{value:,.0f}" if value == round(value) else f"{value:,.6g}" for value in at)
    )
    parts = []
    for value, text in zip(at, words, strict=True):
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>')
    form = "{:.0%}" if down.get("tickformat") == ".0%" else "{:,.6g}"
    for value in _ticks(y.low, y.high):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="currentColor" '
            f'stroke-opacity=".15"/><text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{form.format(value)}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_words(middle, HEIGHT - 8, across, 'text-anchor="middle"'))
    parts.append(_words(LEFT, 12, down, ""))
    return "".join(parts)


def _words(x: float, y: float, axis: dict[str, Any], where: str) -> str:
    title = axis.get("title", {}).get("text", "")
    return f'<text x="{x:.0f}" y="{y}" {where} opacity=".75">{escape(title)}</text>' if title else ""


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, about five."""
    if not high > low:
        return [low]
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * one for one in TICKS if unit * one >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _mark(value: float, x: Axis, y: Axis) -> str:
    at = f"{x(value):.1f}"
    style = f'stroke="currentColor" stroke-opacity=".5" {_dash("dash")}'
    return f'<line x1="{at}" x2="{at}" y1="{y.first}" y2="{y.last}" {style}/>'


def _notes(figure: Figure, x: Axis) -> str:
    """The words at the marks; the axis of a figure that has them is logarithmic, and so are their places."""
    found = [(10 ** note["x"], note["text"]) for note in figure.layout.get("annotations", ())]
    return "".join(
        f'<text x="{x(value) + 4:.1f}" y="{TOP - 5}" font-size="11" opacity=".75">{escape(text)}</text>'
        for value, text in found
        if x.low <= value * 1.001 and value <= x.high * 1.001
    )


def _curve(trace: dict[str, Any], x: Axis, y: Axis) -> str:
    colour, dash = escape(trace["line"]["color"], quote=True), _dash(trace["line"].get("dash", ""))
    points = [(x(a), y(b)) for a, b in zip(trace["x"], trace["y"], strict=True)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    drawn = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" {dash}/>'
    if "markers" in trace.get("mode", ""):
        drawn += "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points)
    half = len(points)
    for (a, _), top, bottom in zip(points, _ends(trace)[:half], _ends(trace)[half:], strict=False):
        drawn += f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{y(top):.1f}" y2="{y(bottom):.1f}" stroke="{colour}"/>'
    return drawn


def _dash(kind: str) -> str:
    return f'stroke-dasharray="{DASHES[kind]}"' if kind in DASHES else ""


def _legend(traces: Sequence[dict[str, Any]]) -> str:
    shown = "".join(
        f'<span style="margin-right:1.2em;white-space:nowrap"><svg width="26" height="10" aria-hidden="true">'
        f'<line x1="0" x2="26" y1="5" y2="5" stroke="{escape(t["line"]["color"], quote=True)}" stroke-width="2.5" '
        f"{_dash(t['line'].get('dash', ''))}/></svg> {escape(str(t['name']))}</span>"
        for t in traces
    )
    return f'<div style="font-size:85%;margin:.2em 0">{shown}</div>'


def _squares(figure: Figure) -> str:
    """A heat map as a table of coloured cells."""
    [trace] = figure.data
    title = figure.layout.get("xaxis", {}).get("title", {}).get("text", "")
    head = "".join(f'<th scope="col" style="{CELL};text-align:center">{escape(str(one))}</th>' for one in trace["x"])
    rows = ""
    for name, values, texts in zip(trace["y"], trace["z"], trace["text"], strict=True):
        cells = "".join(_square(value, text, trace["colorscale"]) for value, text in zip(values, texts, strict=True))
        rows += f'<tr><th scope="row" style="{FIRST};font-weight:500">{escape(str(name))}</th>{cells}</tr>'
    return (
        f'<div style="overflow-x:auto"><table style="{TABLE};border-collapse:separate;border-spacing:2px">'
        f'<thead><tr><th style="{FIRST};font-weight:400">{escape(title)}</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _square(value: float | None, text: str, scale: Sequence[Any]) -> str:
    shown = "<br>".join(escape(part) for part in text.split("<br>")) or "–"
    if value is None:
        return f'<td style="text-align:center;padding:6px">{shown}</td>'
    red, green, blue = _blend(value, scale)
    ink = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"
    ground = f"background:rgb({red},{green},{blue});color:{ink}"
    return f'<td style="text-align:center;padding:6px 10px;font-size:85%;line-height:1.3;{ground}">{shown}</td>'


def _blend(value: float, scale: Sequence[Any]) -> tuple[int, ...]:
    """The colour of a share between those of the scale's points."""
    for (low, before), (high, after) in itertools.pairwise(scale):
        if value <= high:
            part = (value - low) / (high - low)
            pairs = zip(_rgb(before), _rgb(after), strict=True)
            return tuple(round(a + part * (b - a)) for a, b in pairs)
    return _rgb(scale[-1][1])


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
