"""Matched contrasts: what a change of some factors does, with all others and the seed held equal.

An arm is a signed choice of levels. Every set of cells that has one of each arm and is equal in all else gives one
difference: +1 and −1 for a contrast, four arms for an interaction (a difference of differences). A *setting* is the
levels of the other factors; seeds of one setting are not independent of it, so intervals resample settings, and seeds
only where there is one setting. Source of the contrasts: the paper's stage I, maths.md section 8.

The resamples come from a counter and a hash, so that an interval is the same number wherever and in whatever order it
is computed.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from atma.statistics import says
from atma.sweep.table import Cell, Level, Table, Where, holds, is_on, is_switch, level_text, same, stands_alone

Choice = Mapping[str, Level]
RESAMPLES = 5000
SEED = 20_482
TIE = 1e-9
"""A difference below this share of the largest value in it is a tie: what rounding leaves of equal numbers."""


class Arm(NamedTuple):
    """Cells with these levels, counted with this sign."""

    sign: int
    choice: Choice


@dataclass(frozen=True)
class Effect:
    """Differences of one contrast in a metric's unit, and what they say together.

    `label` says which contrast of which `metric`; `differences` are of matched cells, over so many `settings`; `mean`
    and `median` are theirs. `low` and `high` bound 95% of the bootstrapped means (None for a single difference); `p` is
    the two-sided exact sign test over settings, ties left out. Without any matched set all but the counts is None.
    """

    label: str
    metric: str
    differences: tuple[float, ...]
    settings: int
    unmatched: int
    """Cells of the arms that lack a partner or the metric."""
    mean: float | None
    median: float | None
    low: float | None
    high: float | None
    p: float | None

    @property
    def positive(self) -> int:
        """Differences above zero."""
        return sum(d > 0 for d in self.differences)

    @property
    def zero(self) -> int:
        """Ties."""
        return sum(d == 0 for d in self.differences)

    @property
    def negative(self) -> int:
        """Differences below zero."""
        return sum(d < 0 for d in self.differences)

    @property
    def sign(self) -> int:
        """Of the mean: −1, 0 or 1. ValueError without differences."""
        if self.mean is None:
            raise ValueError(f"{self.label}: no matched cells, so no sign")
        return (self.mean > 0) - (self.mean < 0)

    @property
    def clear(self) -> bool:
        """Does the interval leave zero out?"""
        return says(self.low, self.high) != says(None, None)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        ends = {"minimum": min(self.differences, default=None), "maximum": max(self.differences, default=None)}
        counts = {"pairs": len(self.differences), "settings": self.settings, "unmatched": self.unmatched}
        signs = {"positive": self.positive, "zero": self.zero, "negative": self.negative}
        figures = {name: getattr(self, name) for name in ("label", "metric", "mean", "median", "low", "high", "p")}
        return figures | ends | counts | signs | {"differences": list(self.differences)}


def contrast(table: Table, metric: str, more: Choice, less: Choice, where: Where | None = None) -> Effect:
    """The metric of cells chosen by `more` minus that of their partners chosen by `less`, within `where`.

    ValueError if the choices do not name the same factors, are equal, or name what is not in the table.
    """
    if set(more) != set(less):
        raise ValueError(f"both sides of a contrast name the same factors, not {sorted(more)} and {sorted(less)}")
    if all(holds(more[factor], (less[factor],)) for factor in more):
        raise ValueError(f"both sides of the contrast are {choice_text(more, table)}; change a level of one")
    return matched(table.where(where or {}), metric, [Arm(1, more), Arm(-1, less)])


def matched(table: Table, metric: str, arms: Sequence[Arm], label: str = "") -> Effect:
    """The effect of signed arms, all of which name the same factors."""
    for arm in arms:
        for factor, level in arm.choice.items():
            table.check_level(factor, level)
    sets, unmatched = _sets(table, metric, arms)
    clusters: dict[tuple, list[float]] = {}
    for (setting, _), difference in sets:
        clusters.setdefault(setting, []).append(difference)
    groups = list(clusters.values())
    if len(groups) == 1:
        groups = [[difference] for difference in groups[0]]
    differences = [difference for _, difference in sets]
    mean, median = (float(np.mean(differences)), float(np.median(differences))) if sets else (None, None)
    low, high = bootstrap(groups)
    p = sign_test([math.fsum(group) for group in groups]) if sets else None
    label = label or arms_text(arms, table)
    return Effect(label, metric, tuple(differences), len(clusters), unmatched, mean, median, low, high, p)


def main_effects(table: Table, metric: str) -> list[Effect]:
    """Each level of each factor minus the factor's first level, averaged over everything else."""
    return [matched(table, metric, arms) for factor in table.levels for arms in _against_first(table, factor)]


def interactions(table: Table, metric: str) -> list[Effect]:
    """For two factors and a level of each: how much more the first's effect is than at the second's first level."""
    found = []
    for one, other in itertools.combinations(table.levels, 2):
        for outer, inner in itertools.product(_against_first(table, one), _against_first(table, other)):
            arms = [Arm(a.sign * b.sign, {**a.choice, **b.choice}) for a in outer for b in inner]
            label = f"({arms_text(outer, table)}) × ({arms_text(inner, table)})"
            found.append(matched(table, metric, arms, label))
    return found


def bootstrap(groups: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """Percentile 95% interval of the mean of all values when whole groups are drawn again; None for one group."""
    n = len(groups)
    if n < 2:
        return None, None
    picks = _picks(n)
    sums = np.array([math.fsum(group) for group in groups])
    counts = np.array([len(group) for group in groups])
    low, high = np.percentile(sums[picks].sum(1) / counts[picks].sum(1), [2.5, 97.5])
    return float(low), float(high)


@functools.lru_cache(maxsize=64)
def _picks(n: int) -> np.ndarray:
    """Which of n groups each resample draws, (RESAMPLES, n) int64."""
    drawn = (hashed(np.arange(RESAMPLES * n, dtype=np.uint32)).astype(np.uint64) * np.uint64(n)) >> np.uint64(32)
    return drawn.astype(np.int64).reshape(RESAMPLES, n)


def hashed(counter: np.ndarray) -> np.ndarray:
    """A well-mixed 32 bits of each counter, uint32 to uint32. Source: the finaliser of MurmurHash3 (Appleby)."""
    x = counter * np.uint32(0x9E3779B1) + np.uint32(SEED)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def sign_test(values: Sequence[float]) -> float:
    """Two-sided exact p of as uneven a split of signs under even odds; zeros are left out, 1 if nothing is left."""
    positive, negative = sum(v > 0 for v in values), sum(v < 0 for v in values)
    n, fewer = positive + negative, min(positive, negative)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def arms_text(arms: Sequence[Arm], table: Table) -> str:
    """A contrast in words: `memory on − off`, or `polar +memory − nope +memory` where several factors are named."""
    more, less = arms[0].choice, arms[-1].choice
    if len(more) > 1:
        return f"{choice_text(more, table)} − {choice_text(less, table)}"
    (factor, level), (_, other) = *more.items(), *less.items()
    levels = table.levels[factor]
    return f"{factor} {_switched(level, levels)} − {_switched(other, levels)}"


def where_text(where: Where, table: Table) -> str:
    """A subset in words; empty for every cell."""
    alone = {factor: levels[0] for factor, levels in where.items() if len(levels) == 1}
    several = [f"{f}={'|'.join(map(level_text, levels))}" for f, levels in where.items() if len(levels) != 1]
    return " ".join(filter(None, [choice_text(alone, table), *several]))


def choice_text(choice: Choice, table: Table) -> str:
    """Some levels in words."""
    parts = []
    for factor, level in choice.items():
        text = level_text(level)
        if is_switch(table.levels[factor]):
            parts.append(f"{'+' if is_on(level) else 'no '}{factor}")
        else:
            parts.append(text if stands_alone(level, table.levels) else f"{factor}={text}")
    return " ".join(parts)


def _switched(level: Level, levels: Sequence[Level]) -> str:
    return level_text(is_on(level)) if is_switch(levels) else level_text(level)


def _against_first(table: Table, factor: str) -> Iterator[list[Arm]]:
    first, *others = table.levels[factor]
    for level in others:
        yield [Arm(1, {factor: level}), Arm(-1, {factor: first})]


def _sets(table: Table, metric: str, arms: Sequence[Arm]) -> tuple[list[tuple[tuple, float]], int]:
    """Each complete matched set as ((setting, seed), difference) in the table's order, and how many cells lack one."""
    rest = [factor for factor in table.levels if factor not in arms[0].choice]
    found: dict[tuple, dict[int, float]] = {}
    chosen = 0
    for cell in table.cells:
        index = next((i for i, arm in enumerate(arms) if _fits(cell, arm.choice)), None)
        if index is not None:
            chosen += 1
            if metric in cell.metrics:
                key = (tuple((isinstance(cell.factors[f], bool), cell.factors[f]) for f in rest), cell.seed)
                found.setdefault(key, {})[index] = cell.metrics[metric]
    full = {key: values for key, values in found.items() if len(values) == len(arms)}
    sets = [(key, _difference([(arm.sign, values[i]) for i, arm in enumerate(arms)])) for key, values in full.items()]
    return sets, chosen - len(full) * len(arms)


def _difference(terms: Sequence[tuple[int, float]]) -> float:
    total = math.fsum(sign * value for sign, value in terms)
    return 0.0 if abs(total) <= TIE * max(abs(value) for _, value in terms) else total


def _fits(cell: Cell, choice: Choice) -> bool:
    return all(same(cell.factors[factor], level) for factor, level in choice.items())
