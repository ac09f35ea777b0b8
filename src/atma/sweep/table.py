"""The table of a sweep: one cell a training run, with the levels of its factors, its seed and its measured metrics.

A table is read from a sweep folder (`cells/<id>/result.json`) or from a CSV file with one cell a row, and everything
that analyses a sweep reads it from here. Metrics measured at a context length L end in `_L`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from atma.sweep.table_metrics import HEADLINE, family_of, length_of

Level = str | int | float | bool | None
Levels = tuple[Level, ...]
Where = Mapping[str, Sequence[Level]]
"""A subset of cells: for each factor named, the levels that belong to it."""

ABSENT = ("none", "off", "no", "")
"""Levels, as text, that say that something is not there."""
REFERENCES = (*ABSENT, "baseline")
"""Levels, as text, that come first among their factor's, so that the others are compared with them."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    factors: dict[str, Level]
    seed: int
    metrics: dict[str, float]
    """Finite numbers only; what was not measured, or was not finite, is absent."""
    config: dict[str, Any] = field(default_factory=dict)
    """The recipe as plain data, where known."""
    folder: Path | None = None
    """Where its logs are, where known."""
    record: Path | None = None
    """The training record of the attempt that made its result, where there is one."""


@dataclass(frozen=True)
class Table:
    """Cells with the levels of each factor (references first), every metric, and what is planned but has no result."""

    name: str
    cells: tuple[Cell, ...]
    levels: dict[str, Levels]
    metrics: tuple[str, ...]
    unfinished: tuple[str, ...] = ()

    @property
    def trained_length(self) -> int:
        """Context tokens of training: what the recipes say, else the shortest length measured. ValueError: unclear."""
        told = {cell.config.get("train", {}).get("length") for cell in self.cells} - {None}
        if len(told) > 1:
            raise ValueError(
                f"{self.name}: cells were trained at lengths {sorted(told)}; name a metric with its length"
            )
        lengths = {length for name in self.metrics if (length := length_of(name))}
        if not told and not lengths:
            raise ValueError(f"{self.name}: no metric ends in a length; metrics: {', '.join(self.metrics)}")
        return told.pop() if told else min(lengths)

    def metric(self, name: str | None = None) -> str:
        """The metric meant: its name, one without its length (the longest is meant), with `@32x`, or None (headline).

        `@32x` is 32 times the training length. ValueError names what there is.
        """
        if name is None:
            return self._headline()
        family, _, multiple = name.partition("@")
        if multiple:
            return self._at_multiple(family, multiple)
        found = name if name in self.metrics else max(self.family(name).values(), key=length_of, default=None)
        if found is None:
            raise ValueError(f"{self.name}: no metric '{name}'; metrics: {', '.join(self.metrics)}")
        return found

    def family(self, prefix: str) -> dict[int, str]:
        """Metrics `prefix_L` by length L, rising."""
        found = {length_of(name): name for name in self.metrics if length_of(name) and family_of(name) == prefix}
        return dict(sorted(found.items()))

    def where(self, where: Where) -> "Table":
        """The cells whose factors have the levels given, and these levels alone. ValueError for one not there."""
        for factor, wanted in where.items():
            for level in wanted:
                self.check_level(factor, level)
        kept = tuple(c for c in self.cells if all(holds(c.factors[f], wanted) for f, wanted in where.items()))
        levels = {f: tuple(v for v in known if holds(v, where.get(f, known))) for f, known in self.levels.items()}
        return replace(self, cells=kept, levels=levels)

    def values(self, metric: str) -> np.ndarray:
        """One number a cell (cells,) float64; NaN where it was not measured."""
        return np.array([cell.metrics.get(metric, math.nan) for cell in self.cells])

    def check_level(self, factor: str, level: Level) -> None:
        """ValueError unless the factor has this level."""
        if factor not in self.levels:
            raise ValueError(f"{self.name}: no factor '{factor}'; factors: {', '.join(self.levels)}")
        if not holds(level, self.levels[factor]):
            known = ", ".join(map(level_text, self.levels[factor]))
            raise ValueError(f"{self.name}: factor '{factor}' has no level '{level_text(level)}'; levels: {known}")

    def _headline(self) -> str:
        for name in HEADLINE:
            if name in self.metrics or self.family(name):
                return self.metric(name)
        raise ValueError(f"{self.name}: none of {', '.join(HEADLINE)} was measured; name one of {self.metrics}")

    def _at_multiple(self, family: str, multiple: str) -> str:
        if not re.fullmatch(r"\d+(\.\d+)?x", multiple):
            raise ValueError(f"metric '{family}@{multiple}': write a multiple of the training length, such as @32x")
        wanted = float(multiple[:-1]) * self.trained_length
        by_length = self.family(family)
        if wanted not in by_length:
            known = ", ".join(f"{length / self.trained_length:g}x" for length in by_length) or "none"
            raise ValueError(
                f"{self.name}: '{family}' was not measured at {multiple} ({wanted:g} tokens); there is {known}"
            )
        return by_length[int(wanted)]


def table(name: str, cells: Sequence[Cell], unfinished: Sequence[str] = ()) -> Table:
    """A table of these cells; a factor that only some have is unset (None) in the others.

    ValueError if there are none, or two are the same run.
    """
    if not cells:
        raise ValueError(
            f"{name}: no cell has a result yet" + (f" ({len(unfinished)} unfinished)" if unfinished else "")
        )
    factors = list(dict.fromkeys(factor for cell in cells for factor in cell.factors))
    cells = [replace(cell, factors={factor: cell.factors.get(factor) for factor in factors}) for cell in cells]
    seen: dict[tuple, str] = {}
    for cell in cells:
        key = (*(_key(cell.factors[factor]) for factor in factors), cell.seed)
        if key in seen:
            raise ValueError(f"{name}: {cell.name} and {seen[key]} have equal factors and seed; give each its own seed")
        seen[key] = cell.name
    levels = {factor: order(cell.factors[factor] for cell in cells) for factor in factors}
    metrics = tuple(dict.fromkeys(metric for cell in cells for metric in cell.metrics))
    return Table(name, tuple(cells), levels, metrics, tuple(unfinished))


def order(levels: Any) -> Levels:
    """Each level once: references first, then numbers rising, then text by the alphabet."""
    once = {_key(level): level for level in levels}.values()

    def rank(level: Level) -> tuple:
        text = isinstance(level, str)
        reference = level is None or (text and level.lower() in REFERENCES)
        return (not reference, text, str(level) if text or level is None else level)

    return tuple(sorted(once, key=rank))


def same(one: Level, other: Level) -> bool:
    """Are two levels equal? True is not 1 here, and 2 is 2.0."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def holds(level: Level, wanted: Sequence[Level]) -> bool:
    """Is the level `same` as one of those wanted?"""
    return any(same(level, other) for other in wanted)


def is_switch(levels: Sequence[Level]) -> bool:
    """Is a factor with these levels on or off: false and true, 0 and 1, "off" and "on", or a part of these?"""
    return all((isinstance(level, int) and level in (0, 1)) or level in ("off", "on") for level in levels)


def is_on(level: Level) -> bool:
    """Is this level of an on-off factor on?"""
    return level in (1, "on")


def level_text(level: Level) -> str:
    """A level for people: on, off, 512, weak; unset for a setting that only other cells have."""
    if isinstance(level, bool):
        return "on" if level else "off"
    return "unset" if level is None else f"{level:g}" if isinstance(level, float) else str(level)


def stands_alone(level: Level, levels: Mapping[str, Levels]) -> bool:
    """Does a level say without its factor's name what it is: text that no other factor has, and not "none"?"""
    alike = [other for known in levels.values() for other in known if isinstance(other, str) and other == level]
    return isinstance(level, str) and len(alike) == 1 and level.lower() not in ABSENT


def label(factors: Mapping[str, Level], levels: Mapping[str, Levels]) -> str:
    """A cell in few words: text levels alone, `+name` for what is on, nothing for what is off, else `name=level`."""
    parts = []
    for factor, level in factors.items():
        if is_switch(levels[factor]):
            parts += [f"+{factor}"] if is_on(level) else []
        elif stands_alone(level, levels):
            parts.append(str(level))
        elif level is not None and str(level).lower() not in ABSENT:
            parts.append(f"{factor}={level_text(level)}")
    return " ".join(parts) or "nothing on"


def _key(level: Level) -> tuple[bool, Level]:
    return isinstance(level, bool), level
