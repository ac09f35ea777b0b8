"""The dashboard of a sweep: one HTML file with its data, styles and scripts in it, that asks the network for nothing.

The page recomputes contrasts for whatever its filters leave, by the same matching, resamples and tests as
`atma.sweep.contrasts`. Text from cells is put into it as text only, never as markup.
"""

import json
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from atma.report.shell import POLICY
from atma.sweep.dashboard_data import payload
from atma.sweep.table import Table

SCRIPTS = ("dashboard_statistics.js", "dashboard_charts.js", "dashboard_views.js", "dashboard.js")


def page(table: Table, path: str | Path, title: str | None = None, metric: str | None = None) -> Path:
    """Write the dashboard to `path`, making its folder, and return the path.

    ValueError for an unknown metric or where `path` is a folder, OSError if it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the .html file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(table, title, metric), encoding="utf-8")
    return path


def html(table: Table, title: str | None = None, metric: str | None = None) -> str:
    """The dashboard as the text of one HTML file, judged at first by `metric` (see `Table.metric`)."""
    styles = _asset("atma.report", "report.css") + _asset("atma.sweep", "dashboard.css")
    return Template(_asset("atma.sweep", "dashboard.html")).substitute(
        policy=escape(POLICY),
        title=escape(title or f"Sweep {table.name}"),
        style=styles,
        data=_json(payload(table, metric)),
        script="\n".join(_asset("atma.sweep", name) for name in SCRIPTS),
    )


def _json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")
