"""The dashboard of a sweep: one HTML file with its data, styles, scripts and plotly in it, that asks for no network.

Everything that is computed is computed here beforehand (`dashboard_effects`); the page chooses what to show of it.
Text from cells is escaped, or put into the page as text only, never as markup.
"""

import itertools
import json
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from atma.report.figures import Table as Lines
from atma.report.parts import table_html
from atma.report.shell import shell, write_text
from atma.sweep.dashboard_data import cell_text, columns, level_texts, log_characters, log_text, metric_text, payload
from atma.sweep.dashboard_effects import level_numbers
from atma.sweep.pareto import ranked
from atma.sweep.table import Cell, Table
from atma.sweep.table_metrics import digits_of, number_text


def page(table: Table, path: str | Path, title: str | None = None, metric: str | None = None) -> Path:
    """Write the dashboard to `path`, making its folder, and return the path.

    ValueError for an unknown metric or where `path` is a folder, OSError if it cannot be written.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; name the .html file to write")
    return write_text(path, html(table, title, metric))


def html(table: Table, title: str | None = None, metric: str | None = None) -> str:
    """The dashboard as the text of one HTML file, judged at first by `metric` (see `Table.metric`)."""
    headline, data = table.metric(metric), payload(table, metric)
    main = Template(_asset("dashboard.html")).substitute(
        _choices(table, data),
        style=_asset("dashboard.css"),
        summary=escape(_summary(table)),
        filters="".join(_filter(i, name, level_texts(levels)) for i, (name, levels) in enumerate(table.levels.items())),
        columns=_columns(table, headline),
        grid=_grid(table, headline),
        depth=_depth(data["depth"]),
        details="".join(_details(table, i, cell) for i, cell in enumerate(table.cells)),
        data=_json(data),
        script=_asset("dashboard.js"),
    )
    return shell(title or f"Sweep {table.name}", main)


def _choices(table: Table, data: dict[str, Any]) -> dict[str, str]:
    """The options of every select of the page."""
    names = [metric["name"] for metric in data["metrics"]]
    families = list(dict.fromkeys(metric["family"] for metric in data["metrics"] if metric["family"]))
    family = data["metrics"][data["headline"]]["family"]
    pairs = [f"{one} × {other}" for one, other in itertools.combinations(table.levels, 2)]
    return {
        "metrics": _options(names, data["headline"]),
        "families": _options(families, families.index(family) if family else 0),
        "pairs": _options(pairs, data["strongest"]),
        "costs": _options(names, names.index("train seconds") if "train seconds" in names else 0),
        "hues": _options(table.levels),
    }


def _options(texts: Iterable[str], chosen: int = 0) -> str:
    made = [(i, "selected" if i == chosen else "", escape(text)) for i, text in enumerate(texts)]
    return "".join(f'<option value="{i}" {selected}>{text}</option>' for i, selected, text in made)


def _summary(table: Table) -> str:
    varied = ", ".join(f"{name} ({len(levels)})" for name, levels in table.levels.items())
    told = f"; factors and their levels: {varied}" if varied else ", without factors"
    waiting = f" {len(table.unfinished)} more have no result yet." if table.unfinished else ""
    return f"{len(table.cells)} cells of {table.name}{told}.{waiting}"


def _depth(count: int) -> str:
    if not count:
        return "all cells together, without filters"
    return f"filters that keep one level of {'one factor' if count == 1 else f'each of up to {count} factors'}"


def _filter(number: int, name: str, levels: list[str]) -> str:
    boxes = "".join(_box(f"f{number}", str(i), text, False) for i, text in enumerate(levels))
    return f"<fieldset><legend>{escape(name)}</legend>{boxes}</fieldset>"


def _box(name: str, value: str, text: str, checked: bool) -> str:
    ticked = "checked" if checked else ""
    return (
        f'<label><input type="checkbox" form="controls" name="{name}" value="{value}" {ticked}> {escape(text)}</label>'
    )


def _order(table: Table, headline: str) -> list[str]:
    """Metrics in the order of the table's columns: what a reader sees first, then all others."""
    return list(dict.fromkeys([*columns(table, headline), *table.metrics]))


def _columns(table: Table, headline: str) -> str:
    """A box for each column of the table after the cell's name: factors, then metrics."""
    shown = columns(table, headline)
    names = [(name, False) for name in table.levels]
    names += [(metric_text(name), name in shown) for name in _order(table, headline)]
    return "".join(_box("column", str(i), text, on) for i, (text, on) in enumerate(names, 3))


def _grid(table: Table, headline: str) -> str:
    """The table of cells, the best first; numbers and levels stand in each cell's `data-value` for sorting."""
    order, places = _order(table, headline), level_numbers(table)
    best = ranked(table.cells, headline)
    cells = [*best, *(cell for cell in table.cells if headline not in cell.metrics)]
    numbers = {cell.name: i for i, cell in enumerate(table.cells)}
    heads = [("cell", ""), *((name, "") for name in table.levels)]
    heads += [(metric_text(name), str(table.metrics.index(name))) for name in order]
    head = "".join(
        f'<th scope="col" data-metric="{metric}"><button type="button">{escape(text)}</button></th>'
        for text, metric in heads
    )
    lines = "".join(_line(table, cell, numbers[cell.name], order, places) for cell in cells)
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _line(table: Table, cell: Cell, number: int, order: list[str], places: dict[str, Any]) -> str:
    text = escape(cell_text(table, cell))
    box = f'<input type="checkbox" form="controls" name="cell" value="{number}" aria-label="select {text}">'
    name = f'<button type="button" class="link" popovertarget="cell{number}">{text}</button>'
    levels = [(places[f][number], level_texts(known)[places[f][number]]) for f, known in table.levels.items()]
    values = [(cell.metrics.get(m, ""), number_text(cell.metrics.get(m), digits_of(m))) for m in order]
    told = "".join(f'<td data-value="{value}">{escape(words)}</td>' for value, words in [*levels, *values])
    line = f'<td>{box}</td><th scope="row">{name}</th>{told}'
    return f'<tr data-cell="{escape(cell.name)}" data-number="{number}">{line}</tr>'


def _details(table: Table, number: int, cell: Cell) -> str:
    """What a cell's name opens: its levels, seed and metrics, its recipe, the ends of its logs."""
    places = level_numbers(table)
    facts = [[name, level_texts(levels)[places[name][number]]] for name, levels in table.levels.items()]
    facts += [["seed", str(cell.seed)], ["cell", cell.name]]
    facts += [[metric_text(name), number_text(cell.metrics.get(name), digits_of(name))] for name in table.metrics]
    recipe = json.dumps(cell.config, indent=1, ensure_ascii=False, default=str) if cell.config else ""
    texts = [("Recipe", recipe), ("Log", log_text(cell, log_characters(table)))]
    parts = "".join(f'<h3>{name}</h3><pre tabindex="0">{escape(text)}</pre>' for name, text in texts if text)
    close = f'<button type="button" popovertarget="cell{number}">Close</button>'
    head = f"<h2>{escape(cell_text(table, cell))}</h2>{close}"
    return f'<div popover id="cell{number}" role="dialog">{head}{table_html(Lines(["", ""], facts))}{parts}</div>'


def _json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files("atma.sweep").joinpath(name).read_text(encoding="utf-8")
