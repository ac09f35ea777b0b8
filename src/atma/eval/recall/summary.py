"""What runs come to: the best learning rate of each mixer, a table, and figures of learning and of length.

The best rate is chosen by the accuracy on held-out examples, never by the test; all rates stay in the table.
"""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from atma.report.content import size_text
from atma.report.figures import COLOURS, MARKERS, Figure, Table, Trace
from atma.statistics import share_text

Row = dict[str, Any]
PLACE = ("task", "size", "mixer", "rate", "decay")


class Group(NamedTuple):
    """The runs of one mixer at one size and rate, a seed each: their "run" rows, all their rows, and if it is best.

    `decay` is the weight decay where several are tried, as by the protocol of MAD, and None elsewhere.
    """

    size: str
    mixer: str
    rate: float
    runs: list[Row]
    rows: list[Row]
    best: bool
    decay: float | None = None

    def tests(self, kind: str) -> dict[int, list[Row]]:
        """Test rows by factor, a seed each."""
        found: dict[int, list[Row]] = {}
        for row in self.rows:
            if row["kind"] == kind:
                found.setdefault(row["factor"], []).append(row)
        return dict(sorted(found.items()))


def groups(rows: Sequence[Row]) -> list[Group]:
    """The runs by task, size, mixer, rate and weight decay, in their order."""
    by_place: dict[tuple, list[Row]] = {}
    for row in rows:
        by_place.setdefault(tuple(row.get(name) for name in PLACE), []).append(row)
    made = [_group(place, found) for place, found in by_place.items()]
    best: dict[tuple[str, str], Group] = {}
    for group in made:
        rival = best.setdefault((group.size, group.mixer), group)
        if _merit(group) > _merit(rival):
            best[group.size, group.mixer] = group
    return [group._replace(best=best[group.size, group.mixer] is group) for group in made]


def table(rows: Sequence[Row]) -> Table:
    """A line for each size, mixer and rate; the best rate of several has a star."""
    found = groups(rows)
    kind = _tested(rows)
    factors = sorted({factor for group in found for factor in group.tests(kind)})
    rated = len({(group.rate, group.decay) for group in found}) > 1
    probing = kind == "capacity"
    first = min((row["pairs"] for row in rows if row["kind"] == kind), default=0) if probing else 0
    lengths = [f"{first * factor} pairs" if probing else f"{factor}×" for factor in factors]
    told = "memory, bytes" if probing else "tokens to 99%"
    lines = []
    for group in found:
        tests = group.tests(kind)
        name = f"{group.size} {group.mixer}" + (_rate(group) if rated else "")
        fact = f"{group.runs[0]['memory_bytes']:,}" if probing else _tokens(group)
        lines.append([name, fact, *(_accuracy(tests.get(factor)) for factor in factors)])
    return Table(["size, mixer", told, *lengths], lines)


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Learning curves of each size, and accuracy by length (by pairs, for the probe), the best rate of each mixer."""
    best = [group for group in groups(rows) if group.best]
    sizes = list(dict.fromkeys(group.size for group in best))
    kind, task = _tested(rows), rows[0]["task"]
    made = []
    for size in sizes:
        mine = [group for group in best if group.size == size]
        made += [_learning(f"{task} {size}", mine), _by_length(f"{task} {size}", mine, kind)]
    return made


def _learning(title: str, found: Sequence[Group]) -> Figure:
    traces, lines = [], []
    for place, group in enumerate(found):
        for run in group.runs:
            points = [r for r in group.rows if r["kind"] == "curve" and r["run_seed"] == run["run_seed"]]
            name = _label(group, run)
            x, y = [point["tokens"] for point in points], [point["accuracy"] for point in points]
            traces.append(_trace(name, place, x, y, "%{y:.1%} after %{x:,} tokens"))
            last = points[-1]
            lines.append([name, f"{last['tokens']:,}", _number(last["loss"]), f"{last['accuracy']:.1%}"])
    layout = {"xaxis": {"title": {"text": "training tokens"}}, "yaxis": _share()}
    caption = "Share of held-out answers right while training; a curve ends where its run did."
    return Figure(f"Learning: {title}", caption, traces, layout, Table(["run", "tokens", "loss", "accuracy"], lines))


def _by_length(title: str, found: Sequence[Group], kind: str) -> Figure:
    axis = "pairs" if kind == "capacity" else "length"
    traces, lines = [], []
    for place, group in enumerate(found):
        for run in group.runs:
            points = [r for r in group.rows if r["kind"] == kind and r["run_seed"] == run["run_seed"]]
            name = _label(group, run)
            trace = _trace(name, place, [p[axis] for p in points], [p["accuracy"] for p in points], "%{y:.1%}")
            traces.append(trace | {"error_y": _bars(points)})
            lines += [[name, f"{p[axis]:,}", _interval(p), _examples(p)] for p in points]
    ticks = sorted({x for trace in traces for x in trace["x"]})
    shown: dict[str, Any] = {"type": "log", "title": {"text": axis}, "tickvals": ticks}
    shown["ticktext"] = [size_text(tick) for tick in ticks]
    caption = "Share of test answers right, with 95% Wilson intervals; the first length is that of training."
    if kind == "capacity":
        caption = "Share of test answers right for ever more pairs, each number learned from where the last one left."
    header = ["run", axis, "answers right", "examples all right"]
    return Figure(
        f"{axis.title()}: {title}", caption, traces, {"xaxis": shown, "yaxis": _share()}, Table(header, lines)
    )


def _group(place: tuple, rows: list[Row]) -> Group:
    runs = [row for row in rows if row["kind"] == "run"]
    return Group(place[1], place[2], place[3], runs, rows, False, place[4])


def _rate(group: Group) -> str:
    decay = "" if group.decay is None else f", decay {group.decay:g}"
    return f" × {group.rate:g}{decay}{' *' if group.best else ''}"


def _merit(group: Group) -> tuple[float, float]:
    """What is better is greater: the pairs held, or accuracy on held-out examples; then fewer training tokens."""
    value = statistics.mean(run.get("pairs_held", run["validation_accuracy"]) for run in group.runs)
    return value, -statistics.mean(run["trained_tokens"] for run in group.runs)


def _tested(rows: Sequence[Row]) -> str:
    return "capacity" if any(row["kind"] == "capacity" for row in rows) else "accuracy"


def _tokens(group: Group) -> str:
    """Median over seeds; a seed that never learned counts as longer than any that did."""
    needed = sorted(run["tokens_to_99"] or float("inf") for run in group.runs)
    middle = statistics.median_high(needed)
    return f"{middle:,}" if middle < float("inf") else f"not in {group.runs[0]['trained_tokens']:,}"


def _accuracy(rows: Sequence[Row] | None) -> str:
    """One seed with its Wilson interval; the mean of several with their range."""
    if not rows:
        return "–"
    values = [row["accuracy"] for row in rows]
    if len(rows) == 1:
        return _interval(rows[0])
    answers = sum(row["answers"] for row in rows)
    return f"{statistics.mean(values):.1%} of {answers:,} ({min(values):.1%} to {max(values):.1%}, {len(rows)} seeds)"


def _interval(row: Row) -> str:
    return share_text(row, "accuracy", "", row["answers"], 1)


def _examples(row: Row) -> str:
    return share_text(row, "exact_accuracy", "exact_", row["trials"], 1)


def _label(group: Group, run: Row) -> str:
    return group.mixer if len(group.runs) == 1 else f"{group.mixer}, seed {run['run_seed']}"


def _trace(name: str, place: int, x: list, y: list, hover: str) -> Trace:
    colour, symbol = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": colour, "width": 2},
        "marker": {"symbol": symbol, "size": 7},
        "hovertemplate": f"{name}: {hover}<extra></extra>",
    }


def _bars(rows: Sequence[Row]) -> dict[str, Any]:
    above = [row["high"] - row["accuracy"] for row in rows]
    below = [row["accuracy"] - row["low"] for row in rows]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2, "width": 3}


def _share() -> dict[str, Any]:
    return {"title": {"text": "answers right"}, "range": [-0.03, 1.03], "tickformat": ".0%"}


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
