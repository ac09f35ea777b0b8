"""What Python holds of figures: shown in a notebook, printed as numbers, saved as a page, or handed to plotly."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atma.display import MOST_LINES, table_text
from atma.report import inline
from atma.report.content import environment
from atma.report.figures import Figure
from atma.report.plain import plain_page


@dataclass(frozen=True, repr=False)
class Chart:
    """A `title`, and one of `figures` or several. In a notebook it is drawn; printed, it is a table of its numbers."""

    title: str
    figures: list[Figure]
    facts: Mapping[str, str] = field(default_factory=dict)
    """Names and values of what it was made with, for the page."""

    def save(self, path: str | Path) -> Path:
        """Write an .html page whose figures answer the mouse; it asks the network for nothing. Returns the path.

        ValueError: the name does not end in .html. OSError: it cannot be written.
        """
        if Path(path).suffix != ".html":
            raise ValueError(f"{path}: a chart is saved as a page; end the name in .html")
        return plain_page(path, self.title, self.figures, "", {**environment(), **self.facts})

    def plotly(self, index: int = 0) -> Any:
        """One of the figures as a `plotly.graph_objects.Figure`, to change or to save as you like."""
        import plotly.graph_objects as graph

        figure = self.figures[index]
        drawn = graph.Figure(data=figure.data, layout=figure.layout)
        return drawn.update_layout(title=figure.title)

    def __repr__(self) -> str:
        parts = [f"{one.title}\n{table_text(one.table.header, one.table.rows)}" for one in self.figures]
        lines = "\n\n".join(parts).splitlines()
        more = (
            [f"… {len(lines) - MOST_LINES} more lines: print table(), or save(path)"] if len(lines) > MOST_LINES else []
        )
        return "\n".join([*lines[:MOST_LINES], *more])

    def table(self) -> str:
        """The numbers of all its figures as text."""
        return "\n\n".join(f"{one.title}\n{table_text(one.table.header, one.table.rows)}" for one in self.figures)

    def _repr_html_(self) -> str:
        return "".join(map(inline.figure_html, self.figures))
