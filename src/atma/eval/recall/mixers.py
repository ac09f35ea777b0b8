"""Which models are compared: a mixer in words, over settings that all of them share."""

import math
from collections.abc import Sequence
from dataclasses import replace

from atma.config import ModelConfig, from_dict, preset, to_dict
from atma.eval.recall.tasks import Capacity, Task, ids
from atma.strict import read_value

SMALL = ModelConfig(
    width=64, depth=2, pattern=("local", "global"), query_heads=2, key_value_heads=1, head_width=32, mlp_multiple=4
)

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
    elif isinstance(task, Capacity):
        start = replace(SMALL, max_half_life=math.inf, count_limit=None)
    else:
        start = replace(SMALL, max_half_life=float(task.length), count_limit=task.length)
    return replace(_changed(start, settings), vocab_size=ids(task))


def mixer(words: str, start: ModelConfig) -> ModelConfig:
    """The model of a mixer "CORE", "CORE+memory", and ",KEY=VALUE" for settings of its own. ValueError: not one."""
    name, *settings = words.split(",")
    core, plus, memory = name.partition("+")
    if plus and memory != "memory":
        raise ValueError(f"a mixer is polar, nope or rope, with +memory or without, not '{name}'")
    return _changed(from_dict(ModelConfig, to_dict(start) | {"core": core, "memory": bool(plus)}), settings)


def reach(config: ModelConfig) -> int | None:
    """How many tokens back anything but a memory can carry a token to an output; None where attention has no window."""
    if config.window is None and "global" in config.layers:
        return None
    canon = config.canon_taps - 1 if config.has_canon else 0
    of_kind = {"local": config.local_taps - 1, "global": (config.window or 1) - 1 + canon}
    return sum(of_kind[kind] for kind in config.layers)


def _changed(config: ModelConfig, settings: Sequence[str]) -> ModelConfig:
    values, given = to_dict(config), set[str]()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"'{setting}': write a setting of the model as KEY=VALUE, such as window=16")
        if key.strip() in CHOSEN:
            raise ValueError(f"'{setting}': {CHOSEN[key.strip()]}")
        if key.strip() in given:
            raise ValueError(f"'{setting}': '{key.strip()}' is set twice; keep the one that you mean")
        given.add(key.strip())
        values[key.strip()] = read_value(text)
    return from_dict(ModelConfig, values)
