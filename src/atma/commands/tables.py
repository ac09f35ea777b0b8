"""Tables on the terminal: columns where they fit, and where they do not, the cells of each row below one another.

A row is never broken within a number. Where the output is no terminal a table has the width that it needs.
"""

import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNBOUNDED = 100_000
"""Columns of what is no terminal."""


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table, its first column to the left and numbers to the right."""
    shown, drawn = console(), grid(title, head, rows, caption)
    if shown.measure(drawn).minimum <= shown.width and widest(drawn, shown) <= shown.width:
        shown.print(drawn)
        return
    for line in stacked(title, head, rows, caption, shown.width):
        shown.print(line, markup=False, highlight=False, soft_wrap=True)


def console() -> "Console":
    """The terminal as it is; what is no terminal is as wide as a table wants, unless COLUMNS says otherwise."""
    import os

    from rich.console import Console

    bounded = os.environ.get("COLUMNS", "").isdigit() or (sys.stdout is not None and sys.stdout.isatty())
    return Console() if bounded else Console(width=UNBOUNDED)


def grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> "Table":
    """The table with columns."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(title), caption=escape(caption) or None)
    for i, name in enumerate(head):
        shown.add_column(escape(name), justify="right" if i else "left", no_wrap=True)
    for cells in rows:
        shown.add_row(*map(escape, cells))
    return shown


def widest(drawn: "Table", shown: "Console") -> int:
    """Columns that a table takes when nothing of it is cut; its title and caption wrap."""
    from rich.measure import measure_renderables

    padding = 3 * len(drawn.columns) + 1
    options = shown.options.update(width=UNBOUNDED)
    cells = [[column.header, *column.cells] for column in drawn.columns]
    return padding + sum(measure_renderables(shown, options, column).maximum for column in cells)


def stacked(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, width: int) -> list[str]:
    """The same as lines: the first cell of a row, and below it each other one behind the name of its column."""
    lines = textwrap.wrap(title, width)
    for first, *rest in rows:
        lines += ["", *textwrap.wrap(first or "–", width)]
        for name, cell in zip(head[1:], rest, strict=False):
            told = f"{name}: {cell}" if name else cell
            lines += textwrap.wrap(told, width, initial_indent="  ", subsequent_indent="    ")
    return [*lines, *([""] if caption else []), *textwrap.wrap(caption, width)]
