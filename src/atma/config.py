"""What a model and a run are, as frozen data: presets, TOML in and out, and the identity of a run.

A recipe is a TOML file with the tables `[model]`, `[data]`, `[train]`, `[evaluation]` and, for adapters, `[lora]`, each
a dataclass that this module defines or gives. A key left out takes its default; a key that does not exist is an error
that names the nearest one. The canonical JSON of a configuration (`canonical_json`) is its identity: equal text, equal
run.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from atma.display import told
from atma.lora_config import LoraConfig
from atma.model_config import ModelConfig
from atma.presets import PRESETS, preset
from atma.shipped import recipe_path
from atma.strict import (
    LATER,
    UnknownKey,
    check_fields,
    from_dict,
    plain,
    read_toml,
    read_value,
    require,
    to_dict,
    toml_key,
    toml_value,
)
from atma.train_config import DataConfig, Precision, Regulariser, TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationConfig:
    """Length evaluation of a trained model. Lengths are context tokens."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16_384)
    """Context lengths in tokens, increasing."""
    documents: int = 8
    """Documents to measure the losses on."""
    target_tokens: int = 128
    """Tokens scored per document where only the context before them grows ("fixed targets")."""
    needle_trials: int = 32
    """Needles hidden per length; 0 leaves them out."""
    needle_tokens: int | None = None
    """The most tokens to read for needles at one length: long lengths then have fewer trials, one at least."""
    junk: bool = True
    """Also measure the stream of all documents, whose contexts are mostly other documents."""
    seed: int = 1234
    """Chooses documents and needles."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(len(self.lengths) > 0 and min(self.lengths) >= 1, "lengths", self.lengths, "one or more, each ≥ 1")
        require(list(self.lengths) == sorted(set(self.lengths)), "lengths", self.lengths, "strictly increasing")
        for name in ("documents", "target_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("needle_trials", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        bounded = self.needle_tokens is None or self.needle_tokens >= 1
        require(bounded, "needle_tokens", self.needle_tokens, "at least 1")

    def __repr__(self) -> str:
        return told(self)

    def trials(self, length: int) -> int:
        """Needles at this length; each is read twice, the second time without its needle."""
        within = self.needle_trials if self.needle_tokens is None else self.needle_tokens // (2 * length)
        return min(self.needle_trials, max(1, within))


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a run: its name, and the tables `model`, `data`, `train`, `evaluation` and `lora`."""

    name: str = "unnamed"
    """What the run is called; by default as its file."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    lora: LoraConfig | None = field(default=None, metadata=LATER)
    """Adapters to train in the place of the model's own weights; None trains all of these."""

    def __post_init__(self) -> None:
        check_fields(self)
        plain = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")
        require(plain, "name", self.name, "the name of a folder, without slashes")

    def __repr__(self) -> str:
        """What differs from the defaults, a table a line."""
        shown = told(self)
        for table in ("model", "data", "train", "evaluation", "lora"):
            shown = shown.replace(f", {table}=", f",\n  {table}=", 1)
        return shown


def load_recipe(path: str | Path, assignments: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe, changed by assignments "table.key=value". `[model] preset = "nano"` starts from a preset.

    ValueError says which file and key.
    """
    values = load_values(path, assignments)
    try:
        return recipe_of(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_values(path: str | Path, assignments: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a TOML recipe, or of a shipped one by its name, changed by assignments; it is called as its file
    unless it says a name. ValueError."""
    file = recipe_path(path)
    values = {"name": file.stem} | read_toml(file, "recipe")
    assign(values, assignments)
    return values


def assign(values: dict[str, Any], assignments: Sequence[str]) -> None:
    """Change tables by "table.key=value", a value being TOML, or else text. ValueError for anything else."""
    given = set[str]()
    for assignment in assignments:
        path, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not path:
            raise ValueError(f"--set {assignment}: write KEY=VALUE, such as train.tokens=100000")
        if path in given:
            raise ValueError(f"--set {assignment}: '{path}' is set twice; keep the one that you mean")
        given.add(path)
        *tables, key = path.split(".")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ValueError(f"--set {assignment}: '{name}' is no table of a recipe")
        table[key] = read_value(text)


def recipe_of(values: dict[str, Any]) -> Recipe:
    """The recipe of the tables of a recipe file, its preset filled in. ValueError says which key.

    What a preset bounds by its training length is bounded by this recipe's, unless the table says it.
    """
    model = values.get("model", {})
    if isinstance(model, dict) and "preset" in model:
        own = {key: value for key, value in model.items() if key != "preset"}
        chosen = _from_preset(preset(model["preset"]), values.get("train"))
        values = values | {"model": with_words(lambda: chosen.changed(own, "model."))}
    return with_words(lambda: from_dict(Recipe, values))


def with_words(read: Callable[[], T]) -> T:
    """What `read` gives. ValueError for a key that no recipe has: with the one that is meant, in whichever table."""
    try:
        return read()
    except UnknownKey as error:
        from atma.recipe_keys import told

        raise ValueError(told(error)) from None


def _from_preset(chosen: ModelConfig, train: Any) -> ModelConfig:
    length = train.get("length", TrainConfig.length) if isinstance(train, dict) else TrainConfig.length
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:  # an error that TrainConfig tells
        return chosen
    bounded = [name for name, value in chosen.following.items() if value not in (None, math.inf)]
    return chosen.changed(dict.fromkeys(bounded, length))


def canonical(config: Any) -> dict[str, Any]:
    """`to_dict` without what came `LATER` and is at its default, so that a new setting changes no identity, and without
    places of what is known by a hash."""

    def said(config: Any) -> dict[str, Any]:
        if isinstance(config, ModelConfig):
            return config.canonical()
        pairs = [(one, getattr(config, one.name)) for one in dataclasses.fields(config)]
        pairs = [(one, value) for one, value in pairs if not one.metadata.get("place")]
        kept = {one.name: value for one, value in pairs if not one.metadata.get("later") or value != one.default}
        return {name: said(value) if dataclasses.is_dataclass(value) else value for name, value in kept.items()}

    return plain(said(config))


def canonical_json(config: Any) -> str:
    """One text per configuration: sorted keys, no spaces. Equal text means an equal run."""
    return json.dumps(canonical(config), sort_keys=True, separators=(",", ":"))


def identity(config: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(config).encode()).hexdigest()[:16]


def dump_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `load_recipe` reads back to an equal recipe."""
    values = {name: table for name, table in to_dict(recipe).items() if table is not None}
    return f"name = {toml_value(values.pop('name'))}\n" + "".join(_toml(name, table) for name, table in values.items())


def _toml(name: str, table: dict[str, Any]) -> str:
    """A table, and behind it those within it."""
    lines = [f"{key} = {toml_value(value)}\n" for key, value in table.items() if not isinstance(value, dict | None)]
    inner = [_toml(f"{name}.{toml_key(key)}", value) for key, value in table.items() if isinstance(value, dict)]
    return "".join([f"\n[{name}]\n", *lines, *inner])


__all__ = [
    "PRESETS",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "Precision",
    "Recipe",
    "Regulariser",
    "TrainConfig",
    "assign",
    "canonical",
    "canonical_json",
    "dump_toml",
    "from_dict",
    "identity",
    "load_recipe",
    "load_values",
    "preset",
    "recipe_of",
    "to_dict",
    "with_words",
]
