"""What a dashboard's filters can leave, judged beforehand: contrasts, interactions, means and fronts of each subset.

A subset holds some factors at one level each. All subsets of up to so many held factors are computed as keep the page
below `EFFECTS` effects; of other subsets the page shows the cells and says that their contrasts are not in it.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from atma.sweep.analysis import COSTS
from atma.sweep.contrasts import Effect, contrast, interactions, main_effects
from atma.sweep.pareto import over_seeds, pareto
from atma.sweep.table import Cell, Level, Table, same
from atma.sweep.table_metrics import digits_of, number_text, rises

EFFECTS = 12_500
"""Most effects in a page whose filters reach contrasts: each takes about 200 bytes and a millisecond."""
OTHER_LEVELS = 8
"""Most levels of a factor whose levels are all set against each other, not only against the first."""
Held = dict[str, Level]


def depth(table: Table) -> int:
    """How many factors may be held at one level at once, for the page to stay below `EFFECTS`; at least none."""
    best = 0
    for count in range(1, len(table.levels) + 1):
        effects = sum(_size(table, held) for held in subsets(table, count))
        if effects * len(table.metrics) > EFFECTS:
            break
        best = count
    return best


def subsets(table: Table, most: int) -> Iterator[Held]:
    """No factor held, then each level of each, then of each two, and so on up to `most` factors."""
    for count in range(most + 1):
        for factors in itertools.combinations(table.levels, count):
            for levels in itertools.product(*(table.levels[factor] for factor in factors)):
                yield dict(zip(factors, levels, strict=True))


def key(table: Table, held: Held) -> str:
    """A subset's name in the page: the number of each factor's held level, joined by commas."""
    places = {f: next(i for i, other in enumerate(table.levels[f]) if same(other, level)) for f, level in held.items()}
    return ",".join(str(places.get(factor, "")) for factor in table.levels)


def judged(table: Table, most: int) -> dict[str, list[dict[str, Any]]]:
    """For each subset that has cells, what each metric says within it."""
    found = {}
    for held in subsets(table, most):
        kept = table.where({factor: [level] for factor, level in held.items()})
        if kept.cells:
            places = level_numbers(kept)
            found[key(table, held)] = [_judged(kept, metric, places) for metric in table.metrics]
    return found


def level_numbers(table: Table) -> dict[str, np.ndarray]:
    """For each factor the number of every cell's level among the factor's, (cells,) int64."""

    def number(cell: Cell, factor: str) -> int:
        return next(i for i, level in enumerate(table.levels[factor]) if same(cell.factors[factor], level))

    return {factor: np.array([number(cell, factor) for cell in table.cells]) for factor in table.levels}


def fronts(table: Table, most: int) -> dict[str, dict[str, list[int]]]:
    """Per subset and "metric,cost": settings on the front by rising cost, as numbers into those of `over_seeds`.

    Of all cells against every metric, within a filter against training time and parameters.
    """
    settings = over_seeds(table)
    numbers = {cell.name: i for i, cell in enumerate(settings.cells)}
    columns = {name: i for i, name in enumerate(table.metrics)}
    found = {}
    for held in subsets(table, most):
        kept = settings.where({factor: [level] for factor, level in held.items()})
        costs = [cost for cost in table.metrics if cost in COSTS or not held]
        found[key(table, held)] = {
            f"{columns[metric]},{columns[cost]}": [numbers[cell.name] for cell in _front(kept, metric, cost)]
            for metric, cost in itertools.product(table.metrics, costs)
            if cost != metric
        }
    return found


def strongest(table: Table, metric: str) -> int:
    """The number, among all pairs of factors, of the pair with the largest interaction."""
    sizes = [max((abs(e.mean or 0.0) for e in found), default=0.0) for found in _by_pair(table, metric)]
    return int(np.argmax(sizes)) if sizes else 0


def row(effect: Effect) -> list[Any]:
    """Label, verdict, ends of interval and range about the mean (None: unknown), and the texts of a table's cells."""
    if effect.mean is None:
        return [effect.label, "no matched cells"]
    digits = digits_of(effect.metric)
    least, most = min(effect.differences), max(effect.differences)
    text = [number_text(v, digits, True) for v in (effect.mean, effect.low, effect.high, effect.median, least, most)]
    notes = [f"{effect.settings} settings"] if effect.settings < len(effect.differences) else []
    notes += [f"{effect.unmatched} cells unmatched"] if effect.unmatched else []
    pairs = f"{len(effect.differences)} ({', '.join(notes)})" if notes else str(len(effect.differences))
    signs = f"{effect.positive} / {effect.zero} / {effect.negative}"
    interval = "–" if effect.low is None else f"{text[1]} … {text[2]}"
    ends = [_short(v) for v in (effect.mean, effect.low, effect.high, least, most)]
    spread = f"{text[4]} … {text[5]}"
    return [effect.label, verdict(effect), *ends, text[0], interval, text[3], spread, signs, f"{effect.p:.2g}", pairs]


def verdict(effect: Effect) -> str:
    """Better or worse by the metric's direction, or not clear where the interval holds zero or there is none."""
    if effect.mean is None or not effect.clear:
        return "unclear"
    return "better" if (effect.mean > 0) == rises(effect.metric) else "worse"


def _judged(table: Table, metric: str, places: dict[str, np.ndarray]) -> dict[str, Any]:
    pairs = itertools.combinations(table.levels, 2)
    return {
        "main": [row(effect) for effect in main_effects(table, metric)],
        "other": [row(effect) for effect in other_pairs(table, metric)],
        "pairs": [
            {
                "rows": [row(effect) for effect in found],
                "means": _means(table, metric, [places[factor] for factor in pair]),
            }
            for pair, found in zip(pairs, _by_pair(table, metric), strict=True)
        ],
    }


def other_pairs(table: Table, metric: str) -> list[Effect]:
    """Every level minus every earlier one but the first, of factors of at most `OTHER_LEVELS`."""
    return [
        contrast(table, metric, {factor: more}, {factor: less})
        for factor, levels in table.levels.items()
        if len(levels) <= OTHER_LEVELS
        for less, more in itertools.combinations(levels[1:], 2)
    ]


def _by_pair(table: Table, metric: str) -> Iterator[list[Effect]]:
    """The interactions of each pair of factors."""
    found = iter(interactions(table, metric))
    for one, other in itertools.combinations(table.levels.values(), 2):
        yield list(itertools.islice(found, (len(one) - 1) * (len(other) - 1)))


def _means(table: Table, metric: str, places: list[np.ndarray]) -> list[list[list[Any]]]:
    """Mean of the metric at each level of one factor (rows) and of another: its text, and how good it is, 0 to 1."""
    values, (one, other) = table.values(metric), places
    known = ~np.isnan(values)
    masks = [[known & (one == a) & (other == b) for b in range(other.max() + 1)] for a in range(one.max() + 1)]
    grid = [[float(values[mask].mean()) if mask.any() else None for mask in line] for line in masks]
    found = [value for line in grid for value in line if value is not None]

    def shown(value: float | None) -> list[Any]:
        if value is None or max(found) == min(found):
            return [number_text(value, digits_of(metric)), 0]
        share = (value - min(found)) / (max(found) - min(found))
        return [number_text(value, digits_of(metric)), round(share if rises(metric) else 1 - share, 2)]

    return [[shown(value) for value in line] for line in grid]


def _front(settings: Table, metric: str, cost: str) -> list[Cell]:
    known = any(metric in cell.metrics and cost in cell.metrics for cell in settings.cells)
    found = pareto(settings, [metric, cost]) if known else []
    return sorted(found, key=lambda cell: cell.metrics[cost])


def _size(table: Table, held: Held) -> int:
    counts = [1 if factor in held else len(levels) for factor, levels in table.levels.items()]
    main = sum(n * (n - 1) // 2 if n <= OTHER_LEVELS else n - 1 for n in counts)
    return main + sum((a - 1) * (b - 1) for a, b in itertools.combinations(counts, 2))


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
