"""A page of sentences and figures that belong to no run: what was found first, then what it was read from."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from atma.report.figures import Figure, Table
from atma.report.page import _figure, _paragraph, _table
from atma.report.shell import shell, write_text


def plain_page(
    path: Path | str,
    title: str,
    found: Sequence[str],
    note: str,
    figures: Sequence[Figure],
    made_with: Mapping[str, str],
    command: str,
) -> Path:
    """Write one HTML file that asks the network for nothing, making its folder. OSError if it cannot be written.

    found: sentences, the most important first; note: a paragraph below them; made_with: names and values, in words.
    """
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in found)
    drawn = "".join(_figure(figure, f"f{i}") for i, figure in enumerate(figures))
    facts = _table(Table(["made with", ""], [[name, value] for name, value in made_with.items()]))
    made = f'<section><h2>Made with</h2><pre class="command">{escape(command)}</pre>{facts}</section>'
    first = f'<div class="headline"><div style="grid-column: 1 / -1"><ul>{items}</ul></div></div>{_paragraph(note)}'
    main = f'<section><div class="figures">{drawn}</div></section>\n{made}'
    return write_text(path, shell(title, main, f"\n{first}"))
