"""A page of figures that belong to no run: what was found, in sentences or a table, then what it was read from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from atma.report.figures import Figure, Table
from atma.report.parts import figure_html, items, made_with, paragraph, table_html
from atma.report.shell import shell, write_text


def plain_page(
    path: Path | str,
    title: str,
    figures: Sequence[Figure],
    command: str,
    facts: Mapping[str, str],
    found: Sequence[str] = (),
    note: str = "",
    table: Table | None = None,
) -> Path:
    """Write one HTML file that asks the network for nothing, making its folder. OSError if it cannot be written.

    found: sentences, the most important first; note: a paragraph below them; table: what all figures come to;
    facts: names and values of what the page was made with.
    """
    headline = f'<div class="headline"><div style="grid-column: 1 / -1">{items(list(found))}</div></div>'
    drawn = "".join(figure_html(figure, f"f{i}") for i, figure in enumerate(figures))
    summary = f"<section>{table_html(table)}</section>\n" if table else ""
    made = made_with(command, Table(["made with", ""], [[name, value] for name, value in facts.items()]))
    main = f'{summary}<section><div class="figures">{drawn}</div></section>\n{made}'
    return write_text(path, shell(title, main, f"\n{headline if found else ''}{paragraph(note)}"))
