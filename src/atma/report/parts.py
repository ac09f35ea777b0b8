"""What pages are made of, as HTML: a figure with its numbers below it, a table, a paragraph. All text is escaped."""

import json
from html import escape

from atma.report.figures import Figure, Table


def figure_html(figure: Figure, name: str) -> str:
    """A chart that report.js draws, its caption and its table. `name` is unlike that of any other on the page."""
    return f"""<figure>
<h3 id="{name}t">{escape(figure.title)}</h3>
<div class="chart" role="img" aria-labelledby="{name}t" aria-describedby="{name}c" data-figure="{name}d"></div>
<script type="application/json" id="{name}d">{_json({"data": figure.data, "layout": figure.layout})}</script>
<figcaption id="{name}c">{escape(figure.caption)}</figcaption>
<details><summary>The same numbers as a table</summary>{table_html(figure.table)}</details>
</figure>"""


def table_html(table: Table) -> str:
    """A table whose lines are named by their first cell."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(text)}</td>" for text in row[1:])}</tr>'
        for row in table.rows
    )
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def paragraph(text: str) -> str:
    """Nothing where there is no text."""
    return f"<p>{escape(text)}</p>" if text else ""


def items(sentences: list[str]) -> str:
    """A list of sentences, or nothing."""
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>" if sentences else ""


def made_with(command: str, facts: Table) -> str:
    """The last section of a page: the command, and names and values of what it ran on."""
    shown = f'<h2>Made with</h2><pre class="command">{escape(command)}</pre>' if command else "<h2>Made with</h2>"
    return f'<section id="made">{shown}{table_html(facts) if facts.rows else ""}</section>'


def _json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
