"""How objects show themselves: short text for a prompt, and plain HTML for a notebook.

The HTML asks for nothing and runs nothing: tables with inline styles that take their colours from the page, so that
they are read on light and on dark ground. All text in it is escaped.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MOST_LINES = 24
"""Lines of a text that is shown whole; a longer one says how many there are."""
TABLE = "border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.3em 0"
CELL = "text-align:right;padding:2px 10px 2px 0;vertical-align:top;white-space:nowrap"
FIRST = CELL.replace("right", "left", 1)


def count_text(count: float) -> str:
    """A count for people: 950, 12.3 thousand, 2.4 million, 7.2 billion."""
    for unit, word in ((1e9, "billion"), (1e6, "million"), (1e4, "thousand")):
        if count >= unit:
            return f"{count / (1e3 if word == 'thousand' else unit):.3g} {word}"
    return f"{count:,.0f}"


def bytes_text(size: float) -> str:
    """Bytes for people: 512 B, 12 KiB, 1.4 MiB, 3.2 GiB."""
    for unit, word in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {word}"
    return f"{size:.0f} B"


def told(config: Any) -> str:
    """A frozen dataclass as Python that makes an equal one: the fields that are not at their defaults."""
    given = []
    for one in dataclasses.fields(config):
        value, default = getattr(config, one.name), one.default
        if default is dataclasses.MISSING and one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        if value != default:
            given.append(f"{one.name}={value!r}")
    return f"{type(config).__name__}({', '.join(given)})"


def shortened(text: str, most: int = 60) -> str:
    """A text's beginning in quotes, on one line."""
    return repr(text if len(text) <= most else f"{text[: most - 1]}…")


def facts_text(title: str, facts: Mapping[str, str]) -> str:
    """A title, and a line for each name and value below it."""
    width = max(map(len, facts), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in facts.items())])


def facts_html(title: str, facts: Mapping[str, str]) -> str:
    """The same as a table."""
    rows = "".join(
        f'<tr><th scope="row" style="{FIRST};font-weight:500">{escape(name)}</th>'
        f'<td style="{FIRST};white-space:normal">{escape(value)}</td></tr>'
        for name, value in facts.items()
    )
    return f'<div><b>{escape(title)}</b><table style="{TABLE}"><tbody>{rows}</tbody></table></div>'


def table_text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text, numbers to the right, every line of the same words."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def table_html(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table whose lines are named by their first cell."""
    head = "".join(f'<th scope="col" style="{CELL if i else FIRST}">{escape(c)}</th>' for i, c in enumerate(header))
    body = "".join(
        f'<tr><th scope="row" style="{FIRST};font-weight:500">{escape(row[0])}</th>'
        + "".join(f'<td style="{CELL}">{escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    under = f'<div style="opacity:.75;font-size:85%">{escape(caption)}</div>' if caption else ""
    return (
        f'<div style="overflow-x:auto"><table style="{TABLE}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>{under}</div>"
    )
