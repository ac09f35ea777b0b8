"""The table that a comparison comes to: an entrant a line, means over its seeds with 95% intervals.

An interval over seeds is Student's; of one seed there is none. Columns of what was not asked, or is not done yet, are
left out or blank.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from atma.compare.entrants import Entrant
from atma.compare.plan import Comparison
from atma.compare.speed import state_bytes
from atma.report.content import size_text
from atma.report.figures import Table
from atma.statistics import mean_interval

Row = dict[str, Any]
Values = dict[str, list[float | None]]
"""By entrant, one a seed; None where what was asked for was not reached."""
INDUCTION = "copy"
"""The task that asks for induction and for nothing else: a token is followed by what followed it before."""
BEGUN = 0.9
"""Held-out accuracy at which induction counts as begun."""


@dataclass(frozen=True)
class Column:
    """One figure of every entrant: its values over seeds, and how they are read."""

    group: str
    """"text", "tasks" or "cost"."""
    key: str
    title: str
    rises: bool | None
    """Whether more is better; None where it is no merit."""
    show: Callable[[float], str] = field(compare=False)
    values: Values = field(default_factory=dict, compare=False)

    def known(self, name: str) -> list[float]:
        """The values of an entrant that there are."""
        return [value for value in self.values.get(name, ()) if value is not None]

    def mean(self, name: str) -> float | None:
        found = self.known(name)
        return sum(found) / len(found) if found else None

    def rank(self, name: str) -> tuple[float, float]:
        """Sorts the best first: by the share of seeds that never reached it, then by the mean; no value is last."""
        mean, of = self.mean(name), len(self.values.get(name, ()))
        if mean is None:
            return (1.0 if of else 2.0), 0.0
        return 1 - len(self.known(name)) / of, -mean if self.rises else mean

    def text(self, name: str) -> str:
        """Mean and half the interval of an entrant, as "1.234 ± 0.012"; "–" where nothing was measured, "never" where
        nothing was reached, and how many seeds have reached it where not all have."""
        found, of = self.known(name), len(self.values.get(name, ()))
        if not found:
            return "never" if of else "–"
        told = mean_interval(found)
        if len(found) < of:
            return f"{self.show(told.value)} in {len(found)} of {of}"
        return self.show(told.value) + ("" if told.t_high is None else f" ± {self.show(told.t_high - told.value)}")


@dataclass(frozen=True)
class Board:
    """All columns, and the entrants in the order of the plan."""

    entrants: tuple[Entrant, ...]
    columns: tuple[Column, ...]
    results: tuple[Row, ...]
    done: int
    of: int

    def column(self, key: str) -> Column | None:
        return next((one for one in self.columns if one.key == key), None)

    def ranked(self) -> list[str]:
        """Names by the first column that has a merit, the best first; those without a value last."""
        column = next((one for one in self.columns if one.rises is not None and one.values), None)
        names = [one.name for one in self.entrants]
        return names if column is None else sorted(names, key=column.rank)

    def table(self, group: str = "") -> Table:
        """A line for each entrant, the best first; of one group of columns, or of all."""
        shown = [one for one in self.columns if one.values and group in ("", one.group)]
        head = ["mixer", *(one.title for one in shown)]
        return Table(head, [[name, *(one.text(name) for one in shown)] for name in self.ranked()])


def board(comparison: Comparison, results: Sequence[Row], speeds: Sequence[Row], of: int) -> Board:
    """The columns of the results that there are; `of` pieces in all."""
    found = comparison.entrants()
    texts = [row for row in results if row["factors"]["task"] == "text"]
    columns = [*_of_text(comparison, texts), *_of_tasks(comparison, results), *_of_size(found, comparison)]
    columns += _of_speed(comparison, speeds)
    return Board(tuple(found), tuple(columns), tuple(results), len(results), of)


def _of_text(comparison: Comparison, texts: Sequence[Row]) -> list[Column]:
    first, last = comparison.length, comparison.lengths()[-1]
    wanted = [
        (f"fixed_nll_{last}", f"loss at {comparison.longest}×", False, _nats),
        (f"fixed_nll_{first}", "loss at 1×", False, _nats),
        (f"needle_token_acc_{last}", f"needle at {comparison.longest}×", True, _percent),
        (f"needle_token_acc_{first}", "needle at 1×", True, _percent),
    ]
    return [Column("text", key, title, rises, show, _metric(texts, key)) for key, title, rises, show in wanted]


def _of_tasks(comparison: Comparison, results: Sequence[Row]) -> list[Column]:
    columns = []
    for task in comparison.tasks:
        mine = [row for row in results if row["factors"]["task"] == task]
        if task.partition("=")[0] == INDUCTION:
            columns.append(
                Column("tasks", "induction", "tokens to induction", False, _count, _per_entrant(mine, _begun))
            )
        tested = sorted({one["factor"] for row in mine for one in row["rows"] if one["kind"] == "accuracy"})
        for factor in dict.fromkeys([*tested[:1], *tested[-1:]]):
            values = _per_entrant(mine, lambda row, factor=factor: _accuracy(row, factor))
            columns.append(Column("tasks", f"{task}@{factor}", f"{task} at {factor}×", True, _percent, values))
    return columns


def _of_size(found: Sequence[Entrant], comparison: Comparison) -> list[Column]:
    longest = comparison.lengths()[-1]
    bytes_: Values = {one.name: [float(state_bytes(one, longest))] for one in found}
    counts: Values = {one.name: [float(one.parameters)] for one in found}
    size = Column(
        "cost", "state", f"state at {comparison.longest}×, KiB", False, lambda value: f"{value / 1024:,.0f}", bytes_
    )
    return [size, Column("cost", "parameters", "parameters", None, lambda value: size_text(int(value)), counts)]


def _of_speed(comparison: Comparison, speeds: Sequence[Row]) -> list[Column]:
    columns = []
    for kind, length in dict.fromkeys((row["kind"], row["length"]) for row in speeds):
        timed = [row for row in speeds if (row["kind"], row["length"]) == (kind, length)]
        mine: Values = {row["entrant"]: [row["tokens_per_second"]] for row in timed}
        at = f" at {length // comparison.length}×" if kind == "decode" else ""
        columns.append(Column("cost", f"{kind}@{length}", f"{kind}{at}, tokens/s", True, _count, mine))
    return columns


def _metric(results: Iterable[Row], key: str) -> Values:
    return _per_entrant([row for row in results if key in row["metrics"]], lambda row: row["metrics"][key])


def _per_entrant(results: Iterable[Row], value: Callable[[Row], float | None]) -> Values:
    found: Values = {}
    for row in results:
        found.setdefault(row["factors"]["mixer"], []).append(value(row))
    return found


def _accuracy(result: Row, factor: int) -> float | None:
    found = [row for row in result["rows"] if row["kind"] == "accuracy" and row["factor"] == factor]
    return 100 * found[0]["accuracy"] if found else None


def _begun(result: Row) -> float | None:
    """Training tokens after which induction was there; None where it never was."""
    found = [row["tokens"] for row in result["rows"] if row["kind"] == "curve" and row["accuracy"] >= BEGUN]
    return float(found[0]) if found else None


def _nats(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{value:.1f}%"


def _count(value: float) -> str:
    return f"{value:,.0f}"
