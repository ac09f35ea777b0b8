"""The figures of a comparison's page: loss and needles by length, what is remembered, and what it costs."""

from atma.compare.board import Board
from atma.report.content import size_text
from atma.report.figures import COLOURS, MARKERS, Figure, Table, Trace
from atma.statistics import mean_interval

AROUND = ("top left", "bottom center", "middle left", "top center", "bottom left")
"""Where names stand beside their points, in turn: neighbours in rank are often neighbours in the figure."""
PICKED = 8
"""Entrants drawn from the start; the legend shows the others."""


def pictures(board: Board) -> list[Figure]:
    """All figures for which there are results."""
    made = [
        _by_length(board, "Loss by length", "fixed_nll", "nats a token", LOSS),
        _by_length(board, "Needles by length", "needle_token_acc", "digits right, %", NEEDLE),
        _remembered(board),
        _cost(board),
    ]
    return [one for one in made if one is not None]


LOSS = (
    "Loss on the same last tokens of each text with ever more of it before them: flat or falling is a model that "
    "holds at length, rising one that its context harms. Means over seeds, the bars their range."
)
NEEDLE = (
    "A record of five digits is told at the start of a text and asked for at its end, the digits before shown "
    "(teacher-forced). Share of digits right, means over seeds, the bars their range."
)


def _by_length(board: Board, title: str, family: str, axis: str, caption: str) -> Figure | None:
    points = {name: _points(board, name, family) for name in board.ranked()}
    lengths = sorted({length for found in points.values() for length in found})
    if not lengths:
        return None
    traces = [_line(i, name, found) for i, (name, found) in enumerate(points.items()) if found]
    rows = [[name, *(_mean_text(found.get(length)) for length in lengths)] for name, found in points.items() if found]
    ticks = {"tickvals": lengths, "ticktext": [size_text(length) for length in lengths]}
    layout = {"xaxis": {"type": "log", "title": {"text": "tokens"}, **ticks}, "yaxis": {"title": {"text": axis}}}
    table = Table(["mixer", *(f"{length:,}" for length in lengths)], rows)
    return Figure(title, f"{caption} {_shown(len(traces))}", traces, layout, table)


def _points(board: Board, name: str, family: str) -> dict[int, list[float]]:
    """Of an entrant, values over seeds by length."""
    found: dict[int, list[float]] = {}
    for row in board.results:
        if row["factors"]["mixer"] != name:
            continue
        for key, value in row["metrics"].items():
            head, _, length = key.rpartition("_")
            if head == family:
                found.setdefault(int(length), []).append(value)
    return dict(sorted(found.items()))


def _line(i: int, name: str, found: dict[int, list[float]]) -> Trace:
    means = {length: sum(values) / len(values) for length, values in found.items()}
    above = [max(values) - means[length] for length, values in found.items()]
    below = [means[length] - min(values) for length, values in found.items()]
    style = {"color": COLOURS[i % len(COLOURS)], "symbol": MARKERS[i // len(COLOURS) % len(MARKERS)], "size": 7}
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}
    trace: Trace = {"type": "scatter", "mode": "lines+markers", "name": name, "marker": style, "error_y": bars}
    trace |= {"x": list(means), "y": list(means.values()), "line": {"color": style["color"], "width": 2}}
    return trace | ({} if i < PICKED else {"visible": "legendonly"})


def _remembered(board: Board) -> Figure | None:
    """A map of accuracy: an entrant a line, a task and length a column."""
    columns = [one for one in board.columns if one.group == "tasks" and one.rises and one.values]
    if not columns:
        return None
    names = board.ranked()[::-1]
    grid = [[one.mean(name) for one in columns] for name in names]
    texts = [["" if value is None else f"{value:.0f}" for value in line] for line in grid]
    trace: Trace = {"type": "heatmap", "z": grid, "x": [one.title for one in columns], "y": names, "text": texts}
    trace |= {"texttemplate": "%{text}", "colorscale": "Viridis", "zmin": 0, "zmax": 100, "hoverongaps": False}
    layout = {"height": 140 + 28 * len(names), "yaxis": {"automargin": True}, "xaxis": {"automargin": True}}
    rows = [[name, *(one.text(name) for one in columns)] for name in board.ranked()]
    caption = (
        "Answers right, in percent, of models that learned each task alone, one layer of each mixer of the pattern: at "
        "the length they were trained at, and at the longest that was tested. Means over seeds."
    )
    return Figure("What is remembered", caption, [trace], layout, Table(["mixer", *(c.title for c in columns)], rows))


def _cost(board: Board) -> Figure | None:
    """Loss at the longest text against the bytes that decoding keeps there."""
    state = board.column("state")
    losses = next((one for one in board.columns if one.key.startswith("fixed_nll") and one.values), None)
    if state is None or losses is None:
        return None
    found = [(name, state.mean(name), losses.mean(name)) for name in board.ranked()]
    known = [(name, size, loss) for name, size, loss in found if size is not None and loss is not None]
    trace: Trace = {"type": "scatter", "mode": "markers+text", "marker": {"size": 9}}
    trace |= {
        "textposition": [AROUND[i % len(AROUND)] for i in range(len(known))],
        "x": [size for _, size, _ in known],
        "y": [loss for *_, loss in known],
        "text": [name for name, *_ in known],
    }
    layout = {
        "xaxis": {"type": "log", "title": {"text": "bytes of state"}},
        "yaxis": {"title": {"text": f"{losses.title}, nats"}},
        "showlegend": False,
    }
    rows = [[name, state.text(name), losses.text(name)] for name, *_ in known]
    caption = (
        "What decoding keeps of one text of the longest length, and the loss there. Lower and further left is better."
    )
    return Figure("Loss and state", caption, [trace], layout, Table(["mixer", state.title, losses.title], rows))


def sentences(board: Board) -> list[str]:
    """The most that can be said in words."""
    said = []
    for column in board.columns:
        if column.rises is None or not column.values or column.key in ("state",):
            continue
        known = [name for name in sorted(column.values, key=column.rank) if column.known(name)]
        if known:
            said.append(f"{column.title}: {', '.join(f'{name} ({column.text(name)})' for name in known[:3])}.")
    return said


def _mean_text(values: list[float] | None) -> str:
    if not values:
        return "–"
    told = mean_interval(values)
    return f"{told.value:.3f}" + ("" if told.t_high is None else f" ± {told.t_high - told.value:.3f}")


def _shown(count: int) -> str:
    return f"The best {PICKED} are drawn; click the others in the legend." if count > PICKED else ""
