"""Tables on the terminal: columns where they fit, and where they do not, the cells of each row below one another.

No number and no word is ever broken. Where the output is no terminal a table has the width that it needs.
"""

import io
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNBOUNDED = 100_000
"""Columns of what is no terminal."""
HEIGHT = 50
"""Lines, for rich, which takes a width alone for 80 columns where TERM is "dumb"."""


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table, numbers to the right, and its first column to the left unless that is of numbers too."""
    shown, drawn = console(), grid(title, head, rows, caption)
    if _whole(drawn, shown.width, {word for cells in (head, *rows) for cell in cells for word in cell.split()}):
        shown.print(drawn)
        return
    for line in stacked(title, head, rows, caption, shown.width):
        shown.print(line, markup=False, highlight=False, soft_wrap=True)


def console() -> "Console":
    """The terminal as it is; what is no terminal is as wide as a table wants, unless COLUMNS says otherwise."""
    import os

    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit():
        return Console(width=int(columns), height=HEIGHT)
    return Console() if sys.stdout is not None and sys.stdout.isatty() else Console(width=UNBOUNDED, height=HEIGHT)


def grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> "Table":
    """The table with columns."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(title), caption=escape(caption) or None)
    counted = all(cells[0].replace(",", "").isdigit() for cells in rows)
    for i, name in enumerate(head):
        shown.add_column(escape(name), justify="right" if i or counted else "left")
    for cells in rows:
        shown.add_row(*map(escape, cells))
    return shown


def _whole(drawn: "Table", width: int, words: set[str]) -> bool:
    """Whether a table of so many columns has every one of these words in one piece."""
    import re

    from rich.console import Console

    tried = Console(file=io.StringIO(), width=width, height=HEIGHT, color_system=None)
    with tried.capture() as captured:
        tried.print(drawn)
    text = captured.get()
    return max(map(len, text.splitlines())) <= width and words <= set(re.split(r"[\s│┃|]+", text))


def stacked(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, width: int) -> list[str]:
    """The same as lines: the first cell of a row, and below it each other one behind the name of its column."""
    lines = textwrap.wrap(title, width)
    for first, *rest in rows:
        lines += ["", *textwrap.wrap(first or "–", width)]
        for name, cell in zip(head[1:], rest, strict=False):
            told = f"{name}: {cell}" if name else cell
            lines += textwrap.wrap(told, width, initial_indent="  ", subsequent_indent="    ")
    return [*lines, *([""] if caption else []), *textwrap.wrap(caption, width)]
