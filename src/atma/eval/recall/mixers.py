"""Which models are compared: a mixer in words, over settings that all of them share."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from atma.config import ModelConfig, preset
from atma.eval.recall.tasks import Capacity, Task
from atma.mixers import CORES, names
from atma.mixers.table import find
from atma.strict import read_value

SMALL = ModelConfig(
    width=64, depth=2, pattern=("local", "global"), query_heads=2, key_value_heads=1, head_width=32, mlp_multiple=4
)

GLOBAL = "global"
"""The layers of SMALL and of the presets that a mixer's name replaces."""
CHOSEN = {
    "vocab_size": "the vocabulary is that of the task; set --vocabulary",
    "core": "the core is named first in each of --mixers",
    "memory": "a mixer has a memory where its name says +memory",
}
"""Settings that are chosen elsewhere."""


def base(task: Task, model_preset: str = "", settings: Sequence[str] = ()) -> ModelConfig:
    """The model of a task before a mixer is chosen: a preset or SMALL, then settings KEY=VALUE, then its vocabulary.

    SMALL has its half-lives and its count limited at the training length, as the presets have; without limits for the
    capacity probe. ValueError says which setting.
    """
    if model_preset:
        start = preset(model_preset)
    else:
        life, count = (math.inf, None) if isinstance(task, Capacity) else (float(task.length), task.length)
        bounds = {"max_half_life": life, "count_limit": count}
        start = replace(SMALL, pattern=task.layers, depth=len(task.layers), **bounds)
    return replace(changed(start, settings), vocab_size=task.ids)


def mixer(words: str, start: ModelConfig) -> ModelConfig:
    """The model of a mixer in words: of its global layers "CORE" or "CORE+MEMORY", "memory" being the delta memory, or
    the name of any mixer, which then takes their place; and ",KEY=VALUE" for settings of its own. ValueError: not one.
    """
    name, *settings = words.split(",")
    core, plus, memory = name.partition("+")
    if core in CORES:
        held: bool | str = True if memory == "memory" else memory or bool(plus)
        return changed(start.changed({"core": core, "memory": held}), settings)
    if plus or core not in names():
        known = f"{', '.join(CORES)} with +memory or without, or {', '.join(names())}"
        raise ValueError(f"a mixer is {known}, not '{name}'")
    if GLOBAL not in start.layers:
        raise ValueError(
            f"'{name}' takes the place of layers '{GLOBAL}', and there is none in pattern {', '.join(start.pattern)} "
            f"and depth {start.depth}; leave pattern out, or make depth larger"
        )
    pattern = tuple(core if layer == GLOBAL else layer for layer in start.pattern)
    return changed(start.changed({"pattern": pattern}), settings, core)


def reach(config: ModelConfig) -> int | None:
    """How many tokens back anything but a memory can carry a token to an output; None where there is no bound."""
    with torch.device("meta"):
        found = [config.mixer(layer).reach for layer in range(config.depth)]
    return None if None in found else sum(one for one in found if one is not None)


def changed(config: ModelConfig, settings: Sequence[str], name: str = "") -> ModelConfig:
    """With settings KEY=VALUE; those that are a mixer's alone ("own" in its metadata) in a table of mixer `name`."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"'{setting}': write a setting of the model as KEY=VALUE, such as window=16")
        if key in CHOSEN:
            raise ValueError(f"'{setting}': {CHOSEN[key]}")
        if key in values:
            raise ValueError(f"'{setting}': '{key}' is set twice; keep the one that you mean")
        values[key] = read_value(text)
    taken = find(name).cls.takes(values) if name else {}
    own = {key: values.pop(key) for key in list(values) if key in taken and taken[key].metadata.get("own")}
    return config.changed(values | ({"mixers": {name: {"kind": name, **own}}} if own else {}))
