"""The figures of a diagnosis as plotly data: lines over lengths, bars of differences, and half-lives by head."""

import math
from collections.abc import Sequence
from typing import Any

from atma.report.content import size_text
from atma.report.figures import COLOURS, MARKERS, Figure, Table

Row = dict[str, Any]
DASHES = ("solid", "dash", "dot", "dashdot")


def lines(title: str, caption: str, rows: Sequence[Row], key: str) -> Figure:
    """`key` over length, one line for each `name`."""
    names, lengths = list(dict.fromkeys(row["name"] for row in rows)), sorted({row["length"] for row in rows})
    by_name = {name: {row["length"]: row[key] for row in rows if row["name"] == name} for name in names}
    data = [_line(name, by_name[name], i) for i, name in enumerate(names)]
    layout = {
        "xaxis": {
            "type": "log",
            "title": {"text": "tokens read"},
            "tickvals": lengths,
            "ticktext": [size_text(length) for length in lengths],
        },
        "hovermode": "closest",
    }
    cells = [[name, *(_text(by_name[name].get(length)) for length in lengths)] for name in names]
    return Figure(title, caption, data, layout, Table(["", *(f"{length:,}" for length in lengths)], cells))


def bars(title: str, caption: str, effects: Sequence[Row], key: str) -> Figure:
    """`key` of every change at the longest length, with its interval; the table has every length."""
    lengths = sorted({row["length"] for row in effects})
    last = sorted((row for row in effects if row["length"] == lengths[-1]), key=lambda row: -row[key])
    trace: dict[str, Any] = {"type": "bar", "orientation": "h", "marker": {"color": COLOURS[0]}}
    trace |= {"x": [row[key] for row in last], "y": [row["change"] for row in last]}
    if all(row[f"{key}_low"] is not None for row in last):
        up, down = ([abs(row[f"{key}_{end}"] - row[key]) for row in last] for end in ("high", "low"))
        trace["error_x"] = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2}
    layout = {
        "xaxis": {"title": {"text": f"difference at {size_text(lengths[-1])} tokens"}},
        "yaxis": {"autorange": "reversed", "tickfont": {"size": 10}},
        "hovermode": "closest",
    }
    found = {(row["change"], row["length"]): row for row in effects}
    cells = [[row["change"], *(_with_interval(found[row["change"], n], key) for n in lengths)] for row in last]
    return Figure(title, caption, [trace], layout, Table(["", *(f"{n:,}" for n in lengths)], cells))


def half_lives(rows: Sequence[Row]) -> list[Figure]:
    """Half-lives of each memory head at zero input and on the text; no figure where there is no memory."""
    if not rows:
        return []
    names = [f"head {row['layer']}.{row['head']}" for row in rows]
    data = []
    for i, (key, words) in enumerate(HALF_LIVES.items()):
        points = [(name, row[key]) for name, row in zip(names, rows, strict=True) if row[key] is not None]
        style = {"symbol": MARKERS[i], "size": 9, "color": COLOURS[i]}
        trace = {"type": "scatter", "mode": "markers", "name": words, "marker": style}
        data.append(trace | {"x": [value for _, value in points], "y": [name for name, _ in points]})
    layout = {"xaxis": {"type": "log", "title": {"text": "half-life, tokens"}}, "hovermode": "closest"}
    caption = "Tokens until half of what a memory head holds is left. Points that are missing are endless."
    cells = [[name, *(_tokens(row[key]) for key in HALF_LIVES)] for name, row in zip(names, rows, strict=True)]
    return [Figure("Half-lives", caption, data, layout, Table(["", *HALF_LIVES.values()], cells))]


HALF_LIVES = {
    "half_life": "at zero input",
    "half_life_p10": "first decile",
    "half_life_p50": "median",
    "half_life_p90": "ninth decile",
}


def chosen(rows: Sequence[Row]) -> list[Figure]:
    """The loss after each of the heads chosen one after the other; no figure where none was."""
    steps = [row for row in rows if row["step"] > 0]
    if not steps:
        return []
    names = ["none", *(f"{row['step']}. {row['head']}" for row in steps)]
    losses = [steps[0]["loss_before"], *(row["loss"] for row in steps)]
    style = {"color": COLOURS[0], "width": 2}
    data = [{"type": "scatter", "mode": "lines+markers", "name": "chosen on", "x": names, "y": losses, "line": style}]
    layout = {"xaxis": {"title": {"text": "heads moved so far"}, "type": "category"}}
    caption = (
        f"Nats a token at {size_text(steps[0]['length'])} tokens of the documents that chose, after each head's map "
        f"was moved by {steps[0]['strength']:g} to the identity beside those before; the table has the others."
    )
    cells = [[row["head"], _text(row["loss"]), f"{row['change']:+.3f}", _rest(row)] for row in steps]
    return [Figure("Heads chosen", caption, data, layout, Table(["head", "loss", "change", "of the others"], cells))]


def levels(rows: Sequence[Row]) -> list[Figure]:
    """How many sinks of each first layer and lifetime there are; no figure where there are none."""
    if not rows:
        return []
    counts = {(row["lifetime"], row["first_layer"]): row["count"] for row in rows}
    lives, firsts = (range(1, max(one) + 1) for one in zip(*counts, strict=True))
    firsts = range(firsts.stop)
    z = [[math.log1p(counts.get((life, first), 0)) for first in firsts] for life in lives]
    trace: dict[str, Any] = {"type": "heatmap", "x": list(firsts), "y": list(lives), "z": z, "colorscale": "Viridis"}
    trace["colorbar"] = {"title": {"text": "log(1 + tokens)"}}
    layout = {"xaxis": {"title": {"text": "first layer"}}, "yaxis": {"title": {"text": "lifetime, layers"}}}
    caption = (
        "Tokens whose hidden state lies within 0.9 of the first token's in cosine, by the layer where that begins and "
        "by how many layers it lasts."
    )
    cells = [[str(row[key]) for key in ("first_layer", "lifetime", "count", "texts", "called")] for row in rows]
    heads = ["first layer", "lifetime", "tokens", "texts", "called"]
    return [Figure("Sinks like the first token", caption, [trace], layout, Table(heads, cells))]


def _rest(row: Row) -> str:
    if row["rest_low"] is None:
        return "–" if row["rest_change"] is None else f"{row['rest_change']:+.3f}"
    return f"{row['rest_change']:+.3f} [{row['rest_low']:+.3f}, {row['rest_high']:+.3f}]"


def _line(name: str, points: dict[int, float], place: int) -> dict[str, Any]:
    style = {"color": COLOURS[place % len(COLOURS)], "width": 2, "dash": DASHES[place // len(COLOURS) % len(DASHES)]}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(points),
        "y": list(points.values()),
        "line": style,
        "marker": {"symbol": MARKERS[place % len(MARKERS)], "size": 7},
    }


def _with_interval(row: Row, key: str) -> str:
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return f"{row[key]:+.3f}" if low is None else f"{row[key]:+.3f} [{low:+.3f}, {high:+.3f}]"


def _tokens(value: float | None) -> str:
    return "endless" if value is None or math.isinf(value) else f"{value:,.4g}"


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
