"""The one HTML file that every page is: styles, script and figures in it, and nothing asked of the network."""

from html import escape
from importlib.resources import files
from pathlib import Path

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def shell(title: str, main: str, below_title: str = "") -> str:
    """The text of a page, plotly.js in it once. `main` and `below_title` are HTML; the title is escaped."""
    from plotly.offline import get_plotlyjs

    return f"""<!doctype html>
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
<header><h1>{escape(title)}</h1>{below_title}</header>
<main>{main}</main>
<script>{get_plotlyjs()}</script>
<script>{_asset("report.js")}</script>
</body>
</html>
"""


def write_text(path: Path | str, text: str) -> Path:
    """Write a page, making its folder, and return its path. OSError if it cannot be written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _asset(name: str) -> str:
    return files("atma.report").joinpath(name).read_text(encoding="utf-8")
