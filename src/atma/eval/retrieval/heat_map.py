"""Heat maps of retrieval, depth by length, with their intervals as a table below each."""

from collections.abc import Sequence
from pathlib import Path

from atma.eval.language_model import Row
from atma.report.content import environment, size_text
from atma.report.figures import Figure, Table
from atma.report.plain import plain_page
from atma.statistics import share_text

SCALE = [[0.0, "#8c1d40"], [0.5, "#e8a33d"], [1.0, "#16976c"]]
Group = tuple[str, str, str, str]


def page(rows: Sequence[Row], path: Path | str, command: str = "") -> Path:
    """Write the heat maps of a suite's rows, of one model or several, and return the path. OSError if it cannot be.

    A map for each model, task and haystack: a square for each depth and length, coloured by the share of trials with
    the whole answer right. Tasks without a chosen depth share a map, with a line for each.
    """
    return plain_page(path, "Retrieval by depth and length", figures(rows), command, environment())


def figures(rows: Sequence[Row]) -> list[Figure]:
    """The maps, in the order of the rows."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        if row["kind"] == "retrieval":
            task, haystack = (row["task"], row["haystack"]) if "depth" in row else ("tasks", "their own depths")
            group = (str(row["provenance"].get("model")), row["scoring"], task, haystack)
            groups.setdefault(group, []).append(row)
    return [_figure(group, members, rows) for group, members in groups.items()]


def cell_text(row: Row) -> str:
    """The whole answer right, and after it its tokens (teacher-forced) or the share of texts found (greedy)."""
    part = row["token_accuracy"] if row["scoring"] == "forced" else row["recall"]
    return f"{share_text(row, 'exact_accuracy', 'exact_', row['trials'])}, {part:.0%}"


def _figure(group: Group, members: list[Row], rows: Sequence[Row]) -> Figure:
    model, scoring, task, haystack = group
    lengths = sorted({row["length"] for row in members})
    places = list(dict.fromkeys(_place(row) for row in members))
    found = {(_place(row), row["length"]): row for row in members}
    grid = [[found.get((place, length)) for length in lengths] for place in places]
    trace = {
        "type": "heatmap",
        "x": [size_text(length) for length in lengths],
        "y": places,
        "z": [[row and row["exact_accuracy"] for row in line] for line in grid],
        "text": [[cell_text(row).replace(" [", "<br>[") if row else "" for row in line] for line in grid],
        "customdata": [[_interval(row) if row else "" for row in line] for line in grid],
        "texttemplate": "%{text}",
        "hovertemplate": "%{y}, %{x} tokens: %{customdata}<extra></extra>",
        "zmin": 0,
        "zmax": 1,
        "colorscale": SCALE,
        "colorbar": {"tickformat": ".0%", "thickness": 12},
        "xgap": 2,
        "ygap": 2,
    }
    layout = {
        "xaxis": {"type": "category", "title": {"text": "length, tokens"}},
        "yaxis": {"type": "category", "autorange": "reversed"},
        "hovermode": "closest",
    }
    second = "answer tokens right" if scoring == "forced" else "expected texts found"
    caption = (
        f"{model}: share of trials with the whole answer right, with its 95% interval, and of {second} ({scoring}). "
        f"{_trials(members)}. {_baseline(members, rows)}"
    )
    table = Table(
        ["", *(f"{length:,}" for length in lengths)],
        [[place, *(_interval(row) if row else "–" for row in line)] for place, line in zip(places, grid, strict=True)],
    )
    return Figure(f"{task}, {haystack}", caption.strip(), [trace], layout, table)


def _place(row: Row) -> str:
    if "depth" in row:
        return f"depth {row['depth']}%"
    return row["task"] if row["haystack"] == "none" else f"{row['task']}, {row['haystack']}"


def _interval(row: Row) -> str:
    return share_text(row, "exact_accuracy", "exact_", row["trials"], 1)


def _trials(rows: list[Row]) -> str:
    counts = sorted({row["trials"] for row in rows})
    return f"{counts[0]} trials a square" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} trials a square"


def _baseline(members: list[Row], rows: Sequence[Row]) -> str:
    """The best that guessing got where the needle was absent."""
    own = {(row["task"], row["haystack"], row["provenance"].get("model")) for row in members}
    best = [
        row["token_accuracy"]
        for row in rows
        if row["kind"] == "absent" and (row["task"], row["haystack"], row["provenance"].get("model")) in own
    ]
    return f"Without the needle at most {max(best):.0%} of answer tokens were right." if best else ""
