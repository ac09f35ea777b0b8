"""A page of sentences and figures that belong to no run: what was found first, then what it was read from."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from atma.report.figures import Figure, Table
from atma.report.page import POLICY, _asset, _figure, _paragraph, _table


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
    from plotly.offline import get_plotlyjs

    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in found)
    drawn = "".join(_figure(figure, f"f{i}") for i, figure in enumerate(figures))
    facts = _table(Table(["made with", ""], [[name, value] for name, value in made_with.items()]))
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_asset("report.css")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
<div class="headline"><div style="grid-column: 1 / -1"><ul>{items}</ul></div></div>{_paragraph(note)}</header>
<main><section><div class="figures">{drawn}</div></section>
<section><h2>Made with</h2><pre class="command">{escape(command)}</pre>{facts}</section></main>
<script>{get_plotlyjs()}</script>
<script>{_asset("report.js")}</script>
</body>
</html>
"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
