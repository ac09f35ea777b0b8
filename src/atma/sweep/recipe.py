"""What a recipe says under `[sweep]`: factors and their levels, seeds, cells more and less, and when to give up.

A factor is a name with levels, and a level sets fields of the recipe. It is written in one of three forms:

    "model.core" = ["polar", "rope"]                                 # named as its field, the values its levels
    attention = { field = "model.core", values = ["polar", "rope"] } # with a name of its own
    window = { off = {}, on = { "model.window" = 64 } }              # named levels, each sets any number of fields
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any

from atma.config import DataConfig, EvaluationConfig, ModelConfig, TrainConfig
from atma.data.prepare import Preparation
from atma.strict import check_fields, from_dict
from atma.sweep import suites

Scalar = str | int | float | bool
Settings = dict[str, Any]
"""Values by setting, such as {"model.window": 64}."""
TABLES = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "evaluation": EvaluationConfig}
SETTINGS = {
    "model.preset",
    *(f"{table}.{known.name}" for table, kind in TABLES.items() for known in dataclasses.fields(kind)),
}


@dataclass(frozen=True)
class SweepConfig:
    """The table `[sweep]` as it is written."""

    factors: dict = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    """Each cell is run with every one of them as its `train.seed`."""
    cells: tuple[dict, ...] = ()
    """Cells beside the product of the factors: a level of every factor, and any other settings."""
    exclude: tuple[dict, ...] = ()
    """Cells of the product to leave out: those with all of the levels named; a level may be a list of levels."""
    prepare: dict = field(default_factory=dict)
    """How to make `data.path` where it is missing: a `source`, and the options of `atma prepare`."""
    attempts: int = 3
    """Errors after which a cell is marked as failed."""
    deaths: int = 10
    """Deaths of its worker (killed, out of memory, lost machine) after which a cell is marked as failed."""
    lease: float = 60.0
    """Seconds without a heartbeat after which a worker on another machine counts as dead."""
    keep_models: bool = True
    """Keep each cell's final model beside its result."""

    def __post_init__(self) -> None:
        check_fields(self)
        _require(len(self.seeds) > 0, "seeds", self.seeds, "at least one seed")
        _require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "different seeds")
        for name in ("attempts", "deaths"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(0 < self.lease < math.inf, "lease", self.lease, "a positive number of seconds, and finite")


@dataclass(frozen=True)
class Factor:
    """A name, and the settings of each of its levels."""

    name: str
    levels: dict[Scalar, Settings]

    def settings(self, level: Any) -> Settings:
        """What a level sets; ValueError lists the levels when there is no such one."""
        for known, settings in self.levels.items():
            if known == level and isinstance(known, bool) == isinstance(level, bool):
                return settings
        raise ValueError(f"factor '{self.name}' has no level {level!r}; its levels: {', '.join(map(str, self.levels))}")


@dataclass(frozen=True)
class Source:
    """What data is made from, and how."""

    source: str
    preparation: Preparation


def read_sweep(table: Any) -> SweepConfig:
    """The table `[sweep]`, strictly."""
    if not isinstance(table, dict):
        raise ValueError(f"'sweep' must be a table, not {table!r}")
    return from_dict(SweepConfig, table, "sweep.")


def read_factors(config: SweepConfig) -> tuple[Factor, ...]:
    """The factors; ValueError for an unknown setting, an empty one, or two factors that set the same."""
    factors = tuple(_factor(name, written) for name, written in config.factors.items())
    owner: dict[str, str] = {}
    for factor in factors:
        for setting in sorted({setting for settings in factor.levels.values() for setting in settings}):
            if setting in owner:
                raise ValueError(f"factors '{owner[setting]}' and '{factor.name}' both set '{setting}'; join them")
            owner[setting] = factor.name
    return factors


def read_source(config: SweepConfig) -> Source | None:
    """How to make the data, if the recipe says it."""
    if not config.prepare:
        return None
    values = dict(config.prepare)
    source = values.pop("source", None)
    if not isinstance(source, str):
        raise ValueError("'sweep.prepare.source' must name what `atma prepare` reads, such as \"stdlib\"")
    return Source(source, from_dict(Preparation, values, "sweep.prepare."))


def check_settings(settings: Settings, where: str) -> None:
    """ValueError names the nearest setting of a recipe where one does not exist, or is not a sweep's to change."""
    for name in settings:
        if name == "train.seed":
            raise ValueError(f"{where}: 'train.seed' is set by 'sweep.seeds'; list the seeds there")
        known = suites.settings() if name.startswith("suites.") else SETTINGS
        if name not in known and not name.startswith("model."):  # whose options its mixers know
            near = difflib.get_close_matches(name, sorted(known), 1, 0.0)[0]
            raise ValueError(f"{where}: unknown setting '{name}'; did you mean '{near}'?")


def nearest_factor(name: str, factors: tuple[Factor, ...], where: str) -> ValueError:
    """The error for a factor that does not exist."""
    near = difflib.get_close_matches(name, [factor.name for factor in factors], 1, 0.0)
    return ValueError(
        f"{where}: unknown factor '{name}'; " + (f"did you mean '{near[0]}'?" if near else "there is none")
    )


def _factor(name: str, written: Any) -> Factor:
    where = f"sweep.factors.{name}"
    if isinstance(written, list):
        return Factor(name, _levels({"field": name, "values": written}, where))
    if not isinstance(written, dict):
        raise ValueError(f"'{where}' must be a list of values or a table of levels, not {written!r}")
    if isinstance(written.get("field"), str):
        return Factor(name, _levels(written, where))
    for level, settings in written.items():
        if not isinstance(settings, dict):
            raise ValueError(f"'{where}.{level}' must be a table of settings, not {settings!r}")
        check_settings(settings, f"{where}.{level}")
    _require(len(written) > 0, where, written, "a table of at least one level")
    return Factor(name, dict(written))


def _levels(written: dict[str, Any], where: str) -> dict[Scalar, Settings]:
    for key in written:
        if key not in ("field", "values"):
            raise ValueError(f"unknown key '{where}.{key}'; a factor with a field has 'field' and 'values'")
    setting, values = written["field"], written.get("values")
    check_settings({setting: None}, where)
    if not isinstance(values, list) or not values:
        raise ValueError(f"'{where}' must list at least one value, not {values!r}")
    for value in values:
        if not isinstance(value, Scalar):
            raise ValueError(f"'{where}': {value!r} is no plain value; name the levels: NAME = {{ \"{setting}\" = … }}")
    levels = {value: {setting: value} for value in values}
    _require(len(levels) == len(values), where, values, "a list of different values")
    return levels


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"'{name}' must be {rule}, not {value!r}")
