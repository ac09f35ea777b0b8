"""From a sweep's recipe to its cells: every combination of levels, with every seed, each a whole recipe of its own.

A cell is what it trains and measures and nothing else: its identity is the hash of its canonical configuration. So a
level added later, or a factor whose first level changes nothing, leaves finished cells what they are.
"""

import copy
import hashlib
import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from atma.config import Recipe, canonical, identity, recipe_of
from atma.shipped import recipe_path
from atma.strict import plain, read_toml
from atma.sweep.recipe import (
    Factor,
    Scalar,
    Settings,
    Source,
    SweepConfig,
    check_settings,
    nearest_factor,
    read_factors,
    read_source,
    read_sweep,
)
from atma.sweep.suites import Suites, read_suites

NAME = "cell"
"""Of every cell's recipe: a name is not part of what a cell is."""


@dataclass(frozen=True)
class Cell:
    """One training and its measurements."""

    recipe: Recipe
    factors: dict[str, Scalar]
    """Levels as JSON has them: an infinite one is the text "inf"."""
    seed: int
    suites: Suites = field(default_factory=dict)
    """What it is asked beside the recipe's [evaluation]."""
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", _identity(self.recipe, self.suites))

    @property
    def label(self) -> str:
        """Its levels and its seed, to be read by people."""
        return label(self.factors, self.seed)


@dataclass(frozen=True)
class Sweep:
    """A sweep's recipe, expanded."""

    name: str
    config: SweepConfig
    factors: tuple[Factor, ...]
    cells: tuple[Cell, ...]
    source: Source | None


def label(factors: dict[str, Scalar], seed: int) -> str:
    """Levels and a seed in one line."""
    return " ".join([*(f"{name}={level}" for name, level in factors.items()), f"seed={seed}"])


def load_sweep(path: str | Path) -> Sweep:
    """Read and expand a recipe with a table `[sweep]`. ValueError says which file and key."""
    path = Path(path)
    values = read_toml(recipe_path(path), "recipe")
    try:
        return expand({"name": path.stem} | values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def expand(values: dict[str, Any]) -> Sweep:
    """The sweep of a recipe's tables. Seeds are the outermost loop: a sweep cut short has whole replicates."""
    if "sweep" not in values:
        raise ValueError("no table [sweep]; train a single recipe with `atma train`")
    base = {key: value for key, value in values.items() if key != "sweep"}
    read_suites(base.get("suites", {}))
    config = read_sweep(values["sweep"])
    factors = read_factors(config)
    points = [*_product(factors, config.exclude), *_more(factors, config.cells)]
    name = recipe_of({key: value for key, value in base.items() if key != "suites"}).name
    cells = [_cell(base, levels, settings, seed) for seed in config.seeds for levels, settings in points]
    _require_different(cells)
    return Sweep(name, config, factors, tuple(cells), read_source(config))


Point = tuple[dict[str, Scalar], Settings]


def _product(factors: tuple[Factor, ...], excludes: tuple[dict, ...]) -> list[Point]:
    for exclude in excludes:
        _check_levels(exclude, factors, "sweep.exclude")
    points: list[Point] = []
    hits = [0] * len(excludes)
    for levels in itertools.product(*(factor.levels for factor in factors)):
        chosen = dict(zip((factor.name for factor in factors), levels, strict=True))
        out = [_matches(chosen, exclude) for exclude in excludes]
        hits = [count + hit for count, hit in zip(hits, out, strict=True)]
        if not any(out):
            points.append((chosen, _settings(factors, chosen)))
    for exclude, count in zip(excludes, hits, strict=True):
        if count == 0:
            raise ValueError(f"sweep.exclude: no cell has {exclude!r}")
    return points


def _more(factors: tuple[Factor, ...], written: tuple[dict, ...]) -> list[Point]:
    """The cells that are written out: their further settings stand among their factors."""
    points: list[Point] = []
    for cell in written:
        own = {key: value for key, value in cell.items() if "." in key and key not in {f.name for f in factors}}
        levels = {key: value for key, value in cell.items() if key not in own}
        _check_levels(levels, factors, "sweep.cells")
        check_settings(own, "sweep.cells")
        missing = [factor.name for factor in factors if factor.name not in levels]
        if missing:
            raise ValueError(f"sweep.cells: {cell!r} gives no level of '{missing[0]}'")
        told = {key: value if isinstance(value, Scalar) else str(value) for key, value in own.items()}
        points.append((levels | told, _settings(factors, levels) | own))
    return points


def _check_levels(levels: dict[str, Any], factors: tuple[Factor, ...], where: str) -> None:
    known = {factor.name: factor for factor in factors}
    for name, level in levels.items():
        if name not in known:
            raise nearest_factor(name, factors, where)
        for one in level if isinstance(level, list) and where == "sweep.exclude" else [level]:
            known[name].settings(one)


def _matches(chosen: dict[str, Scalar], exclude: dict[str, Any]) -> bool:
    wanted = {name: level if isinstance(level, list) else [level] for name, level in exclude.items()}
    return all(chosen[name] in levels for name, levels in wanted.items())


def _settings(factors: tuple[Factor, ...], chosen: dict[str, Scalar]) -> Settings:
    settings: Settings = {}
    for factor in factors:
        settings |= factor.settings(chosen[factor.name])
    return settings


def _cell(base: dict[str, Any], levels: dict[str, Scalar], settings: Settings, seed: int) -> Cell:
    values = copy.deepcopy(base)
    for setting, value in settings.items():
        *tables, key = setting.split(".")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    suites = values.pop("suites", {})
    try:
        recipe = recipe_of(values)
        trained = replace(recipe, name=NAME, train=replace(recipe.train, seed=seed))
        return Cell(trained, plain(levels), seed, read_suites(suites))
    except ValueError as error:
        raise ValueError(f"cell {label(levels, seed)}: {error}") from None


def _identity(recipe: Recipe, suites: Suites) -> str:
    """That of the recipe where no suite is asked."""
    if not suites:
        return identity(recipe)
    said = [canonical(recipe), {name: canonical(suite) for name, suite in suites.items()}]
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _require_different(cells: list[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.id in seen:
            raise ValueError(f"cells {seen[cell.id].label} and {cell.label} are the same configuration; leave one out")
        seen[cell.id] = cell
    if not cells:
        raise ValueError("the sweep has no cells; 'sweep.exclude' leaves all of them out")
